"""Decides which parts of a source are for training, and which are its own test data.

Names decide, as on the hub. A part is named after train, or after test (also validation, dev, eval), or after neither:

- If some parts are named after train, those named after neither are left out.
- If none is named after train, those named after neither are for training.
- If all parts are named after test, they are for training.

Some sets hold the same rows several times, for different uses: train_prefs, train_sft, train_gen. Then the parts of one
use are taken, the one that fits the wanted kind of record. The test prompts of the other uses are not trained on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_TRAIN = {"train", "training"}
_TEST = {"test", "testing", "valid", "validation", "val", "dev", "eval", "evaluation"}
_USES = {
    **dict.fromkeys(
        ("prefs", "pref", "preference", "preferences", "comparisons", "pairs", "rm", "reward", "dpo"), "prefs"
    ),
    **dict.fromkeys(("sft", "demonstrations"), "sft"),
    **dict.fromkeys(("gen", "generation", "prompts", "rl", "ppo"), "gen"),
}
# For each kind of record the uses, the best fitting first.
_FITTING = {
    "comparison": ("prefs", "sft", "gen"),
    "feedback": ("prefs", "sft", "gen"),
    "demonstration": ("sft", "prefs", "gen"),
    "prompt": ("gen", "prefs", "sft"),
    "text": ("sft", "gen", "prefs"),
}
_FOR = {
    "comparison": "comparisons",
    "feedback": "labelled answers",
    "demonstration": "demonstrations",
    "prompt": "prompts",
    "text": "plain text",
}


@dataclass
class Choice:
    """What is made of a source's parts.

    Attributes:
        splits: part name -> "train", "test" or "excluded" (see `sources.Part`), in the order of the names.
        left_out: the names of parts that belong to no split.
        notes: remarks for the log.
    """

    splits: dict[str, str]
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def choose_splits(names: Sequence[str], kind: str | None) -> Choice:
    """The split of each of a source's parts, for records of `kind`; None: without regard to uses."""
    splits = _splits(names)
    choice = Choice(splits, [name for name in names if name not in splits])
    if kind is None:
        return choice
    for split in ("train", "test"):
        uses = {name: use for name, of_name in splits.items() if of_name == split and (use := _use_in_name(name))}
        if len(set(uses.values())) < 2:
            continue
        fittest = min(uses.values(), key=_FITTING[kind].index)
        others = [name for name, use in uses.items() if use != fittest]
        taken = [name for name, use in uses.items() if use == fittest]
        choice.notes.append(
            f"of its parts for several uses {', '.join(taken)} {'is' if len(taken) == 1 else 'are'} "
            f"read, for {_FOR[kind]}; left out: {', '.join(others)}"
        )
        for name in others:
            if split == "test":
                splits[name] = "excluded"
            else:
                del splits[name]
    return choice


def _splits(names: Sequence[str]) -> dict[str, str]:
    """Part name -> 'train' or 'test', in the order of `names`, without those that belong to no split."""
    splits = {name: _split_in_name(name) for name in names}
    if "train" in splits:
        # Beside a part that is called exactly 'train', 'train_sft' and the like hold the same rows again.
        splits = {name: split for name, split in splits.items() if split != "train" or name == "train"}
    if "train" in splits.values():
        return {name: split for name, split in splits.items() if split}
    if None in splits.values():
        return {name: split or "train" for name, split in splits.items()}
    return dict.fromkeys(splits, "train")


def _split_in_name(name: str) -> str | None:
    """The split that a name is named after; of a path's components, the last one that names a split decides."""
    for component in reversed(name.split("/")):
        if split := _split_in_words(_words(component)):
            return split
    return None


def _words(component: str) -> list[str]:
    return re.split(r"[^a-z]+", component.lower())


def _split_in_words(words: list[str]) -> str | None:
    if not _TRAIN.isdisjoint(words):
        return "train"
    return None if _TEST.isdisjoint(words) else "test"


def _use_in_name(name: str) -> str | None:
    """The use that a name contains beside its split, as in train_sft."""
    for component in reversed(name.split("/")):
        words = _words(component)
        if _split_in_words(words):
            return next((_USES[word] for word in words if word in _USES), None)
    return None
