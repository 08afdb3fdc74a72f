"""Direct preference optimisation: `deepspeed --num_gpus N alternatives/dpo/main.py --help` lists the options."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

if __package__ in (None, ""):  # run as a file: import this clone's packages, not installed ones
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from common.runtime.requirements import begin_program

    begin_program(trains=True)

from alternatives.dpo.config import KTO, DPOConfig
from alternatives.dpo.kto_task import KTOTask
from alternatives.dpo.task import DPOTask
from common.config.parser import parse
from common.errors import UserError
from common.runtime.program import run_program
from common.supervised.run import run_supervised

TaskT = TypeVar("TaskT", DPOTask, KTOTask)


def main(argv: Sequence[str] | None = None, *, task: type[DPOTask] | type[KTOTask] | None = None) -> None:
    """Run this step. `task` may be a subclass of one of the two with another loss, other samples, or options of its
    own; None: the one that --loss_type needs."""
    config: DPOConfig = parse((task or DPOTask).config_class, argv)
    if config.loss_type == KTO:
        run_supervised(_checked(task, KTOTask, config)(config), config)
    else:
        run_supervised(_checked(task, DPOTask, config)(config), config)


def _checked(task: type[Any] | None, wanted: type[TaskT], config: DPOConfig) -> type[TaskT]:
    """The task if it is a subclass of the wanted one, or that one."""
    if task is not None and not issubclass(task, wanted):
        raise UserError(f"--loss_type {config.loss_type}: {task.__name__} is no {wanted.__name__}, which it needs")
    return task or wanted


if __name__ == "__main__":
    sys.exit(run_program(main))
