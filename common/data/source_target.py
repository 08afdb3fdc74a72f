"""Text to ids for encoder-decoder models: the prompt is the source, the response the target."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from common.data.records import Prompt, Response
from common.data.templates import Template
from common.data.tokenization import Codec, closing_ids


class SourceTargetCodec(Codec):
    """A `Codec` for a model that reads the prompt with an encoder and writes the response with a decoder.

    The template words the source alone. As in the model's pre-training, the source is closed by the tokens that the
    tokenizer puts behind a text, such as T5's </s>. The target is a text of its own, so it has no lead; it ends with
    the end token.
    """

    two_sided: ClassVar[bool] = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        end_token: str,
        further_ends: Iterable[object] = (),
    ):
        super().__init__(tokenizer, template, end_token, further_ends)
        self._close = closing_ids(tokenizer) or [self.end_id]
        self.shortest_prompt += len(self._close)
        self._lead = self._space = []  # nothing stands before a target

    def encode_prompt(self, prompt: Prompt, max_tokens: int | None = None) -> list[int]:
        """Ids of the source: the prompt up to and including the assistant's cue, and the tokens that close it."""
        ids = super().encode_prompt(prompt)
        if ids[-len(self._close) :] != self._close:
            ids = ids + self._close
        return ids if max_tokens is None else self.cut_prompt(ids, max_tokens)

    def encode_response(self, response: Response, prompt: Prompt | None = None) -> list[int]:
        """Ids of the target: the response without the template's lead, and the end token."""
        first, *others = self.template.response_pieces(response, prompt)
        ids = self._ids([first._replace(text=first.text.removeprefix(self.template.lead)), *others])
        return ids if ids[-1:] == [self.end_id] else [*ids, self.end_id]
