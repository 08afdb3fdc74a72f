"""Checks the models and prepares the data that a run starts from, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from common.artifacts.compatibility import open_codec
from common.artifacts.model_source import resolve_model
from common.artifacts.run import say_data
from common.artifacts.split_rule import data_request
from common.data.prepare import PreparedData, prepare
from common.data.request import DataRequest
from common.data.tokenization import Codec
from common.errors import named_by
from common.models.loading import EncoderError, check_gives_values, check_language_model, check_length
from common.paths import writing_to
from common.runtime.distributed import say
from common.training.engine import check_engine_options
from step3_ppo.calibration import ScoreScale, read_calibration
from step3_ppo.config import PPOConfig


@dataclass(frozen=True)
class RunInputs:
    """The checked inputs of a run.

    Attributes:
        actor: directory or hub name of the fine-tuned model.
        critic: that of the reward model, which is also the critic's start; with a reward of the program's own only
            the latter. None where neither is wanted.
        codec: the actor's tokenizer and template.
        scale: the scale of the scores.
        prompts: to train and to evaluate on.
        texts: plain text of the pre-training mix; None without it.
    """

    actor: str
    critic: str | None
    codec: Codec
    scale: ScoreScale
    prompts: PreparedData
    texts: PreparedData | None

    @property
    def data(self) -> list[PreparedData]:
        """All prepared data."""
        return [self.prompts, *([self.texts] if self.texts is not None else [])]


def read_inputs(config: PPOConfig) -> RunInputs:
    """Check the models and prepare the data, before the process group exists. One process per machine prepares.

    Raises:
        UserError: a model or the data cannot be used.
    """
    check_engine_options(config)
    actor = checked_model(config, "actor_model_name_or_path", check_language_model)
    critic = None
    if config.reads_reward_model:
        critic = checked_model(config, "critic_model_name_or_path", check_critic)
    with named_by("--actor_model_name_or_path", {actor: config.actor_model_name_or_path}):
        codec = open_codec(config, actor, "--actor_model_name_or_path")
    scale = ScoreScale(read_calibration(config, codec, critic))
    with config.naming_flags("--max_prompt_seq_len"):
        prompts = prepare(data_request(config, "prompt", config.max_prompt_seq_len), codec)
    say_data(prompts)
    with config.naming_flags("--max_prompt_seq_len and --max_answer_seq_len"):
        texts = prepare(text_request(config), codec) if config.unsupervised_dataset_name else None
    warn(config)
    return RunInputs(actor, critic, codec, scale, prompts, texts)


def checked_model(config: PPOConfig, option: str, check: Callable[[str, bool], object]) -> str:
    """The directory or hub name to load the model from that an option names.

    Args:
        check: raises ModelError if it is of the wrong kind; its arguments are the model and --trust_remote_code.

    Raises:
        UserError: there is no such model, or it is of the wrong kind, or too small for the longest prompt and answer.
    """
    name: str = getattr(config, option)
    with writing_to("--data_output_path", config.data_output_path), named_by(f"--{option}"):
        source = resolve_model(name, config.data_output_path, config.merge_adapter)
    with named_by(f"--{option}", {source: name}):
        check(source, config.trust_remote_code)
    with named_by(f"--max_prompt_seq_len and --max_answer_seq_len are too large for --{option}", {source: name}):
        check_length(source, config.max_prompt_seq_len + config.max_answer_seq_len, config.trust_remote_code)
    return source


def check_critic(source: str, trust_remote_code: bool = False) -> None:
    """Raises ModelError if a critic cannot start from this model. Loads no weights."""
    try:
        check_gives_values(source, trust_remote_code)
    except EncoderError as error:
        raise EncoderError(source, f"{error.why}; --reward takes an encoder, as a reward that reads text") from None


def text_request(config: PPOConfig) -> DataRequest:
    """The request for the plain text of the pre-training mix: all rows, because they hold no prompts to divide."""
    return DataRequest(
        data_path=config.text_sources(),
        kind="text",
        phase=None,
        eval_fraction=0.0,
        max_rows=config.max_rows,
        columns=config.columns or None,
        max_tokens=config.max_prompt_seq_len + config.max_answer_seq_len,
        max_bad_fraction=config.max_bad_rows,
        cache_dir=config.data_output_path,
    )


def warn(config: PPOConfig) -> None:
    """Print a note or a warning about options that are allowed but rarely intended."""
    if unused := config.unused_options():
        flags = ", ".join(f"--{name}" for name in unused)
        say(f"note: --advantage {config.advantage} does not use {flags}: without effect")
    if config.sampling.truncated:
        say(
            "warning: with --top_p, --top_k or --min_answer_seq_len answers are not sampled from the policy that is "
            "trained: the ratio of new to old policy is then only approximate"
        )
