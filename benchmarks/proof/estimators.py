"""The built-in task, whose true reward is known, with each advantage estimator and several seeds.

    python benchmarks/proof/estimators.py --estimators gae rloo --seeds 1 2 3

Steps 1 and 2 of the quickstart run once and serve all runs of step 3. What is finished is not run again. See
docs/proof.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __package__ in (None, ""):  # run as a file
    sys.path[0] = str(ROOT)
    from common.runtime.requirements import require_environment

    require_environment()

from launch.report import Report, make_report
from step3_ppo.advantages import ESTIMATORS

RECIPES = ROOT / "launch/recipes/quickstart"
COMMAND = 'source "$0/launch/launcher.sh"; launch_step "$@"'  # as launch/pipeline.sh does
# Where answers to one prompt are compared, 4 to each of 32 prompts are as many as the recipe's, and so are the
# optimizer steps of 3 epochs.
COMPARING = {"answers_per_prompt": 4, "per_device_generation_batch_size": 32, "num_train_epochs": 3}


def run_step(step: str, recipe: str, **flags: object) -> None:
    """Run a step with its recipe under the launcher of this Python's environment.

    Raises:
        CalledProcessError: the step failed.
    """
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    given = ["--config", str(RECIPES / f"{recipe}.yaml"), *words]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-c", COMMAND, str(ROOT), step, "1", *given]
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)


def run_first_steps(quickstart: Path) -> None:
    """Steps 1 and 2 of the quickstart, if their results are not in the directory yet."""
    data = quickstart / "data"
    if not (quickstart / "sft/provenance.json").exists():
        run_step("step1_sft", "sft", output_dir=quickstart / "sft", data_output_path=data)
    if not (quickstart / "reward/provenance.json").exists():
        reward, sft = quickstart / "reward", quickstart / "sft"
        run_step("step2_reward", "reward", output_dir=reward, data_output_path=data, model_name_or_path=sft)


def run_estimator(quickstart: Path, name: str, seed: int, output: Path) -> Report:
    """Step 3 with an estimator; what all three steps reached."""
    comparing = COMPARING if ESTIMATORS[name].fewest_answers > 1 else {}
    run_step(
        "step3_ppo",
        "ppo",
        advantage=name,
        seed=seed,
        actor_model_name_or_path=quickstart / "sft",
        critic_model_name_or_path=quickstart / "reward",
        data_output_path=quickstart / "data",
        output_dir=output,
        **comparing,
    )
    return make_report(quickstart / "sft", quickstart / "reward", output)


def row(name: str, seed: int, report: Report) -> str:
    """A line of the table."""
    assert report.truth is not None and report.kl is not None  # the recipe evaluates, on the built-in task
    changes = (report.truth.reward, report.truth.correct, report.truth.courteous)
    shown = " | ".join(f"{change.before:.3f} | {change.after:.3f}" for change in changes)
    return f"| {name} | {seed} | {shown} | {report.kl.after:.2f} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns 1 if a run has not raised the true reward."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimators", nargs="+", default=list(ESTIMATORS), choices=list(ESTIMATORS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--quickstart", type=Path, default=Path("output/quickstart"), help="its directory")
    parser.add_argument("--output_dir", type=Path, default=Path("output/proof/estimators"))
    options = parser.parse_args(argv)
    run_first_steps(options.quickstart)
    print("| estimator | seed | true reward before | after | correct before | after | courteous before | after | KL |")
    print("|---|---|---|---|---|---|---|---|---|")
    raised = True
    for name in options.estimators:
        for seed in options.seeds:
            report = run_estimator(options.quickstart, name, seed, options.output_dir / f"{name}-{seed}")
            raised &= report.truth is not None and report.truth.reward.after > report.truth.reward.before
            print(row(name, seed, report), flush=True)
    return 0 if raised else 1


if __name__ == "__main__":
    sys.exit(main())
