"""Decides whether a reward model can read the actor's ids, or reads text through a tokenizer of its own."""

from __future__ import annotations

import torch
from torch import nn

from common.artifacts.compatibility import text_of
from common.artifacts.provenance import read_provenance
from common.data.tokenization import Codec, load_tokenizer, tokenizer_fingerprint
from common.errors import ModelError
from common.models.configuration import gives_scores, load_config, without_embedding


def check_reward_model(source: str, trust_remote_code: bool = False) -> None:
    """Raises ModelError for a model that has no trained score head of one label."""
    if not gives_scores(source, trust_remote_code):
        raise ModelError(
            source, "it is no reward model: it has no trained score head; make one with step2_reward/main.py"
        )


def reads_ids_of(codec: Codec, source: str, trust_remote_code: bool = False) -> bool:
    """Whether a reward model makes the same ids of the same dialogue, and scores them at the last token.

    Raises:
        UserError: its tokenizer or its provenance cannot be read.
    """
    own = load_tokenizer(source, trust_remote_code=trust_remote_code)
    with_template = codec.template.name == "chat"
    fingerprints = [tokenizer_fingerprint(one, chat_template=with_template) for one in (own, codec.tokenizer)]
    provenance = read_provenance(source)
    if provenance is not None:
        now = text_of(codec)
        same = all(getattr(provenance, what) == now[what] for what in ("template", "template_date", "end_token"))
    else:
        same = True
    return same and fingerprints[0] == fingerprints[1] and scores_last_token(source, trust_remote_code)


def check_text_model(source: str, trust_remote_code: bool = False) -> None:
    """Raises ModelError for a classifier that is not of one label by its config.json, or that lacks tokens of its
    tokenizer."""
    config = load_config(source, trust_remote_code)
    if config.num_labels != 1:
        raise ModelError(
            source, f"it is a classifier of {config.num_labels} labels, and a reward model gives one score"
        )
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    if without_embedding(config, tokenizer):
        known = config.get_text_config().vocab_size
        raise ModelError(
            source,
            f"its tokenizer has {len(tokenizer)} tokens and its config.json {known}: they are not of one model; put "
            "the files of the model's own tokenizer there",
        )


def scores_last_token(source: str, trust_remote_code: bool = False) -> bool:
    """Whether the head of a sequence-classification model is read at the last token: a decoder's, called `score`."""
    from transformers import AutoModelForSequenceClassification

    config = load_config(source, trust_remote_code, num_labels=1)
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # loading it says what is wrong
        return False
    return isinstance(getattr(model, "score", None), nn.Linear)
