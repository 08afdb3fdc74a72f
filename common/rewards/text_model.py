"""Scores responses by any sequence-classification model with one label, which reads text through its own tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from common.artifacts.compatibility import trained_codec
from common.artifacts.provenance import read_provenance
from common.data.keeping import prompt_of
from common.data.records import Prompt
from common.data.tokenization import Codec, load_tokenizer, make_codec, published_ends
from common.errors import ModelError
from common.models.configuration import load_config, max_positions
from common.models.encoder_decoder import is_encoder_decoder
from common.models.heads import head_names, is_encoder_config
from common.models.loading import load_classifier
from common.models.scalar import EncoderModel, scoring_model, sequence_scores
from common.rewards.batch import Messages, RewardBatch, Scores
from common.runtime.distributed import say

_NO_LIMIT = 10**6  # a tokenizer without a limit of its own says 1e30


class TextRewardModel:
    """A frozen reward model with a tokenizer and an architecture of its own; it is whole on every rank.

    It reads a dialogue as it was trained to: by the template of its provenance; else by its tokenizer's chat template;
    else as a pair of texts, prompt and response. What is too long loses its beginning.

    Args:
        source: directory or hub name.
        device: where it computes.
        batch_size: responses of one pass.
        offload: keep the weights in CPU memory between the calls.
        max_tokens: of a dialogue; None: as many as the model can read.
        quantize: how its linear layers are held: none, nf4 or int8. They then compute in `dtype`.

    Raises:
        ModelError: it cannot be loaded.
    """

    def __init__(
        self,
        source: str,
        *,
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int,
        offload: bool = False,
        quantize: str = "none",
        trust_remote_code: bool = False,
        max_tokens: int | None = None,
    ):
        self.device, self.batch_size, self.offload = device, batch_size, offload
        classifier = load_classifier(source, dtype=dtype, trust_remote_code=trust_remote_code, quantize=quantize)
        self.encoding = dialogue_encoding(source, trust_remote_code)
        limits = [limit for limit in (max_tokens, _max_tokens(classifier, self.encoding.tokenizer)) if limit]
        self.max_tokens = min(limits, default=None)
        # A tokenizer without padding was given a token that the model may lack. Padding is masked: any id will do.
        embeddings: Any = classifier.get_input_embeddings()
        self.pad_id = self.encoding.pad_id if self.encoding.pad_id < embeddings.num_embeddings else 0
        # A head called `score` is that of a decoder, which is read at the last token; other models pool by themselves.
        self._decoder = isinstance(getattr(classifier, "score", None), nn.Linear)
        model: nn.Module = classifier
        config = classifier.config
        has_own_head = is_encoder_config(config) or is_encoder_decoder(config) and head_names(classifier)
        if self._decoder or has_own_head:
            model = scoring_model(classifier)  # its head computes in fp32
        self.model = model.eval().requires_grad_(False).to("cpu" if offload else device)
        if self.max_tokens is not None:
            say(
                f"note: the reward model {source} reads {self.max_tokens} tokens at most: longer dialogues lose their "
                "beginning, and the figure truncated says how many do"
            )

    @torch.inference_mode()
    def score(self, batch: RewardBatch) -> Scores:
        encoded, cut = self._encoded(batch)
        order = sorted(range(len(encoded)), key=lambda at: -len(encoded[at]["input_ids"]))
        numbers = [0.0] * len(batch)
        if self.offload:
            self.model.to(self.device)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            for at, number in zip(rows, self._scores([encoded[at] for at in rows]).tolist()):
                numbers[at] = number
        if self.offload:
            self.model.to("cpu")
        if not len(batch):
            return Scores(numbers)
        return Scores(numbers, {"truncated": cut / len(batch)})

    def close(self) -> None:
        """Nothing was started."""

    def _encoded(self, batch: RewardBatch) -> tuple[list[dict[str, list[int]]], int]:
        """The inputs of each response, and how many were too long."""
        encoded, cut = [], 0
        for messages, response, finished in zip(batch.messages, batch.responses, batch.finished):
            row, is_cut = self.encoding(messages, response, finished, self.max_tokens)
            encoded.append(row)
            cut += is_cut
        return encoded, cut

    def _scores(self, rows: list[dict[str, list[int]]]) -> Tensor:
        """(b,) fp32 raw scores."""
        lengths = [len(row["input_ids"]) for row in rows]
        padding = {"input_ids": self.pad_id, "attention_mask": 0, "token_type_ids": 0}
        width = max(lengths)
        inputs = {
            name: torch.tensor([row[name] + [padding[name]] * (width - len(row[name])) for row in rows]).to(self.device)
            for name in rows[0]
            if name in padding
        }
        if self._decoder:
            return sequence_scores(self.model, inputs["input_ids"], torch.tensor(lengths, device=self.device))
        classifier = self.model.classifier if isinstance(self.model, EncoderModel) else self.model
        return classifier(**inputs).logits[:, 0].float()


class DialogueEncoding:
    """How a dialogue becomes the inputs of a model. Calling it encodes one response.

    Args:
        encode: the inputs from messages, response, whether it is finished, and the most tokens or None.

    Attributes:
        tokenizer: the model's own.
        pad_id: of its padding.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encode: Callable[..., dict[str, list[int]]]):
        self.tokenizer, self._encode = tokenizer, encode
        self.pad_id = int(tokenizer.pad_token_id)

    def __call__(
        self, messages: Messages, response: str, finished: bool, max_tokens: int | None
    ) -> tuple[dict[str, list[int]], bool]:
        """The inputs of a model for one response, at most `max_tokens` long, and whether it was cut for that."""
        whole = self._encode(messages, response, finished, None)
        if max_tokens is None or len(whole["input_ids"]) <= max_tokens:
            return whole, False
        return self._encode(messages, response, finished, max_tokens), True


def dialogue_encoding(source: str, trust_remote_code: bool = False) -> DialogueEncoding:
    """How a reward model reads dialogues: by its provenance, by its chat template, or as a pair of texts.

    Raises:
        UserError: its tokenizer cannot be used.
    """
    config = load_config(source, trust_remote_code)
    closed = is_encoder_config(config) or is_encoder_decoder(config)
    provenance = read_provenance(source)
    if provenance is not None:
        codec = trained_codec(provenance, source, trust_remote_code=trust_remote_code)
        return DialogueEncoding(codec.tokenizer, _by_codec(codec, closed))
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    if tokenizer.chat_template:
        codec = make_codec(tokenizer, "chat", further_ends=published_ends(source))
        return DialogueEncoding(codec.tokenizer, _by_codec(codec, closed))
    if tokenizer.pad_token_id is None:
        raise ModelError(source, "its tokenizer has no padding token")
    return DialogueEncoding(tokenizer, _as_pair(tokenizer))


def _by_codec(codec: Codec, closed: bool) -> Callable[..., dict[str, list[int]]]:
    """The ids that a model was trained on.

    Args:
        closed: whether the end token closes unfinished responses too, as it does for models with an encoder.
    """

    def encode(messages: Messages, response: str, finished: bool, max_tokens: int | None) -> dict[str, list[int]]:
        ids = dialogue_ids(codec, prompt_of(messages), response, finished or closed, max_tokens)
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    return encode


def dialogue_ids(codec: Codec, prompt: Prompt, response: str, ended: bool, max_tokens: int | None) -> list[int]:
    """The ids of a prompt and a response, at most `max_tokens`: the prompt loses its beginning first, and if that is
    not enough, so does the response, because a score is read at the end.

    Args:
        ended: whether the end token follows.
    """
    response_ids = codec.encode_response(response)
    if not ended:
        response_ids = response_ids[:-1]
    if max_tokens is None:
        return codec.encode_prompt(prompt) + response_ids
    room = max_tokens - codec.shortest_prompt
    if len(response_ids) > room:
        response_ids = response_ids[len(response_ids) - room :]
    return codec.encode_prompt(prompt, max_tokens - len(response_ids)) + response_ids


def _as_pair(tokenizer: PreTrainedTokenizerBase) -> Callable[..., dict[str, list[int]]]:
    tokenizer.truncation_side = "left"

    def encode(messages: Messages, response: str, finished: bool, max_tokens: int | None) -> dict[str, list[int]]:
        texts = plain_dialogue(messages), response
        if max_tokens is None:
            return dict(tokenizer(*texts, verbose=False))
        room = max_tokens - tokenizer.num_special_tokens_to_add(pair=True)
        fits = len(tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"]) < room
        # A response that leaves no room loses its beginning as well.
        return dict(tokenizer(*texts, truncation="only_first" if fits else "longest_first", max_length=max_tokens))

    return encode


def plain_dialogue(messages: Messages) -> str:
    """A dialogue as text without a template: the only message itself, else a line for each, "Role: content"."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def _max_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens that a model can read at once; None if there is no limit."""
    positions = max_positions(model.config)
    limits = [limit for limit in (positions, tokenizer.model_max_length) if limit is not None and limit < _NO_LIMIT]
    return min(limits) if limits else None
