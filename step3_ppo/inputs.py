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
from common.errors import UserError, named_by
from common.models.calibration import RAW
from common.models.configuration import EncoderError, check_gives_values, check_language_model, check_length
from common.models.encoder_decoder import reads_source
from common.paths import writing_to
from common.runtime.distributed import say
from common.training.engine import check_engine_options
from step3_ppo.calibration import ScoreScale, calibration_of, check_critic, read_calibration, scale_of
from step3_ppo.config import PPOConfig
from step3_ppo.opening import OpenedReward, columns_to_keep, open_rewards, try_rewards


@dataclass(frozen=True)
class RunInputs:
    """The checked inputs of a run.

    Attributes:
        actor: directory or hub name of the fine-tuned model.
        critic: that of the reward model, which is also the critic's start; with --reward or a reward of the program's
            own only the latter. None where neither is wanted.
        codec: the actor's tokenizer and template.
        scale: the scale of the critic's values, and of the scores where no --reward is given.
        rewards: those of --reward.
        prompts: to train and to evaluate on.
        texts: plain text of the pre-training mix; None without it.
    """

    actor: str
    critic: str | None
    codec: Codec
    scale: ScoreScale
    rewards: list[OpenedReward]
    prompts: PreparedData
    texts: PreparedData | None

    @property
    def data(self) -> list[PreparedData]:
        """All prepared data."""
        return [self.prompts, *([self.texts] if self.texts is not None else [])]

    @property
    def functions(self) -> dict[str, str]:
        """The checksum of the file of each reward function, by what it is called in a message."""
        return {f"file of {one.spec.name}": one.checksum for one in self.rewards if one.checksum is not None}


def read_inputs(config: PPOConfig) -> RunInputs:
    """Check the models and prepare the data, before the process group exists. One process per machine prepares.

    Raises:
        UserError: a model or the data cannot be used.
    """
    check_engine_options(config)
    actor = checked_model(config, "actor_model_name_or_path", check_language_model)
    critic = None
    if config.reads_reward_model and config.critic_model_name_or_path is not None:
        critic = checked_model(config, "critic_model_name_or_path", check_critic_kind)
    with named_by("--actor_model_name_or_path", {actor: config.actor_model_name_or_path}):
        codec = open_codec(config, actor)
    if codec.two_sided:
        check_two_sided(config)
    if critic is not None and reads_source(critic, config.trust_remote_code) != codec.two_sided:
        raise UserError(
            f"--critic_model_name_or_path {config.critic_model_name_or_path}: of this model and the actor one is an "
            "encoder-decoder and the other not: name a model of the actor's kind, or leave the option out"
        )
    rewards, functions = open_rewards(config, codec)
    if rewards:
        critic, scale = critic_start(config, codec, actor, critic, rewards)
    else:
        scale = scale_of(read_calibration(config, codec, critic), config)
    keep = columns_to_keep(config, rewards, functions)
    with config.naming_flags("--max_prompt_seq_len"):
        prompts = prepare(data_request(config, "prompt", config.max_prompt_seq_len, keep), codec)
    say_data(prompts)
    try_rewards(rewards, codec, prompts)
    with config.naming_flags("--max_prompt_seq_len and --max_answer_seq_len"):
        texts = prepare(text_request(config), codec) if config.unsupervised_dataset_name else None
    say(f"the actor's update: {config.update_rule}")
    warn(config)
    return RunInputs(actor, critic, codec, scale, rewards, prompts, texts)


def check_two_sided(config: PPOConfig) -> None:
    """Raises UserError for options that an encoder-decoder actor cannot have."""
    name = f"--actor_model_name_or_path {config.actor_model_name_or_path} is an encoder-decoder"
    if not config.scored_otherwise:
        raise UserError(
            f"{name}, whose answers are scored as text: give --reward, a reward model of any kind, a function or a "
            "service, in the place of --critic_model_name_or_path"
        )
    if config.unsupervised_dataset_name:
        raise UserError(f"--unsupervised_dataset_name is plain text, which has no prompt, and {name}: leave it out")


def critic_start(
    config: PPOConfig, codec: Codec, actor: str, given: str | None, rewards: list[OpenedReward]
) -> tuple[str | None, ScoreScale]:
    """(what the critic starts from, the scale of its values) where --reward gives the scores; None without a critic.

    Args:
        given: the checked model of --critic_model_name_or_path, where that is given.
    """
    if not config.estimator.needs_critic:
        return None, ScoreScale(RAW)
    models = {reward.source: reward for reward in rewards if reward.reads_ids}
    scale = ScoreScale(RAW)
    if given is not None:
        scale = ScoreScale(calibration_of(check_critic(config, codec, given)))
        start = given
    elif models:
        start = next(str(source) for source in models)
        say(f"the critic starts from the reward model {models[start].spec.name}")
    else:
        start = actor
        say("the critic starts from the actor, with a new score head: no reward reads the actor's tokens")
    return start, models[start].scale if start in models else scale


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


def check_critic_kind(source: str, trust_remote_code: bool = False) -> None:
    """Raises ModelError if a critic cannot start from this model. Loads no weights."""
    try:
        check_gives_values(source, trust_remote_code)
    except EncoderError as error:
        raise EncoderError(
            source,
            f"{error.why}, or, to have this one score the answers, leave --critic_model_name_or_path out and say "
            f"--reward {source}: the critic then starts from the actor",
        ) from None


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
    for choice, unused in config.unused_options().items():
        flags = ", ".join(f"--{name}" for name in unused)
        say(f"note: {choice} does not use {flags}: without effect")
    if config.sampling.truncated and not config.sampling.exact:
        say(
            "warning: with --top_p, --top_k or --min_answer_seq_len answers are not sampled from the policy that is "
            "trained: the ratio of new to old policy is then only approximate; --truncated_sampling exact makes it "
            "right"
        )
    if config.clip_range_high is not None and config.clip_range_high < config.clip_range < 1:
        say(
            f"note: --clip_range_high {config.clip_range_high:g} is below --clip_range {config.clip_range:g}: in an "
            "update tokens may lose more probability than they may gain"
        )
    for warning in config.reward_warnings():
        say(f"warning: {warning}")
