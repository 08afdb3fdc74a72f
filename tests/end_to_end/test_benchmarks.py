"""The benchmarks run, their variants agree, and each prints a line that says what it took."""

import json

import pytest

from tests.launching import ROOT, launch

ALWAYS = {
    "benchmark",
    "variant",
    "dtype",
    "ranks",
    "device",
    "step_seconds",
    "samples_per_second",
    "real_tokens_per_second",
    "padded_tokens_per_second",
    "padding_share",
    "peak_resident_mib",
}
# The plain way pads to a length that few rows have, and few rows share a micro-batch: much of it is padding.
TRAINED = ("--max_seq_len", "768", "--steps", "2", "--rounds", "1", "--per_device_train_batch_size", "2")
MODEL = ("--model_name_or_path", "random:opt-2x32")
SMALL = (
    "--actor_model_name_or_path",
    "random:opt-2x32",
    "--prompts",
    "8",
    "--max_answer_seq_len",
    "8",
    "--max_prompt_seq_len",
    "32",
    "--rounds",
    "1",
)
PPO = (*SMALL, "--critic_model_name_or_path", "random:opt-2x32", "--per_device_training_batch_size", "4")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Runs a benchmark at a tiny size; the lines it printed, by variant."""
    directory = tmp_path_factory.mktemp("benchmarks")

    def run(program: str, *flags: str, ranks: int = 1) -> dict[str, dict]:
        done = launch(ROOT / "benchmarks" / f"{program}.py", *flags, "--output_dir", str(directory), ranks=ranks)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert all(ALWAYS <= set(line) and line["ranks"] == ranks for line in lines)
        return {line["variant"]: line for line in lines}

    return run


def test_rollouts_are_compared_with_equal_greedy_tokens(bench):
    lines = bench("rollouts", *SMALL, "--per_device_generation_batch_size", "4", "--greedy")
    assert list(lines) == ["plain", "product"] and lines["product"]["equal_responses"] == 1
    assert lines["product"]["times_faster_than_plain"] > 0
    # The same tokens over times that differ; the plain way computes more that is no data.
    assert lines["product"]["padding_share"] < lines["plain"]["padding_share"] < 1


@pytest.mark.long
def test_rollouts_are_compared_with_transformers_continuous_batching_too(bench):
    lines = bench(
        "rollouts", *SMALL, "--per_device_generation_batch_size", "4", "--greedy", "--against", "generate_batch"
    )
    assert lines["plain"]["against"] == "generate_batch" and lines["product"]["equal_responses"] == 1


@pytest.mark.long
def test_preparation_is_measured_at_the_first_start_and_the_second(tmp_path):
    done = launch(ROOT / "benchmarks/preparation.py", "--rows", "300", "--output_dir", str(tmp_path))
    first, second = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert (first["start"], second["start"], first["rows"], second["rows"]) == ("first", "second", 300, 300)
    assert first["mean_tokens"] == second["mean_tokens"] > 100


@pytest.mark.long
@pytest.mark.parametrize("ranks, stage", [(1, 0), (2, 3)])
@pytest.mark.parametrize("program", ["sft", "reward"])
def test_training_is_compared_with_equal_losses(bench, program, ranks, stage):
    lines = bench(program, *MODEL, *TRAINED, "--zero_stage", str(stage), ranks=ranks)
    assert lines["product"]["padding_share"] < lines["plain"]["padding_share"] - 0.1
    assert lines["product"]["loss"] > 0


@pytest.mark.long
@pytest.mark.parametrize("ranks, stage", [(1, 0), (2, 3)])
def test_an_iteration_is_compared_with_equal_answers(bench, ranks, stage):
    stages = ("--actor_zero_stage", str(stage), "--critic_zero_stage", str(stage))
    lines = bench("ppo", *PPO, *stages, "--max_tokens_per_micro_batch", "128", ranks=ranks)
    assert lines["product"]["equal_responses"] == 1
    phases = {"generate", "log_probs", "score", "advantages", "actor_update", "critic_update", "other"}
    assert all(set(line["phase_seconds"]) == phases for line in lines.values())


@pytest.mark.long
def test_a_critic_free_iteration_is_compared_with_equal_answers(bench):
    lines = bench("critic_free", *PPO, "--max_tokens_per_micro_batch", "128")
    assert lines["without_critic"]["equal_responses"] == 1
    with_critic, without = (set(line["phase_seconds"]) for line in lines.values())
    assert with_critic - without == {"critic_update"}
    assert lines["without_critic"]["weights_mib"] < lines["with_critic"]["weights_mib"]


@pytest.mark.long
def test_one_variant_alone_shows_what_its_weights_take(bench):
    lora = (*PPO, "--actor_lora_dim", "2", "--critic_lora_dim", "2")
    alone = {name: bench("ppo", *lora, "--only", name) for name in ("plain", "product")}
    assert all(list(lines) == [name] for name, lines in alone.items())
    assert alone["product"]["product"]["weights_mib"] < alone["plain"]["plain"]["weights_mib"]


@pytest.mark.long
def test_real_data_can_be_measured(bench, hh_data):
    lines = bench("rollouts", *SMALL, "--data_path", str(hh_data), ranks=2)
    assert lines["plain"]["new_tokens_per_second"] > 0
