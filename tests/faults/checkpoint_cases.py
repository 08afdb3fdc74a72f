"""Step 1 on damaged checkpoints, failing disks and hostile files; writes down the output of each run.

Run under the launcher: checkpoint_cases.py OUTPUT_DIR
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from common.checkpoints.saver import Saver
from common.checkpoints.store import MANIFEST, POINTER
from common.errors import UserError
from common.runtime.distributed import barrier, gather_objects, is_main, rank
from common.runtime.program import run_program
from step1_sft.main import main as step1

STEPS, INTERVAL = 8, 2
OPTIMIZERS = [f"model/engine/zero_pp_rank_{number}_mp_rank_00_optim_states.pt" for number in range(2)]
OPTIMIZER = OPTIMIZERS[1]
WEIGHTS = "model/engine/mp_rank_00_model_states.pt"


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def leave_over(checkpoints: Path) -> None:
    shutil.copytree(checkpoints / "step-4", checkpoints / ".partial-6-0123abcd")
    (checkpoints / ".partial-6-0123abcd" / MANIFEST).unlink()


def plant(checkpoints: Path, *names: str) -> None:
    """Put pickles that make a canary in the place of files, and let the manifest agree."""
    canary = checkpoints.parent / "canary"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    manifest = json.loads((checkpoints / "step-4" / MANIFEST).read_text())
    for name in names:
        path = checkpoints / "step-4" / name
        torch.save({**torch.load(path, weights_only=False), "more": Bomb()}, path)
        manifest["files"][name] = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    (checkpoints / "step-4" / MANIFEST).write_text(json.dumps(manifest))


# Name -> what befalls the checkpoints step-2 and step-4 of a run that broke off.
DAMAGES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda checkpoints: None,
    "empty": lambda checkpoints: (checkpoints / "step-4" / OPTIMIZER).write_bytes(b""),
    "truncated": lambda checkpoints: os.truncate(checkpoints / "step-4" / WEIGHTS, 1000),
    "bit-flipped": lambda checkpoints: flip_a_bit(checkpoints / "step-4" / OPTIMIZER),
    "missing": lambda checkpoints: (checkpoints / "step-4" / "rank1.safetensors").unlink(),
    "no-manifest": lambda checkpoints: (checkpoints / "step-4" / MANIFEST).unlink(),
    "pointer-to-nothing": lambda checkpoints: (checkpoints / POINTER).write_text("step-99"),
    "left-over": leave_over,
    "all": lambda checkpoints: [flip_a_bit(checkpoints / step / OPTIMIZER) for step in ("step-2", "step-4")],
    "hostile-weights": lambda checkpoints: plant(checkpoints, WEIGHTS),
    "hostile-optimizer": lambda checkpoints: plant(checkpoints, *OPTIMIZERS),
}


@contextlib.contextmanager
def full(checkpoints: Path):
    ballast = checkpoints / "ballast"
    with open(ballast, "wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**16))
            file.flush()
    yield
    ballast.unlink()


@contextlib.contextmanager
def read_only(checkpoints: Path):
    subprocess.run(["mount", "-o", "remount,ro", str(checkpoints)], check=True)
    yield
    subprocess.run(["mount", "-o", "remount,rw", str(checkpoints)], check=True)


@contextlib.contextmanager
def small_files(checkpoints: Path):
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, usual[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@contextlib.contextmanager
def a_file_in_the_way(checkpoints: Path):
    checkpoints.rename(checkpoints.with_name("aside"))
    checkpoints.write_text("")
    yield
    checkpoints.unlink()
    checkpoints.with_name("aside").rename(checkpoints)


# Name -> what hinders the second save, on which rank, and whether the directory is a file system of its own.
HINDRANCES = {
    "full": (full, 0, True),
    "read-only": (read_only, 0, True),
    "a-file-in-the-way": (a_file_in_the_way, 0, False),
    "rank-0-refused": (small_files, 0, False),
    "rank-1-refused": (small_files, 1, False),
}


class Broken(Exception):
    """Takes the place of whatever ends a run."""


def main() -> None:
    (output,) = [Path(word) for word in sys.argv[1:] if not word.startswith("--")]
    found = {"whole": run(output, "whole")}
    with each_save(lambda number, save, checkpoints: (save(), break_off(number == 2))):
        run(output, "broken")
    for name, damage in DAMAGES.items():
        if is_main():
            shutil.copytree(output / "broken", output / name)
            damage(output / name / "checkpoints")
        barrier()
        found[name] = run(output, name)
    for name, (hindrance, where, own) in HINDRANCES.items():
        found[name] = hindered(output, name, hindrance, where, own)
    if is_main():
        (output / "found.json").write_text(json.dumps(found))


def run(output: Path, name: str) -> dict:
    """Lines on rank 0's terminal, and every rank's error."""
    words = [
        "--model_name_or_path",
        "builtin:tiny-opt",
        "--data_path",
        "builtin:courtesy",
        "--max_rows",
        "120",
        "--data_split",
        "8,1,1",
        "--data_output_path",
        str(output / "data"),
        "--output_dir",
        str(output / name),
        "--max_seq_len",
        "64",
        "--per_device_train_batch_size",
        "4",
        "--eval_iters",
        "1",
        "--num_train_epochs",
        "2",
        "--enable_test_mode",
        "--test_stop_step",
        str(STEPS),
        "--save_interval",
        str(INTERVAL),
        "--zero_stage",
        "2",
        "--no_enable_tensorboard",
        "--timeout",
        "60",
    ]
    said, error = io.StringIO(), None
    with contextlib.redirect_stdout(said):
        try:
            step1(words)
        except UserError as refusal:
            error = str(refusal)
        except Broken:
            barrier()
    return {"said": said.getvalue().splitlines(), "errors": gather_objects(error)}


def hindered(output: Path, name: str, hindrance, where: int, own: bool) -> dict:
    """A run whose second save is hindered, and what of the first one lies there afterwards."""
    checkpoints, left = output / name / "checkpoints", []
    if is_main() and own:
        checkpoints.mkdir(parents=True)
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(checkpoints)], capture_output=True, text=True
        )
    if not gather_objects(not own or not is_main() or mounted.returncode == 0)[0]:
        return {"skipped": mounted.stderr if is_main() else ""}

    def hinder(number: int, save: Callable, store) -> None:
        barrier()
        if number == 2 and rank() == where:
            with hindrance(checkpoints):
                barrier()
                save()
                barrier()
        elif number == 2:
            barrier()
            save()
            barrier()
        else:
            save()
        barrier()
        left.append(sorted(path.name for path in checkpoints.iterdir()))

    with each_save(hinder):
        result = run(output, name)
    if is_main() and own:
        subprocess.run(["umount", str(checkpoints)], check=True)
    return {**result, "left": left}


@contextlib.contextmanager
def each_save(around: Callable):
    """Within the context `around` is called with a save's number, the save, and its `Saver`."""
    usual, number = Saver.save, 0

    def save(saver, *args):
        nonlocal number
        number += 1
        around(number, lambda: usual(saver, *args), saver)

    Saver.save = save
    try:
        yield
    finally:
        Saver.save = usual


def break_off(now: bool) -> None:
    if now:
        raise Broken


if __name__ == "__main__":
    sys.exit(run_program(main))
