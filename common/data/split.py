"""Decides which phase (SFT, reward model, PPO) and which side (training, evaluation) a dialogue belongs to.

The assignment is a function of the dialogue's split key alone: usually its first user turn, or the value of a column. A
dialogue's later prompts contain its earlier responses, so all of them must fall on the same side. Neither seed, node
nor order moves a prompt from training to evaluation. `common.data.openings` decides which dialogues are keyed by more
turns than the first.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from common.data.errors import SplitByError
from common.errors import DataError, did_you_mean

SPLIT_BY = ("auto", "opening", "prompt")  # or column:NAME
_COLUMN = "column:"


@dataclass(frozen=True)
class Assignment:
    """Attributes: `phase`: 0 SFT, 1 reward model, 2 PPO; `is_eval`: whether the dialogue is held out."""

    phase: int
    is_eval: bool


def parse_data_split(value: str | Sequence[float]) -> tuple[float, float, float]:
    """`'2,4,4'` or `(2, 4, 4)` -> the three phases' parts, in proportion.

    Raises:
        DataError: these are not three finite numbers, or one is negative, or all are zero.
    """
    parts = value.split(",") if isinstance(value, str) else list(value)

    def refused(why: str) -> DataError:
        return DataError(repr(value), f"give three parts for the steps 1, 2 and 3, such as 2,4,4; {why}")

    try:
        shares = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        raise refused("these are not all numbers") from None
    if len(shares) != 3:
        raise refused(f"there are {len(shares)}")
    if not all(math.isfinite(share) and share >= 0 for share in shares):
        raise refused("none may be negative or infinite")
    if not math.isfinite(sum(shares)) or sum(shares) == 0:
        raise refused("one at least must be above zero")
    return shares[0], shares[1], shares[2]


def proportions(data_split: str | Sequence[float]) -> tuple[float, ...]:
    """The phases' parts of one: equal for two ways of writing the same split. Raises as `parse_data_split`."""
    shares = parse_data_split(data_split)
    return tuple(round(share / sum(shares), 9) for share in shares)


def check_eval_fraction(value: float) -> float:
    """The share of every phase's prompts held out for evaluation, in [0, 1). Raises DataError outside it."""
    if not 0 <= value < 1:
        raise DataError(str(value), "give a number from 0 up to, but not including, 1")
    return value


def parse_split_by(value: str) -> str | None:
    """The column of `column:NAME`; None for one of `SPLIT_BY`. Raises SplitByError for anything else."""
    if value in SPLIT_BY:
        return None
    column = value.removeprefix(_COLUMN)
    if column == value or not column.strip():
        raise SplitByError(value, f"choose {', '.join(SPLIT_BY)} or column:NAME{did_you_mean(value, SPLIT_BY)}")
    return column


def normalised(text: str) -> str:
    """`text` without differences of Unicode form, case or white space, so that near-identical prompts become
    equal."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def dialogue_hash(first_user_turn: str) -> int:
    """64 bits, signed: equal for near-identical first user turns."""
    text = normalised(first_user_turn).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True)


def prefix_hashes(turns: Sequence[str]) -> list[int]:
    """The hash (64 bits, signed) of the first turn, of the first two, and so on to all; the first one is
    `dialogue_hash`."""
    digest, hashes = hashlib.blake2b(digest_size=8), []
    for number, turn in enumerate(turns):
        digest.update(b"\0" * bool(number) + normalised(turn).encode("utf-8", "surrogatepass"))
        hashes.append(int.from_bytes(digest.digest(), "big", signed=True))
    return hashes


def fractions(text: str, purpose: str, count: int) -> tuple[float, ...]:
    """`count` (at most 4) independent numbers in [0, 1), a function of the normalised text and the purpose."""
    key = f"{purpose}\n{normalised(text)}".encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(key).digest()
    # 53 bits: exactly representable, so that no number rounds up to 1.
    return tuple((int.from_bytes(digest[8 * i : 8 * i + 8], "big") >> 11) / 2**53 for i in range(count))


def assignment(split_key: str, data_split: str | Sequence[float], eval_fraction: float) -> Assignment:
    """The phase and side of a dialogue, by a hash of its normalised split key (usually its first user turn).

    Args:
        data_split: the phases' parts, see `parse_data_split`.
        eval_fraction: the share of each phase that is for evaluation, in [0, 1).
    """
    shares = parse_data_split(data_split)
    which, side = fractions(split_key, "split", 2)
    position, end, phase = which * sum(shares), 0.0, 0
    for index, share in enumerate(shares):
        end += share
        if share > 0:
            phase = index
            if position < end:
                break
    return Assignment(phase, side < check_eval_fraction(eval_fraction))
