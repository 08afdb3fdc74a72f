"""The groups of options that step 3 alone has; `step3_ppo.config.PPOConfig` is all of its options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.config.groups import MICRO_BATCH_PHASES, QUANTIZATIONS, ScheduleOptions, TrainedModelOptions, check_lora
from common.config.option import Phase
from common.config.parser import Config, PathName, option
from common.config.shared import prefixed, same_option, unprefixed
from common.errors import UserError
from common.rewards.options import NamedRewards

if TYPE_CHECKING:
    from step3_ppo.generation.sampling import Sampling

KL_ESTIMATORS = ("k1", "k2", "k3")  # see rewards.kl_estimate
_FIRST_KL_COEF = {"fixed": 0.1, "adaptive": 0.2}  # by --kl_controller
_NO_DROPOUT = "dropout is off in every model of PPO"


@dataclass(frozen=True, kw_only=True)
class RolloutOptions(Config):
    """Rollouts"""

    per_device_generation_batch_size: int = option(
        16,
        "prompts per rank in one rollout batch, answered at the same time",
        aliases=("per_device_train_batch_size",),
        low=1,
        relieves=(Phase.GENERATE, Phase.EVALUATION),
        advice="lower {flag}",
    )
    generation_batches: int = option(1, "rollout batches per iteration", aliases=("generation_batch_numbers",), low=1)
    max_prompt_seq_len: int = option(
        256,
        "longest prompt; others are cut on the left",
        unit="tokens",
        low=1,
        relieves=(Phase.ANYWHERE,),
        advice="lower {flag}",
    )
    max_answer_seq_len: int = option(
        256, "longest answer", unit="tokens", low=1, relieves=(Phase.ANYWHERE,), advice="lower {flag}"
    )
    min_answer_seq_len: int = option(0, "no end token is sampled before", unit="tokens", low=0)
    draw_answer_lengths: bool = option(
        False, "give every answer exactly a length drawn from --min_answer_seq_len to --max_answer_seq_len"
    )
    answers_per_prompt: int = option(1, "answers to each prompt in an iteration", low=1)
    temperature: float = option(1.0, "logits are divided by it, to sample and to train", above=0)
    top_p: float = option(1.0, "sample from the likeliest tokens that make up this share", above=0, high=1)
    top_k: int = option(0, "sample from this many of the likeliest tokens; 0: from all", unit="tokens", low=0)
    truncated_sampling: str = option(
        "approximate",
        "with --top_p, --top_k, --min_answer_seq_len or --draw_answer_lengths: approximate: train the whole policy; "
        "exact: train the policy renormalised on the tokens that could be sampled, so that the ratio is right",
        choices=("approximate", "exact"),
    )

    @property
    def sampling(self) -> Sampling:
        """How responses are sampled."""
        from step3_ppo.generation.sampling import Sampling  # here, because it imports torch

        return Sampling(
            self.temperature,
            self.top_p,
            self.top_k,
            self.min_answer_seq_len,
            self.max_answer_seq_len,
            self.draw_answer_lengths,
            self.answers_per_prompt,
            self.truncated_sampling == "exact",
        )

    def validate(self) -> None:
        super().validate()
        if self.min_answer_seq_len > self.max_answer_seq_len:
            raise UserError(
                f"--min_answer_seq_len {self.min_answer_seq_len} is above --max_answer_seq_len "
                f"{self.max_answer_seq_len}"
            )
        truncated = self.top_p < 1 or self.top_k or self.min_answer_seq_len or self.draw_answer_lengths
        self.only_with(
            "--top_p, --top_k, --min_answer_seq_len or --draw_answer_lengths", bool(truncated), "truncated_sampling"
        )


@dataclass(frozen=True, kw_only=True)
class RewardOptions(NamedRewards):
    """Rewards"""

    reward_errors: str = option(
        "stop",
        "what happens when a function or a service of --reward fails on an answer: stop: the run ends; zero: the "
        "answer gets 0, and is counted, but where it fails on all answers the run ends too",
        choices=("stop", "zero"),
        affects="nothing",  # a run that goes on has met no failure with stop
    )
    kl_coef: float | None = option(
        None, "weight of the KL to the reference; if adaptive, at the start; none: 0.1 if fixed, 0.2 if adaptive", low=0
    )
    kl_controller: str = option("fixed", "whether the weight is steered to --kl_target", choices=tuple(_FIRST_KL_COEF))
    kl_placement: str = option(
        "auto",
        "where the KL pulls: reward: taken off every token's reward, which also counts what a token does to "
        "the KL of later ones; loss: a term of the actor's loss with the gradient of each token's KL; none: nowhere, "
        "and no reference is loaded; auto: as is usual with --advantage: loss for grpo, dr_grpo and "
        "reinforce++_baseline, reward for the others",
        choices=("auto", "reward", "loss", "none"),
    )
    kl_estimator: str = option(
        "k1",
        "estimate of the KL per token; in the reward k1, the only one with the KL's "
        "gradient; in the loss it is the value that is logged",
        choices=KL_ESTIMATORS,
    )
    kl_target: float = option(6.0, "KL per answer that the adaptive controller aims at", unit="nats", above=0)
    kl_horizon: float = option(10_000.0, "slowness of the adaptive controller", unit="answers", above=0)
    reward_quantize: str = option(
        "none",
        "hold the linear layers of reward models in 4 bits (nf4) or 8 (int8); one that is the LoRA critic with its "
        "adapters off has the critic's",
        choices=QUANTIZATIONS,
    )
    score_calibration: str = option(
        "auto",
        "where the mean and standard deviation that scores are measured in come from; provenance: what step 2 "
        "found over held-out pairs; rollout: the first iteration's answers and the evaluation's before it; running: "
        "all answers so far; auto: provenance where there is one, else rollout, but none for functions and services "
        "of --reward; none: scores are used as they are",
        choices=("auto", "provenance", "rollout", "running", "none"),
    )
    normalize_scores: bool = option(True, "the same as --score_calibration none if turned off")
    score_clip: float = option(5.0, "clip scores to plus or minus this", unit="normalised score", above=0)
    missing_eos_penalty: float = option(
        1.0, "taken off the score of an answer cut by length", unit="normalised score", low=0
    )
    missing_eos_score: float | None = option(
        None, "score of an answer cut by length, in place of the penalty", unit="normalised score"
    )

    @property
    def first_kl_coef(self) -> float:
        """--kl_coef, or the controller's own where that is not given."""
        return _FIRST_KL_COEF[self.kl_controller] if self.kl_coef is None else self.kl_coef

    def validate(self) -> None:
        super().validate()
        if not self.normalize_scores and self.score_calibration not in ("auto", "none"):
            raise UserError(
                f"--no_normalize_scores and --score_calibration {self.score_calibration} contradict each "
                "other: keep one"
            )
        adaptive = self.kl_controller == "adaptive"
        self.only_with("--kl_controller adaptive", adaptive, "kl_target", "kl_horizon")
        if adaptive and self.kl_coef == 0:
            raise UserError("--kl_controller adaptive needs --kl_coef above 0: it multiplies it")
        self.not_both("missing_eos_penalty", "missing_eos_score")
        fails = any(spec.kind != "model" for spec in self.reward_specs())
        self.only_with("a function or a service in --reward", fails, "reward_errors")


@dataclass(frozen=True, kw_only=True)
class UpdateOptions(ScheduleOptions):
    """PPO"""

    max_iterations: int = option(0, "stop after so many iterations; 0: as --num_train_epochs says", low=0)
    num_warmup_steps: int = same_option(ScheduleOptions, "num_warmup_steps", default=100)
    per_device_training_batch_size: int = option(
        16,
        "answers per rank in a micro-batch",
        aliases=("per_device_mini_train_batch_size",),
        low=1,
        deepspeed_keys=("train_batch_size", "train_micro_batch_size_per_gpu"),
        relieves=MICRO_BATCH_PHASES,
        advice="lower {flag}",
    )
    ppo_epochs: int = option(1, "passes over each iteration's rollouts", low=1)
    target_kl: float | None = option(
        None, "leave an iteration's updates when the policy has moved this far", unit="nats per token", above=0
    )
    max_kl: float | None = option(
        None,
        "stop the run when the mean KL of an iteration's answers to the reference passes this; none: 3 nats for "
        "every token of --max_answer_seq_len, where the average token is 20 times likelier than the reference has it",
        unit="nats per answer",
        above=0,
        affects="nothing",
    )
    max_reward: float | None = option(
        None, "stop when an iteration's mean reward is above", unit="raw score", affects="nothing"
    )
    min_reward: float | None = option(
        None, "stop when an iteration's mean reward is below", unit="raw score", affects="nothing"
    )
    enable_ema: bool = option(
        False, "keep a moving average of the actor's weights, in fp32 beside them, and save it too"
    )
    ema_decay: float = option(0.992, "weight of the old average at each optimizer step", low=0, below=1)
    unsupervised_dataset_name: PathName | None = option(None, "plain text to mix into the actor's updates")
    unsupervised_dataset_config_name: str | None = option(None, "configuration of that data set on the hub")
    unsup_coef: float = option(27.8, "weight of the loss on plain text", low=0)

    def validate(self) -> None:
        super().validate()
        self.only_with("--enable_ema", self.enable_ema, "ema_decay")
        self.only_with(
            "--unsupervised_dataset_name",
            self.unsupervised_dataset_name is not None,
            "unsupervised_dataset_config_name",
            "unsup_coef",
        )


_SHORTER_HELP = {
    "gradient_checkpointing": {"help": "recompute activations to save memory"},
    "lora_module_name": {"help": "parts of layer names, with commas; auto: all linear"},
}


@dataclass(frozen=True, kw_only=True)
@prefixed(
    "actor_",
    TrainedModelOptions,
    learning_rate={"default": 9.65e-6},
    weight_decay={"default": 0.1},
    zero_stage={"default": 2, "help": "ZeRO stage; 3 also partitions the reference"},
    **_SHORTER_HELP,
)
class ActorOptions(Config):
    """Actor"""

    actor_dropout: float | None = option(None, "", ignored=_NO_DROPOUT, low=0, below=1)
    disable_actor_dropout: bool = option(False, "", ignored=_NO_DROPOUT)

    @property
    def actor(self) -> TrainedModelOptions:
        """The options of the actor."""
        return unprefixed(self, TrainedModelOptions, "actor_")

    def validate(self) -> None:
        super().validate()
        check_lora(self, "actor_")


@dataclass(frozen=True, kw_only=True)
@prefixed(
    "critic_",
    TrainedModelOptions,
    learning_rate={"default": 5e-6},
    weight_decay={"default": 0.1},
    zero_stage={"default": 2, "help": "ZeRO stage; 3 also partitions the reward model"},
    **_SHORTER_HELP,
)
class CriticOptions(Config):
    """Critic"""

    critic_dropout: float | None = option(None, "", ignored=_NO_DROPOUT, low=0, below=1)
    disable_critic_dropout: bool = option(False, "", ignored=_NO_DROPOUT)

    @property
    def critic(self) -> TrainedModelOptions:
        """The options of the critic."""
        return unprefixed(self, TrainedModelOptions, "critic_")

    def validate(self) -> None:
        super().validate()
        check_lora(self, "critic_")
