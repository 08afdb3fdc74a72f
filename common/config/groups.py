"""Groups of options that several steps share. A step's config inherits the groups it uses."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from common.config.parser import Config, PathName, option, options
from common.errors import UserError
from common.training.learning_rate import SCHEDULES

LORA_ALPHA_HELP = (
    "adapters are scaled by this/rank and start as in peft; none: as in DeepSpeed-Chat, whose learning "
    "rate the default is: scaled by 1/rank, the first factor starting within 1/sqrt(rank)"
)


@dataclass(frozen=True)
class Batch:
    """Rows that all ranks take together, and that two options of each rank make up.

    Attributes:
        what: as in "16 rows per optimizer step".
        flags: the options for the rows that a rank takes at a time, and how many times it does.
        rows_at_a_time: the first one's value.
        rows: of one rank.
    """

    what: str
    flags: tuple[str, str]
    rows_at_a_time: int
    rows: int

    def flags_for(self, total: int, ranks: int) -> str:
        """The flags with which so many ranks take `total` rows, none more at a time than now."""
        rows = total // ranks
        if rows * ranks != total:
            return f"a number of ranks that divides {total}"
        at_a_time = max(number for number in range(1, self.rows_at_a_time + 1) if rows % number == 0)
        return f"--{self.flags[0]} {at_a_time} --{self.flags[1]} {rows // at_a_time}"


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions(Config):
    """Optimization"""

    num_train_epochs: int = option(1, "passes over the training data", low=1)
    gradient_accumulation_steps: int = option(1, "micro-batches per rank in one optimizer step", low=1)
    max_tokens_per_micro_batch: int = option(
        0,
        "cut each optimizer step's rows, the same ones, into micro-batches of so many tokens with padding, alike on "
        "every rank; a longer row goes alone; 0: into equal numbers of rows",
        unit="tokens",
        low=0,
    )
    auto_micro_batch: bool = option(
        False, "measure before training what fits into memory, and set --max_tokens_per_micro_batch to it"
    )
    max_skipped_steps: int = option(
        5,
        "an optimizer step with a loss or gradient that is not finite is skipped; so many in a row end the run",
        unit="optimizer steps",
        low=1,
    )
    lr_scheduler_type: str = option("cosine", "schedule of the learning rate", choices=SCHEDULES)
    num_warmup_steps: int = option(
        0,
        "learning rates rise this long, from 1/N of the highest in the first step; a run that is shorter is all "
        "warm-up",
        unit="optimizer steps",
        low=0,
    )
    max_grad_norm: float = option(1.0, "clip gradients to this global norm; 0 turns it off", low=0)

    def validate(self) -> None:
        super().validate()
        if self.auto_micro_batch and self.max_tokens_per_micro_batch:
            raise UserError(
                f"--auto_micro_batch and --max_tokens_per_micro_batch {self.max_tokens_per_micro_batch} "
                "contradict each other: keep one"
            )
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

    dtype: str = option(
        "auto",
        "number format of forward and backward; auto is bf16 on a GPU, fp32 on a CPU",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    seed: int = option(1234, "seed of data order, initialisation and sampling", low=0, high=2**32 - 1)
    deepspeed_config: PathName | None = option(None, "JSON file laid over the generated DeepSpeed configuration")
    timeout: int = option(1800, "longest wait for other ranks", unit="seconds", low=1)
    trust_remote_code: bool = option(False, "allow models to bring and run their own Python code")
    merge_adapter: bool = option(
        False,
        "where an adapter lies in a model's directory, start from the sum of both, which is kept in "
        "--data_output_path; an adapter alone is laid over the base that it names",
    )
    save_interval: int = option(
        500, "save a checkpoint every N; in step 3 when the iteration ends; 0: never", unit="optimizer steps", low=0
    )
    keep_checkpoints: int = option(2, "how many checkpoints stay; all go when the result is saved", low=1)
    resume: PathName = option(
        "auto",
        "auto: go on from the newest whole checkpoint in the output directory, if there is one; never: start "
        "anew; or the path of a checkpoint",
    )
    resume_anyway: bool = option(False, "resume even though settings have changed")
    enable_tensorboard: bool = option(True, "write TensorBoard events")
    tensorboard_path: PathName | None = option(None, "directory of TensorBoard events; none: in OUTPUT_DIR/logs")
    enable_test_mode: bool = option(False, "stop after --test_stop_step")
    test_stop_step: int = option(
        0, "where --enable_test_mode stops", unit="optimizer steps, in step 3 iterations", low=0
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

    def validate(self) -> None:
        super().validate()
        self.only_with("--enable_tensorboard", self.enable_tensorboard, "tensorboard_path")
        self.only_with("--enable_test_mode", self.enable_test_mode, "test_stop_step")
        if self.enable_test_mode and not self.test_stop_step:
            raise UserError("--enable_test_mode needs --test_stop_step N, N at least 1")


@dataclass(frozen=True, kw_only=True)
class SupervisedOptions(ScheduleOptions):
    """Training"""

    per_device_train_batch_size: int = option(16, "rows per rank in one training micro-batch", low=1)
    per_device_eval_batch_size: int = option(16, "rows per rank in one evaluation batch", low=1)
    max_seq_len: int = option(512, "longest prompt and answer together", unit="tokens", low=2)
    group_by_length: bool = option(
        False, "form optimizer steps of rows of similar length: less padding, but steps are no longer random samples"
    )
    weight_decay: float = option(0.0, "AdamW's weight decay; biases and norms have none", low=0)
    zero_stage: int = option(0, "ZeRO stage", choices=(0, 1, 2, 3))
    offload: bool = option(False, "keep optimizer state (at ZeRO 1-3) and parameters (at ZeRO 3) in CPU memory")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    dropout: float | None = option(None, "dropout probability; none keeps the model's own", low=0, below=1)
    disable_dropout: bool = option(False, "the same as --dropout 0")
    eval_interval: int = option(
        0, "evaluate every N steps; 0: only before and after each epoch", unit="optimizer steps", low=0
    )
    log_interval: int = option(10, "record metrics every N steps", unit="optimizer steps", low=1)
    print_loss: bool = option(False, "print what is recorded, besides the progress bar")

    @property
    def dropout_probability(self) -> float | None:
        """What to set every dropout of the model to; None leaves it."""
        return 0.0 if self.disable_dropout else self.dropout

    def batches(self) -> list[Batch]:
        """What is computed depends on these, not on what each rank contributes."""
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

    lora_dim: int = option(0, "rank of the LoRA adapters; 0 trains the whole model", low=0)
    lora_alpha: float | None = option(None, LORA_ALPHA_HELP, above=0)
    lora_dropout: float = option(0.0, "dropout before the adapters", low=0, below=1)
    lora_module_name: str = option(
        "auto", "comma-separated parts of the names of the layers to adapt; auto: all linear layers"
    )
    lora_learning_rate: float = option(5e-4, "learning rate of the adapters", low=0)

    def validate(self) -> None:
        super().validate()
        self.only_with(
            "--lora_dim above 0",
            self.lora_dim > 0,
            "lora_alpha",
            "lora_dropout",
            "lora_module_name",
            "lora_learning_rate",
        )


def check_output_dir(output_dir: str, **models: str) -> None:
    """`output_dir` can be a directory and is none of the models read from, each given as flag=path.

    Raises UserError.
    """
    place = Path(output_dir)
    try:
        existing = next(path for path in (place, *place.absolute().parents) if path.is_symlink() or path.exists())
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
