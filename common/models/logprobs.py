"""Computes log-probabilities of tokens under a causal language model, without the logits of a whole batch.

The logits at position p predict the token at p + 1. So response token t (0-based), which lies at position
`prompt_length + t`, is read at position `prompt_length - 1 + t`: both its log-probability and its value.

Sequences are right-padded, and a prompt has at least one token. Only the positions that count are read, so padding
cannot influence a result or a gradient. The output head runs on these positions only, chunk by chunk, so that float32
logits never take more memory than one chunk.

Shapes: B sequences of L tokens, R tokens in the longest response, N positions that are read, H the hidden size, V the
vocabulary. `inputs` are the arguments of the model's forward, among them `input_ids` (B, L) long. An encoder-decoder
gets prompt and response apart, see `common.models.encoder_decoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from common.models.encoder_decoder import model_inputs, predicted_ids
from common.models.engine import Engine
from common.models.token_sets import TokenSets

CHUNK_NUMBERS = 2**25  # logits of one chunk: 128 MiB in float32, and enough rows to keep a matrix product busy

Head = Callable[[Tensor], Tensor]  # hidden states (N, H) -> logits (N, V)
CausalLM = PreTrainedModel | Engine


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """(B,) lengths -> (B, width) bool, true in the first `lengths[b]` columns of row b."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def response_log_probs(
    model: CausalLM,
    inputs: Mapping[str, Any],
    prompt_lengths: Tensor,
    response_lengths: Tensor,
    temperature: float = 1.0,
    kept: TokenSets | None = None,
) -> Tensor:
    """Log-probability of every response token under log softmax(z / T), in nats.

    Args:
        prompt_lengths, response_lengths: (B,) long.
        temperature: T.
        kept: a set for each response token, row by row: the softmax is over its tokens alone. None: over all.

    Returns:
        (B, R), float32 for a half-precision model; 0 after the end of a response.
    """
    inputs, prompt_lengths = model_inputs(model, inputs, prompt_lengths, response_lengths)
    window = _ResponseWindow(prompt_lengths, response_lengths)
    return window.spread(_read_tokens(model, inputs, window.row, window.position, temperature, kept=kept)[:, 0])


def response_log_probs_and_entropy(
    model: CausalLM,
    inputs: Mapping[str, Any],
    prompt_lengths: Tensor,
    response_lengths: Tensor,
    temperature: float = 1.0,
    kept: TokenSets | None = None,
) -> tuple[Tensor, Tensor]:
    """`response_log_probs` and, for monitoring, the entropy (nats) of the distribution at each token.

    Both (B, R), 0 after the end of a response; the entropy carries no gradient.
    """
    inputs, prompt_lengths = model_inputs(model, inputs, prompt_lengths, response_lengths)
    window = _ResponseWindow(prompt_lengths, response_lengths)
    numbers = _read_tokens(model, inputs, window.row, window.position, temperature, entropy=True, kept=kept)
    return window.spread(numbers[:, 0]), window.spread(numbers[:, 1])


def gather_response(values: Tensor, prompt_lengths: Tensor, response_lengths: Tensor) -> Tensor:
    """Values (B, L), one per position -> (B, R): column t is read where response token t is predicted.

    Half precision is raised to float32; 0 after the end of a response.
    """
    window = _ResponseWindow(prompt_lengths, response_lengths)
    return window.spread(_at_least_float32(values[window.row, window.position]))


def next_token_loss_sum(model: CausalLM, inputs: Mapping[str, Any], loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of -log p over the target tokens, and their number.

    Args:
        loss_mask: (B, L) bool, true where the token at that position is a target. No position predicts the first token
            of a row, so it never counts.

    Returns:
        Two scalars: the sum in nats (float32 for a half-precision model) and the number of tokens (long).
    """
    row, position = loss_mask[:, 1:].nonzero(as_tuple=True)
    return -_read_tokens(model, inputs, row, position).sum(), loss_mask[:, 1:].sum()


class _ResponseWindow:
    """The N positions that predict response tokens, and where their results lie in (B, R)."""

    def __init__(self, prompt_lengths: Tensor, response_lengths: Tensor) -> None:
        mask = length_mask(response_lengths, int(response_lengths.max()))
        self.shape = mask.shape
        self.row, self.column = mask.nonzero(as_tuple=True)
        self.position = prompt_lengths[self.row] - 1 + self.column

    def spread(self, picked: Tensor) -> Tensor:
        """(N,) -> (B, R)."""
        return picked.new_zeros(self.shape).index_put((self.row, self.column), picked)


def _read_tokens(
    model: CausalLM,
    inputs: Mapping[str, Any],
    row: Tensor,
    position: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    kept: TokenSets | None = None,
) -> Tensor:
    """Log-probability of the token after each of N positions, and with `entropy` the entropy of its distribution.

    row, position: (N,) long; kept: N sets. Returns (N, 2), or (N, 1) without the entropy.
    """
    tokens = predicted_ids(inputs)[row, position + 1]
    # Calling the head outside the model's forward would bypass ZeRO-3's hooks, so it is replaced within the forward.
    causal_lm: Any = getattr(model, "module", model)
    if _changes_logits(causal_lm):
        with _head_replaced(causal_lm, lambda head, hidden: head(hidden[row, position])[None]):
            logits = model(**inputs, use_cache=False).logits
        return _numbers(logits[0], tokens, temperature, entropy, kept)

    def read(head: Head, hidden: Tensor) -> Tensor:
        rows = max(1, CHUNK_NUMBERS // causal_lm.config.get_text_config().vocab_size)
        return _chunk_by_chunk(head, hidden[row, position], tokens, temperature, entropy, kept, rows)

    with _head_replaced(causal_lm, read):
        return model(**inputs, use_cache=False).logits


def _changes_logits(causal_lm: PreTrainedModel) -> bool:
    """Whether the model may scale or cap the logits of its head.

    For models of transformers the names in the configuration tell; any other model may.
    """
    config = vars(causal_lm.config.get_text_config())
    return not type(causal_lm).__module__.startswith("transformers.") or any(
        value and ("logit" in name or "lm_head" in name) for name, value in config.items()
    )


@contextmanager
def _head_replaced(causal_lm: PreTrainedModel, forward: Callable[[Head, Tensor], Tensor]) -> Iterator[None]:
    """Within the context the output head's forward is `forward(head, hidden states (B, L, H))`."""
    module: Any = causal_lm.get_output_embeddings()
    head = module.forward
    module.forward = lambda hidden: forward(head, hidden)
    try:
        yield
    finally:
        del module.forward


def _chunk_by_chunk(
    head: Head,
    hidden: Tensor,
    tokens: Tensor,
    temperature: float,
    entropy: bool,
    kept: TokenSets | None,
    rows: int,
) -> Tensor:
    """`_numbers` of head(hidden (N, H)), `rows` at a time; if there are several chunks, the backward pass recomputes
    each of them."""

    def numbers(hidden: Tensor, tokens: Tensor, kept: TokenSets | None) -> Tensor:
        return _numbers(head(hidden), tokens, temperature, entropy, kept)

    if len(tokens) <= rows:
        return numbers(hidden, tokens, kept)
    sets: Iterable[TokenSets | None] = repeat(None) if kept is None else kept.split(rows)
    return torch.cat(
        [
            checkpoint(numbers, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in zip(hidden.split(rows), tokens.split(rows), sets)
        ]
    )


def _numbers(logits: Tensor, tokens: Tensor, temperature: float, entropy: bool, kept: TokenSets | None) -> Tensor:
    """Log-probabilities of tokens (N,) under log softmax(z / T), z (N, V), and the entropy: (N, 2), or (N, 1)."""
    scaled = _at_least_float32(logits) / temperature
    if kept is not None:
        scaled = scaled.masked_fill_(~kept.members(), -torch.inf)
    log_probs = F.log_softmax(scaled, dim=-1)
    numbers = log_probs.gather(-1, tokens[:, None])
    if not entropy:
        return numbers
    return torch.cat([numbers, torch.special.entr(log_probs.detach().exp()).sum(-1, keepdim=True)], -1)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
