"""One optimizer step of the actor and one of the critic, on the same answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from common.batching.collate import TokenBatch, unmasked
from common.models.logprobs import next_token_loss_sum, response_log_probs
from common.runtime.distributed import device, global_sum
from common.training.atomic_step import AtomicStep
from common.training.metrics import Sums, add_sums
from common.training.timing import PhaseClock
from step3_ppo.config import PPOConfig
from step3_ppo.experience import Experience, Rollout
from step3_ppo.loss import kl_loss_sum, policy_loss_sum, value_loss_sum
from step3_ppo.models import PPOModels, inputs_of, response_values


class Learner:
    """Makes the steps of the update.

    Args:
        models: actor and critic are trained.
        clock: gets the phases actor_update and critic_update.
    """

    def __init__(self, models: PPOModels, config: PPOConfig, clock: PhaseClock):
        self.models, self.config, self.clock = models, config, clock
        self.step = AtomicStep({"actor": models.actor, "critic": models.critic}, config.max_skipped_steps)

    def learn(self, batches: Sequence[Experience], texts: Sequence[TokenBatch], kl_coef: float) -> Sums | None:
        """A step of both engines; returns sums over all its tokens, or None where it was skipped.

        Args:
            batches: this rank's micro-batches.
            texts: plain text to mix into the actor's.
            kl_coef: weight of the KL where it is in the loss.
        """
        sums = self._accumulate(batches, texts, kl_coef)
        if not self.step.finite_on_all_ranks():
            self.step.skip()
            return None
        with self.clock.phase("actor_update"):
            self.models.actor.step()
            if self.models.ema is not None:
                self.models.ema.update()
        with self.clock.phase("critic_update"):
            self.models.critic.step()
        return {name: total for parts in sums if parts for name, total in add_sums(parts, global_sum).items()}

    def probe(self, rows: int, prompt: int, pad_id: int) -> None:
        """What `learn` does before its steps, for rows of `prompt` tokens and the longest answer; all is dropped."""
        answer = self.config.max_answer_seq_len
        each = lambda number: torch.full((rows,), number)
        rollout = Rollout(
            torch.full((rows, prompt + answer), pad_id), each(prompt), each(answer), each(True), each(0), each(True)
        )
        experience = Experience(rollout, *torch.zeros(5, rows, answer)).to(device())
        text = TokenBatch(rollout.tokens, rollout.attention_mask, rollout.attention_mask.bool(), rollout.lengths)
        self._accumulate([experience], [text.to(device())] if self.config.unsupervised_dataset_name else [], 1.0)
        self.step.discard()

    def _accumulate(
        self, batches: Sequence[Experience], texts: Sequence[TokenBatch], kl_coef: float
    ) -> list[list[Sums]]:
        """Gradients in both engines; returns the micro-batches' sums for the policy, the text and the value loss."""
        tokens = global_sum(sum(batch.response_mask.sum() for batch in batches))
        policy, text, value = sums = [[], [], []]

        def share(loss_sum: Callable, total: Tensor, parts: list[Sums], weight: float = 1.0) -> Callable:
            def loss_of(batch: Experience | TokenBatch) -> Tensor:
                loss, statistics = loss_sum(batch)
                parts.append(statistics)
                return weight * loss / total

            return loss_of

        with self.clock.phase("actor_update"):
            self.step.accumulate(
                "actor", "policy loss", batches, share(partial(self._policy_loss, kl_coef), tokens, policy)
            )
            if texts:
                text_tokens = global_sum(sum(batch.loss_mask[:, 1:].sum() for batch in texts))
                self.step.accumulate(
                    "actor", "text loss", texts, share(self._text_loss, text_tokens, text, self.config.unsup_coef)
                )
        with self.clock.phase("critic_update"):
            self.step.accumulate("critic", "value loss", batches, share(self._value_loss, tokens, value))
        return sums

    def _policy_loss(self, kl_coef: float, batch: Experience) -> tuple[Tensor, Sums]:
        rollout = batch.rollout
        log_probs = response_log_probs(
            self.models.actor,
            inputs_of(rollout),
            rollout.prompt_lengths,
            rollout.response_lengths,
            self.config.temperature,
        )
        loss, sums = policy_loss_sum(
            log_probs, batch.old_log_probs, batch.advantages, batch.response_mask, self.config.clip_range
        )
        if self.config.kl_placement == "loss":
            kl_loss, kl_sums = kl_loss_sum(
                log_probs, batch.old_log_probs, batch.ref_log_probs, batch.response_mask, self.config.kl_estimator
            )
            loss, sums = loss + kl_coef * kl_loss, {**sums, **kl_sums}
        return loss, sums

    def _value_loss(self, batch: Experience) -> tuple[Tensor, Sums]:
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
