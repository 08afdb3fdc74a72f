"""The launch scripts with two ranks on tiny models: flags and signals of the user must arrive."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.launching import ROOT, environment, run
from tests.logs import assert_tensorboard_shows

TASK = ["--data_path", "builtin:courtesy", "--max_rows", "800"]
STOP = ["--enable_test_mode", "--test_stop_step", "2"]
SUPERVISED = ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1", "--max_seq_len", "64"]
PPO = [
    "--max_prompt_seq_len",
    "64",
    "--max_answer_seq_len",
    "8",
    "--per_device_generation_batch_size",
    "4",
    "--per_device_training_batch_size",
    "4",
    "--eval_prompts",
    "8",
]


def script(name: str, *flags: str) -> subprocess.CompletedProcess:
    return run(["env", "NUM_GPUS=2", "bash", str(ROOT / "launch" / name), *flags])


def handed_to_dpo(output: Path) -> list[str]:
    return ["--model_name_or_path", str(output / "sft"), "--output_dir", str(output / "dpo")]


def read_json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.long
@pytest.mark.parametrize("machine", ["1gpu", "8xa100"])
def test_the_three_scripts_of_a_machine_hand_on_their_results(machine, tmp_path):
    data = [*TASK, *STOP, "--data_output_path", str(tmp_path / "data")]
    tiny = ["--model_name_or_path", "builtin:tiny-opt", *SUPERVISED]
    script(
        f"sft_{machine}.sh",
        *tiny,
        *data,
        "--output_dir",
        str(tmp_path / "sft"),
        "--tensorboard_path",
        str(tmp_path / "board"),
    )
    assert_tensorboard_shows(read_json_lines(tmp_path / "sft/logs/metrics.jsonl"), tmp_path / "board")
    assert not (tmp_path / "sft/logs/tensorboard").exists()
    script(f"reward_{machine}.sh", *tiny, *data, "--output_dir", str(tmp_path / "reward"))
    script(f"dpo_{machine}.sh", *tiny[2:], *data, *handed_to_dpo(tmp_path))
    script(
        f"ppo_{machine}.sh",
        *PPO,
        *data,
        "--output_dir",
        str(tmp_path / "ppo"),
        "--actor_model_name_or_path",
        str(tmp_path / "sft"),
        "--critic_model_name_or_path",
        str(tmp_path / "reward"),
    )
    summary = run(["python", str(ROOT / "launch/summary.py"), str(tmp_path), "--price_per_hour", "8.80"])
    assert "TRUE reward" in summary.stdout and "which cost $" in summary.stdout
    for step in ("sft", "reward", "dpo", "ppo/actor", "ppo/critic"):
        assert (tmp_path / step / "model.safetensors").is_file() and (tmp_path / step / "provenance.json").is_file()
    for step in ("sft", "reward", "dpo", "ppo"):
        assert read_json_lines(tmp_path / step / "logs/metrics.jsonl")[-1]["step"] == 2


def test_a_wrong_flag_ends_a_script_with_its_one_line(tmp_path):
    done = run(["bash", str(ROOT / "launch/sft_1gpu.sh"), "--learning_rat", "1"], cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: unknown flag --learning_rat: did you mean --learning_rate?"]
    assert done.stdout == ""  # nor does the launcher say anything afterwards
    assert not any(tmp_path.iterdir())


STEP = ["launch/sft_1gpu.sh", "--output_dir", "{}/sft"]
PIPELINE = ["launch/pipeline.sh", "--output_dir", "{}", "--num_gpus", "2"]


@pytest.mark.parametrize(
    "script, number, code",
    [
        (STEP, signal.SIGTERM, -signal.SIGTERM),
        pytest.param(STEP, signal.SIGINT, -signal.SIGINT, marks=pytest.mark.long),
        pytest.param(PIPELINE, signal.SIGTERM, 143, marks=pytest.mark.long),
        pytest.param(PIPELINE, signal.SIGINT, 130, marks=pytest.mark.long),
    ],
)
def test_a_signal_to_the_script_saves_and_ends_every_rank(script, number, code, tmp_path):
    output = tmp_path / "sft"
    name, *flags = [word.format(tmp_path) for word in script]
    command = [
        "bash",
        str(ROOT / name),
        "--model_name_or_path",
        "builtin:tiny-opt",
        *SUPERVISED,
        *TASK,
        *flags,
        "--data_output_path",
        str(tmp_path / "data"),
        "--num_train_epochs",
        "10000",
        "--log_interval",
        "1",
    ]
    if script is PIPELINE:
        at = command.index("--model_name_or_path")
        words, command[at : at + 2 + len(SUPERVISED)] = command[at : at + 2 + len(SUPERVISED)], []
        command += ["--sft_flags", " ".join(words)]
    with open(tmp_path / "said", "w") as said:
        started = subprocess.Popen(
            command, cwd=tmp_path, env={**environment(), "NUM_GPUS": "2"}, stdout=said, stderr=said
        )
        try:
            metrics = output / "logs/metrics.jsonl"
            while not (metrics.is_file() and '"train"' in metrics.read_text()):
                assert started.poll() is None, (tmp_path / "said").read_text()
                time.sleep(0.5)
            assert sum("main.py" in " ".join(words) for words in command_lines(output)) >= 2
            os.kill(started.pid, number)
            assert started.wait(timeout=60) == code
            if script is not PIPELINE:  # which has waited for its ranks
                deadline = time.monotonic() + 25
                while command_lines(output) and time.monotonic() < deadline:
                    time.sleep(0.1)
        finally:
            started.kill()
    assert command_lines(output) == []
    said = (tmp_path / "said").read_text()
    assert f"run the same command to go on from {output}/checkpoints/step-" in said and "ended at once" not in said


def command_lines(output: Path) -> list[list[str]]:
    """Of every process that was told to write to `output`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(output) in words:
            found.append(words)
    return found


@pytest.mark.long
def test_the_pipeline_passes_flags_to_each_step_and_sums_up(tmp_path):
    tiny = "--model_name_or_path builtin:tiny-opt " + " ".join(SUPERVISED)
    command = [
        "bash",
        str(ROOT / "launch/pipeline.sh"),
        "--num_gpus",
        "2",
        "--output_dir",
        str(tmp_path),
        "--recipes",
        str(ROOT / "launch/recipes/8xa100"),
        "--price_per_hour",
        "1.13",
        "--sft_flags",
        tiny,
        "--reward_flags",
        tiny,
        "--ppo_flags",
        " ".join(PPO),
        *TASK,
        *STOP,
    ]
    done = run(command)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "TRUE reward" in done.stdout and summary["truth"] is not None
    assert summary["cost"] == pytest.approx(sum(summary["seconds"].values()) / 3600 * 1.13)
    assert "lora_dim: 0" in (tmp_path / "sft/run_config.yaml").read_text()

    (tmp_path / "ppo/logs/finished.json").unlink()  # as if it had been interrupted in step 3
    again = run(command)
    assert again.stdout.count("holds the result of this command already") == 2
    assert again.stdout.count("evaluation after 0 of") == 1
    once_more = json.loads((tmp_path / "summary.json").read_text())
    assert {**once_more, "seconds": 0, "cost": 0} == {**summary, "seconds": 0, "cost": 0}


@pytest.mark.long
def test_the_pipeline_stops_where_a_step_fails(tmp_path):
    done = run(
        [
            "bash",
            str(ROOT / "launch/pipeline.sh"),
            "--output_dir",
            str(tmp_path),
            "--data_path",
            "./missing.jsonl",
            "--sft_flags",
            "--model_name_or_path builtin:tiny-opt",
        ],
        check=False,
    )
    assert done.returncode == 2
    assert "missing.jsonl" in done.stderr and "Step 2 of 3" not in done.stdout
