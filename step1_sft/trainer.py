"""Supervised fine-tuning: next-token loss on the response tokens, perplexity on held-out demonstrations."""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from datasets import Dataset

from common.data.collate import TokenBatch, collate_demonstrations
from common.data.sampler import MicroBatch
from common.data.tokenization import Codec
from common.distributed import device, global_sum
from common.engine import gradient_norm, optimizer_step
from common.models.logprobs import next_token_loss_sum


class SFTTrainer:
    """Trains and evaluates one engine on demonstrations.

    Args:
        engine: a DeepSpeed engine around a causal language model.
        train, evaluation: prepared demonstrations.
        evaluation_batches: this rank's part of the evaluation.
        pad_id: fills the right of short rows.
        train_on_prompt: whether prompt tokens are targets too.
    """

    def __init__(self, engine, train: Dataset, evaluation: Dataset, evaluation_batches: Sequence[MicroBatch],
                 pad_id: int, train_on_prompt: bool):
        self.engine = engine
        self.train, self.evaluation, self.evaluation_batches = train, evaluation, evaluation_batches
        self.pad_id, self.train_on_prompt = pad_id, train_on_prompt

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """One optimizer step; the loss is the mean over its target tokens on all ranks."""
        batches = list(self._batches(self.train, micro_batches))
        tokens = global_sum(sum(batch.loss_mask[:, 1:].sum() for batch in batches))
        local_loss = torch.zeros((), device=device())

        def loss_of(batch: TokenBatch) -> torch.Tensor:
            loss = self._loss_sum(batch)[0] / tokens
            local_loss.add_(loss.detach())
            return loss

        optimizer_step(self.engine, batches, loss_of)
        return {"loss": float(global_sum(local_loss)), "tokens": int(tokens),
                "learning_rate": self.engine.get_lr()[0], "gradient_norm": gradient_norm(self.engine)}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean next-token loss over all held-out target tokens, in nats, and its exponential, the perplexity."""
        if not self.evaluation_batches:
            return {}
        self.engine.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=device())
        for batch in self._batches(self.evaluation, self.evaluation_batches):
            totals += torch.stack([total.double() for total in self._loss_sum(batch)])
        self.engine.train()
        loss, tokens = global_sum(totals).tolist()
        mean = loss / max(tokens, 1)
        return {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}

    @torch.no_grad()
    def samples(self, codec: Codec, rows: int = 8, max_new_tokens: int = 64) -> list[dict[str, str]]:
        """Greedy answers to the first held-out prompts beside the demonstrations. All ranks must call it."""
        self.engine.eval()
        answers = []
        for row in self.evaluation.select(range(min(rows, len(self.evaluation)))):
            prompt = torch.tensor([row["prompt_ids"]], device=device())
            tokens = self.engine.module.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, do_sample=False,
                use_cache=True, synced_gpus=False)  # every rank decodes the same rows, so all stay in step
            answers.append({"prompt": codec.tokenizer.decode(row["prompt_ids"], skip_special_tokens=True),
                            "response": codec.decode_response(tokens[0, prompt.shape[1]:].tolist()),
                            "demonstration": codec.decode_response(row["response_ids"])})
        self.engine.train()
        return answers

    def _batches(self, dataset: Dataset, micro_batches: Sequence[MicroBatch]) -> Iterable[TokenBatch]:
        for micro_batch in micro_batches:
            yield collate_demonstrations(dataset, micro_batch, self.pad_id, self.train_on_prompt).to(device())

    def _loss_sum(self, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.engine(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        return next_token_loss_sum(logits, batch.input_ids, batch.loss_mask)
