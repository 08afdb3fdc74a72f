"""Proximal policy optimisation of the actor against the reward model, one iteration at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import islice
from math import ceil

import torch
from datasets import Dataset
from torch import Tensor

from common.batching.collate import TokenBatch, collate_prompts
from common.batching.sampler import MicroBatch, StepSampler, evaluation_batches
from common.data.tokenization import Codec
from common.errors import DIVERGED, Diverged, UserError
from common.models.calibration import RAW, Calibration
from common.runtime.distributed import device, on_gpu, rank, say, world_size
from common.training.engine import gradient_norm
from common.training.loop import check_finite
from common.training.metrics import Sums, add_sums, means
from common.training.timing import PhaseClock
from step3_ppo.advantages import gae, whiten
from step3_ppo.config import PPOConfig
from step3_ppo.experience import Experience, Rollout
from step3_ppo.generation.optimizer_offload import OptimizerOffload
from step3_ppo.generation.rollout import ActorRollouts
from step3_ppo.generation.sampling import NO_TOKEN, Sampling
from step3_ppo.kl_controller import AdaptiveKL, FixedKL
from step3_ppo.learner import Learner
from step3_ppo.loss import explained_variance, explained_variance_sums
from step3_ppo.models import PPOModels
from step3_ppo.rewards import ShapedScores, shape_scores, token_rewards
from step3_ppo.scoring import ModelOutputs, score_rollout, share_rollout

EVALUATION = 2**31  # takes the place of the iteration in the random numbers: every evaluation draws the same ones


class PPOTrainer:
    """One PPO iteration, and the evaluation on held-out prompts.

    Args:
        models: the engines.
        config: the resolved configuration.
        codec: end and padding tokens, decoding of samples.
        prompts, held_out: prepared prompts to train on and to evaluate on.
        texts: endless micro-batches of plain text for the pre-training mix, if it is on; a list for each step.
        calibration: of the reward model's scores; the identity where they are not normalised; None: that of the first
            iteration's scores and of the evaluation before it, from then on.
    """

    def __init__(
        self,
        models: PPOModels,
        config: PPOConfig,
        codec: Codec,
        prompts: Dataset,
        held_out: Dataset,
        texts: Iterator[list[TokenBatch]] | None,
        calibration: Calibration | None,
    ):
        self.models, self.config, self.codec = models, config, codec
        self.prompts, self.held_out, self.texts = prompts, held_out, texts
        self.calibration = calibration
        self.first_scores: list[Tensor] = []  # of rollouts without a calibration, which they are to give
        self.sampling = Sampling.from_config(config)
        self.rollouts = ActorRollouts(
            models.actor,
            slots=config.per_device_generation_batch_size,
            seed=config.seed,
            end_ids=codec.end_ids,
            pad_id=codec.pad_id,
            gather=not config.unpin_actor_parameters,
            keep_cache=not (config.release_inference_cache or config.offload_in_rollouts),
        )
        self.optimizer_offload = OptimizerOffload(
            [models.actor, models.critic] if config.offload_in_rollouts and on_gpu() else []
        )
        if config.offload_in_rollouts and not on_gpu():
            say("note: --offload_in_rollouts moves nothing where there is no GPU")
        self.kl = (
            AdaptiveKL(config.first_kl_coef, config.kl_target, config.kl_horizon)
            if config.kl_controller == "adaptive"
            else FixedKL(config.first_kl_coef)
        )
        self.optimizer_steps_made = 0  # those that were skipped included
        self.clock = PhaseClock()
        self.learner = Learner(models, config, self.clock)
        self.latest: tuple[Rollout, ModelOutputs] | None = None

    def state_dict(self) -> dict:
        """What the next iteration depends on besides the weights: the KL controller, the scale of the scores, how much
        text was read, how micro-batches are cut, and how many steps were skipped."""
        return {
            "kl": self.kl.state_dict(),
            "optimizer_steps": self.optimizer_steps_made,
            "calibration": self.calibration and [self.calibration.mean, self.calibration.std],
            "step": self.learner.step.state_dict(),
            "max_tokens": self.config.max_tokens_per_micro_batch,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where a trainer with this `state_dict` was; this one has not begun yet."""
        self.kl.load_state_dict(state["kl"])
        self.optimizer_steps_made = state["optimizer_steps"]
        self.learner.step.load_state_dict(state["step"])
        if state["calibration"] is not None:
            self.calibration = Calibration(*state["calibration"])
            self.models.measure_values_in(self.calibration)
        if self.texts is not None:  # every optimizer step has read its share
            self.texts = islice(self.texts, self.optimizer_steps_made, None)

    def iteration(self, index: int, prompts: Sequence[MicroBatch]) -> dict[str, float]:
        """Roll out, score, reward, estimate advantages, update; returns what to log.

        Args:
            index: 0-based number of the iteration.
            prompts: this rank's micro-batches of prompt rows.
        """
        self.clock.reset()
        with self.clock.phase("generate"):
            rollout = self.rollout(self.prompts, prompts, index)
        outputs = self.score(rollout, index)
        if self.calibration is None:
            outputs = self.calibrate(outputs)
        with self.clock.phase("advantages"):
            shaped, rewards = self.rewards(rollout, outputs)
            self.check_limits(outputs, index)
            experience = self.advantages(rollout, outputs, rewards)
        self.latest = rollout, outputs
        updates = self.update(experience, index)
        metrics = self.report(experience, outputs, shaped, updates)
        self.kl.update(metrics["kl"], len(rollout.tokens))
        return metrics

    def rollout(self, dataset: Dataset, micro_batches: Sequence[MicroBatch], stream: int) -> Rollout:
        """Responses of all ranks to the prompts of `micro_batches`, on every rank.

        Raises:
            Diverged: on all ranks alike, if on one of them the actor's logits are not numbers.
        """
        rows = MicroBatch(
            tuple(index for batch in micro_batches for index in batch.indices),
            tuple(real for batch in micro_batches for real in batch.real),
        )
        prompts = collate_prompts(dataset, rows, self.codec.pad_id)
        with self.optimizer_offload.offloaded():
            made = self.rollouts.roll_out(prompts, self.sampling, stream)
        rollout = share_rollout(made)
        if (rollout.tokens == NO_TOKEN).any():
            raise Diverged(f"the actor's logits in the rollout of {_occasion(stream)} are not numbers: {DIVERGED}")
        return rollout

    def score(self, rollout: Rollout, stream: int) -> ModelOutputs:
        """What the models say of a rollout; raises Diverged on all ranks alike if some of it is not finite."""
        outputs = score_rollout(
            self.models,
            rollout,
            self.clock,
            self.config.per_device_training_batch_size,
            self.config.max_tokens_per_micro_batch,
        )
        for field in fields(outputs):
            total = float(getattr(outputs, field.name).sum())
            check_finite(total, f"sum of all {field.name.replace('_', ' ')}", _occasion(stream))
        return outputs

    def calibrate(self, outputs: ModelOutputs) -> ModelOutputs:
        """Take the scale of the scores from these and the evaluation's before them, the same on every rank; returns
        them with values in that scale.

        Raises:
            UserError: on all ranks alike, if the scores do not vary.
        """
        scores = torch.cat([*self.first_scores, outputs.scores])
        measured = Calibration.of(scores)
        if not measured.usable:
            raise UserError(
                f"the {len(scores)} scores of the first rollouts have the mean {measured.mean:g} and the "
                f"standard deviation {measured.std:g}, which nothing can be measured in: give an iteration "
                "more answers, or add --score_calibration none"
            )
        self.calibration = measured
        self.models.measure_values_in(measured)
        say(
            f"the {len(scores)} scores of the first rollouts have the mean {measured.mean:.4g} and the spread "
            f"{measured.std:.4g}: from here on scores and values are measured in these"
        )
        return replace(outputs, values=measured.normalise(outputs.values))

    def check_limits(self, outputs: ModelOutputs, index: int) -> None:
        """Raises Diverged on all ranks alike, before the update, if KL or reward has left the limits that are set."""
        config = self.config
        for what, mean, flag, limit, exceeded in (
            ("KL to the reference", outputs.response_kl().mean(), "max_kl", config.kl_limit, torch.gt),
            ("reward", outputs.scores.mean(), "max_reward", config.max_reward, torch.gt),
            ("reward", outputs.scores.mean(), "min_reward", config.min_reward, torch.lt),
        ):
            if limit is not None and exceeded(mean, limit):
                raise Diverged(
                    f"the mean {what} of the answers of {_occasion(index)} is {float(mean):.4g}, beyond "
                    f"--{flag} {limit:g}: training stopped before it learnt from them; raise --kl_coef, "
                    "lower --actor_learning_rate, or set another limit"
                )

    def rewards(self, rollout: Rollout, outputs: ModelOutputs) -> tuple[ShapedScores, Tensor]:
        """Shaped scores (B,) and token rewards (B, R)."""
        config = self.config
        scale = self.calibration or RAW
        shaped = shape_scores(
            outputs.scores,
            rollout.finished,
            rollout.real,
            mean=scale.mean,
            std=scale.std,
            clip=config.score_clip,
            missing_eos_penalty=config.missing_eos_penalty,
            missing_eos_score=config.missing_eos_score,
        )
        beta = self.kl.beta if config.kl_placement == "reward" else 0.0
        return shaped, token_rewards(
            outputs.old_log_probs - outputs.ref_log_probs, shaped.scores, rollout.response_mask, beta
        )

    def advantages(self, rollout: Rollout, outputs: ModelOutputs, rewards: Tensor) -> Experience:
        """The experience that the update learns from. Every rank holds all of it, so whitening needs no reduction."""
        advantages, returns = gae(
            rewards, outputs.values, rollout.response_mask, gamma=self.config.gamma, lam=self.config.gae_lambda
        )
        if self.config.whiten_advantages:
            advantages = whiten(advantages, rollout.response_mask)
        return Experience(rollout, outputs.old_log_probs, outputs.ref_log_probs, outputs.values, advantages, returns)

    def update(self, experience: Experience, index: int) -> dict[str, float]:
        """PPO epochs over the experience; leaves them early where the policy has moved past `target_kl`."""
        sampler = StepSampler(
            experience.rollout.lengths.tolist(),
            rows_per_micro_batch=self.config.per_device_training_batch_size,
            micro_batches_per_step=self.config.gradient_accumulation_steps,
            world_size=world_size(),
            rank=rank(),
            seed=self.config.seed + index,
            max_tokens=self.config.max_tokens_per_micro_batch,
        )
        steps: list[Sums] = []
        rates = {
            "actor_learning_rate": self.models.actor.get_lr()[0],
            "critic_learning_rate": self.models.critic.get_lr()[0],
        }
        for epoch in range(self.config.ppo_epochs):
            for micro_batches in sampler.epoch(epoch):
                batches = [experience.select(batch.indices, batch.real).to(device()) for batch in micro_batches]
                texts = [text.to(device()) for text in next(self.texts)] if self.texts is not None else []
                sums = self.learner.learn(batches, texts, self.kl.beta)
                self.optimizer_steps_made += 1
                if sums is None:
                    continue
                steps.append(sums)
                if self._moved_too_far(sums):
                    return {**_update_metrics(steps), **rates}
        return {**_update_metrics(steps), **rates}

    @torch.no_grad()
    def evaluate(self) -> tuple[dict[str, float], list[dict]]:
        """Sample answers to held-out prompts, with the same random numbers every time.

        Returns:
            Mean metrics, and a row for every prompt: prompt, response, reward, kl, finished.
        """
        rows = len(self.held_out)
        if not rows:
            return {}, []
        lengths = self.held_out["length"][:]
        rows_per_batch = min(self.config.per_device_generation_batch_size, ceil(rows / world_size()))
        batches = evaluation_batches(lengths, rows_per_batch, world_size(), rank())
        rollout = self.rollout(self.held_out, batches, EVALUATION)
        outputs = self.score(rollout, EVALUATION)
        shaped = self.rewards(rollout, outputs)[0]
        metrics = {**_response_metrics(rollout, shaped), "kl": float(outputs.response_kl().mean())}
        if self.calibration is None:  # it comes with the first iteration
            self.first_scores.append(outputs.scores)
            del metrics["shaped_score"], metrics["score_clip_fraction"]
        return metrics, self._samples(rollout, outputs, len(rollout.tokens))

    def latest_samples(self, rows: int) -> list[dict]:
        """The first rows of the last iteration, as in `evaluate`."""
        rollout, outputs = self.latest
        return self._samples(rollout, outputs, min(rows, len(rollout.tokens)))

    def report(
        self, experience: Experience, outputs: ModelOutputs, shaped: ShapedScores, updates: dict[str, float]
    ) -> dict[str, float]:
        """Metrics of an iteration."""
        rollout, mask = experience.rollout, experience.response_mask
        seconds = self.clock.total()
        return {
            **_response_metrics(rollout, shaped),
            "kl": float(outputs.response_kl().mean()),
            "kl_coef": self.kl.beta,
            "entropy": float(outputs.entropy[mask].mean()),
            "explained_variance": explained_variance(
                explained_variance_sums(experience.values, experience.returns, mask)
            ),
            **updates,
            "skipped_steps": self.learner.step.skipped,
            "actor_gradient_norm": gradient_norm(self.models.actor),
            "critic_gradient_norm": gradient_norm(self.models.critic),
            **{f"seconds_{name}": seconds for name, seconds in self.clock.seconds.items()},
            "seconds_other": seconds - sum(self.clock.seconds.values()),
            "responses": len(rollout.tokens),
            "samples_per_second": len(rollout.tokens) / seconds,
        }

    def _moved_too_far(self, step: Sums) -> bool:
        limit = self.config.target_kl
        return limit is not None and float(step["approx_kl"] / step["tokens"].clamp_min(1)) > limit

    def _samples(self, rollout: Rollout, outputs: ModelOutputs, rows: int) -> list[dict]:
        kl = outputs.response_kl()
        samples = []
        for row in range(rows):
            start, end = int(rollout.prompt_lengths[row]), int(rollout.lengths[row])
            tokens = rollout.tokens[row].tolist()
            samples.append(
                {
                    "prompt": self.codec.tokenizer.decode(tokens[:start], skip_special_tokens=True),
                    "response": self.codec.decode_response(tokens[start:end]),
                    "reward": float(outputs.scores[row]),
                    "kl": float(kl[row]),
                    "finished": bool(rollout.finished[row]),
                }
            )
        return samples


def _occasion(stream: int) -> str:
    return "the evaluation" if stream == EVALUATION else f"iteration {stream + 1}"


def _update_metrics(steps: Sequence[Sums]) -> dict[str, float]:
    if not steps:  # all were skipped
        return {"optimizer_steps": 0}
    sums = add_sums(steps)
    texts = {name: sums.pop(name) for name in ("text_loss", "text_tokens") if name in sums}  # of the pre-training mix
    return {**means(sums, "tokens"), **(means(texts, "text_tokens") if texts else {}), "optimizer_steps": len(steps)}


def _response_metrics(rollout: Rollout, shaped: ShapedScores) -> dict[str, float]:
    scores = means(shaped.sums, "responses")
    return {
        "reward": scores["raw_score"],
        "shaped_score": scores["score"],
        "score_clip_fraction": scores["clipped"],
        "response_length": float(rollout.response_lengths.float().mean()),
        "eos_fraction": scores["finished"],
    }
