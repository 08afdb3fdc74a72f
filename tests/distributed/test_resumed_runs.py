"""A run that was interrupted and resumed ends with the same numbers and weights, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.architectures import build_model
from tests.distributed.variants import EVALUATED_OTHERWISE, RESHAPED, RESHAPED_AT_LENGTH, RESUMED, RESUMED_AT_LENGTH
from tests.launching import ROOT, at_length, launch, launch_each
from tests.logs import metrics, same_weights

PROGRAM = ROOT / "tests" / "distributed" / "resume_cases.py"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, builtin_cache, hh_data) -> tuple[str, ...]:
    """Data, plain texts and a model."""
    directory = tmp_path_factory.mktemp("inputs")
    texts = directory / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"Number {n} comes before {n + 1}."}) + "\n" for n in range(30)))
    return str(hh_data), str(texts), str(build_model("opt", directory / "model", builtin_cache))


@pytest.fixture(scope="module")
def output(tmp_path_factory, inputs, length) -> Path:
    """RANKS/whole/CASE, RANKS/broken/CASE and RANKS/moved/CASE; two launches for each number of ranks."""
    directory = tmp_path_factory.mktemp("resume")
    for part in ("first", "second"):
        for ranks, done in launch_each(PROGRAM, part, *length, *inputs, str(directory), timeout=1800).items():
            (directory / f"{ranks}.said").write_text(done.stdout)
    return directory


@pytest.mark.parametrize("ranks", (1, 2))
@pytest.mark.parametrize("case", [*RESUMED, *at_length(RESUMED_AT_LENGTH)])
def test_a_resumed_run_ends_as_an_undisturbed_one(output, case, ranks):
    whole, resumed = (output / str(ranks) / kind / case for kind in ("whole", "broken"))
    assert metrics(resumed) == metrics(whole)
    assert [record["step"] for record in metrics(whole)] == sorted(record["step"] for record in metrics(whole))
    same_weights(whole, resumed)
    for samples in (whole / "samples").iterdir():
        assert (resumed / "samples" / samples.name).read_text() == samples.read_text()
    assert not (resumed / "checkpoints").exists()


@pytest.mark.parametrize("ranks", (1, 2))
@pytest.mark.parametrize("case", EVALUATED_OTHERWISE)
def test_a_run_that_goes_on_with_other_evaluations_trains_the_same(output, case, ranks):
    whole, resumed = (output / str(ranks) / kind / case for kind in ("whole", "broken"))
    trained, evaluated = (
        [[record for record in metrics(run) if record["phase"] == phase] for run in (whole, resumed)]
        for phase in ("train", "eval")
    )
    assert trained[0] == trained[1]
    assert len(evaluated[1]) > len(evaluated[0])
    same_weights(whole, resumed)


@pytest.mark.parametrize("ranks", (1, 2))
def test_without_a_critic_none_is_saved_or_measured(output, ranks):
    run = output / str(ranks) / "broken" / "ppo-zero2-rloo"
    assert (run / "actor" / "provenance.json").exists() and not (run / "critic").exists()
    trained = [record for record in metrics(run) if record["phase"] == "train"]
    assert trained and not {"explained_variance", "value_loss", "critic_learning_rate"} & {*trained[-1]}


@pytest.mark.parametrize("ranks", (1, 2))
def test_equal_groups_are_left_out_and_replaced(output, ranks):
    records = train_records(output / str(ranks) / "broken" / "ppo-groups")
    wanted = 16  # 8 prompts, 2 responses to each
    assert any(record["equal_groups"] > 0 for record in records)
    assert any(record["responses"] > wanted for record in records)
    for record in records:
        unequal = round(record["responses"] * (1 - record["equal_groups"]))
        assert 0 < record["trained_responses"] == min(unequal, wanted)
        assert record["optimizer_steps"] == -(-record["trained_responses"] // 4)


@pytest.mark.parametrize("ranks", (1, 2))
def test_the_actor_stays_as_it_is_while_the_critic_warms_up(output, ranks):
    *warming, last = train_records(output / str(ranks) / "broken" / "ppo-critic-warmup")
    assert [record["step"] for record in warming] == [1, 2, 3, 4, 5]
    assert all(abs(record["kl"]) < 1e-5 for record in (*warming, last))  # the last was sampled before the first step
    assert not any({"policy_loss", "actor_learning_rate"} & {*record} for record in warming)
    assert last["policy_loss"] and last["actor_learning_rate"] == pytest.approx(1e-3 / 2)  # the first of its warm-up
    assert len({record["kl_coef"] for record in warming}) == 1


def train_records(run: Path) -> list[dict]:
    """What was logged of each iteration, numbers alone."""
    records = [record for record in metrics(run) if record["phase"] == "train"]
    return [{name: value for name, value in record.items() if name != "phase"} for record in records]


@pytest.mark.parametrize("ranks", (1, 2))
def test_another_configuration_is_refused_unless_it_is_meant(output, ranks):
    said = (output / f"{ranks}.said").read_text()
    (refused,) = [line for line in said.splitlines() if line.startswith("refused: ")]
    assert "--learning_rate was 0.001, now 0.002" in refused and "--resume_anyway" in refused
    assert "log_interval" not in refused  # changes nothing that is computed
    runs = len(list((output / str(ranks) / "whole").iterdir()))
    assert said.count("resuming from") == runs + len(RESHAPED) + 1
    assert [record["step"] for record in metrics(output / str(ranks) / "changed")][-1] > 6
    changed = output / str(ranks) / "changed"
    assert (
        f"finished: {changed} holds the result of this command already; give --resume never to train it again" in said
    )


@pytest.mark.parametrize("ranks", (1, 2))
@pytest.mark.parametrize("case", RESHAPED)
def test_another_number_of_ranks_goes_on_with_the_same_batches(output, case, ranks):
    assert f"{ranks}/moved/{case}/checkpoints" in (output / f"{3 - ranks}.said").read_text()  # it did begin there
    goes_on(output / str(ranks), case)


@pytest.fixture(scope="module")
def moved(tmp_path_factory, inputs) -> Path:
    """RANKS/whole/CASE and RANKS/moved/CASE: what 1 and 4 ranks have left is continued by 2, what 2 have left by 1."""
    directory = tmp_path_factory.mktemp("moved")
    for part, ranks in (("first", 1), ("first", 2), ("first", 4), ("second", 2), ("second", 1)):
        launch(PROGRAM, part, "--at_length", *inputs, str(directory), ranks=ranks, timeout=1800)
    return directory


@pytest.mark.long
@pytest.mark.parametrize("ranks", (1, 2, 4))
@pytest.mark.parametrize("case", RESHAPED_AT_LENGTH)
def test_another_number_of_ranks_goes_on_at_every_zero_stage(moved, case, ranks):
    goes_on(moved / str(ranks), case)


def goes_on(runs: Path, case: str) -> None:
    """The run that another number of ranks ended is the undisturbed one, but for rounding."""
    whole, moved = runs / "whole" / case, runs / "moved" / case
    precise = "bf16" not in case
    expected, found = metrics(whole), metrics(moved)
    assert [list(record) for record in found] == [list(record) for record in expected]
    for record, other in zip(expected, found):
        assert other.pop("phase") == record.pop("phase")
        assert other == pytest.approx(record, rel=1e-3 if precise else 0.02, abs=1e-4 if precise else 0.02)
        losses = [name for name in record if name.endswith("loss") and precise]
        # The terms of a policy loss are of order 1 and cancel out.
        assert [other[name] for name in losses] == pytest.approx([record[name] for name in losses], rel=1e-5, abs=1e-6)
    for samples in (whole / "samples").iterdir():
        assert not precise or answers(moved / "samples" / samples.name) == answers(samples)
    for model in whole.rglob("*.safetensors"):
        expected, found = load_file(model), load_file(moved / model.relative_to(whole))
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-4 if precise else 0.01)


def answers(path: Path) -> list[dict]:
    """Samples without their numbers."""
    return [
        {name: value for name, value in json.loads(line).items() if not isinstance(value, float)}
        for line in path.read_text().splitlines()
    ]
