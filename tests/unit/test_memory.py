"""The largest micro-batch that fits is measured, and a lack of memory is reported in one line."""

import mmap

import pytest
import torch

from common.errors import TrainingFailure
from common.runtime import distributed
from common.training.memory import (
    advising_on_memory,
    fit_micro_batches,
    memory_advice,
    most_that_fit,
    named_when_out_of_memory,
)
from step1_sft.config import SFTConfig
from step3_ppo.config import PPOConfig

MIB = 2**20


@pytest.mark.parametrize(
    "free_mib, most, least, fitting", [(100, 64, 10, 12), (100, 5, 5, 5), (1, 64, 1, 1), (70, 64, 7, 8)]
)
def test_the_largest_number_that_fits_is_found(free_mib, most, least, fitting):
    """Each row takes 8 MiB, besides 3 MiB that are taken once."""
    tried = []

    def probe(rows):
        tried.append(rows)
        with mmap.mmap(-1, (3 + 8 * rows) * MIB) as memory:  # unlike torch's, gone at once when it is given back
            for page in range(0, len(memory), mmap.PAGESIZE):
                memory[page] = 1

    assert least <= most_that_fit(probe, most, free_mib * MIB) <= fitting
    assert max(tried) <= max(1, 1.2 * free_mib // 8)  # a machine that swaps or kills must never be driven there


@pytest.mark.parametrize(
    "files",
    [
        {"memory.max": 900, "memory.current": 500, "memory.stat": "anon 400\ninactive_file 60"},
        {
            "memory/memory.limit_in_bytes": 900,
            "memory/memory.usage_in_bytes": 500,
            "memory/memory.stat": "cache 1\ntotal_inactive_file 60",
        },
    ],
    ids=["cgroup-2", "cgroup-1"],
)
def test_a_containers_limit_is_the_memory_there_is(files, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "_CGROUP", tmp_path)
    whole = distributed.memory_available()
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    assert distributed.memory_available() == 460 < whole
    for limit in {"memory.max", "memory/memory.limit_in_bytes"} & set(files):
        (tmp_path / limit).write_text("max\n" if limit == "memory.max" else f"{2**63 - 4096}\n")
    assert distributed.memory_available() > 2**20


def test_memory_that_is_refused_names_the_phase_the_size_and_what_helps():
    with (
        pytest.raises(TrainingFailure) as failure,
        advising_on_memory(PPOConfig()),
        named_when_out_of_memory("critic_update"),
    ):
        torch.empty(2**50, dtype=torch.uint8)
    line = str(failure.value)
    assert "out of memory on rank 0 in critic_update, which asked for 1125899906842624 bytes more" in line
    assert "\n" not in line
    for flag in (
        "--auto_micro_batch",
        "--max_tokens_per_micro_batch",
        "--per_device_training_batch_size",
        "--critic_gradient_checkpointing",
        "--critic_zero_stage",
        "--offload",
    ):
        assert flag in line
    assert "actor" not in line


@pytest.mark.parametrize(
    "cls, phase, advice",
    [
        (PPOConfig, "generate", "add --release_inference_cache, or lower --per_device_generation_batch_size"),
        (PPOConfig, "the evaluation", "lower --per_device_generation_batch_size"),
        (SFTConfig, "the evaluation", "lower --per_device_eval_batch_size"),
        (
            SFTConfig,
            "the training step",
            "lower --per_device_train_batch_size or --max_tokens_per_micro_batch, raise --zero_stage, add --offload or "
            "--gradient_checkpointing, or let --auto_micro_batch choose",
        ),
        (
            SFTConfig,
            "loading the model",
            "lower --max_seq_len, raise --zero_stage, add --offload, or train adapters only with --lora_dim",
        ),
        (
            PPOConfig,
            "loading the models",
            "add --offload, lower --max_prompt_seq_len or --max_answer_seq_len, raise --actor_zero_stage or "
            "--critic_zero_stage, or train adapters only with --actor_lora_dim or --critic_lora_dim",
        ),
    ],
)
def test_the_options_that_relieve_a_phase_are_advised(cls, phase, advice):
    assert memory_advice(cls(), phase) == advice


@pytest.mark.parametrize(
    "config, phase, absent, advised",
    [
        (SFTConfig(gradient_checkpointing=True), "the training step", "--gradient_checkpointing", "--offload"),
        (SFTConfig(offload=True, zero_stage=2), "loading the model", "--offload", "--zero_stage"),
        (PPOConfig(release_inference_cache=True), "generate", "cache", "--per_device_generation_batch_size"),
        (PPOConfig(advantage="rloo"), "loading the models", "--critic_lora_dim", "--actor_lora_dim"),
        (PPOConfig(advantage="rloo"), "actor_update", "critic", "--actor_gradient_checkpointing"),
        (PPOConfig(reward=("a.py:f",)), "score", "--reward_batch_size", "--per_device_training_batch_size"),
        (PPOConfig(reward=("a.py:f", "judge")), "score", "--reward_workers", "--reward_batch_size"),
    ],
)
def test_what_is_on_already_or_has_no_effect_is_not_advised(config, phase, absent, advised):
    advice = memory_advice(config, phase)
    assert absent not in advice and advised in advice


@pytest.mark.parametrize(
    "error, size",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total of 79 GiB"),
            "2.50 GiB",
        ),
        (MemoryError("Unable to allocate 8.00 TiB for an array with shape (1,)"), "8.00 TiB"),
        (MemoryError(), "an unknown amount"),
        (RuntimeError("std::bad_alloc"), "an unknown amount"),
    ],
)
def test_all_ways_of_being_refused_are_known(error, size):
    with pytest.raises(TrainingFailure, match=f"in generate, which asked for {size} more: .*generation_batch_size"):
        with advising_on_memory(PPOConfig()), named_when_out_of_memory("generate"):
            raise error


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes do not match"), named_when_out_of_memory("generate"):
        raise RuntimeError("shapes do not match")


def test_a_resumed_run_takes_what_the_interrupted_one_found():
    """Rounding depends on how steps are cut, and there may be more memory now."""
    config = SFTConfig(auto_micro_batch=True)
    fitted = fit_micro_batches(config, 640, [], lambda rows: pytest.fail("measured"), longest=64, rows=16)
    assert fitted.max_tokens_per_micro_batch == 640
    assert fit_micro_batches(SFTConfig(), None, [], lambda rows: pytest.fail("measured"), 64, 16) == SFTConfig()
