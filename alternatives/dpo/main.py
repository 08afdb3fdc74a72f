"""Direct preference optimisation: `deepspeed --num_gpus N alternatives/dpo/main.py --help` lists the options."""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import this clone's packages, not installed ones
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from common.runtime.requirements import begin_program

    begin_program(trains=True)

from alternatives.dpo.task import DPOTask
from common.config.parser import parse
from common.runtime.program import run_program
from common.supervised.run import run_supervised


def main(argv: Sequence[str] | None = None, *, task: type[DPOTask] = DPOTask) -> None:
    """Run this step. `task` may be a subclass with another loss, other samples, or options of its own."""
    config = parse(task.config_class, argv)
    run_supervised(task(config), config)


if __name__ == "__main__":
    sys.exit(run_program(main))
