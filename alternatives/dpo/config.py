"""Declares the options of direct preference optimisation, its family and KTO."""

from __future__ import annotations

from dataclasses import dataclass

from alternatives.dpo.loss import LOSSES, LossOptions, PreferenceLoss
from common.config.parser import PathName, option, options
from common.config.shared import same_option
from common.errors import UserError
from common.supervised.config import ComparisonConfig, SupervisedConfig

KTO = "kto"  # the only --loss_type that is of single answers, not of pairs
# The losses that an option is for.
_TAKERS: dict[str, tuple[str, ...]] = {
    **{
        name: tuple(loss for loss in LOSSES if name in LOSSES[loss].options)
        for name in ("label_smoothing", "target_margin")
    },
    "sft_coef": tuple(LOSSES),
    "desirable_weight": (KTO,),
    "undesirable_weight": (KTO,),
}


@dataclass(frozen=True, kw_only=True)
class DPOConfig(ComparisonConfig):
    """Direct preference optimisation"""

    model_name_or_path: PathName = same_option(SupervisedConfig, "model_name_or_path", default="output/sft")
    output_dir: PathName = same_option(SupervisedConfig, "output_dir", default="output/dpo")
    learning_rate: float = same_option(SupervisedConfig, "learning_rate", default=5e-7)
    # Dropout would add noise to one side of the log-ratio only.
    dropout: float | None = same_option(SupervisedConfig, "dropout", default=0.0)
    loss_type: str = option(
        "sigmoid",
        "the loss of a pair: sigmoid is DPO, sigmoid_norm divides by the answers' lengths; simpo and orpo need no "
        "reference; kto is of single answers, labelled as good or bad",
        choices=(*LOSSES, KTO),
    )
    beta: float = option(
        0.1,
        "weight of the KL to the reference; scale of the implicit reward of simpo, weight of the odds ratio in orpo",
        above=0,
    )
    label_smoothing: float = option(
        0.0, "share of the pairs whose label is taken to be wrong; of sigmoid, robust, sigmoid_norm", low=0, below=0.5
    )
    target_margin: float = option(0.0, "the wanted distance of the implicit rewards, gamma of simpo", low=0)
    sft_coef: float | None = option(
        None,
        "weight of the chosen answer's -log p, a mean over its tokens; none: 1 with orpo, whose loss has it, else 0",
        low=0,
    )
    desirable_weight: float = option(1.0, "weight of the answers labelled as good, lambda_D of kto", low=0)
    undesirable_weight: float = option(1.0, "weight of those labelled as bad, lambda_U of kto", low=0)
    keep_reference: bool = option(
        False,
        "keep the reference in memory, with LoRA the model without its adapters, in place of computing its "
        "log-probs of all answers before training; then the samples tell the KL",
    )

    @property
    def loss(self) -> PreferenceLoss:
        """The loss of pairs that --loss_type names."""
        return LOSSES[self.loss_type]

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference model."""
        return self.loss_type == KTO or self.loss.needs_reference

    def loss_options(self) -> LossOptions:
        """The numbers that the loss reads."""
        sft_coef = self.loss.sft_coef if self.sft_coef is None else self.sft_coef
        return LossOptions(self.beta, self.label_smoothing, self.target_margin, sft_coef)

    def validate(self) -> None:
        super().validate()
        for name, takers in _TAKERS.items():
            if getattr(self, name) != options(type(self))[name].default and self.loss_type not in takers:
                raise UserError(
                    f"--{name} has no meaning with --loss_type {self.loss_type}: it is for {', '.join(takers)}"
                )
        if self.keep_reference and self.lora_dim and self.dropout_probability != 0:
            raise UserError("--keep_reference with --lora_dim reads the reference in the same pass: give --dropout 0")
        if self.loss_type == KTO and not (self.desirable_weight or self.undesirable_weight):
            raise UserError("--desirable_weight 0 and --undesirable_weight 0: nothing would be learnt from")
        if self.keep_reference and not self.needs_reference:
            raise UserError(f"--keep_reference has no meaning with --loss_type {self.loss_type}: it needs no reference")
