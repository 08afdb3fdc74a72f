"""The metrics that docs/metrics.md documents, by step."""

from __future__ import annotations

import re

from common.paths import ROOT

_SECTIONS = {"sft": "Step 1", "reward": "Step 2", "dpo": "DPO", "ppo": "Step 3"}
_REWARD = re.compile(r"reward/(?P<label>[^/]+?)(?P<rest>/.+|_std|_clipped|_failed)?")


def documented_metrics(step: str) -> set[str]:
    """What a row of metrics.jsonl may hold in a step: "sft", "reward", "dpo" or "ppo"."""
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", page, flags=re.DOTALL | re.MULTILINE))
    cells = re.findall(r"^\| (`[^|]*?) \|", sections["Rows"] + sections[_SECTIONS[step]], flags=re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def as_documented(name: str) -> str:
    """A metric's name as the page has it: that of a reward and of its figure are general there."""
    match = _REWARD.fullmatch(name)
    if match is None:
        return name
    rest = match["rest"] or ""
    return "reward/NAME" + ("/FIGURE" if rest.startswith("/") else rest)
