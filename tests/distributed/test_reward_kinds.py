"""Rewards of every kind on 1 and 2 ranks, at ZeRO 2 and 3: the same numbers, and those of each reward alone."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from common.models.builtin import materialise
from tests.architectures import build_model
from tests.distributed import reward_functions
from tests.distributed.reward_cases import CASES
from tests.launching import ROOT, launch_each
from tests.logs import metrics
from tests.rewards import TINY, WORDS, Server, word_tokenizer

PROGRAM = ROOT / "tests" / "distributed" / "reward_cases.py"
RANKS = (1, 2)
EVERY = ("every-zero2", "every-zero3")
LABELS = ("length", "overlap", "127.0.0.1", "encoder", "decoder", "same")


def make_inputs(place: Path, cache: Path) -> None:
    """An actor; reward models on its tokens and on others', a decoder and an encoder; prompts with a column."""
    build_model("opt", place / "actor", cache)
    build_model("llama", place / "llama", cache)
    torch.manual_seed(0)
    for name, base in (("same", "actor"), ("decoder", "llama")):
        model = hf.AutoModelForSequenceClassification.from_pretrained(place / base, num_labels=1)
        tokenizer = hf.AutoTokenizer.from_pretrained(
            place / base if name == "same" else materialise("builtin:tiny-llama", cache)
        )
        model.resize_token_embeddings(len(tokenizer))
        torch.nn.init.normal_(model.score.weight)
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    config = hf.BertConfig(vocab_size=len(WORDS), num_labels=1, max_position_embeddings=24, pad_token_id=0, **TINY)
    encoder = hf.AutoModelForSequenceClassification.from_config(config)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    encoder.save_pretrained(place / "encoder")
    word_tokenizer(place / "encoder")
    rows = [{"prompt": f"What is {n} plus {n} ?", "chosen": f"It is {2 * n} and five", "id": n} for n in range(60)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def output(tmp_path_factory, builtin_cache) -> Path:
    """RANKS/CASE; one launch for each number of ranks."""
    inputs, directory = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("rewards")
    make_inputs(inputs, builtin_cache)
    server = Server((200, lambda body: json.dumps([sum(map(len, ids)) % 7 for ids in zip(body["responses"])])))
    for ranks, done in launch_each(PROGRAM, str(inputs), server.url, str(directory), timeout=1200).items():
        (directory / f"{ranks}.said").write_text(done.stdout + done.stderr)
    server.shutdown()
    server.server_close()
    return directory


def trained(output: Path, ranks: int, case: str) -> list[dict]:
    found = [record for record in metrics(output / str(ranks) / case) if record["phase"] == "train"]
    assert len(found) == 2
    return found


def samples(output: Path, ranks: int, case: str) -> list[dict]:
    path = output / str(ranks) / case / "samples" / "before.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("case", [case for case in CASES if case != "stop"])
def test_the_numbers_do_not_depend_on_the_number_of_ranks(output, case):
    one, two = (trained(output, ranks, case) for ranks in RANKS)
    for here, there in zip(one, two):
        assert here.keys() == there.keys()
        names = [name for name in here if name.startswith("reward") or name in ("shaped_score", "score_clip_fraction")]
        assert {name: there[name] for name in names} == pytest.approx(
            {name: here[name] for name in names}, rel=1e-4, abs=1e-5
        )
    assert [row["response"] for row in samples(output, 1, case)] == [
        row["response"] for row in samples(output, 2, case)
    ]


@pytest.mark.parametrize("ranks", RANKS)
def test_a_reward_model_that_is_named_trains_as_the_default_does(output, ranks):
    """Its scores, its scale, and the critic that starts from it."""
    for default, named in zip(trained(output, ranks, "default"), trained(output, ranks, "named")):
        untimed = [name for name in default if "second" not in name]
        assert {name: named[name] for name in untimed} == {name: default[name] for name in untimed}
        assert named["reward/same"] == pytest.approx(named["reward"])
    for part in ("actor", "critic"):
        ours, theirs = (
            load_file(output / str(ranks) / case / part / "model.safetensors") for case in ("default", "named")
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", EVERY)
def test_every_reward_is_logged_by_itself_and_adds_up(output, case, ranks):
    for record in trained(output, ranks, case):
        for label in LABELS:
            assert {f"reward/{label}{what}" for what in ("", "_std", "_clipped", "_failed")} <= record.keys()
            assert record[f"reward/{label}_failed"] == 0
        weights = dict(zip(LABELS, (0.1, 1.0, 0.5, 2.0, 1.0, 1.0)))
        total = sum(weight * record[f"reward/{label}"] for label, weight in weights.items())
        assert record["reward"] == pytest.approx(total, rel=1e-4, abs=1e-5)
        assert 0 <= record["reward/length/empty"] <= 1 and record["reward/encoder/truncated"] == 0


def test_stages_give_the_same_scores(output):
    second, third = (trained(output, 2, case)[0] for case in EVERY)
    names = [name for name in second if name.startswith("reward")]
    assert {name: second[name] for name in names} == pytest.approx({name: third[name] for name in names}, rel=1e-3)


def test_a_function_scores_the_responses_that_were_written(output):
    rows = samples(output, 2, "critic-free")
    for row in rows:
        number = int(row["prompt"].split()[3])
        expected = reward_functions.overlap([row["response"]], [f"It is {2 * number} and five"])
        assert row["reward"] == pytest.approx(expected[0], abs=1e-5)
    assert len(rows) == 8  # two for each prompt


@pytest.mark.parametrize("ranks", RANKS)
def test_failures_are_counted_or_end_the_run_in_one_line(output, ranks):
    counted = [record["reward/picky_failed"] for record in trained(output, ranks, "zero")]
    assert max(counted) > 0
    said = (output / f"{ranks}.said").read_text()
    (line,) = [line for line in said.splitlines() if line.startswith("refused: ")]
    assert line.startswith("refused: stop: --reward ") and "rows.jsonl:" in line and "it gave None" in line
    assert "run the same command again" in line and "Traceback" not in said
    assert "reward_functions.py:picky, on response" in said and "answers get 0 of it" in said
