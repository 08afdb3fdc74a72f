"""What works with a family of models, by the runs of `families`: a word for each feature.

A feature is a function of OUTPUT_DIR/ARCHITECTURE, as `family_cases` has filled it. It returns what docs/models.md says
of it, and raises AssertionError if a run has given wrong results.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import PeftModel
from safetensors.torch import load_file

from common.models.lora import linear_modules
from tests.architectures import ENCODERS
from tests.distributed.families import EVAL_PROMPTS
from tests.distributed.outcomes import held_out_loss, held_out_scores, logged, samples

YES, NO = "yes", "no"
STAGES = ("zero2", "zero3")
TOKENS = torch.tensor([[5, 9, 17, 30, 12, 44, 8, 21]])


def sft(place: Path) -> str:
    """Step 1 learns the same at both stages; what it saves has, in plain transformers, the perplexity it measured."""
    if refused(place, "sft"):
        return NO
    for stage in STAGES:
        first, *_, last = logged(place / stage / "sft", "eval")
        assert last["perplexity"] < first["perplexity"]
        model = hf.AutoModelForCausalLM.from_pretrained(place / stage / "sft", dtype=torch.float32).eval()
        assert math.exp(held_out_loss(place / "data", model)) == pytest.approx(last["perplexity"], rel=1e-4)
    assert_alike(place, "sft", loss={"rel": 1e-3})
    return YES


def reward(place: Path) -> str:
    """Step 2 trains the same at both stages; what it saves gives, in plain transformers, the scores it measured."""
    if refused(place, "reward"):
        return NO
    for stage in STAGES:
        assert_scores_as_measured(place, place / stage / "reward")
    assert_alike(place, "reward", loss={"rel": 1e-3})
    return YES


def ppo(place: Path) -> str:
    """The sampler's log-probabilities are the trainer's, the policy starts at its reference and moves, and the numbers
    are the same at both stages. An encoder scores the text of another model's responses."""
    if refused(place, "ppo"):
        return NO
    for stage in STAGES:
        assert_trains_a_policy(place / stage / "ppo")
    tolerances = {"reward": {"abs": 1e-3}, "kl": {"abs": 1e-4}, "value_loss": {"rel": 1e-3}}
    assert_alike(place, "ppo", **tolerances)
    if place.name in ENCODERS:
        scores = [row["reward"] for row in samples(place / "zero2/ppo", "before")]
        assert len(set(scores)) > 1
        return "as reward"
    for stage in STAGES:
        start = hf.AutoModelForCausalLM.from_pretrained(place / stage / "sft").state_dict()
        trained = hf.AutoModelForCausalLM.from_pretrained(place / stage / "ppo/actor").state_dict()
        assert any(not torch.equal(trained[name], start[name]) for name in start)
    return YES


def lora(place: Path) -> str:
    """Every linear layer has an adapter that was trained; base and adapter are, for peft, the merged model."""
    if place.name in ENCODERS:
        for stage in STAGES:
            assert_scores_as_measured(place, place / stage / "reward-lora")
            model = hf.AutoModelForSequenceClassification.from_pretrained(place / stage / "reward-lora")
            assert_every_adapter_was_trained(model, place / stage / "reward-lora/adapter")
        return YES
    if refused(place, "sft"):
        return NO
    merged = hf.AutoModelForCausalLM.from_pretrained(place / "zero3/sft-lora").eval()
    assert_every_adapter_was_trained(merged, place / "zero3/sft-lora/adapter")
    base = hf.AutoModelForCausalLM.from_pretrained(place / "model").eval()
    with torch.no_grad():
        before = base(TOKENS).logits
        adapted = PeftModel.from_pretrained(base, place / "zero3/sft-lora/adapter").eval()(TOKENS).logits
        torch.testing.assert_close(merged(TOKENS).logits, adapted, atol=1e-4, rtol=1e-4)
    assert (adapted - before).abs().max() > 1e-3
    assert_trains_a_policy(place / "zero3/ppo-lora")
    policy = hf.AutoModelForCausalLM.from_pretrained(place / "zero3/ppo-lora/actor")
    assert_every_adapter_was_trained(policy, place / "zero3/ppo-lora/adapter/actor")
    return YES


def packing(place: Path) -> str:
    """Rows that share sequences give, step by step, the losses of rows in sequences of their own."""
    if refused(place, "sft"):
        return NO
    apart, packed = ([row["loss"] for row in logged(place / "zero2" / run, "train")] for run in ("sft", "packed"))
    assert packed == pytest.approx(apart, rel=1e-4)
    return YES if "rows that share a sequence are kept apart" in said(place, "zero2/packed") else "rows of like length"


def generation_mode(place: Path) -> str:
    """Whole weights and continuous batching give the responses of `generate` of transformers, layer by layer."""
    if place.name in ENCODERS or refused(place, "ppo"):
        return NO
    assert "since --unpin_actor_parameters asks" in said(place, "zero3/ppo")
    fast, plain = ([row["response"] for row in samples(place / stage / "ppo", "before")] for stage in STAGES)
    assert fast == plain and len(set(fast)) > EVAL_PROMPTS // 2
    return NO if "rollouts in batches that stay together" in said(place, "zero2/ppo") else YES


FEATURES: dict[str, Callable[[Path], str]] = {
    "SFT": sft,
    "reward model": reward,
    "PPO": ppo,
    "LoRA": lora,
    "packing": packing,
    "generation mode": generation_mode,
}


def refused(place: Path, run: str) -> bool:
    """Whether a run ended, at both stages, with an error of one line."""
    messages = [place / stage / f"{run}.refused" for stage in STAGES]
    assert len({message.exists() for message in messages}) == 1
    return messages[0].exists()


def said(place: Path, run: str) -> str:
    return (place / f"{run}.said").read_text()


def assert_alike(place: Path, run: str, **tolerances: dict[str, float]) -> None:
    """The metrics of the steps of training are the same at both stages, each within a tolerance."""
    for metric, tolerance in tolerances.items():
        second, third = ([row[metric] for row in logged(place / stage / run, "train")] for stage in STAGES)
        assert second == pytest.approx(third, **tolerance), metric


def assert_scores_as_measured(place: Path, directory: Path) -> None:
    last = logged(directory, "eval")[-1]
    model = hf.AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    chosen, rejected = held_out_scores(place / "data", model)
    assert chosen.mean().item() == pytest.approx(last["chosen_score"], abs=1e-4)
    assert rejected.mean().item() == pytest.approx(last["rejected_score"], abs=1e-4)
    assert chosen.std() > 0


def assert_trains_a_policy(directory: Path) -> None:
    first, second = logged(directory, "train")
    assert abs(first["kl"]) < 1e-5 < abs(second["kl"])
    for row in (first, second):
        assert row["sampler_gap_max"] < 1e-4
        assert row["optimizer_steps"] == 1 and row["clip_fraction"] == 0
        assert row["ratio_mean"] == pytest.approx(1, abs=1e-5)


def assert_every_adapter_was_trained(model, directory: Path) -> None:
    weights = load_file(directory / "adapter_model.safetensors")
    ups = {name: weight for name, weight in weights.items() if ".lora_B." in name}
    expected = {f"base_model.model.{name}.lora_B.weight" for name in linear_modules(model)}
    assert ups.keys() == expected
    assert all(weight.any() for weight in ups.values())
