"""Computes the metrics of an iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.training.engine import TrainedEngine, gradient_norm
from common.training.metrics import Metrics, StepMetrics, Sums, add_sums, means
from common.training.timing import PhaseClock
from step3_ppo.combined import RewardScores
from step3_ppo.config import PPOConfig
from step3_ppo.diagnostics import RATIO_SUMS, ratio_metrics, sampler_gap
from step3_ppo.experience import Experience
from step3_ppo.generation.rollout import Rollout
from step3_ppo.groups import equal_fraction
from step3_ppo.loss import explained_variance, explained_variance_sums
from step3_ppo.rewards import ShapedScores
from step3_ppo.scoring import ModelOutputs

CLIPPED = "_clipped"  # ends the names of metrics that say how much of a reward was clipped


def rollout_metrics(rollout: Rollout, shaped: ShapedScores, outputs: ModelOutputs) -> Metrics:
    """Metrics of all responses that were made: rewards, lengths, KL where there is a reference; where prompts got
    several, `equal_groups`, the share of prompts to which all responses have the same raw score."""
    scores, kl = means(shaped.sums, "responses"), outputs.response_kl()
    groups = rollout.prompt_index
    several = len(groups.unique()) < len(groups)
    return {
        "reward": scores["raw_score"],
        "shaped_score": scores["score"],
        "score_clip_fraction": scores["clipped"],
        "response_length": float(rollout.response_lengths.float().mean()),
        "eos_fraction": scores["finished"],
        **({} if kl is None else {"kl": float(kl.mean())}),
        **({"equal_groups": equal_fraction(rollout, outputs.scores_to_compare())} if several else {}),
        **({"overlong_penalty": scores["overlong_penalty"]} if "overlong_penalty" in scores else {}),
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


def experience_metrics(experience: Experience | None, config: PPOConfig) -> Metrics:
    """Metrics of the responses that are learnt from, before the update: where options leave some out, their number; how
    far the sampler's log-probs are from the actor's; the fit of the critic. None: there are no such responses."""
    metrics: Metrics = {}
    if config.leaves_responses_out:
        metrics["trained_responses"] = 0 if experience is None else len(experience.rollout.tokens)
    if experience is None:
        return metrics
    mask = experience.response_mask
    if experience.rollout.sampling_log_probs is not None:
        metrics |= sampler_gap(experience.rollout.sampling_log_probs, experience.old_log_probs, mask)
    if experience.values is not None and experience.returns is not None:
        sums = explained_variance_sums(experience.values, experience.returns, mask)
        metrics["explained_variance"] = explained_variance(sums)
    return metrics


def update_metrics(steps: Sequence[Sums]) -> Metrics:
    """Means over the optimizer steps made, from the sums of each, and the spread of the ratio."""
    if not steps:  # all were skipped, or there was nothing to learn from
        return {"optimizer_steps": 0}
    sums = add_sums(steps)
    texts: Sums = {name: sums.pop(name) for name in ("text_loss", "text_tokens") if name in sums}
    policy: Sums = {name: sums.pop(name) for name in ("policy_loss", "kl_loss", "policy_units") if name in sums}
    ratios: Sums = {name: sums.pop(name) for name in RATIO_SUMS if name in sums}
    return {
        **means(sums, "tokens"),
        **(means(policy, "policy_units") if policy else {}),
        **(ratio_metrics(steps) if ratios else {}),
        **(means(texts, "text_tokens") if texts else {}),
        "optimizer_steps": len(steps),
    }


def learning_rates(engines: Mapping[str, TrainedEngine]) -> Metrics:
    return {f"{name}_learning_rate": engine.get_lr()[0] for name, engine in engines.items()}


def gradient_norms(engines: Mapping[str, TrainedEngine]) -> StepMetrics:
    """Of the last optimizer step."""
    return {f"{name}_gradient_norm": gradient_norm(engine) for name, engine in engines.items()}


def time_metrics(clock: PhaseClock, responses: int) -> Metrics:
    """Seconds of each phase, and how fast all responses that were made went through the iteration."""
    seconds = clock.total()
    return {
        **{f"seconds_{name}": seconds for name, seconds in clock.seconds.items()},
        "seconds_other": seconds - sum(clock.seconds.values()),
        "responses": responses,
        "samples_per_second": responses / seconds,
    }
