"""Checks that a model of an earlier step fits this one: tokenizer, template, and the rule that splits the data."""

from __future__ import annotations

from typing import Any

from common.artifacts.provenance import Provenance, read_provenance
from common.artifacts.split_rule import check_split_rule
from common.data.options import ProgramConfig
from common.data.tokenization import Codec, load_tokenizer, make_codec, published_ends, tokenizer_fingerprint
from common.errors import ModelError
from common.models.configuration import check_vocabulary
from common.models.encoder_decoder import reads_source
from common.runtime.distributed import say


def open_codec(config: ProgramConfig, source: str) -> Codec:
    """Load the tokenizer and template for a model. If the model has a provenance, they must be those of its training.

    Raises:
        ModelError: the tokenizer cannot be loaded, or has more tokens than the model; or the model was trained with
            another template, end token, tokenizer or split of the data.
        UserError: an option does not suit the tokenizer.
    """
    tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
    check_vocabulary(source, tokenizer, config.trust_remote_code)
    with config.naming_flags():
        codec = make_codec(
            tokenizer,
            config.template,
            add_eot_token=config.add_eot_token,
            eot_token=config.eot_token,
            date=config.template_date,
            further_ends=published_ends(source),
            two_sided=reads_source(source, config.trust_remote_code),
        )
    if codec.date:
        say(
            f"note: the chat template of {source} writes the date: prompts of all steps say {codec.date}, whenever "
            "they are made (--template_date)"
        )
    provenance = read_provenance(source)
    if provenance is not None:
        check_text(provenance, codec, source, "this run")
        check_split_rule(provenance, config, source)
    return codec


def trained_codec(
    provenance: Provenance,
    name: str,
    *,
    weights: str | None = None,
    tokenizer_source: str | None = None,
    trust_remote_code: bool = False,
) -> Codec:
    """The codec that a model was trained with, as its provenance says.

    Args:
        name: directory or hub name of the model, as messages have it.
        weights, tokenizer_source: those of its weights and of its tokenizer, where they lie elsewhere.

    Raises:
        ModelError: the tokenizer is not the one of the training.
    """
    tokenizer_source = tokenizer_source or name
    tokenizer = load_tokenizer(tokenizer_source, trust_remote_code=trust_remote_code)
    template: dict[str, Any] = {
        "date": provenance.template_date,
        "further_ends": published_ends(weights or name),
        "two_sided": reads_source(weights or name, trust_remote_code),
    }
    codec = make_codec(tokenizer, provenance.template, **template)
    if codec.end_token != provenance.end_token:
        added: dict[str, Any] = {"add_eot_token": True, "eot_token": provenance.end_token}
        codec = make_codec(tokenizer, provenance.template, **added, **template)
    if tokenizer_fingerprint(codec.tokenizer) != provenance.tokenizer:
        raise ModelError(
            name,
            f"the tokenizer in {tokenizer_source} is not the one of the training: restore the directory or train the "
            "model again",
        )
    return codec


def check_text(provenance: Provenance, codec: Codec, model: str, used: str) -> None:
    """Raise ModelError if a model was trained with another template, end token or tokenizer than `codec` has.

    Args:
        model: directory of the model with this provenance.
        used: names the owner of the codec, for the message.
    """
    now = text_of(codec)
    for what in ("template", "template_date", "end_token", "tokenizer"):
        was = getattr(provenance, what)
        if was != now[what]:
            raise ModelError(
                model,
                f"it was trained with {what.replace('_', ' ')} {was[:24]!r}, but {used} has {now[what][:24]!r}: use "
                "the same in every step",
            )


def text_of(codec: Codec) -> dict[str, Any]:
    """The part of a provenance that says how text becomes ids."""
    return {
        "tokenizer": tokenizer_fingerprint(codec.tokenizer),
        "template": codec.template.name,
        "template_date": codec.date,
        "end_token": codec.end_token,
        "pad_token": codec.pad_token,
    }
