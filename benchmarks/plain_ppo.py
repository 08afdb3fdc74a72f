"""A PPO iteration the standard way: cached generation, fixed micro-batches, log-probs over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.plain import cached_generate, dealt
from common.batching.collate import collate_prompts
from common.batching.sampler import MicroBatch
from common.models.engine import Engine
from common.models.logprobs import gather_response
from common.runtime.distributed import device, gather_objects, global_sum
from common.training.engine import TrainedEngine, accumulate, gradient_norm
from common.training.metrics import StepMetrics, Sums, add_sums, means
from common.training.timing import PhaseClock
from step3_ppo.experience import Experience
from step3_ppo.generation.rollout import Rollout, join_responses
from step3_ppo.generation.sampling import response_limits, uniforms
from step3_ppo.loss import policy_loss_sum, value_loss_sum
from step3_ppo.scoring import ModelOutputs
from step3_ppo.sharing import share_rollout
from step3_ppo.trainer import PPOTrainer

Result = tuple[StepMetrics, Rollout]


@dataclass
class PlainPPO:
    """The product's mathematics and engines without its batching.

    Attributes:
        trainer: the product's; its actor and critic are trained, its rewards and advantages used.
        critic: the trainer's.
        reference, reward_model: engines of their own, as four models in memory are the standard.
    """

    trainer: PPOTrainer
    critic: TrainedEngine
    reference: Engine
    reward_model: Engine

    def iteration(self, index: int, prompts: Sequence[MicroBatch], clock: PhaseClock) -> Result:
        """As `PPOTrainer.iteration`; returns the metrics that can be compared, and the rollout."""
        trainer, models = self.trainer, self.trainer.models
        with clock.phase("generate"):
            rollout = share_rollout(Rollout.concat([self._generate(batch, index) for batch in prompts]))
        models.actor.eval(), self.critic.eval()
        with torch.no_grad():
            with clock.phase("score"):
                scores = self._over(rollout, lambda part: last_numbers(self.reward_model, part))
                values = self._over(rollout, lambda part: response_numbers(self.critic, part))
            with clock.phase("log_probs"):
                old = self._over(rollout, lambda part: self._log_probs(models.actor, part))
                reference = self._over(rollout, lambda part: self._log_probs(self.reference, part))
        models.actor.train(), self.critic.train()
        with clock.phase("advantages"):
            outputs = ModelOutputs(old, reference, torch.zeros_like(old), values, scores)
            experience = trainer.advantages(rollout, outputs, trainer.rewards(rollout, outputs)[1])
        kl = outputs.response_kl()
        assert kl is not None  # there is a reference
        metrics = self._update(experience, clock)
        return {"reward": float(scores.mean()), "kl": float(kl.mean()), **metrics}, rollout

    def _generate(self, micro_batch: MicroBatch, index: int) -> Rollout:
        trainer = self.trainer
        batch = collate_prompts(trainer.prompts, micro_batch, trainer.codec.pad_id)
        uniform = uniforms(trainer.config.seed, index, batch.prompt_index, trainer.responder.sampling.max_new_tokens)
        lengths = response_limits(trainer.config.seed, index, batch.prompt_index, trainer.responder.sampling)[:, 1]
        responses = cached_generate(
            trainer.models.actor,
            batch.to(device()),
            trainer.responder.sampling,
            uniform,
            lengths,
            end_id=trainer.codec.end_id,
            pad_id=trainer.codec.pad_id,
        )
        width = batch.input_ids.shape[1]
        prompts = [ids[width - length :].tolist() for ids, length in zip(batch.input_ids, batch.lengths.tolist())]
        rollout = join_responses(prompts, responses, batch.prompt_index, trainer.codec.end_ids, trainer.codec.pad_id)
        return rollout.select(range(len(prompts)), micro_batch.real)

    def _over(self, rollout: Rollout, numbers: Callable[[Rollout], Tensor]) -> Tensor:
        """Numbers (B,) or (B, R) of all rows, computed in micro-batches in the order given; on the CPU of every
        rank."""
        mine = []
        for batch in dealt(range(len(rollout.tokens)), self.trainer.config.per_device_training_batch_size):
            found = numbers(rollout.select(batch.indices).to(device())).float().cpu()
            mine += [(row, part) for row, part, real in zip(batch.indices, found, batch.real) if real]
        whole = sorted((item for items in gather_objects(mine) for item in items), key=lambda item: item[0])
        width = rollout.response_mask.shape[1]
        return torch.stack([part if part.dim() == 0 else F.pad(part, (0, width - len(part))) for _, part in whole])

    def _log_probs(self, engine: Engine, rollout: Rollout) -> Tensor:
        """(B, R) from log-probs in fp32 at all positions."""
        logits = engine(input_ids=rollout.tokens, attention_mask=rollout.attention_mask, use_cache=False).logits
        log_probs = F.log_softmax(logits[:, :-1].float() / self.trainer.config.temperature, -1)
        chosen = log_probs.gather(-1, rollout.tokens[:, 1:, None]).squeeze(-1)
        return gather_response(chosen, rollout.prompt_lengths, rollout.response_lengths)

    def _update(self, experience: Experience, clock: PhaseClock) -> StepMetrics:
        """One optimizer step of each model over all rows."""
        models, config = self.trainer.models, self.trainer.config
        batches = [
            experience.select(batch.indices, batch.real).to(device())
            for batch in dealt(range(len(experience.advantages)), config.per_device_training_batch_size)
        ]
        tokens = global_sum(torch.stack([batch.response_mask.sum() for batch in batches]).sum())
        sums: dict[str, list[Sums]] = {"actor": [], "critic": []}

        def actor_loss(batch: Experience) -> Tensor:
            loss, parts = policy_loss_sum(
                self._log_probs(models.actor, batch.rollout),
                batch.old_log_probs,
                batch.advantages,
                batch.response_mask,
                config.clip_range,
            )
            sums["actor"].append(parts)
            return loss / tokens

        def critic_loss(batch: Experience) -> Tensor:
            assert batch.values is not None and batch.returns is not None  # the estimator needs a critic
            loss, parts = value_loss_sum(
                response_numbers(self.critic, batch.rollout),
                batch.values,
                batch.returns,
                batch.response_mask,
                config.value_clip_range,
            )
            sums["critic"].append(parts)
            return loss / tokens

        with clock.phase("actor_update"):
            accumulate(models.actor, batches, actor_loss)
            models.actor.step()
        with clock.phase("critic_update"):
            accumulate(self.critic, batches, critic_loss)
            self.critic.step()
        totals = {name: value for parts in sums.values() for name, value in add_sums(parts, global_sum).items()}
        averages = means(totals, "tokens")
        return {
            "policy_loss": averages["policy_loss"],
            "value_loss": averages["value_loss"],
            "actor_gradient_norm": gradient_norm(models.actor),
            "critic_gradient_norm": gradient_norm(self.critic),
        }


def response_numbers(engine: Engine, rollout: Rollout) -> Tensor:
    """(B, R) numbers of a scalar model where response tokens are predicted."""
    numbers = engine(input_ids=rollout.tokens, attention_mask=rollout.attention_mask)
    return gather_response(numbers, rollout.prompt_lengths, rollout.response_lengths)


def last_numbers(engine: Engine, rollout: Rollout) -> Tensor:
    """(B,) numbers of a scalar model at the last tokens."""
    numbers = engine(input_ids=rollout.tokens, attention_mask=rollout.attention_mask)
    return numbers.gather(1, (rollout.lengths - 1)[:, None]).squeeze(1)
