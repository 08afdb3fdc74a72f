"""Step 3: PPO of the actor against the reward model. `deepspeed --num_gpus N step3_ppo/main.py --help` says all."""

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
from common.training.memory import advising_on_memory, named_when_out_of_memory
from step3_ppo.advantages import Estimator
from step3_ppo.config import config_class
from step3_ppo.evaluation import evaluation_prompts
from step3_ppo.fitting import fitted_config
from step3_ppo.inputs import read_inputs
from step3_ppo.loop import run_iterations
from step3_ppo.models import build_models
from step3_ppo.reward import Reward, TokenRewardModel
from step3_ppo.saving import model_parts, save, training_state
from step3_ppo.schedule import optimizer_steps, prompt_sampler, scheduled_iterations, text_batches
from step3_ppo.trainer import PPOTrainer


def main(
    argv: Sequence[str] | None = None, *, advantages: Estimator | None = None, reward: Reward | None = None
) -> None:
    """Parse, prepare, build, train, save.

    Args:
        argv: the command line; None: the program's own.
        advantages: an estimator beside those of the product, and the default of --advantage.
        reward: gives the scores in the place of the reward model.
    """
    config = parse(config_class(advantages, own_reward=reward is not None), argv, prog="step3_ppo/main.py")
    inputs = read_inputs(config)
    run = start_run(config, *inputs.data, parts=model_parts(config))
    codec, prompts, scale = inputs.codec, inputs.prompts.train, inputs.scale
    sampler = prompt_sampler(config, prompts)
    scheduled = scheduled_iterations(config, len(prompts))
    iterations = min(scheduled, config.stop_after or sys.maxsize)
    with advising_on_memory(config):
        with named_when_out_of_memory("loading the models"):
            steps = optimizer_steps(config, len(prompts), scheduled)
            models = build_models(config, codec, inputs.actor, inputs.reward_model, scale, steps)
        saved_tokens = run.checkpoints.saved_value(run.checkpoint, "max_tokens")
        fitted = fitted_config(config, models, max(prompts["length"]), codec.pad_id, saved_tokens)
        texts = text_batches(fitted, inputs.texts.train, codec) if inputs.texts else None
        trainer = PPOTrainer(models, reward or TokenRewardModel(models, fitted), fitted, codec, prompts, texts, scale)
        held_out = evaluation_prompts(config, inputs.prompts.eval)
        with run.checkpoints.reporting_last_good():
            done = run.restore(training_state(models, trainer))
            metrics = run_iterations(
                trainer, held_out, sampler, iterations, run.tracker, done, run.checkpoints.on_step_end
            )
            save(config, models, inputs)
    report_done(run.tracker, iterations, metrics, config.output_dir)
    run.checkpoints.discard()
    models.destroy()


if __name__ == "__main__":
    sys.exit(run_program(main))
