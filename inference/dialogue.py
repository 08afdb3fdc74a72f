"""Keeps the turns of a dialogue, and drops the oldest when the prompt becomes too long for the model."""

from __future__ import annotations

from common.data.options import naming_flags
from common.data.records import Message, Prompt
from common.data.tokenization import Codec


class Dialogue:
    """Turns of user and assistant in order.

    Args:
        codec: of the model that responds.
        max_prompt_tokens: the longest prompt that the model can take; None: no limit.
        system: the system prompt, which comes before the first turn.
    """

    def __init__(self, codec: Codec, max_prompt_tokens: int | None = None, system: str | None = None):
        self._codec, self._max_prompt_tokens = codec, max_prompt_tokens
        self._system = (Message("system", system),) if system else ()
        self._turns: list[Message] = []

    def reset(self) -> None:
        """Forget all turns; the system prompt stays."""
        self._turns = []

    def ask(self, question: str) -> tuple[list[int], str | None]:
        """Add the user's turn.

        Returns:
            The ids of the prompt, and a notice if something of the dialogue had to be left out to make room.
        """
        self._turns.append(Message("user", question))
        ids, dropped = self._encode(), 0
        while self._too_long(ids) and len(self._turns) > 1:
            del self._turns[:2]
            ids, dropped = self._encode(), dropped + 1
        if self._too_long(ids):
            assert self._max_prompt_tokens is not None
            cut = len(ids) - self._max_prompt_tokens
            kept = self._codec.cut_prompt(ids, self._max_prompt_tokens)
            return kept, f"too long a question: its first {cut} tokens are cut"
        if dropped:
            return ids, f"too long a dialogue: the oldest turns are forgotten ({dropped})"
        return ids, None

    def add_response(self, text: str) -> None:
        """Add the assistant's turn."""
        self._turns.append(Message("assistant", text.strip()))

    @naming_flags()
    def _encode(self) -> list[int]:
        return self._codec.encode_prompt(Prompt((*self._system, *self._turns)))

    def _too_long(self, ids: list[int]) -> bool:
        return self._max_prompt_tokens is not None and len(ids) > self._max_prompt_tokens
