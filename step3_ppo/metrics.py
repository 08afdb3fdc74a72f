"""Computes the metrics of an iteration."""

from __future__ import annotations

from collections.abc import Sequence

from common.training.engine import gradient_norm
from common.training.metrics import Metrics, StepMetrics, Sums, add_sums, means
from common.training.timing import PhaseClock
from step3_ppo.combined import RewardScores
from step3_ppo.experience import Experience
from step3_ppo.generation.rollout import Rollout
from step3_ppo.loss import explained_variance, explained_variance_sums
from step3_ppo.models import PPOModels
from step3_ppo.rewards import ShapedScores
from step3_ppo.scoring import ModelOutputs

CLIPPED = "_clipped"  # ends the names of metrics that say how much of a reward was clipped


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
        **(reward_metrics(outputs.by_reward, shaped) if outputs.by_reward is not None else {}),
    }


def reward_metrics(scores: RewardScores, shaped: ShapedScores) -> Metrics:
    """Each of --reward by itself: raw mean and spread over the responses that it did not fail on, the share that was
    clipped, the number of failures, and its figures."""
    metrics: Metrics = {}
    for at, label in enumerate(scores.labels):
        raw = scores.raw[~scores.failed[:, at], at].double()
        if len(raw):
            metrics[f"reward/{label}"] = float(raw.mean())
            metrics[f"reward/{label}_std"] = float(raw.std(correction=0))
        if shaped.clipped is not None:
            metrics[f"reward/{label}{CLIPPED}"] = float(shaped.clipped[:, at].mean())
        metrics[f"reward/{label}_failed"] = int(scores.failed[:, at].sum())
    return metrics | {f"reward/{name}": value for name, value in scores.figures.items()}


def experience_metrics(experience: Experience, outputs: ModelOutputs) -> Metrics:
    """Metrics of the models before the update."""
    mask = experience.response_mask
    metrics: Metrics = {"entropy": float(outputs.entropy[mask].mean())}
    if experience.values is not None and experience.returns is not None:
        sums = explained_variance_sums(experience.values, experience.returns, mask)
        metrics["explained_variance"] = explained_variance(sums)
    return metrics


def update_metrics(steps: Sequence[Sums]) -> Metrics:
    """Means over the optimizer steps made, from the sums of each."""
    if not steps:  # all were skipped
        return {"optimizer_steps": 0}
    sums = add_sums(steps)
    texts: Sums = {name: sums.pop(name) for name in ("text_loss", "text_tokens") if name in sums}
    return {**means(sums, "tokens"), **(means(texts, "text_tokens") if texts else {}), "optimizer_steps": len(steps)}


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
