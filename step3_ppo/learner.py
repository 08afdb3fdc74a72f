"""Makes one optimizer step of the actor and, if there is one, of the critic, on the same responses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor

from common.batching.collate import TokenBatch, unmasked
from common.config.option import Phase
from common.models.logprobs import next_token_loss_sum, response_log_probs
from common.models.token_sets import TokenSets
from common.runtime.distributed import device, global_max, global_sum
from common.training.atomic_step import AtomicStep
from common.training.metrics import Sums, add_sums
from common.training.timing import PhaseClock
from step3_ppo.config import PPOConfig
from step3_ppo.diagnostics import ratio_sums
from step3_ppo.experience import Experience
from step3_ppo.generation.rollout import Rollout
from step3_ppo.loss import kl_loss_sum, loss_units, policy_loss_sum, value_loss_sum
from step3_ppo.models import PPOModels, inputs_of, response_values


class Learner:
    """Makes the optimizer steps of the update.

    Args:
        models: the actor and the critic among them are trained.
        clock: measures the phases actor_update and critic_update.
    """

    def __init__(self, models: PPOModels, config: PPOConfig, clock: PhaseClock):
        self.models, self.config, self.clock = models, config, clock
        self.step = AtomicStep(models.trained(), config.max_skipped_steps)

    def learn(
        self, batches: Sequence[Experience], texts: Sequence[TokenBatch], kl_coef: float, engines: Collection[str]
    ) -> Sums | None:
        """Make a step of some trained engines. Returns sums over all its tokens, or None if it was skipped.

        Args:
            batches: this rank's micro-batches.
            texts: micro-batches of plain text, whose loss is added to the actor's.
            kl_coef: weight of the KL, if it is part of the loss.
            engines: the names of those that step; the others stay as they are.
        """
        sums = self._accumulate(batches, texts, kl_coef, engines)
        if not self.step.finite_on_all_ranks():
            self.step.skip()
            return None
        if "actor" in engines:
            with self.clock.phase(Phase.ACTOR_UPDATE):
                self.models.actor.step()
                if self.models.ema is not None:
                    self.models.ema.update()
        if self.models.critic is not None and "critic" in engines:
            with self.clock.phase(Phase.CRITIC_UPDATE):
                self.models.critic.step()
        return {
            name: total for parts in sums if parts for name, total in add_sums(parts, global_sum, global_max).items()
        }

    def probe(self, rows: int, prompt: int, pad_id: int) -> None:
        """Run forward and backward as `learn` does, on `rows` rows of `prompt` tokens and the longest response, and
        discard the gradients."""
        response = self.config.max_answer_seq_len
        each = lambda number: torch.full((rows,), number)
        tokens = torch.full((rows, prompt + response), pad_id)
        kept = None
        if self.config.sampling.exact:
            kept = TokenSets.largest(rows * response, self.models.actor.module.config.get_text_config().vocab_size)
        rollout = Rollout(tokens, each(prompt), each(response), each(True), each(0), each(True), each(0), kept=kept)
        zeros = torch.zeros(rows, response)
        of_critic = None if self.models.critic is None else zeros
        experience = Experience(rollout, zeros, zeros, of_critic, zeros, of_critic).to(device())
        text = TokenBatch(rollout.tokens, rollout.attention_mask, rollout.attention_mask.bool(), rollout.lengths)
        texts = [text.to(device())] if self.config.unsupervised_dataset_name else []
        self._accumulate([experience], texts, 1.0, self.models.trained())
        self.step.discard()

    def _accumulate(
        self, batches: Sequence[Experience], texts: Sequence[TokenBatch], kl_coef: float, engines: Collection[str]
    ) -> list[list[Sums]]:
        """Accumulate gradients in the engines of these names. Returns the sums of policy, text and value loss."""
        tokens, units = global_sum(torch.stack([self._counts(batch) for batch in batches]).sum(0))
        policy: list[Sums] = []
        text: list[Sums] = []
        value: list[Sums] = []

        def share(loss_sum: Callable, total: Tensor, parts: list[Sums], weight: float = 1.0) -> Callable:
            def loss_of(batch: Experience | TokenBatch) -> Tensor:
                loss, statistics = loss_sum(batch)
                parts.append(statistics)
                return weight * loss / total

            return loss_of

        if "actor" in engines:
            with self.clock.phase(Phase.ACTOR_UPDATE):
                self.step.accumulate(
                    "actor", "policy loss", batches, share(partial(self._policy_loss, kl_coef), units, policy)
                )
                if texts:
                    text_tokens = global_sum(torch.stack([batch.loss_mask[:, 1:].sum() for batch in texts]).sum())
                    self.step.accumulate(
                        "actor", "text loss", texts, share(self._text_loss, text_tokens, text, self.config.unsup_coef)
                    )
        if "critic" in engines:
            with self.clock.phase(Phase.CRITIC_UPDATE):
                self.step.accumulate("critic", "value loss", batches, share(self._value_loss, tokens, value))
        return [policy, text, value]

    def _counts(self, batch: Experience) -> Tensor:
        """(2,) long: tokens, by which the value loss is divided, and what the policy loss is divided by."""
        mask = batch.response_mask
        return torch.stack([mask.sum(), loss_units(mask, self.config.aggregation, self.config.max_answer_seq_len)])

    def _policy_loss(self, kl_coef: float, batch: Experience) -> tuple[Tensor, Sums]:
        config, rollout = self.config, batch.rollout
        log_probs = response_log_probs(
            self.models.actor,
            inputs_of(rollout),
            rollout.prompt_lengths,
            rollout.response_lengths,
            config.temperature,
            rollout.kept,
        )
        loss, sums = policy_loss_sum(
            log_probs,
            batch.old_log_probs,
            batch.advantages,
            batch.response_mask,
            config.clip_range,
            clip_range_high=config.clip_range_high,
            dual_clip=config.dual_clip,
            policy_loss=config.policy_loss,
            aggregation=config.aggregation,
        )
        sums |= ratio_sums(log_probs, batch.old_log_probs, batch.response_mask)
        sums["policy_units"] = self._counts(batch)[1].double()
        if config.kl_place == "loss":
            assert batch.ref_log_probs is not None  # the experience has them where there is a reference
            kl_loss, kl_sums = kl_loss_sum(
                log_probs,
                batch.old_log_probs,
                batch.ref_log_probs,
                batch.response_mask,
                config.kl_estimator,
                config.aggregation,
            )
            loss, sums = loss + kl_coef * kl_loss, {**sums, **kl_sums}
        return loss, sums

    def _value_loss(self, batch: Experience) -> tuple[Tensor, Sums]:
        assert self.models.critic is not None  # this is its loss
        assert batch.values is not None and batch.returns is not None  # the experience has both where there is a critic
        return value_loss_sum(
            response_values(self.models.critic, batch.rollout),
            batch.values,
            batch.returns,
            batch.response_mask,
            self.config.value_clip_range,
        )

    def _text_loss(self, text: TokenBatch) -> tuple[Tensor, Sums]:
        loss, tokens = next_token_loss_sum(self.models.actor, unmasked(text.input_ids), text.loss_mask)
        return loss, {"text_loss": loss.detach().double(), "text_tokens": tokens.double()}
