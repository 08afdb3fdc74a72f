"""Step 3 against the exact optimum, on a task whose responses can all be listed.

    python benchmarks/proof/closed_form.py --estimators rloo gae --betas 0.3 0.5 1

It trains with the program of step 3 itself, reads the model that this has saved, and compares it with the optimum by
sums over all responses. See docs/proof.md.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from common.runtime.requirements import require_environment

    require_environment()

import torch
from torch import Tensor

from benchmarks.proof.enumeration import LETTERS, TinyTask, divergence, total_variation
from common.runtime.program import finish, prepare_environment
from step3_ppo.advantages import ESTIMATORS
from step3_ppo.main import main as step3

ANSWERS_PER_PROMPT, ROWS_PER_PROMPT = 8, 32
BEST_OF = (2, 4, 8)
TOLERANCE, FARTHEST = 0.02, 0.05  # of reward and KL, as a share; of the total variation

Optimum = Callable[[TinyTask, Tensor, float], Tensor]


@dataclass(frozen=True)
class Variant:
    """A way to train, and the policy that it converges to exactly.

    Attributes:
        flags: of step 3.
        optimum: from the task, the reference's log-probabilities (P, M) and beta to the policy's.
    """

    flags: tuple[str, ...]
    optimum: Optimum = TinyTask.optimum


# Twice as many iterations, for advantages that do not vanish at the optimum, or only as their spread is divided out.
NOISIER = ("grpo", "reinforce++", "rloo_kl_in_loss", "dr_grpo_kl_in_loss")


def optimum_of_own_mean(task: TinyTask, reference: Tensor, beta: float) -> Tensor:
    """That of the KL in the loss, where a response's own reward is in the mean that it is compared with: advantages are
    (k - 1) / k of those by the others' mean, for k answers to a prompt."""
    return task.optimum_of_token_kl(reference, beta * ANSWERS_PER_PROMPT / (ANSWERS_PER_PROMPT - 1))


# By the name that --estimators takes. Any estimator of --advantage is trained by its name, with the KL in the reward:
# there all of them converge to the same policy, see docs/proof.md.
VARIANTS = {
    # Whitening scales advantages and not the KL in the loss, so beta would be another one with it.
    "rloo_kl_in_loss": Variant(
        ("--advantage", "rloo", "--kl_placement", "loss", "--no_whiten_advantages"), TinyTask.optimum_of_token_kl
    ),
    # As published: its definition neither whitens nor divides, and weighs all tokens alike.
    "dr_grpo_kl_in_loss": Variant(("--advantage", "dr_grpo", "--kl_placement", "loss"), optimum_of_own_mean),
}


@dataclass(frozen=True)
class Outcome:
    """Exact figures of a policy and of the optimum; means over prompts, the total variation their maximum.

    Attributes:
        reward, kl: of the policy; KL to the reference in nats.
        best_reward, best_kl: of the optimum.
        frontier: the highest reward that is possible at the policy's KL.
        start: the reference's reward.
        total_variation: between policy and optimum.
    """

    reward: float
    kl: float
    best_reward: float
    best_kl: float
    frontier: float
    start: float
    total_variation: float

    @property
    def gain(self) -> float:
        """The share of the optimum's gain in reward that the policy has."""
        return (self.reward - self.start) / (self.best_reward - self.start)

    @property
    def efficiency(self) -> float:
        """The share of the highest gain in reward at the policy's own KL."""
        return (self.reward - self.start) / (self.frontier - self.start)

    @property
    def reached(self) -> bool:
        """Whether the policy is the optimum, within the tolerances of docs/proof.md."""
        return (
            abs(self.gain - 1) < TOLERANCE
            and abs(self.kl / self.best_kl - 1) < TOLERANCE
            and self.total_variation < FARTHEST
        )


def measure(task: TinyTask, policy: Tensor, reference: Tensor, optimum: Tensor) -> Outcome:
    """Compare log-probabilities (P, M)."""
    kl = divergence(policy, reference)
    return Outcome(
        task.expected_reward(policy),
        kl,
        task.expected_reward(optimum),
        divergence(optimum, reference),
        task.frontier(reference, kl),
        task.expected_reward(reference),
        total_variation(policy, optimum),
    )


def train(task: TinyTask, variant: Variant, beta: float, iterations: int, directory: Path, output: Path) -> Path:
    """Run step 3 in this process; returns the directory of the actor.

    All answers of an iteration are one optimizer step, so its gradient is that of the policy that was sampled, and
    nothing is clipped. The learning rate falls to 0, and with it the noise of the last policy.

    Args:
        directory: gets the reference, the prompts and the libraries' output.
        output: of the run.
    """
    prepare_environment()
    torch.set_num_threads(1)  # more of them only wait for one another on so small a model
    model, prompts = task.write(directory)
    rows = ROWS_PER_PROMPT * len(LETTERS)
    flags = {
        "actor_model_name_or_path": model,
        "critic_model_name_or_path": model,
        "data_path": f"{prompts}:{ROWS_PER_PROMPT}",  # each prompt so many times
        "data_output_path": directory / "data",
        "output_dir": output,
        "resume": "never",
        "data_split": "0,0,1",
        "eval_fraction": 0,
        "template": "none",
        "max_prompt_seq_len": 1,
        "max_answer_seq_len": task.longest,
        "answers_per_prompt": ANSWERS_PER_PROMPT,
        "per_device_generation_batch_size": rows,
        "per_device_training_batch_size": rows * ANSWERS_PER_PROMPT,
        "max_iterations": iterations,
        "num_train_epochs": iterations,
        "num_warmup_steps": 0,
        "lr_scheduler_type": "linear",
        "actor_learning_rate": 2e-3,
        "critic_learning_rate": 1e-2,
        "actor_weight_decay": 0,
        "critic_weight_decay": 0,
        "actor_zero_stage": 0,
        "critic_zero_stage": 0,
        "kl_coef": beta,
        "score_calibration": "none",
        "missing_eos_penalty": 0,
        "save_interval": 0,
        "dtype": "fp32",
    }
    given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with open(directory / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        step3([*given, "--no_enable_tensorboard", *variant.flags], reward=task.reward)
    return output / "actor"


def outcome_of(
    name: str, beta: float, iterations: int, directory: Path, task: TinyTask | None = None, label: str = ""
) -> Outcome:
    """Train by the variant or estimator `name`, and measure what came of it.

    Args:
        label: of the run's output, where there are several of one name and beta.
    """
    task = task or TinyTask()
    variant = VARIANTS.get(name) or Variant(("--advantage", name, "--kl_placement", "reward"))
    actor = train(task, variant, beta, iterations, directory, directory / f"{name}-{beta:g}{label}")
    reference = task.log_probs(directory / "reference")
    return measure(task, task.log_probs(actor), reference, variant.optimum(task, reference, beta))


def row(name: str, beta: str, outcome: Outcome) -> str:
    """A line of the table."""
    numbers = (outcome.reward, outcome.best_reward, outcome.kl, outcome.best_kl, outcome.total_variation)
    shown = " | ".join(f"{number:.4f}" for number in numbers)
    return f"| {name} | {beta} | {shown} | {outcome.efficiency:.2%} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns 1 if a policy is not the optimum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimators", nargs="+", default=[*ESTIMATORS, *VARIANTS], choices=[*ESTIMATORS, *VARIANTS])
    parser.add_argument("--betas", nargs="+", type=float, default=[0.3, 0.5, 1.0])
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--output_dir", type=Path, default=Path("output/proof/closed_form"))
    options = parser.parse_args(argv)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    print("| estimator | beta | reward | optimum | KL | optimum | total variation | of the frontier's gain |")
    print("|---|---|---|---|---|---|---|---|")
    reached = True
    for name in options.estimators:
        for beta in options.betas:
            iterations = options.iterations * (2 if name in NOISIER else 1)
            outcome = outcome_of(name, beta, iterations, options.output_dir)
            reached &= outcome.reached
            print(row(name, f"{beta:g}", outcome), flush=True)
    task = TinyTask()
    reference = task.log_probs(options.output_dir / "reference")
    for n in BEST_OF:
        best = task.best_of(reference, n)
        print(row(f"best of {n}", "", measure(task, best, reference, best)))
    finish()
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
