"""Small data files, and requests to prepare them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from common.data.blend import parse_data_path
from common.data.request import DataRequest


def pairs(count: int, start: int = 0) -> list[dict]:
    return [
        {"prompt": f"What is {i} plus {i}?", "chosen": f"The sum is {2 * i}.", "rejected": "No idea."}
        for i in range(start, start + count)
    ]


def write(path: Path, rows: list) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def request(tmp_path: Path, *data_path: str, **changes) -> DataRequest:
    return replace(
        DataRequest(
            parse_data_path(data_path),
            kind="demonstration",
            phase=None,
            max_tokens=200,
            eval_fraction=0.2,
            cache_dir=tmp_path / "cache",
        ),
        **changes,
    )
