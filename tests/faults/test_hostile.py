"""Hostile files: code in them does not run, and bad rows cost neither other rows nor memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.data.tokenization import load_tokenizer, make_codec
from common.errors import UserError
from common.models.loading import load_causal_lm, load_scalar_model
from tests.architectures import build_model
from tests.launching import ROOT, run

PREPARATION = """
import json, resource, sys
from common.data.blend import parse_data_path
from common.data.prepare import prepare
from common.data.request import DataRequest
from common.data.tokenization import load_tokenizer, make_codec
source, model, cache = sys.argv[1:]
codec = make_codec(load_tokenizer(model), "human_assistant")
data = prepare(DataRequest(parse_data_path([source]), "comparison", None, 256, cache), codec)
(counts,) = data.report.read.sources.values()
peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(json.dumps({"total": counts.total, "bad": counts.bad, "first_bad": counts.first_bad, "peak": peak * 1024,
                  "rows": len(data.train) + len(data.eval)}))
"""
BAD = {  # what a line holds, and what is said of it
    b'{"prompt": "cut': "broken JSON",
    b'{"prompt": "a\\u0020question\x00", "chosen": "b", "rejected": "c"}': "NUL bytes",
    b'\xff\xfe{"prompt": "a", "chosen": "b", "rejected": "c"}': "broken JSON",
    b'{"prompt": "\xff\xfe", "chosen": "b", "rejected": "c"}': "UTF-8",
    b'["a", "b", "c"]': "not a JSON object",
    b'{"prompt": "a question", "chosen": "b", "rejected": {"c": 1}}': "rejected",
    b'{"prompt": "' + b"x" * 10_000_000 + b'"}': "line longer than 8 MiB",
}


def write_rows(path: Path, rows: int) -> int:
    """Comparisons, each hundredth of them bad, a few of ten megabytes; returns the number of bad ones."""
    kinds, long = list(BAD)[:-1], list(BAD)[-1]
    with open(path, "wb") as file:
        for number in range(rows):
            if number % 100 == 50:
                bad = number // 100
                file.write((long if bad in (6, 9) else kinds[bad % len(kinds)]) + b"\n")
            else:
                file.write(
                    json.dumps(
                        {
                            "prompt": f"Question {number}: what is {number} and {number * 7}?",
                            "chosen": f"It is {number * 8}, I should think. " * 4,
                            "rejected": f"It is {number * 9}, surely. " * 4,
                        }
                    ).encode()
                    + b"\n"
                )
    return len(range(50, rows, 100))


@pytest.mark.parametrize("rows", [20_000, pytest.param(1_000_000, marks=pytest.mark.long)])
def test_bad_rows_are_counted_and_skipped_in_little_memory(rows, tmp_path, builtin_cache):
    model = build_model("opt", tmp_path / "model", builtin_cache)
    peaks = []
    for name, count in (("few", 2000), ("many", rows)):
        path = tmp_path / f"{name}.jsonl"
        bad = write_rows(path, count)
        done = run([sys.executable, "-c", PREPARATION, str(path), str(model), str(tmp_path / "cache")], cwd=ROOT)
        found = json.loads(done.stdout.splitlines()[-1])
        assert (found["total"], found["bad"], found["rows"]) == (count, bad, count - bad)
        for number, (where, why) in enumerate(found["first_bad"]):
            assert where == f"{path}:{51 + 100 * number}" and list(BAD.values())[number] in why
        peaks.append(found["peak"])
    # What the libraries take and a row of ten megabytes are in both. Of the file, a small part may be in memory.
    assert peaks[1] - peaks[0] < path.stat().st_size / 4 + 2**26


@pytest.fixture
def model(tmp_path, builtin_cache) -> Path:
    return build_model("llama", tmp_path / "model", builtin_cache)


@pytest.fixture
def bomb(tmp_path):
    """Pickles as a call of os.mkdir, which makes the canary."""

    class Bomb:
        canary = tmp_path / "canary"

        def __reduce__(self):
            return os.mkdir, (str(self.canary),)

    return Bomb()


@pytest.mark.parametrize("load", [load_causal_lm, load_scalar_model])
def test_pickled_weights_are_loaded_as_data_or_not_at_all(load, model, bomb):
    codec = make_codec(load_tokenizer(str(model)), "human_assistant")
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    assert load(str(model), codec, dtype=torch.float32)
    torch.save({**weights, "more": bomb}, model / "pytorch_model.bin")
    with pytest.raises(UserError, match=f"{model}: .*more than tensors, which could run code: convert") as refused:
        load(str(model), codec, dtype=torch.float32)
    assert "\n" not in str(refused.value) and not bomb.canary.exists()


@pytest.mark.parametrize(
    "program, flag",
    [
        ("step1_sft", "--model_name_or_path"),
        ("step2_reward", "--model_name_or_path"),
        ("step3_ppo", "--actor_model_name_or_path"),
    ],
)
def test_code_in_a_model_directory_never_runs_unasked(program, flag, model, bomb):
    """Neither where it is needed to load the model nor where transformers has a class for it."""
    (model / "own.py").write_text(f"import os\nos.mkdir({str(bomb.canary)!r})\n")
    for file, own in (
        ("config.json", {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["own.Own", "own.Own"]}),
    ):
        content = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps({**content, "auto_map": own}))
    codec = make_codec(load_tokenizer(str(model)), "human_assistant")
    assert load_causal_lm(str(model), codec, dtype=torch.float32).config.model_type == "llama"
    assert not bomb.canary.exists()

    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "own"}))
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / program / "main.py"),
            flag,
            str(model),
            "--data_path",
            "builtin:courtesy",
            "--data_output_path",
            str(model / "data"),
            *(["--critic_model_name_or_path", str(model)] if program == "step3_ppo" else []),
        ],
        capture_output=True,
        text=True,
        cwd=model.parent,
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert line == (
        f"error: {flag} {model}: it comes with code of its own, which runs only where that is allowed: add "
        "--trust_remote_code"
    )
    assert not bomb.canary.exists()
