"""Opens the rewards of --reward before any model is loaded: finds, checks and tries them, and reads their scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.artifacts.model_source import resolve_model
from common.artifacts.provenance import read_provenance
from common.artifacts.split_rule import check_split_rule
from common.data.keeping import KEPT, KeptColumns
from common.data.prepare import PreparedData
from common.data.tokenization import Codec
from common.errors import named_by
from common.models.configuration import check_length
from common.paths import writing_to
from common.rewards.batch import BatchReward, trial_batch
from common.rewards.function import Function
from common.rewards.opening import MADE_UP, TRIED_PROMPTS, kept_columns, open_functions, open_reward, try_reward
from common.rewards.reading import check_reward_model, check_text_model, reads_ids_of
from common.rewards.spec import RewardSpec
from common.runtime.distributed import is_main, say
from step3_ppo.calibration import ScoreScale, checked_provenance, reward_calibration, scale_of
from step3_ppo.config import PPOConfig


@dataclass(frozen=True)
class OpenedReward:
    """One of --reward, checked.

    Attributes:
        scale: of its scores.
        scorer: a function or a service, ready to score; None for a reward model.
        source: directory or hub name of a reward model; None for the others.
        reads_ids: whether a reward model reads the actor's ids, so that it can be the critic's start.
        checksum: of the file of a function.
    """

    spec: RewardSpec
    scale: ScoreScale
    scorer: BatchReward | None
    source: str | None
    reads_ids: bool
    checksum: str | None = None


def open_rewards(config: PPOConfig, codec: Codec) -> tuple[list[OpenedReward], dict[str, Function]]:
    """The rewards, and the functions among them by their names.

    Raises:
        UserError: one of them cannot be used.
    """
    specs = config.reward_specs()
    with named_by("--reward"):
        functions = open_functions(specs)
    opened = []
    for spec in specs:
        if spec.kind == "model":
            opened.append(_open_model(config, codec, spec))
            continue
        function = functions.get(spec.name)
        with named_by("--reward_header_env" if spec.kind == "service" else "--reward"):
            scorer = open_reward(spec, function, config, config.reward_errors == "zero")
        scale = scale_of(reward_calibration(config, spec.name, None, is_model=False), config, spec.name)
        checksum = function.checksum if function else None
        opened.append(OpenedReward(spec, scale, scorer, None, reads_ids=False, checksum=checksum))
    return opened, functions


def _open_model(config: PPOConfig, codec: Codec, spec: RewardSpec) -> OpenedReward:
    with writing_to("--data_output_path", config.data_output_path), named_by("--reward"):
        source = resolve_model(spec.name, config.data_output_path, config.merge_adapter)
    with named_by("--reward", {source: spec.name}):
        check_reward_model(source, config.trust_remote_code)
        reads_ids = not codec.two_sided and reads_ids_of(codec, source, config.trust_remote_code)
        if reads_ids:
            tokens = config.max_prompt_seq_len + config.max_answer_seq_len
            check_length(source, tokens, config.trust_remote_code)
        else:
            check_text_model(source, config.trust_remote_code)
    if reads_ids:
        provenance = checked_provenance(config, codec, source, "--reward", spec.name)
    else:
        provenance = read_provenance(source)
        if provenance is not None:
            with named_by("--reward", {source: spec.name}):
                check_split_rule(provenance, config, source)
    say(f"the reward model {spec.name} reads " + ("the actor's tokens" if reads_ids else "text, by its own tokenizer"))
    scale = scale_of(reward_calibration(config, spec.name, provenance, is_model=True), config, spec.name)
    return OpenedReward(spec, scale, None, source, reads_ids)


def columns_to_keep(
    config: PPOConfig, opened: Sequence[OpenedReward], functions: Mapping[str, Function]
) -> KeptColumns | None:
    """What preparation keeps of each prompt's row; None where no reward reads text and no column is named."""
    if not config.keep_columns and all(reward.reads_ids for reward in opened):
        return None
    return kept_columns(list(functions.values()), config.keep_columns)


def try_rewards(opened: Sequence[OpenedReward], codec: Codec, prompts: PreparedData) -> None:
    """Let functions, and on rank 0 services, score a made-up response to each of two prompts.

    Raises:
        UserError: one fails.
    """
    rows = prompts.train.select(range(min(TRIED_PROMPTS, len(prompts.train))))
    if KEPT not in rows.column_names or not len(rows):
        return
    texts = [str(codec.tokenizer.decode(ids, skip_special_tokens=True)) for ids in rows["prompt_ids"]]
    batch = trial_batch(rows[KEPT], texts, MADE_UP, codec.encode_response(MADE_UP))
    if tried := [reward.spec.name for reward in opened if reward.scorer is not None]:
        say(f"{', '.join(tried)}: tried on a made-up answer to {len(rows)} prompts")
    for reward in opened:
        if reward.scorer is not None and (is_main() or reward.spec.kind == "function"):
            with named_by("--reward"):
                try_reward(reward.spec.name, reward.scorer, batch)
