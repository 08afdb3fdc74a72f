"""Which parts of a source are for training, and which are its own test data.

Told from names, as the hub does: a part named after train, or after test, validation, dev or eval; if some are named
after train, those named after none are left out; if none is, those named after none are for training, and if all are
test data, they are the source's data. Where the parts of a split are named after uses too (train_prefs, train_sft,
train_gen), as sets do that hold the same rows for each use, those of one use are taken: the one that fits the records
wanted. What the other uses test is not trained on either.
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
# For each kind of record the uses, the fittest first.
_FITTING = {
    "comparison": ("prefs", "sft", "gen"),
    "demonstration": ("sft", "prefs", "gen"),
    "prompt": ("gen", "prefs", "sft"),
    "text": ("sft", "gen", "prefs"),
}
_FOR = {"comparison": "comparisons", "demonstration": "demonstrations", "prompt": "prompts", "text": "plain text"}


@dataclass
class Choice:
    """``splits``: part name -> 'train', 'test' or 'excluded', in the order of the names; ``left_out``: the names of
    those that belong to no split; ``notes``: what is worth saying."""

    splits: dict[str, str]
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def choose_splits(names: Sequence[str], kind: str | None) -> Choice:
    """The part that each of a source's parts has in giving records of ``kind``; None: whatever the kind."""
    splits = _splits(names)
    choice = Choice(splits, [name for name in names if name not in splits])
    if kind is None:
        return choice
    for split in ("train", "test"):
        uses = {name: use for name, found in splits.items() if found == split and (use := _use_in_name(name))}
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
    """Part name -> 'train' or 'test', in the order of ``names``, without those that belong to no split."""
    splits = {name: _split_in_name(name) for name in names}
    if "train" in splits:
        # An exact name leaves no doubt; 'train_sft' and the like beside it hold the same rows again.
        splits = {name: split for name, split in splits.items() if split != "train" or name == "train"}
    if "train" in splits.values():
        return {name: split for name, split in splits.items() if split}
    if None in splits.values():
        return {name: split or "train" for name, split in splits.items()}
    return dict.fromkeys(splits, "train")


def _split_in_name(name: str) -> str | None:
    """The split a name speaks of; of several components of a path, the last that speaks decides."""
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
    """The use that is named beside the split, as in train_sft."""
    for component in reversed(name.split("/")):
        words = _words(component)
        if _split_in_words(words):
            return next((_USES[word] for word in words if word in _USES), None)
    return None
