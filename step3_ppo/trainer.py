"""Runs proximal policy optimisation of the actor against a reward, one iteration at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from datasets import Dataset
from torch import Tensor

from common.batching.collate import TokenBatch
from common.batching.sampler import MicroBatch, StepSampler
from common.data.tokenization import Codec
from common.runtime.distributed import device, rank, say, world_size
from common.training.engine import TrainedEngine
from common.training.memory import MAX_TOKENS
from common.training.metrics import StepMetrics, Sums
from common.training.timing import PhaseClock
from step3_ppo.calibration import ScoreScale
from step3_ppo.combined import CombinedReward
from step3_ppo.config import PPOConfig
from step3_ppo.experience import Experience
from step3_ppo.generation.rollout import Rollout
from step3_ppo.groups import Responses, refill_batches, refilled
from step3_ppo.kl_controller import kl_controller
from step3_ppo.learner import Learner
from step3_ppo.limits import check_limits, warn_of_clipped
from step3_ppo.metrics import (
    experience_metrics,
    gradient_norms,
    learning_rates,
    rollout_metrics,
    time_metrics,
    update_metrics,
)
from step3_ppo.models import PPOModels
from step3_ppo.responder import Responder, name_of
from step3_ppo.reward import Reward
from step3_ppo.rewards import ShapedScores, overlong_penalties, shape_scores, token_rewards
from step3_ppo.scoring import ModelOutputs, to_scale
from step3_ppo.whitening import whiten


class PPOTrainer:
    """One PPO iteration.

    Args:
        models: the engines.
        reward: scores the responses.
        config: the resolved configuration.
        codec: end and padding tokens, decoding of samples.
        prompts: prepared prompts to train on.
        texts: endless micro-batches of plain text for the pre-training mix, if it is on; a list for each step.
        scale: the scale of scores and of the critic's values.
    """

    def __init__(
        self,
        models: PPOModels,
        reward: Reward | CombinedReward,
        config: PPOConfig,
        codec: Codec,
        prompts: Dataset,
        texts: Iterator[list[TokenBatch]] | None,
        scale: ScoreScale,
    ):
        self.models, self.reward, self.config, self.codec = models, reward, config, codec
        self.prompts, self.texts, self.scale = prompts, texts, scale
        self.estimator = config.estimator
        self.kl = kl_controller(config)
        self.optimizer_steps_made = 0  # those that were skipped included
        self.clock = PhaseClock()
        self.responder = Responder(models, reward, config, codec, self.clock)
        self.learner = Learner(models, config, self.clock)
        self.latest: tuple[Rollout, ModelOutputs] | None = None  # those of the last iteration
        self._warned_of_clipped = False

    def iteration(self, index: int, prompts: Sequence[MicroBatch]) -> StepMetrics:
        """Roll out, score, reward, estimate advantages, update; returns what to log.

        Args:
            index: 0-based number of the iteration.
            prompts: this rank's micro-batches of prompt rows.

        Raises:
            Diverged: on all ranks alike, if numbers are not finite or leave the limits that are set.
        """
        self.clock.reset()
        responses, chosen = self.responses(prompts, index)
        rollout, outputs = responses.rollout, to_scale(responses.outputs, self.scale, self.reward)
        with self.clock.phase("advantages"):
            shaped, rewards = self.rewards(rollout, outputs)
            check_limits(self.config, outputs, name_of(index))
            self._warned_of_clipped = self._warned_of_clipped or warn_of_clipped(self.config, shaped, name_of(index))
            experience = self.experience(rollout, outputs, rewards, chosen)
        self.latest = rollout, outputs
        updates = self.update(experience, index)
        metrics = self.report(rollout, outputs, shaped, experience, updates)
        kl = outputs.response_kl()
        if kl is not None and "actor" in self.learning(index):  # while it is frozen there is no KL to steer
            self.kl.update(float(kl.mean()), len(rollout.tokens))
        return metrics

    def responses(self, prompts: Sequence[MicroBatch], index: int) -> tuple[Responses, Tensor | None]:
        """Scored responses to the prompts of an iteration and, with --drop_equal_groups, to further ones.

        Returns:
            All that were made, the same on every rank; and the rows (N,) long that are learnt from, None for all.
        """
        first = self.responder.respond(self.prompts, prompts, index)
        if not self.config.drop_equal_groups:
            return first, None

        def respond(rows: list[int]) -> Responses:
            lengths, slots = self.prompts[rows]["length"], self.config.per_device_generation_batch_size
            batches = refill_batches(rows, lengths, slots, world_size(), rank())
            return self.responder.respond(self.prompts, batches, index)

        return refilled(first, respond, len(self.prompts), index, self.config)

    def rewards(self, rollout: Rollout, outputs: ModelOutputs) -> tuple[ShapedScores, Tensor]:
        """Shaped scores (B,) and token rewards (B, R)."""
        config, scale, weighted = self.config, self.scale.current, None
        if isinstance(self.reward, CombinedReward) and outputs.by_reward is not None:
            weighted = self.reward.weigh(outputs.by_reward, config.score_clip)
        shaped = shape_scores(
            outputs.scores,
            rollout.finished,
            rollout.real,
            mean=scale.mean,
            std=scale.std,
            clip=config.score_clip,
            missing_eos_penalty=config.missing_eos_penalty,
            missing_eos_score=config.missing_eos_score,
            overlong=overlong_penalties(
                rollout.response_lengths, config.max_answer_seq_len, config.overlong_buffer, config.overlong_penalty
            ),
            weighted=weighted,
        )
        beta = self.kl.beta if config.kl_place == "reward" else 0.0
        return shaped, token_rewards(outputs.log_ratio(), shaped.scores, rollout.response_mask, beta)

    def experience(
        self, rollout: Rollout, outputs: ModelOutputs, rewards: Tensor, chosen: Tensor | None
    ) -> Experience | None:
        """What the update learns from; None if nothing is left.

        Args:
            rewards: (B, R) token rewards.
            chosen: (N,) long, the rows of the groups that are learnt from; None: all.
        """
        if chosen is not None:
            if not len(chosen):
                return None
            responses = Responses(rollout, outputs).select(chosen)
            rollout, outputs = responses.rollout, responses.outputs
            rewards = rewards[chosen, : rollout.response_mask.shape[1]]
        experience = self.advantages(rollout, outputs, rewards)
        if self.config.mask_truncated_answers:
            ended = rollout.finished.nonzero().squeeze(1)
            return experience.select(ended) if len(ended) else None
        return experience

    def advantages(self, rollout: Rollout, outputs: ModelOutputs, rewards: Tensor) -> Experience:
        """The experience of all these responses. Every rank holds all of it, so whitening needs no reduction."""
        mask = rollout.response_mask
        advantages, returns = self.estimator(rewards, outputs.values, mask, rollout.prompt_index, self.config)
        if self.config.whitens:  # over what will be learnt from; before, truncated ones were compared with
            masked = self.config.mask_truncated_answers
            advantages = whiten(advantages, mask & rollout.finished[:, None] if masked else mask)
        return Experience(rollout, outputs.old_log_probs, outputs.ref_log_probs, outputs.values, advantages, returns)

    def learning(self, index: int) -> dict[str, TrainedEngine]:
        """The engines that learn in an iteration, by name: in the first ones perhaps the critic alone."""
        engines = self.models.trained()
        if index < self.config.critic_warmup_iterations:
            del engines["actor"]
        return engines

    def update(self, experience: Experience | None, index: int) -> StepMetrics:
        """PPO epochs over the experience; leaves them early where the policy has moved past `target_kl`."""
        engines = self.learning(index)
        rates = learning_rates(engines)
        if experience is None:
            say(f"note: no response of {name_of(index)} is left to learn from: it makes no optimizer step")
            return {**update_metrics([]), **rates}
        steps: list[Sums] = []
        for batches in self._optimizer_steps(experience, index):
            # Each optimizer step reads its share, one of the critic alone too: their number says where a run goes on.
            texts = [text.to(device()) for text in next(self.texts)] if self.texts is not None else []
            sums = self.learner.learn(batches, texts, self.kl.beta, engines)
            self.optimizer_steps_made += 1
            if sums is not None:
                steps.append(sums)
                if self._moved_too_far(sums):
                    break
        return {**update_metrics(steps), **rates, **gradient_norms(engines)}

    def report(
        self,
        rollout: Rollout,
        outputs: ModelOutputs,
        shaped: ShapedScores,
        experience: Experience | None,
        updates: StepMetrics,
    ) -> StepMetrics:
        """Metrics of an iteration: of all responses that were made, and of the experience that was learnt from."""
        return {
            **rollout_metrics(rollout, shaped, outputs),
            **({"kl_coef": self.kl.beta} if self.config.has_reference else {}),
            "entropy": float(outputs.entropy[rollout.response_mask].mean()),
            **experience_metrics(experience, self.config),
            **updates,
            "skipped_steps": self.learner.step.skipped,
            **time_metrics(self.clock, len(rollout.tokens)),
        }

    def destroy(self) -> None:
        """End what the rewards have started, and remove DeepSpeed's hooks and buffers from all models."""
        if isinstance(self.reward, CombinedReward):
            self.reward.close()
        self.models.destroy()

    def state_dict(self) -> dict:
        """The state besides the weights: the KL controller, optimizer steps made, the scales of the scores, counters of
        skipped steps, and the micro-batch size."""
        return {
            "kl": self.kl.state_dict(),
            "optimizer_steps": self.optimizer_steps_made,
            "calibration": self.scale.state_dict(),
            "rewards": self.reward.state_dict() if isinstance(self.reward, CombinedReward) else {},
            "step": self.learner.step.state_dict(),
            MAX_TOKENS: self.config.max_tokens_per_micro_batch,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore the state of `state_dict` into a trainer that has not started."""
        self.kl.load_state_dict(state["kl"])
        self.optimizer_steps_made = state["optimizer_steps"]
        self.learner.step.load_state_dict(state["step"])
        self.scale.load_state_dict(state["calibration"])
        if isinstance(self.reward, CombinedReward):
            self.reward.load_state_dict(state["rewards"])
        if self.texts is not None:  # every optimizer step has read its share
            self.texts = islice(self.texts, self.optimizer_steps_made, None)

    def _optimizer_steps(self, experience: Experience, index: int) -> Iterator[list[Experience]]:
        """This rank's micro-batches of each optimizer step, over all PPO epochs."""
        sampler = StepSampler(
            experience.rollout.lengths.tolist(),
            rows_per_micro_batch=self.config.per_device_training_batch_size,
            micro_batches_per_step=self.config.gradient_accumulation_steps,
            world_size=world_size(),
            rank=rank(),
            seed=self.config.seed + index,
            max_tokens=self.config.max_tokens_per_micro_batch,
        )
        for epoch in range(self.config.ppo_epochs):
            for micro_batches in sampler.epoch(epoch):
                yield [experience.select(batch.indices, batch.real).to(device()) for batch in micro_batches]

    def _moved_too_far(self, step: Sums) -> bool:
        limit = self.config.target_kl
        return (
            limit is not None and "approx_kl" in step and float(step["approx_kl"] / step["tokens"].clamp_min(1)) > limit
        )
