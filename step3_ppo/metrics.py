"""Computes the metrics of an iteration."""

from __future__ import annotations

from collections.abc import Sequence

from common.training.engine import gradient_norm
from common.training.metrics import Metrics, StepMetrics, Sums, add_sums, means
from common.training.timing import PhaseClock
from step3_ppo.diagnostics import RATIO_SUMS, ratio_metrics, sampler_gap
from step3_ppo.experience import Experience
from step3_ppo.generation.rollout import Rollout
from step3_ppo.loss import explained_variance, explained_variance_sums
from step3_ppo.models import PPOModels
from step3_ppo.rewards import ShapedScores
from step3_ppo.scoring import ModelOutputs


def rollout_metrics(rollout: Rollout, shaped: ShapedScores, outputs: ModelOutputs) -> Metrics:
    """Metrics of the responses: rewards, lengths, KL."""
    scores = means(shaped.sums, "responses")
    return {
        "reward": scores["raw_score"],
        "shaped_score": scores["score"],
        "score_clip_fraction": scores["clipped"],
        "response_length": float(rollout.response_lengths.float().mean()),
        "eos_fraction": scores["finished"],
        "kl": float(outputs.response_kl().mean()),
    }


def experience_metrics(experience: Experience, outputs: ModelOutputs) -> Metrics:
    """Metrics of the models before the update."""
    mask = experience.response_mask
    metrics: Metrics = {"entropy": float(outputs.entropy[mask].mean())}
    if experience.rollout.sampling_log_probs is not None:
        metrics |= sampler_gap(experience.rollout.sampling_log_probs, experience.old_log_probs, mask)
    if experience.values is not None and experience.returns is not None:
        sums = explained_variance_sums(experience.values, experience.returns, mask)
        metrics["explained_variance"] = explained_variance(sums)
    return metrics


def update_metrics(steps: Sequence[Sums]) -> Metrics:
    """Means over the optimizer steps made, from the sums of each, and the spread of the ratio."""
    if not steps:  # all were skipped
        return {"optimizer_steps": 0}
    sums = add_sums(steps)
    texts: Sums = {name: sums.pop(name) for name in ("text_loss", "text_tokens") if name in sums}
    ratios: Sums = {name: sums.pop(name) for name in RATIO_SUMS if name in sums}
    return {
        **means(sums, "tokens"),
        **(ratio_metrics(steps) if ratios else {}),
        **(means(texts, "text_tokens") if texts else {}),
        "optimizer_steps": len(steps),
    }


def learning_rates(models: PPOModels) -> Metrics:
    return {f"{name}_learning_rate": engine.get_lr()[0] for name, engine in models.trained().items()}


def gradient_norms(models: PPOModels) -> StepMetrics:
    """Of the last optimizer step."""
    return {f"{name}_gradient_norm": gradient_norm(engine) for name, engine in models.trained().items()}


def time_metrics(clock: PhaseClock, responses: int) -> Metrics:
    """Seconds of each phase, and how fast responses went through the iteration."""
    seconds = clock.total()
    return {
        **{f"seconds_{name}": seconds for name, seconds in clock.seconds.items()},
        "seconds_other": seconds - sum(clock.seconds.values()),
        "responses": responses,
        "samples_per_second": responses / seconds,
    }
