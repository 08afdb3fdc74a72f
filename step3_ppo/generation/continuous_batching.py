"""Generates with continuous batching: as soon as a response ends, its slot is given to the next prompt.

So the cost of decoding grows with the number of real tokens, not with rows times the longest response. A slot is a row
of a key-value cache that is allocated once. In one forward pass the slots have different lengths; the attention mask
and the position ids, which all decoder-only models of transformers take, tell them apart. No architecture is special
here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from common.runtime.signals import stop_requested
from step3_ppo.generation.cache_attention import attention_in, fastest_cache_dtype
from step3_ppo.generation.sampler_record import SamplerRecord
from step3_ppo.generation.sampling import NO_TOKEN, Sampling, sample_tokens, without_ends

PREFILL_TOKENS = 8192  # tokens of one prefill pass at most, padding included: bounds its memory
PREFILL_PADDING = 512  # padding tokens of one pass at most: they take about as long as one more pass


@dataclass(frozen=True)
class Request:
    """One response to generate.

    Attributes:
        prompt: token ids, at least one. Neighbouring requests with equal prompts share one prefill.
        uniform: (max_new_tokens,) in [0, 1): the random number behind each token.
        min_new_tokens: no end token before so many tokens.
        max_new_tokens: the response is cut after so many tokens.
    """

    prompt: tuple[int, ...]
    uniform: Tensor
    min_new_tokens: int
    max_new_tokens: int


def can_decode(config: PreTrainedConfig, longest: int) -> bool:
    """Whether every layer attends to all of `longest` tokens: no window shorter than that, no recurrent state."""
    config = config.get_text_config()
    if hasattr(config, "attention_layers"):  # GPT-Neo's names
        return "local" not in config.attention_layers or config.window_size >= longest
    kinds = set(getattr(config, "layer_types", None) or ["full_attention", "sliding_attention"])
    window = getattr(config, "sliding_window", None)
    if kinds - {"full_attention", "sliding_attention"}:
        return False
    return "sliding_attention" not in kinds or window is None or window >= longest


class SlotCache(Cache):
    """Keys and values of `slots` sequences of up to `columns` tokens, each at a length of its own, kept in `dtype`."""

    def __init__(self, config: PreTrainedConfig, slots: int, columns: int, dtype: torch.dtype):
        layers = config.get_text_config().num_hidden_layers
        self.slot_layers = [_SlotLayer(self) for _ in range(layers)]
        super().__init__(layers=list(self.slot_layers))
        self.slots, self.columns, self.dtype = slots, columns, dtype
        self.rows = self.places = torch.empty(0, dtype=torch.long)
        self.width = 0

    def begin_step(self, lengths: Tensor, width: int) -> None:
        """Prepare for a pass that adds a token to each of the first n slots.

        Args:
            lengths: (n,) long, tokens that these slots hold before the pass.
            width: tokens of the longest of them after it.
        """
        self.rows, self.places, self.width = torch.arange(len(lengths), device=lengths.device), lengths, width

    def fill(self, prefilled: DynamicCache, source: Tensor, target: Tensor) -> None:
        """Copy rows `source` of a prefill into the slots `target`, both (n,) long."""
        for layer, other in zip(self.slot_layers, prefilled.layers, strict=True):
            assert isinstance(other, CacheLayerMixin) and other.keys is not None and other.values is not None
            layer.fill(other.keys, other.values, source, target)

    def move(self, source: Tensor, target: Tensor, width: int) -> None:
        """Copy the first `width` columns of the slots `source` onto the slots `target`, both (n,) long."""
        for layer in self.slot_layers:
            for states in (layer.keys, layer.values):
                states[target, :, :width] = states[source, :, :width]


class _SlotLayer(CacheLayerMixin):
    is_sliding = False
    keys: Tensor  # (slots, heads, columns, head size)
    values: Tensor

    def __init__(self, cache: SlotCache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if not self.is_initialized:
            # Zeros: masked positions are multiplied by 0, and 0 times uninitialised memory may be NaN.
            self.keys, self.values = (
                states.new_zeros(
                    self.cache.slots, states.shape[1], self.cache.columns, states.shape[3], dtype=self.cache.dtype
                )
                for states in (key_states, value_states)
            )
            self.is_initialized = True

    def fill(self, keys: Tensor, values: Tensor, source: Tensor, target: Tensor) -> None:
        self.lazy_initialization(keys, values)
        width = keys.shape[2]
        self.keys[target, :, :width] = keys[source].to(self.keys.dtype)
        self.values[target, :, :width] = values[source].to(self.values.dtype)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.lazy_initialization(key_states, value_states)
        rows, width = self.cache.rows, self.cache.width
        self.keys[rows, :, self.cache.places] = key_states[:, :, 0].to(self.keys.dtype)
        self.values[rows, :, self.cache.places] = value_states[:, :, 0].to(self.values.dtype)
        return self.keys[: len(rows), :, :width], self.values[: len(rows), :, :width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.width, 0

    def get_seq_length(self) -> int:
        return self.cache.width - 1

    def get_max_length(self) -> int:
        return self.cache.columns


class Decoder:
    """Generates responses with a causal language model with unsharded weights, in evaluation mode.

    Args:
        model: of transformers; `can_decode` says whether it can be served.
        slots: sequences in one forward pass.
        end_ids: tokens that end a response.
        cache: cache of an earlier decoder, used again if it is large enough.
        cache_dtype: of keys and values; None: the dtype with which the model's attention is fastest.
    """

    def __init__(
        self,
        model,
        sampling: Sampling,
        *,
        slots: int,
        end_ids: Sequence[int],
        cache: SlotCache | None = None,
        cache_dtype: torch.dtype | None = None,
    ):
        self.model, self.sampling, self.slots, self.cache = model, sampling, slots, cache
        self.ends = torch.tensor(end_ids)
        self.device, self.cache_dtype = model.device, cache_dtype or fastest_cache_dtype(model)
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        # Prompts are admitted when so many slots are free: prefilling them one by one costs more than it gains.
        self.refill_at = max(1, slots // 8)

    @torch.no_grad()
    def run(
        self,
        requests: Sequence[Request],
        progress: Callable[[int], object] | None = None,
        record: SamplerRecord | None = None,
    ) -> list[list[int]]:
        """The tokens of the response to each request, the end token included.

        A response ends with `NO_TOKEN` where the logits were not finite. When this rank is asked to stop, responses are
        incomplete.

        Args:
            progress: called with the number of responses finished since the last call.
            record: gets what the sampler knows of each token; its rows are the requests.
        """
        responses: list[list[int]] = [[] for _ in requests]
        if requests:
            cache = self._allocate(max(len(request.prompt) + request.max_new_tokens for request in requests))
            with attention_in(self.model, self.cache_dtype):
                self._write(requests, responses, cache, progress or (lambda finished: None), record)
        return responses

    def _write(
        self,
        requests: Sequence[Request],
        responses: list[list[int]],
        cache: SlotCache,
        progress: Callable[[int], object],
        record: SamplerRecord | None,
    ) -> None:
        limits = torch.tensor([request.max_new_tokens for request in requests])
        minima = torch.tensor([request.min_new_tokens for request in requests])
        held_back = bool(minima.any())
        uniform = torch.stack(
            [
                torch.nn.functional.pad(request.uniform, (0, int(limits.max()) - len(request.uniform)))
                for request in requests
            ]
        ).to(self.device)
        # Longest prompts first: neighbours in the prefill and in the slots then need little padding.
        queue = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt))
        # For each slot in use: its request, its next input token, tokens in its cache, tokens of its response so far.
        index = fed = length = written = torch.empty(0, dtype=torch.long)
        while (queue or len(index)) and not stop_requested():
            if queue and (self.slots - len(index) >= self.refill_at or not len(index)):
                admitted, queue = queue[: self.slots - len(index)], queue[self.slots - len(index) :]
                prompts = [requests[request].prompt for request in admitted]
                self._prefill(prompts, len(index), cache)
                index = torch.cat([index, torch.tensor(admitted)])
                fed = torch.cat([fed, torch.tensor([prompt[-1] for prompt in prompts])])
                length = torch.cat([length, torch.tensor([len(prompt) - 1 for prompt in prompts])])
                written = torch.cat([written, torch.zeros(len(admitted), dtype=torch.long)])
            logits = self._forward(fed, length, cache)
            if held_back:
                logits = without_ends(logits, (written < minima[index]).to(self.device), self.ends.to(self.device))
            places = index.to(self.device), written.to(self.device)
            sampled = sample_tokens(logits, uniform[places], self.sampling)
            if record is not None:
                record.add(*places, sampled)
            fed = sampled.tokens.cpu()
            for request, token in zip(index.tolist(), fed.tolist()):
                responses[request].append(token)
            length, written = length + 1, written + 1
            going = ~torch.isin(fed, self.ends) & (fed != NO_TOKEN) & (written < limits[index])
            if not going.all():
                progress(int((~going).sum()))
                order = self._close_gaps(going, length, cache)
                index, fed, length, written = index[order], fed[order], length[order], written[order]

    def _allocate(self, columns: int) -> SlotCache:
        """A cache with at least `columns` columns: the present one if it is large enough, else a new one."""
        cache = self.cache
        if cache is None or cache.columns < columns or cache.slots < self.slots or cache.dtype != self.cache_dtype:
            cache = self.cache = SlotCache(self.model.config, self.slots, columns, self.cache_dtype)
        return cache

    def _prefill(self, prompts: Sequence[tuple[int, ...]], first_slot: int, cache: SlotCache) -> None:
        """Cache all but the last token of each prompt, in slots from `first_slot` on.

        The first decoding step feeds the last token, so no logits of the prompt are needed.
        """
        for group in prefill_groups([prompt for prompt in dict.fromkeys(prompts) if len(prompt) > 1]):
            lengths = torch.tensor([len(prompt) - 1 for prompt in group])
            width = int(lengths[0])
            ids = torch.full((len(group), width), int(self.ends[0]))
            for row, prompt in enumerate(group):
                ids[row, : len(prompt) - 1] = torch.tensor(prompt[:-1])
            mask = (torch.arange(width) < lengths[:, None]).long()
            prefilled = DynamicCache()
            self._call(ids, mask, (mask.cumsum(1) - 1).clamp_min(0), prefilled)
            rows = {prompt: row for row, prompt in enumerate(group)}
            pairs = [(rows[prompt], first_slot + slot) for slot, prompt in enumerate(prompts) if prompt in rows]
            source, target = torch.tensor(pairs, device=self.device).unbind(1)
            cache.fill(prefilled, source, target)

    def _forward(self, tokens: Tensor, lengths: Tensor, cache: SlotCache) -> Tensor:
        """(n, V) next-token logits after feeding one token to each of the first n slots."""
        width = int(lengths.max()) + 1
        places = lengths.to(self.device)
        cache.begin_step(places, width)
        mask = (torch.arange(width, device=self.device) <= places[:, None]).long()
        return self._call(tokens[:, None], mask, places[:, None], cache)[:, -1]

    def _call(self, input_ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        inputs = {"position_ids": positions.to(self.device)} if self.takes_positions else {}
        return self.model(
            input_ids=input_ids.to(self.device),
            attention_mask=mask.to(self.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **inputs,
        ).logits

    def _close_gaps(self, going: Tensor, lengths: Tensor, cache: SlotCache) -> Tensor:
        """Move the last slots in use into those whose responses have ended.

        Args:
            going: (n,) bool, slots whose responses go on.
            lengths: (n,) long, tokens in each slot.

        Returns:
            (m,) long: for each of the m slots now in use, the slot that its content came from.
        """
        count = int(going.sum())
        order = torch.arange(count)
        holes = (~going[:count]).nonzero().squeeze(1)
        if len(holes):
            movers = going[count:].nonzero().squeeze(1) + count
            order[holes] = movers
            cache.move(movers.to(self.device), holes.to(self.device), int(lengths[movers].max()))
        return order


def prefill_groups(prompts: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Group prompts, given longest first, into prefill passes of similar lengths: few passes, little padding."""
    groups: list[list[tuple[int, ...]]] = []
    padding = 0
    for prompt in prompts:
        width = len(groups[-1][0]) if groups else 0
        padding += width - len(prompt)
        if not groups or padding > PREFILL_PADDING or (len(groups[-1]) + 1) * width > PREFILL_TOKENS:
            groups.append([])
            padding = 0
        groups[-1].append(prompt)
    return groups
