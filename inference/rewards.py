"""Scores answers by what --reward names: functions, services, reward models."""

from __future__ import annotations

import json
from collections.abc import Sequence

from common.data.keeping import messages_of
from common.data.records import Prompt
from common.data.tokenization import Codec
from common.errors import UserError, named_by
from common.paths import writing_to
from common.rewards.batch import BatchReward, RewardBatch, columns_in
from common.rewards.opening import MADE_UP, TRIED_PROMPTS, kept_columns, open_functions, open_reward, try_reward
from common.rewards.options import NamedRewards
from common.rewards.reading import check_text_model, scores_last_token
from common.rewards.spec import RewardSpec
from common.rewards.text_model import TextRewardModel
from inference.decoding import Response
from inference.loading import LoadedModel, choose_device, choose_dtype, load_reward_model
from inference.locating import find_model
from inference.options import LoadOptions
from inference.prompts import PromptOfRow
from inference.scoring import score_responses


class Rewards:
    """Several rewards, each with a weight. A decoder reads dialogues through the template and tokenizer of its own.

    Args:
        specs: the rewards; perhaps none.
        options: how functions and services are called.
        flag: the option that named them, for messages.

    Attributes:
        keep: the columns that reading prompts is to keep of their rows.

    Raises:
        UserError: a function cannot be loaded, or the variable of the authorisation is not set.
    """

    def __init__(self, specs: Sequence[RewardSpec], options: NamedRewards, flag: str = "--reward"):
        self.specs, self.flag = tuple(specs), flag
        self._scorers: dict[str, BatchReward] = {}
        self._models: dict[str, LoadedModel] = {}
        with named_by(flag):
            functions = open_functions(self.specs)
        for spec in self.specs:
            if spec.kind != "model":
                with named_by("--reward_header_env" if spec.kind == "service" else flag):
                    self._scorers[spec.label] = open_reward(spec, functions.get(spec.name), options)
        self.functions = list(functions.values())
        self.keep = kept_columns(self.functions, options.keep_columns)

    def try_on(self, prompts: Sequence[Prompt]) -> None:
        """Let functions and services score a made-up response. Raises UserError if one fails."""
        some = list(prompts[:TRIED_PROMPTS])
        batch = self._batch(some, [Response(MADE_UP, (0,), True)] * len(some), None)
        for spec in self.specs:
            if spec.label in self._scorers:
                with named_by(self.flag):
                    try_reward(spec.name, self._scorers[spec.label], batch)

    def load_models(self, options: LoadOptions, batch_size: int, max_tokens: int | None = None) -> None:
        """Load the reward models among them. Raises UserError for one that cannot be used.

        Args:
            max_tokens: of a dialogue, where a model reads text.
        """
        for spec in self.specs:
            if spec.kind != "model":
                continue
            with named_by(self.flag), writing_to("--data_output_path", options.data_output_path):
                files = find_model(spec.name, options.data_output_path, merge_adapter=options.merge_adapter)
            with named_by(self.flag, {files.weights: spec.name}):
                if files.adapter or scores_last_token(files.weights, options.trust_remote_code):
                    self._models[spec.label] = load_reward_model(spec.name, options)
                    continue
                check_text_model(files.weights, options.trust_remote_code)
                device = choose_device(options.device)
                self._scorers[spec.label] = TextRewardModel(
                    files.weights,
                    dtype=choose_dtype(options.dtype, device),
                    device=device,
                    batch_size=batch_size,
                    max_tokens=max_tokens,
                    trust_remote_code=options.trust_remote_code,
                )

    def scores(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], codec: Codec, batch_size: int
    ) -> dict[str, list[float]]:
        """The raw scores of every reward, by its label.

        Args:
            codec: of the model that wrote the responses.
            batch_size: of a reward model that is a decoder.

        Raises:
            UserError: a reward fails on a response.
        """
        batch = self._batch(prompts, responses, codec)
        found = {}
        for spec in self.specs:
            if spec.label in self._models:
                found[spec.label] = score_responses(self._models[spec.label], prompts, responses, batch_size)
                continue
            scores = self._scorers[spec.label].score(batch)
            for failure in scores.failures:
                line = failure.line(spec.name, failure.response + 1, batch.rows[failure.response])
                raise UserError(f"{self.flag} {line}")
            found[spec.label] = scores.numbers
        return found

    def total(self, scores: dict[str, list[float]]) -> list[float]:
        """The weighted sum of raw scores, for each response."""
        weights = {spec.label: spec.weight for spec in self.specs}
        return [
            sum(weights[label] * number for label, number in zip(scores, numbers)) for numbers in zip(*scores.values())
        ]

    def close(self) -> None:
        """End what the rewards have started."""
        for scorer in self._scorers.values():
            scorer.close()

    def _batch(self, prompts: Sequence[Prompt], responses: Sequence[Response], codec: Codec | None) -> RewardBatch:
        rows = [prompt if isinstance(prompt, PromptOfRow) else PromptOfRow(prompt.messages) for prompt in prompts]
        return RewardBatch(
            [_text(prompt, codec) for prompt in prompts],
            [messages_of(prompt) for prompt in prompts],
            [response.text for response in responses],
            [[*response.ids, *([codec.end_id] if codec and response.ended else [])] for response in responses],
            [response.ended for response in responses],
            columns_in([{"columns": json.loads(row.columns)} for row in rows]),
            [row.location for row in rows],
        )


def _text(prompt: Prompt, codec: Codec | None) -> str:
    """A prompt as the model's template renders it, without special tokens; without a codec, its last message."""
    if codec is None:
        return prompt.messages[-1].content
    return str(codec.tokenizer.decode(codec.encode_prompt(prompt), skip_special_tokens=True))
