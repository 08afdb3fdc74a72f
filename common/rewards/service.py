"""Asks a service for scores: JSON over HTTP, with limits of time, repeated attempts and an authorisation header."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.rewards.answers import WrongAnswer, read_answer
from common.rewards.batch import RewardBatch, Scores, merged
from common.rewards.errors import Failure, RewardError

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds before the second attempt, doubled before each later one
_SHOWN = 120  # characters of what a service said


@dataclass(frozen=True)
class ServiceSettings:
    """How services are asked.

    Attributes:
        batch_size: responses of one request at most.
        timeout: seconds that an attempt may take.
        retries: further attempts after one that failed to connect, took too long, or was answered by 429 or 5xx.
        header_env: the environment variable whose value is sent as authorisation; None: none is sent.
    """

    batch_size: int = 16
    timeout: float = 60.0
    retries: int = 3
    header_env: str | None = None


class ServiceReward:
    """A service that gives scores.

    It gets `POST {"prompts": [...], "messages": [...], "responses": [...], "response_ids": [...], "columns": {...}}`,
    and answers with `{"scores": [...]}`, perhaps with `"figures": {...}` beside them, or with the list alone.

    Args:
        url: of the service.
        wait: sleeps for a number of seconds.

    Raises:
        RewardError: the environment variable for the authorisation is not set.
    """

    def __init__(self, url: str, settings: ServiceSettings, wait: Callable[[float], None] = time.sleep):
        import httpx2

        self.url, self.settings, self._wait = url, settings, wait
        self._secret = _secret(settings.header_env)
        headers = {"Authorization": self._secret} if self._secret else {}
        self._client = httpx2.Client(headers=headers, timeout=settings.timeout)

    def score(self, batch: RewardBatch) -> Scores:
        parts = batch.parts(self.settings.batch_size)
        return merged(len(batch), [(indices, self._score(batch.select(indices))) for indices in parts])

    def close(self) -> None:
        self._client.close()

    def _score(self, batch: RewardBatch) -> Scores:
        try:
            return read_answer(self._asked(batch), len(batch))
        except WrongAnswer as error:
            failures = [Failure(at, str(error)) for at in range(len(batch))]
            return Scores([0.0] * len(batch), failures=tuple(failures))

    def _asked(self, batch: RewardBatch) -> Any:
        """What the service answers to a batch, as `read_answer` takes it; raises WrongAnswer."""
        names = ("prompts", "messages", "responses", "response_ids", "columns")
        response = self._posted({name: getattr(batch, name) for name in names})
        try:
            answer = response.json()
        except ValueError:
            raise WrongAnswer(f"it answered with {self._shown(response.text)}, which is no JSON") from None
        if isinstance(answer, list):
            return answer
        if not isinstance(answer, dict) or "scores" not in answer:
            raise WrongAnswer(
                f"it answered with {self._shown(response.text)}: it must answer with "
                '{"scores": [...]} or a list of numbers'
            )
        figures = answer.get("figures")
        if figures is not None and not isinstance(figures, dict):
            raise WrongAnswer("its figures are no object of numbers")
        return (answer["scores"], figures) if figures else answer["scores"]

    def _posted(self, body: dict[str, Any]) -> Any:
        """The response to a request that was answered well, after as many attempts as it took."""
        import httpx2

        why = ""
        for attempt in range(self.settings.retries + 1):
            if attempt:
                self._wait(min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE))
            try:
                response = self._client.post(self.url, json=body)
            except httpx2.TimeoutException:
                why = f"it gave no answer within {self.settings.timeout:g} seconds (--reward_timeout)"
                continue
            except httpx2.InvalidURL as error:
                raise WrongAnswer(f"its address cannot be used: {self._shown(str(error))}") from None
            except httpx2.TransportError as error:
                why = f"it cannot be reached: {self._shown(str(error))}"
                continue
            except ValueError as error:  # NaN in a column is no JSON
                raise WrongAnswer(f"its request cannot be written as JSON: {error}") from None
            if response.is_success:
                return response
            why = f"it answered {response.status_code} {response.reason_phrase}".rstrip()
            if response.status_code != 429 and response.status_code < 500:
                raise WrongAnswer(f"{why}: {self._shown(response.text)}")
        attempts = self.settings.retries + 1
        raise WrongAnswer(why + (f", at each of {attempts} attempts (--reward_retries)" if attempts > 1 else ""))

    def _shown(self, text: str) -> str:
        """What a service said, in one line and without the secret."""
        if self._secret:
            for secret in (self._secret, self._secret.partition(" ")[2]):
                text = text.replace(secret, "***")
        return repr(" ".join(text.split())[:_SHOWN])


def _secret(variable: str | None) -> str:
    """The value of the header: the variable's own if that begins with a scheme, as in "Basic ...", else a token."""
    if variable is None:
        return ""
    value = os.environ.get(variable, "").strip()
    if not value:
        raise RewardError(variable, "the environment variable is not set, or empty")
    if not value.isascii() or not value.isprintable():
        raise RewardError(variable, "the environment variable holds what no header can hold")
    return value if re.match(r"[A-Za-z][\w-]* +\S", value) else f"Bearer {value}"
