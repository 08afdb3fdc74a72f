"""Runs that are interrupted after a checkpoint, and their continuation in a new process.

Run under the launcher: resume_cases.py first|second DATA TEXTS MODEL OUTPUT_DIR, within OUTPUT_DIR/RANKS. `first` makes
every run whole, in whole/, and once more in broken/, where an exception ends it after its second checkpoint; moved/ has
a copy of that. `second` starts the run in broken/ again by the same command, and those in the moved/ of all other
numbers of ranks by one that makes the same batches.

With --at_length: other runs, all of them moved and none of them continued in broken/.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from alternatives.dpo.main import main as dpo
from common.checkpoints.saver import Saver
from common.errors import AlreadyComplete, UserError
from common.runtime.distributed import barrier, is_main, say, world_size
from common.runtime.program import run_program
from step1_sft.main import main as step1
from step2_reward.main import main as step2
from step3_ppo.main import main as step3
from step3_ppo.reward import RewardInputs
from tests.distributed.variants import (
    DEEPSPEED,
    EVALUATED_OTHERWISE,
    RESHAPED,
    RESHAPED_AT_LENGTH,
    RESUMED,
    RESUMED_AT_LENGTH,
    WITH_FUNCTION,
)

PROGRAMS = {"sft": step1, "reward": step2, "dpo": dpo, "ppo": step3}


def parity(inputs: RewardInputs) -> torch.Tensor:
    """1 for a response whose ids have an odd sum, else 0."""
    return torch.tensor([float(sum(ids) % 2) for ids in inputs.response_ids])


class Broken(Exception):
    """Takes the place of whatever ends a run."""


def main() -> None:
    part, data, texts, model, output = [word for word in sys.argv[1:] if not word.startswith("--")]
    at_length = "--at_length" in sys.argv
    if at_length:
        cases = moved = RESHAPED_AT_LENGTH
    else:
        evaluated = {name: case[:2] for name, case in EVALUATED_OTHERWISE.items()}
        cases, moved = RESUMED | evaluated | (RESUMED_AT_LENGTH if "--long" in sys.argv else {}), RESHAPED
    output = Path(output) / str(world_size())

    def run(name: str, place: Path, kind: str, *more: str) -> None:
        step, flags = cases[name]
        command = ppo(data, texts, place / "made") if step == "ppo" else supervised(data, model, place)
        reward = {"reward": parity} if name in WITH_FUNCTION else {}
        PROGRAMS[step]([*command, *flags, *more, "--output_dir", str(place / kind / name)], **reward)

    if part == "first":
        for step in ("sft", "reward"):  # for step 3 to begin with
            PROGRAMS[step]([*supervised(data, model, output), "--output_dir", str(output / "made" / step)])
        for name in cases:
            run(name, output, "whole")
            with breaking_off():
                run(name, output, "broken")
            if is_main() and name in moved:
                shutil.copytree(output / "broken" / name, output / "moved" / name)
    else:
        for name in cases if not at_length else ():
            run(name, output, "broken", *EVALUATED_OTHERWISE.get(name, [()])[-1])
        for other in sorted(set(output.parent.glob("[0-9]")) - {output}):
            for name in moved:
                if (other / "moved" / name / "checkpoints").exists():
                    run(name, other, "moved")
    if not at_length:
        changed(part, [*supervised(data, model, output), "--output_dir", str(output / "changed")])


def changed(part: str, command: list[str]) -> None:
    """A run that goes on with another learning rate, which it does only when told to."""
    if part == "first":
        with breaking_off():
            step1(command)
        return
    other = [*command, "--learning_rate", "2e-3", "--log_interval", "2"]
    try:
        step1(other)
    except UserError as error:
        say(f"refused: {error}")
    step1([*other, "--resume_anyway"])
    finished = Path(command[-1]) / "model.safetensors"
    before = finished.stat().st_mtime_ns
    try:
        step1([*other, "--save_interval", "2"])
    except AlreadyComplete as there:
        say(f"finished: {there}")
    assert finished.stat().st_mtime_ns == before


class breaking_off:
    """Within the context a run ends with an exception right after its second checkpoint."""

    def __enter__(self):
        self.saves, self.save = 0, Saver.save

        def save(saver, *args):
            self.save(saver, *args)
            self.saves += 1
            if self.saves == 2:
                raise Broken

        Saver.save = save

    def __exit__(self, kind, error, trace):
        Saver.save = self.save
        barrier()
        assert kind is Broken, "the run was not broken off"
        return True


def supervised(data: str, model: str, output: Path) -> list[str]:
    return [
        "--data_path",
        data,
        "--model_name_or_path",
        model,
        "--data_output_path",
        str(output / "data"),
        "--max_rows",
        "300",
        "--max_seq_len",
        "64",
        "--per_device_train_batch_size",
        str(8 // world_size()),
        "--data_split",
        "1,1,1",
        "--num_train_epochs",
        "2",
        "--log_interval",
        "1",
        "--save_interval",
        "3",
        "--learning_rate",
        "1e-3",
        "--no_enable_tensorboard",
        "--deepspeed_config",
        DEEPSPEED,
    ]


def ppo(data: str, texts: str, made: Path) -> list[str]:
    rows = str(8 // world_size())
    return [
        "--data_path",
        data,
        "--data_output_path",
        str(made.parent / "data"),
        "--max_rows",
        "300",
        "--actor_model_name_or_path",
        str(made / "sft"),
        "--critic_model_name_or_path",
        str(made / "reward"),
        "--data_split",
        "1,1,1",
        "--per_device_generation_batch_size",
        rows,
        "--per_device_training_batch_size",
        str(4 // world_size()),
        "--max_prompt_seq_len",
        "48",
        "--max_answer_seq_len",
        "8",
        "--eval_prompts",
        "4",
        "--eval_interval",
        "3",
        "--kl_controller",
        "adaptive",
        "--kl_horizon",
        "50",
        "--max_iterations",
        "6",
        "--save_interval",
        "4",
        "--num_warmup_steps",
        "2",
        "--actor_learning_rate",
        "1e-3",
        "--unsupervised_dataset_name",
        texts,
        "--unsup_coef",
        "0.5",
        "--no_enable_tensorboard",
        "--deepspeed_config",
        DEEPSPEED,
    ]


if __name__ == "__main__":
    sys.exit(run_program(main))
