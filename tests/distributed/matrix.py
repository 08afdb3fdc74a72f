"""The combinations of ZeRO stage, number format, and full or LoRA training that every step must run with."""

from itertools import product
from typing import NamedTuple


class Combination(NamedTuple):
    zero_stage: int
    dtype: str
    lora: bool

    @property
    def name(self) -> str:
        return f"zero{self.zero_stage}-{self.dtype}-{'lora' if self.lora else 'full'}"


_ALL = [Combination(*values) for values in product((0, 2, 3), ("fp32", "bf16"), (False, True))]
# Every value of every dimension, and every pair that has made trouble, in less than half of the time.
SHORT = [
    Combination(0, "fp32", False),
    Combination(2, "fp32", True),
    Combination(3, "fp32", False),
    Combination(3, "bf16", True),
]
LONG = [combination for combination in _ALL if combination not in SHORT]

# DPO is run with each; KTO, which shares its program, where it adds something: both ways to hold the reference.
KTO = SHORT[1:3]

ROWS_PER_STEP = 8  # over all ranks, so that runs on other numbers of ranks see the same steps
EVAL_PROMPTS = 8
