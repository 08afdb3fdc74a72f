"""Log-probabilities of tokens, from the logits of a causal language model.

The logits at position p say which token comes at p + 1. So response token t (0-based), which lies at position
`prompt_length + t`, is read at position `prompt_length - 1 + t`: its log-probability and its value alike.
Sequences are right-padded and a prompt has at least one token. Only the positions that count are ever
touched, hence nothing in the padding can reach a result or a gradient, and only they are raised to float32.
R stands for the longest response of the batch.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """(B,) lengths -> (B, width) bool, true in the first `lengths[b]` columns of row b."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def response_log_probs(
    logits: Tensor, tokens: Tensor, prompt_lengths: Tensor, response_lengths: Tensor, temperature: float = 1.0
) -> Tensor:
    """Log-probability of every response token under log softmax(z / T), in nats.

    logits (B, L, V) of any float type; tokens (B, L), prompt_lengths and response_lengths (B,) long.
    Returns (B, R), float32 for half-precision logits; 0 after the end of a response.
    """
    window = _ResponseWindow(prompt_lengths, response_lengths)
    log_probs = _log_softmax(window.pick(logits), temperature)
    return window.spread(_chosen(log_probs, window.pick(tokens, ahead=1)))


def response_log_probs_and_entropy(
    logits: Tensor, tokens: Tensor, prompt_lengths: Tensor, response_lengths: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`response_log_probs` and, for monitoring, the entropy (nats) of the distribution at each token.

    Both (B, R), 0 after the end of a response; the entropy carries no gradient.
    """
    window = _ResponseWindow(prompt_lengths, response_lengths)
    log_probs = _log_softmax(window.pick(logits), temperature)
    entropy = torch.special.entr(log_probs.detach().exp()).sum(-1)
    return window.spread(_chosen(log_probs, window.pick(tokens, ahead=1))), window.spread(entropy)


def gather_response(values: Tensor, prompt_lengths: Tensor, response_lengths: Tensor) -> Tensor:
    """Values (B, L), one per position -> (B, R): column t is read where response token t is predicted.

    Half precision is raised to float32; 0 after the end of a response.
    """
    window = _ResponseWindow(prompt_lengths, response_lengths)
    return window.spread(_at_least_float32(window.pick(values)))


def next_token_loss_sum(logits: Tensor, input_ids: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of -log p over the tokens marked in `loss_mask`, and how many they are.

    logits (B, L, V); input_ids (B, L) long; loss_mask (B, L) bool, true where the TOKEN at that position is
    a target. The first token of a row has nothing before it to predict it, so it never counts.
    Returns two scalars: nats (float32 for half-precision logits) and a count (long).
    """
    row, position = loss_mask[:, 1:].nonzero(as_tuple=True)
    picked = _at_least_float32(logits[row, position])
    return F.cross_entropy(picked, input_ids[row, position + 1], reduction="sum"), loss_mask[:, 1:].sum()


class _ResponseWindow:
    """The N positions that predict response tokens: picks them, and spreads N results over (B, R)."""

    def __init__(self, prompt_lengths: Tensor, response_lengths: Tensor) -> None:
        mask = length_mask(response_lengths, int(response_lengths.max()))
        self.shape = mask.shape
        self.row, self.column = mask.nonzero(as_tuple=True)
        self.position = prompt_lengths[self.row] - 1 + self.column

    def pick(self, tensor: Tensor, ahead: int = 0) -> Tensor:
        """(B, L, ...) -> (N, ...), `ahead` positions after the predicting one."""
        return tensor[self.row, self.position + ahead]

    def spread(self, picked: Tensor) -> Tensor:
        """(N,) -> (B, R)."""
        return picked.new_zeros(self.shape).index_put((self.row, self.column), picked)


def _log_softmax(picked_logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(_at_least_float32(picked_logits) / temperature, dim=-1)


def _chosen(log_probs: Tensor, tokens: Tensor) -> Tensor:
    return log_probs.gather(-1, tokens[:, None]).squeeze(-1)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
