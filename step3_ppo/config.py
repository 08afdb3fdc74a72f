"""The options of step 3."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from math import ceil
from pathlib import Path
from typing import Any, ClassVar

from common.config.groups import (
    Batch,
    TrainedModelOptions,
    check_output_dir,
)
from common.config.option import Phase
from common.config.parser import PathName, option, options
from common.data.blend import SourceSpec, parse_data_path
from common.data.options import ProgramConfig
from common.errors import UserError, named_by
from step3_ppo.advantages import ESTIMATORS, Estimator, register
from step3_ppo.group_options import SelectionOptions
from step3_ppo.loss_options import LossOptions
from step3_ppo.options import ActorOptions, CriticOptions, RewardOptions, RolloutOptions, UpdateOptions

_REWARD_MODEL = "output/reward"  # what --critic_model_name_or_path is where neither it nor --reward is given
_ONE_ENGINE = "generation always runs on the training engine's own weights"
# Options that mean nothing if no critic is trained. Its ZeRO stage is not one: a reward model has the same.
_OF_A_CRITIC = (
    "value_clip_range",
    *(f"critic_{name}" for name in options(TrainedModelOptions) if name != "zero_stage"),
)
# Options that mean nothing without a reference.
_OF_A_REFERENCE = (
    "kl_coef",
    "kl_controller",
    "kl_estimator",
    "kl_target",
    "kl_horizon",
    "max_kl",
    "offload_reference_model",
)
_NO_TENSOR_PARALLEL = "every rank generates for its own prompts with the whole model"


@dataclass(frozen=True, kw_only=True)
class PPOConfig(
    RolloutOptions,
    RewardOptions,
    UpdateOptions,
    LossOptions,
    SelectionOptions,
    ActorOptions,
    CriticOptions,
    ProgramConfig,
):
    """Step 3: PPO"""

    phase: ClassVar[int] = 2
    other_source_flag: ClassVar[str] = "--unsupervised_dataset_name"
    own_reward: ClassVar[bool] = False  # the program brings a reward of its own, so no reward model scores

    actor_model_name_or_path: PathName = option("output/sft", "the fine-tuned model of step 1", names_model=True)
    critic_model_name_or_path: PathName | None = option(
        None,
        "the reward model of step 2, and the critic's start; with --reward only the latter; none: output/reward, or "
        "with --reward the first reward model there that reads the actor's tokens, else the actor with a new score "
        "head",
        names_model=True,
    )
    output_dir: PathName = option("output/ppo", "directory of the result", affects="nothing")
    offload: bool = option(
        False,
        "keep optimizer states (at ZeRO 1-3) and parameters (at ZeRO 3) in CPU memory",
        relieves=(Phase.ACTOR_UPDATE, Phase.CRITIC_UPDATE, Phase.ANYWHERE),
        advice="add {flag}",
    )
    offload_in_rollouts: bool = option(
        False,
        "keep optimizer states in CPU memory during rollouts, and so leave their room to keys and values, which "
        "are released afterwards; --offload keeps them there all the time",
        affects="nothing",
    )
    offload_reference_model: bool = option(False, "keep the reference in CPU memory")
    offload_reward_model: bool = option(False, "keep the reward model in CPU memory")
    eval_interval: int = option(
        0, "evaluate every N; 0: only before and after", unit="iterations", low=0, affects="evaluation"
    )
    eval_prompts: int = option(64, "held-out prompts to answer in an evaluation; 0: none", low=0, affects="evaluation")
    log_interval: int = option(1, "record metrics every N iterations", unit="iterations", low=1, affects="nothing")
    print_answers: bool = option(False, "print a few prompts and answers while training", affects="nothing")
    print_answers_interval: int = option(
        1, "how often --print_answers prints", unit="iterations", low=1, affects="nothing"
    )
    enable_hybrid_engine: bool = option(False, "", ignored=_ONE_ENGINE)
    unpin_actor_parameters: bool = option(
        False, "under ZeRO-3 gather the actor layer by layer for every token, not whole: slow, for want of memory"
    )
    release_inference_cache: bool = option(
        False,
        "give back the memory of keys and values after each rollout",
        affects="nothing",
        relieves=(Phase.GENERATE,),
        advice="add {flag}",
    )
    inference_tp_size: int = option(1, "", ignored=_NO_TENSOR_PARALLEL, low=1)
    tp_gather_partition_size: int = option(8, "", ignored=_NO_TENSOR_PARALLEL, low=1)
    enable_mixed_precision_lora: bool = option(False, "", ignored="gathered weights are not quantised")
    align_overflow: bool = option(False, "", ignored="actor and critic always skip a step together")

    def __post_init__(self) -> None:
        if self.critic_model_name_or_path is None and not self.reward:
            object.__setattr__(self, "critic_model_name_or_path", _REWARD_MODEL)

    def all_sources(self) -> list[SourceSpec]:
        return super().all_sources() + self.text_sources()

    def text_sources(self) -> list[SourceSpec]:
        """The source of the plain text that is mixed into the updates, if any."""
        if not self.unsupervised_dataset_name:
            return []
        form = self.file_format()
        with named_by("--unsupervised_dataset_name"):
            return parse_data_path(
                [self.unsupervised_dataset_name], config_name=self.unsupervised_dataset_config_name, form=form
            )

    @property
    def trained_models(self) -> dict[str, TrainedModelOptions]:
        """The options of each model that is trained, by its name."""
        critic = {"critic": self.critic} if self.estimator.needs_critic else {}
        return {"actor": self.actor, **critic}

    @property
    def scored_otherwise(self) -> bool:
        """Whether the scores are not those of --critic_model_name_or_path, but of --reward or the program's own."""
        return self.own_reward or bool(self.reward)

    @property
    def reads_reward_model(self) -> bool:
        """Whether --critic_model_name_or_path, where there is one, is loaded: to give the scores, or as the critic's
        start."""
        return self.estimator.needs_critic or not self.scored_otherwise

    @property
    def kl_place(self) -> str:
        """Where the KL pulls: "reward", "loss" or "none"; --kl_placement, or as the paper of the estimator has it."""
        return self.estimator.kl_placement if self.kl_placement == "auto" else self.kl_placement

    @property
    def has_reference(self) -> bool:
        """Whether there is a reference to measure the KL to."""
        return self.kl_place != "none"

    @property
    def update_rule(self) -> str:
        """What the actor learns from, as the flags that say it in full."""
        return (
            f"--advantage {self.advantage} --whiten_advantages {str(self.whitens).lower()} --policy_loss "
            f"{self.policy_loss} --loss_aggregation {self.aggregation} --kl_placement {self.kl_place}"
        )

    @property
    def kl_limit(self) -> float:
        """--max_kl, or a limit that no policy which still writes text comes near."""
        return 3.0 * self.max_answer_seq_len if self.max_kl is None else self.max_kl

    @property
    def rollout_batches_per_iteration(self) -> int:
        """Rollout batches of one iteration: as asked for, but never fewer answers than one optimizer step takes.

        Until the step is complete the policy does not change, so rolling out all its batches first is the same
        algorithm.
        """
        needed = self.per_device_training_batch_size * self.gradient_accumulation_steps
        return max(
            self.generation_batches, ceil(needed / (self.per_device_generation_batch_size * self.answers_per_prompt))
        )

    def models(self) -> dict[str, str | None]:
        """The actor, the critic and the reward models."""
        rewards = {f"reward {spec.name}": spec.name for spec in self.reward_specs() if spec.kind == "model"}
        return {**super().models(), **rewards}

    def batches(self) -> list[Batch]:
        """The prompts of one iteration and the answers of one optimizer step."""
        return [
            Batch(
                "prompts per iteration",
                ("per_device_generation_batch_size", "generation_batches"),
                self.per_device_generation_batch_size,
                self.per_device_generation_batch_size * self.rollout_batches_per_iteration,
            ),
            Batch(
                "answers per optimizer step",
                ("per_device_training_batch_size", "gradient_accumulation_steps"),
                self.per_device_training_batch_size,
                self.per_device_training_batch_size * self.gradient_accumulation_steps,
            ),
        ]

    def validate(self) -> None:
        super().validate()
        self.only_with("--print_answers", self.print_answers, "print_answers_interval")
        if self.draw_answer_lengths and self.missing_eos_score is not None:
            raise UserError(
                "--draw_answer_lengths lets no answer end by itself, so --missing_eos_score would be the "
                "score of them all: leave one of the two out"
            )
        if self.offload and not any(model.zero_stage for model in self.trained_models.values()):
            flags = " or ".join(f"--{name}_zero_stage" for name in self.trained_models)
            raise UserError(f"--offload needs {flags} 1, 2 or 3")
        self._check_advantage()
        self._check_rewards()
        self._check_selection()
        models = {"actor_model_name_or_path": self.actor_model_name_or_path}
        if self.critic_model_name_or_path is not None:
            models["critic_model_name_or_path"] = self.critic_model_name_or_path
        check_output_dir(self.output_dir, **models)
        self._check_default_exists("actor_model_name_or_path", "output/sft", "step1_sft/main.py")
        if self.reads_reward_model:
            self._check_default_exists("critic_model_name_or_path", _REWARD_MODEL, "step2_reward/main.py")

    def _check_rewards(self) -> None:
        if self.own_reward and self.reward:
            raise UserError("--reward: this program brings a reward of its own: leave the option out")
        self.only_with("--reward, or a reward of the program's own", self.scored_otherwise, "keep_columns")
        models = [spec for spec in self.reward_specs() if spec.kind == "model"]
        for spec in models:
            check_output_dir(self.output_dir, reward=spec.name)
        if self.scored_otherwise and not models:
            self.only_with("the scores of a reward model", False, "offload_reward_model", "reward_quantize")

    def _check_advantage(self) -> None:
        estimator = self.estimator
        if self.answers_per_prompt < estimator.fewest_answers:
            raise UserError(
                f"--advantage {self.advantage} compares the answers to one prompt: it needs --answers_per_prompt "
                f"{estimator.fewest_answers} or more, not {self.answers_per_prompt}"
            )
        if self.kl_place == "reward" and self.kl_estimator != "k1":
            raise UserError(
                f"--kl_estimator {self.kl_estimator} in the reward pulls with next to none of the KL's "
                f"gradient: leave it out, or add --kl_placement loss"
            )
        if self.own_reward and self.score_calibration == "provenance":
            raise UserError("--score_calibration provenance is that of a reward model, which gives no scores here")

    def _check_selection(self) -> None:
        if self.drop_equal_groups and self.answers_per_prompt < 2:
            raise UserError(
                "--drop_equal_groups compares the scores of the answers to one prompt: it needs --answers_per_prompt 2 "
                "or more"
            )
        if self.overlong_buffer > self.max_answer_seq_len:
            raise UserError(
                f"--overlong_buffer {self.overlong_buffer} is above --max_answer_seq_len {self.max_answer_seq_len}"
            )
        if self.draw_answer_lengths and (self.mask_truncated_answers or self.overlong_buffer):
            raise UserError(
                "--draw_answer_lengths lets no answer end by itself: leave it out, or --mask_truncated_answers and "
                "--overlong_buffer"
            )
        if self.critic_warmup_iterations and not self.estimator.needs_critic:
            raise UserError(
                f"--critic_warmup_iterations {self.critic_warmup_iterations} trains the critic alone, and --advantage "
                f"{self.advantage} has none: leave it out"
            )

    def useless_options(self) -> list[str]:
        """The options that --advantage, --policy_loss, --kl_placement and --reward have no use for."""
        names = [name for names in self._useless_beside().values() for name in names]
        with_models = any(spec.kind == "model" for spec in self.reward_specs())
        return list(dict.fromkeys([*names, *([] if with_models else ["reward_batch_size", "reward_max_seq_len"])]))

    def unused_options(self) -> dict[str, list[str]]:
        """The options that are set, in a recipe or by a flag, but without effect, by the choice that does not use
        them."""
        known = options(type(self))
        unused = {
            choice: [name for name in dict.fromkeys(names) if getattr(self, name) != known[name].default]
            for choice, names in self._useless_beside().items()
        }
        return {choice: names for choice, names in unused.items() if names}

    def _useless_beside(self) -> dict[str, list[str]]:
        """Choices, as their flags, and the options that each has no use for."""
        estimator = self.estimator
        of_critic = [] if estimator.needs_critic else list(_OF_A_CRITIC)
        with_models = self.reads_reward_model or any(spec.kind == "model" for spec in self.reward_specs())
        of_critic += [] if with_models else ["critic_zero_stage"]
        if not self.reads_reward_model and self.critic_model_name_or_path != _REWARD_MODEL:
            of_critic.append("critic_model_name_or_path")
        of_others = [name for other in ESTIMATORS.values() for name in other.options if name not in estimator.options]
        return {
            f"--advantage {self.advantage}": [*of_critic, *of_others],
            f"--policy_loss {self.policy_loss}": ["dual_clip"] if self.policy_loss == "cispo" else [],
            f"--kl_placement {self.kl_place}": [] if self.has_reference else list(_OF_A_REFERENCE),
        }

    def _check_default_exists(self, name: str, default: str, program: str) -> None:
        # transformers would look up a default directory that does not exist on the hub.
        model = getattr(self, name)
        if model == default and not (Path(default) / "config.json").is_file():
            raise UserError(
                f"no model, or none that is finished, at {model}: make it with `deepspeed {program}` or give --{name}"
            )


def config_class(advantages: Estimator | None = None, own_reward: bool = False) -> type[PPOConfig]:
    """The options of step 3 for a program that brings an advantage estimator or a reward of its own.

    Args:
        advantages: registered as one more choice of --advantage, and the default there.
        own_reward: see `PPOConfig.own_reward`.
    """
    changed: list[tuple[str, Any, Any]] = [("own_reward", ClassVar[bool], own_reward)]
    if advantages is not None:
        register(advantages)
        help = options(PPOConfig)["advantage"].help
        changed.append(("advantage", str, option(advantages.name, help, choices=tuple(ESTIMATORS))))
    names = {"__doc__": PPOConfig.__doc__}
    return make_dataclass("PPOConfig", changed, bases=(PPOConfig,), namespace=names, frozen=True, kw_only=True)
