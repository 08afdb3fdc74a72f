"""A run resumes from the newest undamaged checkpoint, and a disk that cannot save does not end it."""

import contextlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.checkpoints.store import PARTIAL
from tests.faults.checkpoint_cases import DAMAGES, HINDRANCES, INTERVAL, OPTIMIZER, STEPS, WEIGHTS
from tests.launching import ROOT, environment, launch, small_run
from tests.logs import metrics

WHY = {
    "empty": f"{OPTIMIZER} has 0 bytes, not",
    "truncated": f"{WEIGHTS} has 1,000 bytes, not",
    "bit-flipped": f"{OPTIMIZER} has other content than was written",
    "all": f"{OPTIMIZER} has other content",
    "missing": "rank1.safetensors: No such file or directory",
    "no-manifest": "manifest.json: No such file or directory",
}
HOSTILE = {"hostile-weights", "hostile-optimizer"}
REFUSED = {
    "full": r"No space left on device \(rank [01]\)",
    "read-only": r"Read-only file system \(rank [01]\)",
    "a-file-in-the-way": r"(Not a directory|File exists) \(rank [01]\)",
    "rank-0-refused": r"File too large \(rank 0\)",
    "rank-1-refused": r"File too large \(rank 1\)",
}


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """A directory for each case, and found.json; one launch."""
    directory = tmp_path_factory.mktemp("checkpoints")
    try:
        launch(ROOT / "tests" / "faults" / "checkpoint_cases.py", str(directory), ranks=2)
    finally:
        for name in HINDRANCES:
            subprocess.run(["umount", str(directory / name / "checkpoints")], capture_output=True)
    return directory


@pytest.fixture(scope="module")
def found(output) -> dict:
    return json.loads((output / "found.json").read_text())


@pytest.mark.parametrize("case", sorted({*DAMAGES} - HOSTILE))
def test_the_newest_whole_checkpoint_is_taken_and_the_damage_named(case, found, output):
    warnings = [line for line in found[case]["said"] if line.startswith("warning")]
    resumed = [line for line in found[case]["said"] if line.startswith("resuming from")]
    damaged = ["step-4", "step-2"] if case == "all" else ["step-4"] if case in WHY else []
    assert len(warnings) == len(damaged)
    for line, name in zip(warnings, damaged):
        assert f"{output / case}/checkpoints/{name} is not whole" in line and WHY[case] in line
    newest = {0: "step-4", 1: "step-2"}.get(len(damaged))
    assert resumed == ([f"resuming from {output / case}/checkpoints/{newest}"] if newest else [])
    assert metrics(output / case) == metrics(output / "whole")
    assert not list((output / case).rglob(f"{PARTIAL}*"))
    if case == "all":  # so the run was made anew, and what is left of the old one is not deleted
        aside = output / case / "checkpoints-1"
        assert {path.name for path in aside.glob("step-*")} == {"step-2", "step-4"}
        assert any(f"kept in {aside}" in line for line in found[case]["said"])


@pytest.mark.parametrize("case", sorted(HOSTILE))
def test_a_checkpoint_that_would_run_code_is_refused(case, found, output):
    checkpoint = output / case / "checkpoints" / "step-4"
    for name in (OPTIMIZER, WEIGHTS) if case == "hostile-optimizer" else (WEIGHTS,):
        harmful = torch.serialization.get_unsafe_globals_in_checkpoint(checkpoint / name)
        assert ("posix.mkdir" in harmful) == (case == "hostile-weights" or name == OPTIMIZER)
    for error in found[case]["errors"]:
        assert f"{checkpoint}/model: it holds more than data" in error and "\n" not in error and "mkdir" in error
        assert "--resume never" in error
    assert not (output / case / "canary").exists()


@pytest.mark.parametrize("case", HINDRANCES)
def test_a_disk_that_refuses_a_save_costs_that_save_alone(case, found, output):
    result = found[case]
    if "skipped" in result:
        pytest.skip(f"no right to mount a file system: {result['skipped']}")
    (warning,) = [line for line in result["said"] if line.startswith("warning")]
    assert f"{output / case}/checkpoints, which takes " in warning and re.search(REFUSED[case], warning)
    assert warning.endswith("the run goes on and will try again")
    needed = int(re.search(r"takes ([0-9,]+) bytes", warning)[1].replace(",", ""))
    whole = [
        path
        for path in (output / "hostile-weights" / "checkpoints" / "step-2").rglob("*")
        if path.is_file() and path.name != "manifest.json"
    ]
    assert needed == pytest.approx(sum(path.stat().st_size for path in whole), rel=0.01)
    saves = [f"step-{step}" for step in range(INTERVAL, STEPS, INTERVAL)]
    assert result["left"] == [["newest", "step-2"], ["newest", "step-2"], ["newest", "step-2", "step-6"]]
    assert [line.split("/")[-1] for line in result["said"] if "checkpoint saved to" in line] == [saves[0], saves[2]]
    assert metrics(output / case) == metrics(output / "whole")


@pytest.mark.long
def test_a_full_disk_ends_no_run_before_its_result_is_written(tmp_path, tmpfs):
    """Neither metrics nor events nor checkpoints find room; what was saved before is there to go on from."""
    output = tmpfs(tmp_path / "sft", "40m")
    command = [
        sys.executable,
        str(ROOT / "step1_sft" / "main.py"),
        *small_run(tmp_path),
        *"--max_rows 200 --data_split 8,1,1 --max_seq_len 64 --log_interval 1 --num_train_epochs 20".split(),
        *"--save_interval 5 --eval_interval 2 --eval_iters 1".split(),
    ]
    with open(tmp_path / "said", "w+") as file:
        started = subprocess.Popen(command, env=environment(), stdout=file, stderr=file)
        while not (output / "checkpoints" / "step-5").is_dir() and started.poll() is None:
            time.sleep(0.01)
        while started.poll() is None:
            fill(output / "ballast")
        file.seek(0)
        said = file.read()
    assert started.returncode == 1, said
    (error,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert str(output) in error and "No space left on device" in error and "same command" in error
    assert "Traceback" not in said and "Logging error" not in said
    assert "warning: no checkpoint could be written" in said
    assert said.count(f"warning: {output}/logs/metrics.jsonl cannot be written: No space left on device") == 1
    (output / "ballast").unlink()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stderr
    steps = [record["step"] for record in metrics(output) if record["phase"] == "train"]
    assert steps == list(range(1, steps[-1] + 1)) and len(steps) > 50


def fill(ballast: Path) -> None:
    """Leave no room beside `ballast`."""
    with contextlib.suppress(OSError), open(ballast, "ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    time.sleep(0.001)
