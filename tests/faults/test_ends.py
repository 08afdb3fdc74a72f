"""How a run ends: on a signal, without its launcher, after a hang, and after an error."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from common.runtime.signals import STOPPED
from tests.faults.end_cases import TIMEOUT
from tests.launching import ROOT, deepspeed, environment
from tests.logs import metrics
from tests.wandb_records import metrics_of, recorded

PROGRAM = ROOT / "tests" / "faults" / "end_cases.py"


class Run:
    """A run of two ranks in the background, in a process group of its own."""

    def __init__(self, directory: Path, case: str, *words: str):
        self.marks, self.said = directory / "marks", directory / "said"
        self.marks.mkdir(parents=True, exist_ok=True)
        for old in self.marks.iterdir():
            old.unlink()
        with open(self.said, "w") as said:
            self.outer = subprocess.Popen(
                [*deepspeed(2, "--log_level", "critical"), str(PROGRAM), case, str(self.marks), *words],
                env=environment(),
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        self.processes: list[psutil.Process] = []  # launch, rank 0, rank 1

    def wait_for_marks(self) -> None:
        deadline = time.monotonic() + 120
        while len(list(self.marks.iterdir())) < 2:
            assert self.outer.poll() is None and time.monotonic() < deadline, self.said.read_text()
            time.sleep(0.1)
        (launch,) = psutil.Process(self.outer.pid).children()
        self.processes = [launch, *sorted(launch.children(), key=lambda process: process.environ()["RANK"])]

    def wait_until_gone(self, limit: float) -> None:
        processes = [process for process in self.processes if process.is_running()]
        _, alive = psutil.wait_procs(processes, timeout=limit)
        alive = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
        for process in alive:
            process.kill()
        assert not alive, f"{alive} are left after {limit} s: {self.said.read_text()}"

    def lines(self) -> list[str]:
        return [line for line in self.said.read_text().replace("\r", "\n").splitlines() if line.strip()]


def disturb(run: Run, how: str) -> None:
    launch, *ranks = run.processes
    if how == "SIGTERM to deepspeed":
        os.kill(run.outer.pid, signal.SIGTERM)
    elif how == "SIGTERM to the launch process":
        launch.terminate()
    elif how == "SIGINT to the group":  # Ctrl-C
        os.killpg(run.outer.pid, signal.SIGINT)
    elif how == "SIGTERM to rank 1":
        ranks[1].terminate()
    elif how == "SIGKILL to deepspeed":
        os.kill(run.outer.pid, signal.SIGKILL)
    elif how == "SIGKILL to the launch process":
        launch.kill()
    elif how == "SIGSTOP of rank 0":
        ranks[0].suspend()
    elif how == "SIGSTOP of rank 1":
        ranks[1].suspend()
    elif how == "SIGKILL to rank 1":
        ranks[1].kill()
    elif how == "an exception":
        (run.marks / "raise").touch()
    elif how == "SIGKILL to rank 1 under a launcher that is slow":
        time.sleep(3)  # until the ranks have seen each other
        launch.suspend()
        ranks[1].kill()


LONG = pytest.mark.long


@pytest.mark.parametrize(
    "flags, disturbances",
    [
        # Where it is, what happens, who is said to have told it, the iterations then saved, deepspeed's exit code.
        (
            "",
            [
                ("rollout-2", "SIGTERM to deepspeed", "the end of its launcher", 2, -signal.SIGTERM),
                ("update-3", "SIGINT to the group", "SIGINT", 4, None),
            ],
        ),
        pytest.param(
            "--actor_zero_stage 3 --unpin_actor_parameters",
            [
                ("rollout-1", "SIGTERM to rank 1", "SIGTERM", 1, STOPPED),
                ("evaluation", "SIGTERM to the launch process", "SIGTERM", 1, 1),
            ],
            marks=LONG,
        ),
        pytest.param(
            "--actor_zero_stage 3 --critic_zero_stage 3",
            [
                ("evaluation", "SIGTERM to rank 1", "SIGTERM", 0, STOPPED),
                ("rollout-1", "SIGKILL to the launch process", "the end of its launcher", 1, 0),
                ("rollout-2", "SIGINT to the group", "SIGINT", 2, None),
            ],
            marks=LONG,
        ),
    ],
)
def test_a_run_that_was_told_to_stop_goes_on_exactly(flags, disturbances, option_inputs, tmp_path):
    command = [
        word.format(inputs=option_inputs)
        for word in (
            "--data_path {inputs}/pairs.jsonl --data_split 1,1,8 --eval_fraction 0.2 --actor_model_name_or_path "
            "{inputs}/model --critic_model_name_or_path {inputs}/reward_model --per_device_generation_batch_size 2 "
            "--per_device_training_batch_size 2 --max_prompt_seq_len 32 --max_answer_seq_len 40 "
            "--min_answer_seq_len 30 --eval_prompts 3 --eval_interval 1 --max_iterations 5 --log_interval 1 "
            "--report_to jsonl wandb "
            "--actor_zero_stage 0 --critic_zero_stage 0 --actor_learning_rate 0.01 " + flags
        ).split()
    ]
    command += ["--data_output_path", str(tmp_path / "data")]

    undisturbed = Run(tmp_path / "whole", "ppo", "nowhere", *command, "--output_dir", str(tmp_path / "whole" / "ppo"))
    again = [*command, "--output_dir", str(tmp_path / "disturbed" / "ppo")]
    for where, how, teller, iterations, code in disturbances:
        run = Run(tmp_path / "disturbed", "ppo", where, *again)
        run.wait_for_marks()
        disturb(run, how)
        run.wait_until_gone(25)
        checkpoint = tmp_path / "disturbed" / "ppo" / "checkpoints" / f"step-{iterations}"
        assert (
            f"stopped by {teller} after {iterations} iterations: run the same command to go on from {checkpoint}"
            in run.lines()
        ), run.said.read_text()
        assert code is None or run.outer.wait(timeout=5) == code
        assert "Traceback" not in run.said.read_text() or how == "SIGINT to the group"  # that one is deepspeed's
    last = Run(tmp_path / "disturbed", "ppo", "nowhere", *again)
    for run in (undisturbed, last):
        assert run.outer.wait(timeout=120) == 0, run.said.read_text()
    assert metrics(tmp_path / "disturbed" / "ppo") == metrics(tmp_path / "whole" / "ppo")
    sessions = recorded(tmp_path / "disturbed" / "ppo")
    assert len(sessions) == len(disturbances) + 1, "rank 0 alone reports"
    assert len({session.id for session in sessions}) == 1
    assert metrics_of(sessions) == metrics(tmp_path / "whole" / "ppo")
    assert [session.exit_code for session in sessions] == [STOPPED] * len(disturbances) + [0]


SILENT = f"has not been heard of for --timeout {TIMEOUT} seconds; it was in counting"
# What happens, which of `end_cases` it happens to, and how the last line begins.
ENDINGS = {
    "SIGKILL to deepspeed": ("steps", "the launcher has gone"),
    "SIGKILL to the launch process": ("steps", "the launcher has gone"),
    "SIGSTOP of rank 1": ("steps", f"error: rank 1 {SILENT}"),
    "an exception": ("raises", "error: rank 1, in counting: ValueError: row 3 is odd"),
}
LAUNCHER_STOPS = "SIGKILL to rank 1 under a launcher that is slow"
ENDINGS[LAUNCHER_STOPS] = ("starts", "error: another rank has ended without a word while the programs started")
MORE_ENDINGS = {
    "SIGSTOP of rank 0": ("steps", f"error: rank 0 {SILENT}"),
    "SIGKILL to rank 1": ("steps", "error: rank 1 has ended without a word, in counting"),
    "a deadlock": ("deadlocks", "error: rank 0, in counting: RuntimeError"),
}


@pytest.mark.parametrize("endings", [ENDINGS, pytest.param(MORE_ENDINGS, marks=LONG)], ids=["some", "more"])
def test_no_process_remains_and_the_last_line_says_why(endings, tmp_path):
    runs = {how: Run(tmp_path / how, case) for how, (case, _) in endings.items()}  # at once: mostly they wait
    for how, run in runs.items():
        run.wait_for_marks()
        disturb(run, how)
    for how, run in runs.items():
        _, says = endings[how]
        deadline = time.monotonic() + 30
        while not any(line.startswith(says) for line in run.lines()):
            assert time.monotonic() < deadline, run.said.read_text()
            time.sleep(0.1)
        if how == LAUNCHER_STOPS:
            run.processes[0].resume()
        for process in run.processes:
            if process.is_running() and process.status() == psutil.STATUS_STOPPED:
                process.kill()  # the launcher would do it 30 seconds later
        run.wait_until_gone(30)
        assert run.lines()[-1].startswith(says), run.said.read_text()
        assert "frame #" not in run.said.read_text()
        assert sum(line.startswith("error: ") for line in run.lines()) == says.startswith("error: ")
        assert run.said.read_text().count("Traceback") == (how in ("an exception", "a deadlock"))
        assert (run.outer.wait(timeout=40) == 0) == (how == "SIGKILL to the launch process")  # deepspeed says so
