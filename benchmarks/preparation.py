"""Preparing many rows of data, and the second start, which finds them prepared: seconds, memory of all processes."""

from __future__ import annotations

import json
import random
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

if __package__ in (None, ""):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.runtime.requirements import require_environment

    require_environment()

import psutil

from benchmarks.inputs import BenchmarkOptions, random_model, with_data
from benchmarks.measure import MIB, say_line
from common.artifacts.compatibility import open_codec
from common.artifacts.split_rule import data_request
from common.config.parser import PathName, option, parse
from common.data.prepare import prepare
from common.runtime.program import run_program
from step1_sft.config import SFTConfig


@dataclass(frozen=True, kw_only=True)
class PreparationBenchmark(BenchmarkOptions, SFTConfig):
    """Data preparation of step 1, by its options"""

    model_name_or_path: PathName = option("random:opt-4x256", "the model whose tokenizer is used")
    data_split: str = option("1,0,0", "parts of the prompts for the steps 1, 2 and 3")
    rows: int = option(100_000, "rows of the file", low=1)
    words_per_row: int = option(84, "words of each row, of random letters, so that each takes several tokens", low=11)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the file, prepare it, and start a second time."""
    config = with_data(parse(PreparationBenchmark, argv))
    source = random_model(config.model_name_or_path, "--model_name_or_path", config)
    codec = open_codec(config, source)
    prepared = Path(config.output_dir) / "preparation"
    shutil.rmtree(prepared, ignore_errors=True)
    rows = PathName(str(write_rows(prepared / "rows.jsonl", config)))
    config = replace(config, data_path=(rows,), data_output_path=PathName(str(prepared)))
    request = data_request(config, "demonstration", config.max_seq_len)
    for start in ("first", "second"):
        peak = PeakMemory()
        began = time.perf_counter()
        with peak:
            data = prepare(request, codec)
        lengths = data.train["length"]
        say_line(
            {
                "benchmark": "preparation",
                "start": start,
                "rows": len(data.train) + len(data.eval),
                "mean_tokens": sum(lengths) / len(lengths),
                "seconds": time.perf_counter() - began,
                "peak_resident_mib": peak.bytes / MIB,
            }
        )


def write_rows(path: Path, config: PreparationBenchmark) -> Path:
    """Questions that all differ, and answers, of random words."""
    draw = random.Random(config.seed)
    words = ["".join(draw.choices("etaoinshrdlucmfwypvbgk", k=draw.randint(2, 8))) for _ in range(2000)]
    path.parent.mkdir(parents=True)
    with open(path, "w") as stream:
        for number in range(config.rows):
            row = {
                "prompt": f"{number} {' '.join(draw.choices(words, k=9))}?",
                "response": " ".join(draw.choices(words, k=config.words_per_row - 10)),
            }
            stream.write(json.dumps(row) + "\n")
    return path


class PeakMemory:
    """Within the context: the most that this process and its children hold together, memory that they share counted in
    each; looked at 20 times a second."""

    def __enter__(self) -> PeakMemory:
        self.bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        ours = psutil.Process()
        while not self._over.wait(0.05):
            held = 0
            for process in [ours, *ours.children(recursive=True)]:
                try:
                    held += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.bytes = max(self.bytes, held)


if __name__ == "__main__":
    sys.exit(run_program(main))
