"""Runs of the three programs that differ in one option each, in one process; writes down the effects of each.

Run under the launcher: option_cases.py INPUTS OUTPUT_DIR STEP...
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import sys
import traceback
from pathlib import Path
from unittest import mock

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from alternatives.dpo.main import main as dpo
from common.checkpoints.store import CheckpointStore
from common.errors import TrainingFailure, UserError
from common.runtime.program import run_program
from step1_sft.main import main as step1
from step2_reward.main import main as step2
from step3_ppo.generation import continuous_batching
from step3_ppo.main import main as step3
from tests.distributed.option_rows import STEPS, runs

PROGRAMS = {"sft": step1, "reward": step2, "dpo": dpo, "ppo": step3}
# What a run notes of its own flags is no effect of them.
ECHOES = ("run_config.yaml", "provenance.json")
CLOCKS = ("seconds", "samples_per_second")


def main() -> None:
    inputs, output, *steps = [word for word in sys.argv[1:] if not word.startswith("--")]
    torch.set_num_threads(1)
    for step in steps:
        found = {}
        for number, (name, flags) in enumerate(runs(STEPS[step]).items()):
            places = {
                "inputs": inputs,
                "data": f"{output}/{step}/data",
                "output": f"{output}/{step}/{number}",
                "elsewhere": f"{output}/{step}/{number}-elsewhere",
            }
            words = f"{STEPS[step].flags} --output_dir {{output}} --data_output_path {{data}} {flags}"
            found[name] = fingerprint(PROGRAMS[step], [word.format(**places) for word in words.split()], places)
        (Path(output) / f"{step}.json").write_text(json.dumps(found))


def fingerprint(program, argv: list[str], places: dict[str, str]) -> dict:
    """All that a run does but for its times and the echo of its flags, by part.

    Parts:
        metrics: the records of metrics.jsonl. samples: the files of samples/.
        weights: hashes of the saved tensors. files: hashes of all else that lies beside them, and the logs' names.
        elsewhere: names of the files outside of the output directory and the cache.
        printed: lines on the terminal. error: what the user is told, where the run refuses or gives up.
        engines: the DeepSpeed configuration of each. passes: how often the start of each ran forward.
        caches: how often memory for keys and values was taken. checkpoints: what was there after each was saved.
        timeout: seconds, of the process group.
        crash: a traceback; only in a run that failed as no run should.
    """
    printed, error, crash = io.StringIO(), None, None
    with watched() as seen, contextlib.redirect_stdout(printed):
        try:
            program(argv)
        except (UserError, TrainingFailure) as refusal:
            error = str(refusal)
        except Exception:  # shown by the test of the option; the runs of the others are still wanted
            crash = traceback.format_exc()
    output = Path(places["output"])
    saved = {
        path: hashlib.sha256((output / path).read_bytes()).hexdigest()
        for path in names(output)
        if not path.startswith(("logs/", "samples/")) and Path(path).name not in ECHOES
    }
    return {
        "metrics": [
            {name: value for name, value in record.items() if not any(clock in name for clock in CLOCKS)}
            for record in records(output / "logs" / "metrics.jsonl")
        ],
        "samples": {path: records(output / path) for path in names(output) if path.startswith("samples/")},
        "weights": {path: digest for path, digest in saved.items() if path.endswith(".safetensors")},
        "files": [
            {path: digest for path, digest in saved.items() if not path.endswith(".safetensors")},
            sorted({path.partition(".")[0] for path in names(output) if path.startswith("logs/")}),
        ],
        "elsewhere": sorted({path.partition("/")[0] for path in names(Path(places["elsewhere"]))}),
        "printed": [line.replace(places["output"], "") for line in printed.getvalue().splitlines()],
        "error": error,
        "crash": crash,
        **seen,
    }


def names(directory: Path) -> list[str]:
    """The files in a directory, from there."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@contextlib.contextmanager
def watched():
    """What DeepSpeed is asked for within the context, and what engines and rollouts do; all is done as without."""
    import deepspeed

    initialize, init_distributed, cache = (
        deepspeed.initialize,
        deepspeed.init_distributed,
        continuous_batching.SlotCache,
    )
    save = CheckpointStore.save
    seen: dict = {"engines": [], "passes": [], "caches": 0, "checkpoints": [], "timeout": None}

    def initialize_watched(model, config, **arguments):
        number = len(seen["engines"])
        seen["engines"].append(copy.deepcopy(config))
        seen["passes"].append(0)

        def count(*_):
            seen["passes"][number] += 1

        first_linear(model).register_forward_pre_hook(count)
        return initialize(model=model, config=config, **arguments)

    def init_distributed_watched(timeout, **arguments):
        seen["timeout"] = timeout.total_seconds()
        init_distributed(timeout=timeout, **arguments)

    def cache_watched(*arguments):
        seen["caches"] += 1
        return cache(*arguments)

    def save_watched(store, *arguments):
        path = save(store, *arguments)
        seen["checkpoints"].append(sorted(entry.name for entry in store.directory.glob("step-*")))
        return path

    with (
        mock.patch("deepspeed.initialize", initialize_watched),
        mock.patch("deepspeed.init_distributed", init_distributed_watched),
        mock.patch("step3_ppo.generation.continuous_batching.SlotCache", cache_watched),
        mock.patch.object(CheckpointStore, "save", save_watched),
    ):
        yield seen


def first_linear(model: torch.nn.Module) -> torch.nn.Module:
    """A part of the first block: what is recomputed starts inside of a block, after its own hooks."""
    block = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))[0]
    return next(module for module in block.modules() if isinstance(module, torch.nn.Linear))


if __name__ == "__main__":
    sys.exit(run_program(main))
