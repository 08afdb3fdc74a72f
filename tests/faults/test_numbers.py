"""Steps with numbers that are not finite are skipped on all ranks, and diverged runs end in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.option_rows import STEPS
from tests.faults.number_rows import ENGINES, RUNS, SHORT
from tests.launching import ROOT, launch
from tests.logs import metrics

PROGRAM = ROOT / "tests" / "faults" / "number_cases.py"


@pytest.fixture(scope="module")
def output(tmp_path_factory, option_inputs, request):
    output = tmp_path_factory.mktemp("numbers")
    extent = "long" if request.config.getoption("--long") else "short"
    launch(PROGRAM, str(option_inputs), str(output), extent, ranks=2)
    return output


@pytest.fixture(scope="module")
def found(output):
    return json.loads((output / "found.json").read_text())


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name in SHORT else pytest.mark.long) for name in ENGINES]
)
def test_a_skipped_step_leaves_every_engine_as_if_it_had_never_been(found, case):
    assert found["engines"][case] == {"unchanged": True, "learns": True, "alike before": True, "as if never": True}


@pytest.mark.parametrize("case", [name for name, (*_, said, _) in RUNS.items() if said])
def test_a_run_that_is_lost_says_why_and_keeps_what_was_good(output, found, case):
    *_, expected, checkpoints = RUNS[case]
    run = found["runs"][case]
    first, second = run["said"]
    assert first is not None and first == second and "\n" not in first and expected in first
    assert not run["published"]
    if checkpoints is not None:
        assert run["checkpoints"] == checkpoints
    if not run["checkpoints"]:
        assert "there is no checkpoint from before" in first
    else:
        good, newest = run["checkpoints"]  # the newest may be lost: it is the state in which the fault showed
        assert f"the last good checkpoint is {output / case}/checkpoints/{good}: " in first


@pytest.mark.parametrize("case", ("sft-skips", "ppo-skips"))
def test_skipped_steps_are_counted_and_resumed_exactly(output, found, case):
    whole, resumed = output / case, output / f"{case}-broken-off"
    assert found["runs"][case]["published"] and found["runs"][f"{case}-broken-off"]["published"]
    assert same_weights(whole, resumed)
    assert metrics(whole) == metrics(resumed)
    skipped = [record["skipped_steps"] for record in metrics(whole) if record["phase"] == "train"]
    assert 0 < skipped[-1] and skipped == sorted(skipped)


def test_fitting_micro_batches_change_nothing_but_how_steps_are_cut(output, found):
    """With dropout on: neither weights nor the random state remember the probe."""
    assert found["fitted"] > 0
    assert same_weights(output / "auto", output / "given")
    assert metrics(output / "auto") == metrics(output / "given")


def same_weights(left, right) -> bool:
    models = sorted(path.relative_to(left) for path in left.rglob("*.safetensors"))
    assert models
    return all(
        torch.equal(tensor, load_file(right / model)[name])
        for model in models
        for name, tensor in load_file(left / model).items()
    )


def test_memory_that_runs_out_on_one_rank_ends_the_run_in_a_line(output, option_inputs):
    words = STEPS["sft"].flags.format(inputs=option_inputs).split()
    done = launch(
        ROOT / "tests" / "faults" / "memory_cases.py",
        *words,
        "--output_dir",
        str(output / "memory"),
        "--data_output_path",
        str(output / "data"),
        ranks=2,
        check=False,
    )
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if "error: out of memory" in line]
    assert f"on rank 1 in the training step, which asked for {2**30} bytes more" in line
    assert "--auto_micro_batch" in line and "--gradient_checkpointing" in line
