"""Programs start from any directory, with and without the launcher, and report errors alike."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.launching import ROOT, environment, launch
from tests.logs import assert_tensorboard_shows

SMALL = [
    "--data_path",
    "builtin:courtesy",
    "--max_rows",
    "600",
    "--max_seq_len",
    "96",
    "--enable_test_mode",
    "--test_stop_step",
    "3",
    "--learning_rate",
    "1e-3",
]


def test_a_program_runs_without_launcher_from_anywhere_with_its_own_packages(tmp_path):
    """Even where another project's `common` stands first on PYTHONPATH."""
    decoy = tmp_path / "decoy" / "common"
    decoy.mkdir(parents=True)
    (decoy / "__init__.py").write_text("raise ImportError('the wrong package')\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "step1_sft" / "main.py"), "--model_name_or_path", "builtin:tiny-llama", *SMALL],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(decoy.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = tmp_path / "output" / "sft"
    AutoModelForCausalLM.from_pretrained(result)
    rows = [json.loads(line) for line in (result / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["perplexity"] < rows[0]["perplexity"]
    assert_tensorboard_shows(rows, result / "logs" / "tensorboard")
    samples = [json.loads(line) for line in (result / "samples" / "after.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in samples}) == len(samples) > 2
    rights = {path.stat().st_mode for path in result.iterdir() if path.is_file()}
    assert rights == {(result / "config.json").stat().st_mode}, "who may read the one may read the others"
    # Nothing on the terminal but our own lines and the progress bar.
    assert [
        line
        for line in done.stdout.splitlines()
        if not line.startswith(("builtin:courtesy: 600 rows read", "evaluation after", "saved to"))
        and "rows to train on" not in line
    ] == []
    assert all("training:" in line for line in done.stderr.split("\r") if line.strip())


@pytest.mark.parametrize("schedule, rate", [("polynomial", "1e-3"), ("cosine", "0")])
def test_a_run_shorter_than_its_warm_up_learns_and_one_that_learns_nothing_says_so(schedule, rate, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} and {n}?", "response": f"{2 * n}"}) + "\n" for n in range(6)))
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "step1_sft" / "main.py"),
            "--model_name_or_path",
            "builtin:tiny-opt",
            "--data_path",
            "$HERE/rows.jsonl",
            "--data_split",
            "1,0,0",
            "--eval_fraction",
            "0",
            "--per_device_train_batch_size",
            "2",
            "--num_warmup_steps",
            "100",
            "--lr_scheduler_type",
            schedule,
            "--learning_rate",
            rate,
            "--log_interval",
            "1",
            "--output_dir=~/sft",
        ],
        cwd=tmp_path,
        timeout=300,
        capture_output=True,
        text=True,
        env={**environment(), "HOME": str(tmp_path / "home"), "HERE": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    result = tmp_path / "home" / "sft"
    trained = [json.loads(line) for line in (result / "logs" / "metrics.jsonl").read_text().splitlines()][:3]
    assert [row["learning_rate"] for row in trained] == pytest.approx(
        [float(rate) * share for share in (1 / 3, 2 / 3, 1)]
    )
    assert "note: --num_warmup_steps 100 is shortened to the 3 optimizer steps that this run has" in done.stdout
    assert ("training has left every weight of the model as it was" in done.stdout) is (rate == "0")
    (base,) = (tmp_path / "output" / "data").glob("tiny-opt-*")
    before, after = (load_file(directory / "model.safetensors") for directory in (base, result))
    assert all(torch.equal(before[name], after[name]) for name in before) is (rate == "0")
    assert not (tmp_path / "~").exists()


def test_an_error_that_all_ranks_meet_is_said_once(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n' * 20 + "broken\n" * 20)
    done = launch(
        ROOT / "step2_reward" / "main.py",
        "--model_name_or_path",
        "builtin:tiny-opt",
        "--data_path",
        str(rows),
        ranks=2,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode != 0
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error:")]
    assert len(said) == 1 and f"{rows}:21" in said[0]
    assert "Traceback" not in done.stderr


def test_losses_that_are_not_numbers_end_the_run_in_one_line(tmp_path):
    done = launch(
        ROOT / "step1_sft" / "main.py",
        "--model_name_or_path",
        "builtin:tiny-opt",
        *SMALL[:-2],
        "--learning_rate",
        "1e30",
        "--max_grad_norm",
        "0",
        "--max_skipped_steps",
        "2",
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "the loss on rank 0 is not finite" in error and "--max_skipped_steps 2" in error
    assert not os.path.exists(tmp_path / "output" / "sft" / "model.safetensors")
