"""A run that broke off and was started again ends as one that did not: every number and every weight, bit for bit."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.architectures import build_model
from tests.distributed.variants import RESUMED
from tests.launching import ROOT, launch

PROGRAM = ROOT / "tests" / "distributed" / "resume_cases.py"
TIMES = {"seconds", "step_seconds", "samples_per_second"}


@pytest.fixture(scope="module")
def output(tmp_path_factory, builtin_cache, hh_data) -> Path:
    """RANKS/whole/CASE and RANKS/broken/CASE; two launches for each number of ranks."""
    directory = tmp_path_factory.mktemp("resume")
    model = build_model("opt", directory / "model", builtin_cache)
    texts = directory / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"Number {n} comes before {n + 1}."}) + "\n" for n in range(30)))
    for ranks in (1, 2):
        for part in ("first", "second"):
            done = launch(PROGRAM, part, str(hh_data), str(texts), str(model), str(directory), ranks=ranks)
        (directory / f"{ranks}.said").write_text(done.stdout)
    return directory


@pytest.mark.parametrize("ranks", (1, 2))
@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_ends_as_an_undisturbed_one(output, case, ranks):
    whole, resumed = (output / str(ranks) / kind / case for kind in ("whole", "broken"))
    assert metrics(resumed) == metrics(whole)
    assert [record["step"] for record in metrics(whole)] == sorted(record["step"] for record in metrics(whole))
    models = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    assert models and models == sorted(path.relative_to(resumed) for path in resumed.rglob("*.safetensors"))
    for model in models:
        expected, found = load_file(whole / model), load_file(resumed / model)
        assert all(torch.equal(found[name], expected[name]) for name in expected), model
    for samples in (whole / "samples").iterdir():
        assert (resumed / "samples" / samples.name).read_text() == samples.read_text()
    assert not (resumed / "checkpoints").exists()


@pytest.mark.parametrize("ranks", (1, 2))
def test_another_configuration_is_refused_unless_it_is_meant(output, ranks):
    said = (output / f"{ranks}.said").read_text()
    (refused,) = [line for line in said.splitlines() if line.startswith("refused: ")]
    assert "--learning_rate was 0.001, now 0.002" in refused and "--resume_anyway" in refused
    assert "log_interval" not in refused  # changes nothing that is computed
    assert said.count("resuming from") == len(RESUMED) + 1
    assert [record["step"] for record in metrics(output / str(ranks) / "changed")][-1] > 6


def metrics(directory: Path) -> list[dict]:
    lines = (directory / "logs" / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items()
             if name not in TIMES and not name.startswith("seconds_")} for line in lines]
