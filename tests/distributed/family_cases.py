"""All runs of `families`, for each of some architectures, in one process per rank.

Run under the launcher: family_cases.py DATA OUTPUT_DIR. OUTPUT_DIR/ARCHITECTURE/model is a model; each run writes
OUTPUT_DIR/ARCHITECTURE/STAGE/NAME, and beside that NAME.said, what it printed, or NAME.refused, why it did not run.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.errors import UserError
from common.runtime.distributed import is_main, say
from common.runtime.program import run_program
from step1_sft.main import main as step1
from step2_reward.main import main as step2
from step3_ppo.main import main as step3
from tests.architectures import ENCODERS
from tests.distributed.families import DECODER_RUNS, ENCODER_RUNS, Run

STEPS = {1: step1, 2: step2, 3: step3}


def main() -> None:
    data, output = [word for word in sys.argv[1:] if not word.startswith("--")]
    for model in sorted(Path(output).glob("*/model")):
        place = model.parent
        for name, run in (ENCODER_RUNS if place.name in ENCODERS else DECODER_RUNS).items():
            printed = io.StringIO()
            try:
                with contextlib.redirect_stdout(printed):
                    STEPS[run.step]([*flags(run, model, place / name), "--data_path", data])
            except UserError as error:
                write(place / f"{name}.refused", str(error))
            finally:
                write(place / f"{name}.said", printed.getvalue())
        say(f"done: {place.name}")


def flags(run: Run, model: Path, output: Path) -> list[str]:
    """The command line of a run, without its data."""
    stage = str(run.stage)
    stages = ("actor_zero_stage", "critic_zero_stage") if run.step == 3 else ("zero_stage",)
    return [
        *run.flags.format(model=model, place=output.parent).split(),
        *(word for name in stages for word in (f"--{name}", stage)),
        *("--output_dir", str(output), "--data_output_path", str(model.with_name("data"))),
    ]


def write(path: Path, text: str) -> None:
    if is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    sys.exit(run_program(main))
