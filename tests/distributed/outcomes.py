"""What a run has left, read with plain transformers and nothing of the trainer's own code."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def logged(directory: Path, phase: str) -> list[dict]:
    """The rows of metrics.jsonl of one phase: `train` or `eval`."""
    records = [json.loads(line) for line in (directory / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["phase"] == phase]


def samples(directory: Path, name: str) -> list[dict]:
    """The rows of samples/NAME.jsonl."""
    return [json.loads(line) for line in (directory / "samples" / f"{name}.jsonl").read_text().splitlines()]


@torch.no_grad()
def held_out_loss(data: Path, model) -> float:
    """Mean loss of the response tokens of the demonstrations held out in `--data_output_path`, row by row."""
    total = tokens = 0
    for row in _held_out(data, "demonstration"):
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        labels = ids.clone()
        labels[:, : len(row["prompt_ids"])] = -100
        total += float(model(input_ids=ids, labels=labels).loss) * len(row["response_ids"])
        tokens += len(row["response_ids"])
    return total / tokens


@torch.no_grad()
def held_out_scores(data: Path, model) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the chosen and of the rejected responses held out in `--data_output_path`, row by row: (N,) each."""
    rows = _held_out(data, "comparison")
    scores = [
        [float(model(input_ids=torch.tensor([row["prompt_ids"] + row[side]])).logits) for row in rows]
        for side in ("chosen_ids", "rejected_ids")
    ]
    return torch.tensor(scores[0]), torch.tensor(scores[1])


def _held_out(data: Path, kind: str):
    from datasets import Dataset

    (prepared,) = data.glob(f"{kind}-*/eval.arrow")
    return Dataset.from_file(str(prepared))
