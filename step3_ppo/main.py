"""Step 3: PPO against the reward model. `deepspeed --num_gpus N step3_ppo/main.py --help` lists the options."""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: this clone's packages, not those of another that is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.runtime.requirements import begin_program

    begin_program(trains=True)

from collections.abc import Sequence

from common.artifacts.run import report_done, start_run
from common.config.parser import parse
from common.runtime.program import run_program
from common.training.memory import advising_on_memory
from step3_ppo.advantages import Estimator
from step3_ppo.building import build_trainer, reward_piece
from step3_ppo.config import config_class
from step3_ppo.evaluation import evaluation_prompts
from step3_ppo.inputs import read_inputs
from step3_ppo.loop import run_iterations
from step3_ppo.reward import Reward
from step3_ppo.saving import model_parts, save, training_state
from step3_ppo.schedule import prompt_sampler, scheduled_iterations


def main(
    argv: Sequence[str] | None = None, *, advantages: Estimator | None = None, reward: Reward | None = None
) -> None:
    """Parse, prepare, build, train, save.

    Args:
        argv: the command line; None: the program's own.
        advantages: an estimator beside those of the product, and the default of --advantage.
        reward: gives the scores in the place of the reward model.
    """
    config = parse(config_class(advantages, own_reward=reward is not None), argv)
    inputs = read_inputs(config)
    pieces = {"reward": reward or reward_piece(config), **inputs.functions}
    run = start_run(config, *inputs.data, parts=model_parts(config), pieces=pieces)
    prompts, held_out = inputs.prompts.train, evaluation_prompts(config, inputs.prompts.eval)
    sampler = prompt_sampler(config, prompts)
    iterations = min(scheduled_iterations(config, len(prompts)), config.stop_after or sys.maxsize)
    with run.tracker, advising_on_memory(config):
        trainer = build_trainer(config, inputs, run, reward)
        saver = run.restore(training_state(trainer))
        with saver.reporting_last_good():
            metrics = run_iterations(
                trainer, held_out, sampler, iterations, run.tracker, saver.steps_done, saver.on_step_end
            )
            save(config, trainer.models, inputs)
        report_done(run.tracker, iterations, metrics, config.output_dir)
    run.checkpoints.discard()
    trainer.destroy()


if __name__ == "__main__":
    sys.exit(run_program(main))
