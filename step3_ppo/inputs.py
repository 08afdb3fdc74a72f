"""The models and the data that a run starts from, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from common.artifacts.provenance import RAW
from common.artifacts.publish import data_request, open_codec, read_calibration, say_data
from common.data.prepare import DataRequest, PreparedData, prepare
from common.data.tokenization import Codec
from common.models.loading import check_language_model, check_max_length, resolve_model
from common.runtime.distributed import say
from common.training.engine import check_engine_options
from step3_ppo.calibration import ScoreScale
from step3_ppo.config import PPOConfig
from step3_ppo.trainer import sampling_of


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
    names = ["actor_model_name_or_path", *(["critic_model_name_or_path"] if config.reads_reward_model else [])]
    sources = {
        name: resolve_model(getattr(config, name), f"--{name}", Path(config.data_output_path), config.merge_adapter)
        for name in names
    }
    for name, source in sources.items():
        check_max_length(
            source,
            f"--{name}",
            config.max_prompt_seq_len + config.max_answer_seq_len,
            "--max_prompt_seq_len and --max_answer_seq_len",
            config.trust_remote_code,
        )
    actor, reward_model = sources["actor_model_name_or_path"], sources.get("critic_model_name_or_path")
    check_language_model(actor, "--actor_model_name_or_path", config.trust_remote_code)
    codec = open_codec(config, actor, "--actor_model_name_or_path")
    scale = read_scale(config, codec, reward_model)
    prompts = prepare(data_request(config, "prompt", config.max_prompt_seq_len, "--max_prompt_seq_len"), codec)
    say_data(prompts)
    texts = prepare(text_request(config), codec) if config.unsupervised_dataset_name else None
    warn(config)
    return RunInputs(actor, reward_model, codec, scale, prompts, texts)


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
    if sampling_of(config).truncated:
        say(
            "warning: with --top_p, --top_k or --min_answer_seq_len answers are not sampled from the policy that is "
            "trained: the ratio of new to old policy is then only approximate"
        )
