"""The models and the data that a run starts from, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from common.artifacts.compatibility import open_codec
from common.artifacts.model_source import resolve_model
from common.artifacts.run import say_data
from common.artifacts.split_rule import data_request
from common.data.prepare import PreparedData, prepare
from common.data.request import DataRequest
from common.data.tokenization import Codec
from common.errors import named_by
from common.models.calibration import RAW
from common.models.loading import check_language_model, check_length, gives_scores
from common.paths import writing_to
from common.runtime.distributed import say
from common.training.engine import check_engine_options
from step3_ppo.calibration import ScoreScale, read_calibration
from step3_ppo.config import PPOConfig


@dataclass(frozen=True)
class RunInputs:
    """What a run starts from.

    Attributes:
        actor: directory or hub name of the fine-tuned model.
        reward_model: that of the reward model, which is also the critic's start; None where neither is wanted.
        codec: the actor's tokenizer and template.
        scale: in which scores are measured.
        prompts: to train and to evaluate on.
        texts: plain text of the pre-training mix, if it is on.
    """

    actor: str
    reward_model: str | None
    codec: Codec
    scale: ScoreScale
    prompts: PreparedData
    texts: PreparedData | None

    @property
    def data(self) -> list[PreparedData]:
        """All prepared data."""
        return [self.prompts, *([self.texts] if self.texts is not None else [])]


def read_inputs(config: PPOConfig) -> RunInputs:
    """Check the models, prepare the data. One process per machine prepares, before the process group exists.

    Raises:
        UserError: a model or the data cannot be used.
    """
    check_engine_options(config)
    with named_by("--actor_model_name_or_path"):
        actor = checked_model(config, config.actor_model_name_or_path)
        check_language_model(actor, config.trust_remote_code)
    reward_model = None
    if config.reads_reward_model:
        with named_by("--critic_model_name_or_path"):
            reward_model = checked_model(config, config.critic_model_name_or_path)
            gives_scores(reward_model, config.trust_remote_code)  # refuses a classifier of several labels
    for flag, source in {"--actor_model_name_or_path": actor, "--critic_model_name_or_path": reward_model}.items():
        if source is not None:
            with named_by(f"--max_prompt_seq_len and --max_answer_seq_len are too large for {flag}"):
                check_length(source, config.max_prompt_seq_len + config.max_answer_seq_len, config.trust_remote_code)
    codec = open_codec(config, actor, "--actor_model_name_or_path")
    scale = read_scale(config, codec, reward_model)
    with config.naming_flags("--max_prompt_seq_len"):
        prompts = prepare(data_request(config, "prompt", config.max_prompt_seq_len), codec)
    say_data(prompts)
    with config.naming_flags("--max_prompt_seq_len and --max_answer_seq_len"):
        texts = prepare(text_request(config), codec) if config.unsupervised_dataset_name else None
    warn(config)
    return RunInputs(actor, reward_model, codec, scale, prompts, texts)


def checked_model(config: PPOConfig, name: str) -> str:
    """The directory or hub name to load a model from; raises ModelError if there is no such model."""
    with writing_to("--data_output_path", config.data_output_path):
        return resolve_model(name, config.data_output_path, config.merge_adapter)


def read_scale(config: PPOConfig, codec: Codec, reward_model: str | None) -> ScoreScale:
    """The scale of the scores, from the reward model's provenance where that gives the scores.

    Raises:
        UserError: the reward model cannot be used with the actor.
    """
    if reward_model is None:
        wanted = config.normalize_scores and config.score_calibration != "none"
        return ScoreScale(None if wanted else RAW)
    if config.own_reward and config.score_calibration == "auto":
        config = replace(config, score_calibration="rollout")
    return ScoreScale(read_calibration(config, codec, reward_model))


def text_request(config: PPOConfig) -> DataRequest:
    """The plain text of the pre-training mix; all of it, since it has no prompts to keep apart."""
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
    """Say what is allowed but rarely meant."""
    if unused := config.unused_options():
        flags = ", ".join(f"--{name}" for name in unused)
        say(f"note: --advantage {config.advantage} does not use {flags}: without effect")
    if config.sampling.truncated:
        say(
            "warning: with --top_p, --top_k or --min_answer_seq_len answers are not sampled from the policy that is "
            "trained: the ratio of new to old policy is then only approximate"
        )
