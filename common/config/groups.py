"""Defines groups of options that several steps share. The config of a step inherits the groups that it uses."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from common.config.option import Phase
from common.config.parser import Config, PathName, option, options
from common.config.shared import same_option, unprefixed
from common.errors import UserError
from common.runtime.requirements import is_installed

# How the frozen linear layers of a model are held, see common.models.quantization.
QUANTIZATIONS = ("none", "nf4", "int8")
# Schedules of the learning rate, see common.training.learning_rate.
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
# The phases in which a micro-batch passes forward or backward, see Option.relieves.
MICRO_BATCH_PHASES = (
    Phase.TRAINING_STEP,
    Phase.LOG_PROBS,
    Phase.SCORE,
    Phase.ACTOR_UPDATE,
    Phase.CRITIC_UPDATE,
)


@dataclass(frozen=True)
class Batch:
    """Rows that all ranks process together. Two options say how many of them one rank processes.

    Attributes:
        what: names the batch in messages, as in "16 rows per optimizer step".
        flags: the two options: the rows that a rank processes at a time, and how many times it does so.
        rows_at_a_time: the value of the first option.
        rows: of one rank.
    """

    what: str
    flags: tuple[str, str]
    rows_at_a_time: int
    rows: int

    def flags_for(self, total: int, ranks: int) -> str | None:
        """The flags with which `ranks` ranks process `total` rows, each no more at a time than now.

        None if that many rows cannot be divided among them.
        """
        rows = total // ranks
        if rows * ranks != total:
            return None
        at_a_time = max(number for number in range(1, self.rows_at_a_time + 1) if rows % number == 0)
        return f"--{self.flags[0]} {at_a_time} --{self.flags[1]} {rows // at_a_time}"


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions(Config):
    """Optimization"""

    num_train_epochs: int = option(1, "passes over the training data", low=1)
    gradient_accumulation_steps: int = option(
        1,
        "micro-batches per rank in one optimizer step",
        low=1,
        deepspeed_keys=("gradient_accumulation_steps", "managed_gradient_accumulation"),
    )
    max_tokens_per_micro_batch: int = option(
        0,
        "cut each optimizer step's rows, the same ones, into micro-batches of so many tokens with padding, alike on "
        "every rank; a longer row goes alone; 0: into equal numbers of rows",
        unit="tokens",
        low=0,
        relieves=MICRO_BATCH_PHASES,
        advice="lower {flag}",
    )
    auto_micro_batch: bool = option(
        False,
        "measure before training what fits into memory, and set --max_tokens_per_micro_batch to it",
        relieves=MICRO_BATCH_PHASES,
        advice="let {flag} choose",
    )
    max_skipped_steps: int = option(
        5,
        "an optimizer step with a loss or gradient that is not finite is skipped; so many in a row end the run",
        unit="optimizer steps",
        low=1,
        affects="nothing",
    )
    lr_scheduler_type: str = option(
        "cosine", "schedule of the learning rate", choices=SCHEDULES, deepspeed_keys=("scheduler",)
    )
    num_warmup_steps: int = option(
        0,
        "learning rates rise this long, from 1/N of the highest in the first step; a run that is shorter is all "
        "warm-up",
        unit="optimizer steps",
        low=0,
    )
    max_grad_norm: float = option(
        1.0, "clip gradients to this global norm; 0 turns it off", low=0, deepspeed_keys=("gradient_clipping",)
    )

    def validate(self) -> None:
        super().validate()
        self.not_both("auto_micro_batch", "max_tokens_per_micro_batch")
        if self.lr_scheduler_type == "constant" and self.num_warmup_steps not in (
            0,
            options(type(self))["num_warmup_steps"].default,
        ):
            raise UserError(
                f"--num_warmup_steps {self.num_warmup_steps} has no meaning with --lr_scheduler_type "
                "constant: use constant_with_warmup, or leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class RunOptions(Config):
    """Run"""

    output_dir: PathName  # declared by every step, with a default of its own
    dtype: str = option(
        "auto",
        "number format of forward and backward; auto is bf16 on a GPU, fp32 on a CPU",
        choices=("auto", "bf16", "fp16", "fp32"),
        deepspeed_keys=("fp16.enabled", "bf16.enabled"),
    )
    seed: int = option(1234, "seed of data order, initialisation and sampling", low=0, high=2**32 - 1)
    deepspeed_config: PathName | None = option(None, "JSON file laid over the generated DeepSpeed configuration")
    timeout: int = option(1800, "longest wait for other ranks", unit="seconds", low=1, affects="nothing")
    trust_remote_code: bool = option(False, "allow models to bring and run their own Python code", affects="nothing")
    merge_adapter: bool = option(
        False,
        "where an adapter lies in a model's directory, start from the sum of both, which is kept in "
        "--data_output_path; an adapter alone is laid over the base that it names",
    )
    save_interval: int = option(
        500,
        "save a checkpoint every N; in step 3 when the iteration ends; 0: never",
        unit="optimizer steps",
        low=0,
        affects="nothing",
    )
    keep_checkpoints: int = option(
        2, "how many checkpoints stay; all go when the result is saved", low=1, affects="nothing"
    )
    resume: PathName = option(
        "auto",
        "auto: go on from the newest whole checkpoint in the output directory, if there is one; never: start "
        "anew; or the path of a checkpoint",
        affects="nothing",
    )
    resume_anyway: bool = option(False, "resume even though settings have changed", affects="nothing")
    report_to: tuple[str, ...] = option(
        ("jsonl", "tensorboard"),
        "where metrics go; jsonl is OUTPUT_DIR/logs/metrics.jsonl, which is always written, because resumed runs go on "
        "in it; wandb is Weights & Biases, which gets samples too, and reads WANDB_MODE, WANDB_PROJECT, ...",
        choices=("jsonl", "tensorboard", "wandb"),
        affects="nothing",
    )
    run_name: str | None = option(
        None, "name of the run in Weights & Biases; none: the name of OUTPUT_DIR", affects="nothing"
    )
    enable_tensorboard: bool | None = option(
        None, "write TensorBoard events; none: if --report_to names it", affects="nothing"
    )
    tensorboard_path: PathName | None = option(
        None, "directory of TensorBoard events; none: in OUTPUT_DIR/logs", affects="nothing"
    )
    enable_test_mode: bool = option(False, "stop after --test_stop_step", affects="length")
    test_stop_step: int = option(
        0, "where --enable_test_mode stops", unit="optimizer steps, in step 3 iterations", low=0, affects="length"
    )
    deepspeed: bool = option(False, "", ignored="DeepSpeed is always on", quiet=True)
    local_rank: int = option(-1, "", ignored="the launcher's environment says it too", quiet=True)
    num_padding_at_beginning: int = option(0, "", ignored="the attention mask makes it needless")
    only_optimize_lora: bool = option(False, "", ignored="LoRA trains adapters and new heads only")
    compute_fp32_loss: bool = option(False, "", ignored="the loss is always computed in fp32")

    @property
    def stop_after(self) -> int:
        """Optimizer steps (iterations in step 3) after which the run stops early; 0 for never."""
        return self.test_stop_step if self.enable_test_mode else 0

    def models(self) -> dict[str, str | None]:
        """The models that the run starts from or asks, by what names them."""
        return {name: getattr(self, name) for name, meta in options(type(self)).items() if meta.names_model}

    @property
    def writes_tensorboard(self) -> bool:
        """Whether TensorBoard events are written."""
        return "tensorboard" in self.report_to if self.enable_tensorboard is None else self.enable_tensorboard

    def batches(self) -> list[Batch]:
        """The batches that decide what is computed, however the ranks share them; every step has its own."""
        return []

    def validate(self) -> None:
        super().validate()
        self.only_with("--enable_tensorboard", self.writes_tensorboard, "tensorboard_path")
        self._check_report_to()
        self.only_with("--enable_test_mode", self.enable_test_mode, "test_stop_step")
        if self.enable_test_mode and not self.test_stop_step:
            raise UserError("--enable_test_mode needs --test_stop_step N, N at least 1")

    def _check_report_to(self) -> None:
        chosen = self.report_to != options(type(self))["report_to"].default
        if self.enable_tensorboard is False and chosen and "tensorboard" in self.report_to:
            raise UserError("--no_enable_tensorboard and tensorboard in --report_to contradict each other: keep one")
        self.only_with("wandb in --report_to", "wandb" in self.report_to, "run_name")
        if "wandb" in self.report_to and not is_installed("wandb"):
            raise UserError("--report_to wandb: the package wandb is not installed: pip install wandb")


@dataclass(frozen=True, kw_only=True)
class TrainedModelOptions(Config):
    """What decides how one model is held and trained

    Steps 1 and 2 have these options for their one model; step 3 has each of them for the actor and for the critic.
    """

    learning_rate: float = option(1e-5, "highest learning rate", low=0, deepspeed_keys=("optimizer",))
    weight_decay: float = option(0.0, "AdamW's weight decay; biases and norms have none", low=0)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon, added to the root of the second moment", above=0)
    zero_stage: int = option(
        0,
        "ZeRO stage",
        choices=(0, 1, 2, 3),
        deepspeed_keys=("zero_optimization.stage",),
        relieves=(Phase.TRAINING_STEP, Phase.OWN_UPDATE, Phase.ANYWHERE),
        advice="raise {flag}",
    )
    gradient_checkpointing: bool = option(
        False,
        "recompute activations in the backward pass to save memory",
        relieves=(Phase.TRAINING_STEP, Phase.OWN_UPDATE),
        advice="add {flag}",
    )
    lora_dim: int = option(
        0,
        "rank of the LoRA adapters; 0 trains the whole model",
        low=0,
        relieves=(Phase.ANYWHERE,),
        advice="train adapters only with {flag}",
    )
    lora_alpha: float | None = option(
        None,
        "adapters are scaled by this/rank and start as in peft; none: as in DeepSpeed-Chat, whose learning "
        "rate the default is: scaled by 1/rank, the first factor starting within 1/sqrt(rank)",
        above=0,
    )
    lora_module_name: str = option(
        "auto", "comma-separated parts of the names of the layers to adapt; auto: all linear layers"
    )
    lora_learning_rate: float = option(5e-4, "learning rate of the adapters", low=0)
    quantize: str = option(
        "none",
        "hold the frozen linear layers in 4 bits (nf4) or 8 (int8), for adapters to be trained on: QLoRA",
        choices=QUANTIZATIONS,
    )


def check_lora(config: Config, prefix: str = "") -> None:
    """Raise UserError for an option of LoRA that is set while no adapters are trained, and for weights of few bits
    that would have to be trained."""
    names = [name for name in options(type(config)) if name.startswith(f"{prefix}lora_")]
    names.remove(f"{prefix}lora_dim")
    config.only_with(f"--{prefix}lora_dim above 0", getattr(config, f"{prefix}lora_dim") > 0, *names)
    quantize = getattr(config, f"{prefix}quantize")
    if quantize != "none" and not getattr(config, f"{prefix}lora_dim"):
        raise UserError(
            f"--{prefix}quantize {quantize} holds weights that cannot be trained: add adapters with --{prefix}lora_dim "
            "16, say, or leave it out"
        )


@dataclass(frozen=True, kw_only=True)
class SupervisedOptions(ScheduleOptions):
    """Training"""

    learning_rate: float  # declared by every step, with a default of its own
    per_device_train_batch_size: int = option(
        16,
        "rows per rank in one training micro-batch",
        low=1,
        deepspeed_keys=("train_batch_size", "train_micro_batch_size_per_gpu"),
        relieves=(Phase.TRAINING_STEP,),
        advice="lower {flag}",
    )
    per_device_eval_batch_size: int = option(
        16,
        "rows per rank in one evaluation batch",
        low=1,
        affects="evaluation",
        relieves=(Phase.EVALUATION,),
        advice="lower {flag}",
    )
    max_seq_len: int = option(
        512,
        "longest prompt and answer together",
        unit="tokens",
        low=2,
        relieves=(Phase.ANYWHERE,),
        advice="lower {flag}",
    )
    group_by_length: bool = option(
        False, "form optimizer steps of rows of similar length: less padding, but steps are no longer random samples"
    )
    weight_decay: float = same_option(TrainedModelOptions, "weight_decay")
    adam_epsilon: float = same_option(TrainedModelOptions, "adam_epsilon")
    zero_stage: int = same_option(TrainedModelOptions, "zero_stage")
    offload: bool = option(
        False,
        "keep optimizer state (at ZeRO 1-3) and parameters (at ZeRO 3) in CPU memory",
        relieves=(Phase.TRAINING_STEP, Phase.ANYWHERE),
        advice="add {flag}",
    )
    gradient_checkpointing: bool = same_option(TrainedModelOptions, "gradient_checkpointing")
    dropout: float | None = option(None, "dropout probability; none keeps the model's own", low=0, below=1)
    disable_dropout: bool = option(False, "the same as --dropout 0")
    eval_interval: int = option(
        0,
        "evaluate every N steps; 0: only before and after each epoch",
        unit="optimizer steps",
        low=0,
        affects="evaluation",
    )
    log_interval: int = option(10, "record metrics every N steps", unit="optimizer steps", low=1, affects="nothing")
    print_loss: bool = option(False, "print what is recorded, besides the progress bar", affects="nothing")

    @property
    def dropout_probability(self) -> float | None:
        """The probability of every dropout layer of the model; None keeps those of the model."""
        return 0.0 if self.disable_dropout else self.dropout

    def batches(self) -> list[Batch]:
        """The rows of one optimizer step."""
        return [
            Batch(
                "rows per optimizer step",
                ("per_device_train_batch_size", "gradient_accumulation_steps"),
                self.per_device_train_batch_size,
                self.per_device_train_batch_size * self.gradient_accumulation_steps,
            )
        ]

    def validate(self) -> None:
        super().validate()
        if self.disable_dropout and self.dropout:
            raise UserError(f"--disable_dropout and --dropout {self.dropout} contradict each other: keep one")
        if self.offload and self.zero_stage == 0:
            raise UserError("--offload needs --zero_stage 1, 2 or 3")


@dataclass(frozen=True, kw_only=True)
class LoraOptions(Config):
    """LoRA"""

    lora_dim: int = same_option(TrainedModelOptions, "lora_dim")
    lora_alpha: float | None = same_option(TrainedModelOptions, "lora_alpha")
    lora_dropout: float = option(0.0, "dropout before the adapters", low=0, below=1)
    lora_module_name: str = same_option(TrainedModelOptions, "lora_module_name")
    lora_learning_rate: float = same_option(TrainedModelOptions, "lora_learning_rate")
    quantize: str = same_option(TrainedModelOptions, "quantize")

    def validate(self) -> None:
        super().validate()
        check_lora(self)


@dataclass(frozen=True, kw_only=True)
class OneModelConfig(SupervisedOptions, LoraOptions, RunOptions):
    """What every step that trains one model has"""

    @property
    def trained(self) -> TrainedModelOptions:
        """The options of the model that is trained."""
        return unprefixed(self, TrainedModelOptions)


def check_output_dir(output_dir: str, **models: str) -> None:
    """Raise UserError unless `output_dir` is, or can become, a directory in which this process may write.

    Args:
        models: paths that the run reads, by the flag that names them; the directory may be none of them.
    """
    directory = Path(output_dir)
    try:
        existing = next(
            path for path in (directory, *directory.absolute().parents) if path.is_symlink() or path.exists()
        )
        if not existing.is_dir():
            raise UserError(f"--output_dir {output_dir}: {existing} is a file; name a directory")
        # Permissions say too little: root may write, and yet not to /proc or a read-only disk.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"--output_dir {output_dir}: cannot be written to: {error.strerror}; name another directory"
        ) from None
    for flag, model in models.items():
        if Path(model).resolve() == Path(output_dir).resolve():
            raise UserError(f"--output_dir {output_dir}: would overwrite --{flag}; name another directory")
