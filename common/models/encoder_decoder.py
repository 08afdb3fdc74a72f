"""Feeds models that have an encoder and a decoder, as T5 (Raffel et al. 2020, arXiv:1910.10683).

A row of data is prompt and response joined in one sequence, for every model. An encoder-decoder reads the prompt with
its encoder, as the source, and predicts the response with its decoder, as the target. The decoder's sequence is a start
token and the response. So it is read as that of a decoder-only model is, with one token before the response.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled

FAMILIES = ("t5",)  # Flan-T5 and Flan-UL2 are of it too
_OUTPUT = "lm_head.weight"


def is_encoder_decoder(config: PreTrainedConfig | None) -> bool:
    """Whether a configuration is that of an encoder-decoder, of any family."""
    return bool(getattr(config, "is_encoder_decoder", False))


def reads_source(source: str, trust_remote_code: bool = False) -> bool:
    """Whether the model in a directory or of a hub name is an encoder-decoder; False where that cannot be told."""
    try:
        return is_encoder_decoder(AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code))
    except Exception:  # a missing or damaged file may raise anything; loading the model says what is wrong
        return False


@contextlib.contextmanager
def output_untied(auto_class: Any, config: PreTrainedConfig) -> Iterator[None]:
    """Within the context a Flan-T5 is loaded with output embeddings of its own, also where ZeRO-3 partitions weights.

    transformers ties the output of every T5 to its input, unless their values in the files differ. It compares them
    after loading, when partitioned weights are empty on every rank and so seem equal. Those that do not scale the
    decoder's states before the output are of the later kind, whose two matrices differ.
    """
    if config.model_type not in FAMILIES or config.scale_decoder_outputs or not is_deepspeed_zero3_enabled():
        yield
        return
    kind = auto_class._model_mapping[type(config)]
    tied = kind._tied_weights_keys or {}
    if _OUTPUT not in tied:  # a classifier
        yield
        return
    kind._tied_weights_keys = {name: other for name, other in tied.items() if name != _OUTPUT}
    try:
        yield
    finally:
        kind._tied_weights_keys = tied


def keep_output_untied(model: Any) -> None:
    """Have a model whose output was loaded untied stay so, for instance when its embeddings are resized."""
    if model.config.model_type in FAMILIES:
        model._tied_weights_keys = dict(model.all_tied_weights_keys)


def start_id(model: Any) -> int | None:
    """The token that a decoder's sequence starts with; None for a model that has no encoder.

    Args:
        model: of transformers, a `TargetScalarModel`, any other model without `config`, or an engine around one.
    """
    config = getattr(getattr(model, "module", model), "config", None)
    start: int | None = getattr(config, "decoder_start_token_id", None) if is_encoder_decoder(config) else None
    return start


def model_inputs(
    model: Any, inputs: Mapping[str, Any], prompt_lengths: Tensor, response_lengths: Tensor
) -> tuple[Mapping[str, Any], Tensor]:
    """What a model reads of prompts and responses, and how many tokens stand before each response there.

    Args:
        model: as of `start_id`.
        inputs: the inputs of a decoder-only model, among them `input_ids` (B, L) long: prompt and response joined.
        prompt_lengths, response_lengths: (B,) long.

    Returns:
        The arguments as they are for a model that has no encoder. Else `input_ids` and `attention_mask` (B, P) of the
        sources and `decoder_input_ids` (B, 1 + R) of the targets, both padded on the right, and ones (B,).
    """
    start = start_id(model)
    if start is None:
        return inputs, prompt_lengths
    tokens: Tensor = inputs["input_ids"]
    place = torch.arange(int(prompt_lengths.max()), device=tokens.device)
    column = torch.arange(int(response_lengths.max()), device=tokens.device)
    response = tokens.gather(1, (prompt_lengths[:, None] + column).clamp_max(tokens.shape[1] - 1))
    source_and_target = {
        "input_ids": tokens[:, : len(place)],  # what follows a shorter prompt is hidden by the mask
        "attention_mask": (place < prompt_lengths[:, None]).long(),
        "decoder_input_ids": torch.cat([torch.full_like(tokens[:, :1], start), response], 1),
    }
    return source_and_target, torch.ones_like(prompt_lengths)


def predicted_ids(inputs: Mapping[str, Any]) -> Tensor:
    """(B, L) long: the sequences in which a model predicts each token from those before it."""
    ids: Tensor = inputs.get("decoder_input_ids", inputs["input_ids"])
    return ids


def prompt_width(model: Any, prompts: Tensor) -> int:
    """Columns that stand before the responses in what `generate` returns for prompts (B, P)."""
    return prompts.shape[1] if start_id(model) is None else 1


def behind_prompts(model: Any, prompts: Tensor, generated: Tensor) -> Tensor:
    """What `generate` returned for prompts (B, P), as (B S, P + T): prompts followed by responses, for every model.

    Args:
        generated: S responses to each prompt, those of one prompt together.
    """
    if start_id(model) is None:
        return generated
    repeated = prompts.repeat_interleave(len(generated) // len(prompts), 0)
    return torch.cat([repeated, generated[:, prompt_width(model, prompts) :]], 1)
