"""Compares one or two models by the scores of a reward model on held-out prompts.

`python inference/evaluate.py --path output/sft output/ppo --data_path SOURCE` prints a table and writes it,
with every response, to --output_file. For the task builtin:courtesy the true reward is added.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from this clone, even if another one is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.runtime.requirements import begin_program

    begin_program(trains=False)

import torch

from common.config.parser import PathName, option, options
from common.data.builtin import true_reward
from common.data.keeping import KeptColumns
from common.data.records import Prompt
from common.errors import UserError, named_by
from common.paths import writing_to
from common.rewards.options import NamedRewards
from common.rewards.spec import RewardSpec
from common.runtime.program import run_program
from inference.decoding import Response, respond
from inference.generate import open_output, plain
from inference.loading import load_actor
from inference.locating import find_model
from inference.options import DecodingOptions, LoadOptions, PromptOptions, read_options
from inference.prompts import choose, held_out_prompts, read_prompts
from inference.rewards import Rewards

_TASK = "builtin:courtesy"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DecodingOptions, PromptOptions, NamedRewards, LoadOptions):
    """Evaluation"""

    path: tuple[PathName, ...] = option(("output/sft", "output/ppo"), "one model, or two to compare")
    reward_model_path: PathName = option("output/reward", "reward model that scores the answers without --reward")
    output_file: PathName = option("output/evaluation.json", "JSON file of the result")
    which_prompts: str = option(
        "held_out", "held_out: those that no step trained on; all: every one", choices=("held_out", "all")
    )
    max_prompts: int | None = option(256, "prompts answered at most; chosen by --seed", low=1)
    max_new_tokens: int = option(128, "longest answer", unit="tokens", low=1)

    def validate(self) -> None:
        super().validate()
        if len(self.path) > 2:
            raise UserError(f"--path: give one model or two, not {len(self.path)}")
        if not self.data_path:
            raise UserError(f"--data_path is needed: where the prompts are, such as {_TASK}")
        self.not_both("reward_model_path", "reward")
        self.only_with("--reward", bool(self.reward), "keep_columns")


@dataclass(frozen=True)
class Evaluation:
    """One model's response to each prompt, with its raw score.

    Attributes:
        scores: of --reward their weighted sum.
        by_reward: those of each of --reward, by its label; empty without.
    """

    path: str
    responses: list[Response]
    scores: list[float]
    by_reward: dict[str, list[float]] = field(default_factory=dict)

    def summary(self, prompts: list[Prompt], task: bool) -> dict[str, float]:
        """Means over the prompts: score, each of --reward, length in tokens, share that ended; for the built-in task
        the true reward."""
        means = {
            "score": _mean(self.scores),
            **{f"reward/{label}": _mean(scores) for label, scores in self.by_reward.items()},
            "length": _mean([len(response.ids) for response in self.responses]),
            "ended": _mean([response.ended for response in self.responses]),
        }
        if task:
            truth = [
                true_reward(prompt.first_user_turn, response.text) for prompt, response in zip(prompts, self.responses)
            ]
            means.update(
                true_reward=_mean([judgement.reward for judgement in truth]),
                correct=_mean([judgement.correct for judgement in truth]),
                courteous=_mean([judgement.courteous for judgement in truth]),
            )
        return means


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, respond with each model, score, report."""
    config = read_options(EvaluateConfig, argv)
    for warning in config.reward_warnings():
        print(f"warning: {warning}", file=sys.stderr)
    rewards = open_rewards(config)
    try:
        _evaluate(config, rewards)
    finally:
        rewards.close()


def open_rewards(config: EvaluateConfig) -> Rewards:
    """Those of --reward, or the model of --reward_model_path."""
    if config.reward:
        return Rewards(config.reward_specs(), config)
    alone = RewardSpec(config.reward_model_path, label="score")
    return Rewards([alone], config, "--reward_model_path")


def _evaluate(config: EvaluateConfig, rewards: Rewards) -> None:
    prompts = find_prompts(config, rewards.keep if config.reward else None)
    rewards.try_on(prompts)
    scored_together = config.reward_batch_size if config.reward else config.batch_size
    rewards.load_models(config, scored_together, config.reward_max_seq_len)
    with open_output(config.output_file) as write:
        evaluations = []
        for path in config.path:
            with named_by("--path"):
                actor = load_actor(path, config)
            torch.manual_seed(config.seed)
            responses = respond(actor, prompts, config, config.batch_size)
            scores = rewards.scores(prompts, responses, actor.codec, scored_together)
            by_reward = scores if config.reward else {}
            evaluations.append(Evaluation(path, responses, rewards.total(scores), by_reward))
        result = compare(prompts, evaluations, task=config.data_path == (_TASK,))
        shown = {name: getattr(config, name) for name in options(EvaluateConfig)}
        write(
            json.dumps({**result, "config": shown, "answers": rows(prompts, evaluations)}, indent=2, ensure_ascii=False)
        )
    print(table(result))
    print(f"saved to {config.output_file}")


def find_prompts(config: EvaluateConfig, keep: KeptColumns | None = None) -> list[Prompt]:
    """The prompts to respond to. Which of them are held out depends on how the models were trained.

    Args:
        keep: the columns to keep of their rows.
    """
    with writing_to("--data_output_path", config.data_output_path), named_by("--path"):
        models = [find_model(path, config.data_output_path) for path in config.path]
    if config.which_prompts == "held_out":
        trained = [model.provenance for model in models if model.provenance]
        return held_out_prompts(config, trained, config.seed, keep)
    return choose(list(dict.fromkeys(read_prompts(config, keep))), config.max_prompts, config.seed)


def compare(prompts: list[Prompt], evaluations: list[Evaluation], task: bool) -> dict[str, Any]:
    """The means of each model, and for two models the second's win rate, where a draw counts as half a win."""
    result: dict[str, Any] = {
        "prompts": len(prompts),
        "models": [{"path": model.path, **model.summary(prompts, task)} for model in evaluations],
    }
    if len(evaluations) == 2:
        first, second = (model.scores for model in evaluations)
        result["win_rate"] = _mean([(b > a) + 0.5 * (b == a) for a, b in zip(first, second)])
    return result


def rows(prompts: list[Prompt], evaluations: list[Evaluation]) -> list[dict[str, Any]]:
    """Every prompt with the models' responses and scores."""
    labels = evaluations[0].by_reward
    return [
        {
            "prompt": plain(prompt),
            "responses": [model.responses[i].text for model in evaluations],
            "scores": [model.scores[i] for model in evaluations],
            **{f"reward/{label}": [model.by_reward[label][i] for model in evaluations] for label in labels},
        }
        for i, prompt in enumerate(prompts)
    ]


def table(result: dict[str, Any]) -> str:
    """The result as text, with one line per figure and one column per model."""
    models = result["models"]
    names = [name for name in models[0] if name != "path"]
    cells = [
        ["", *(model["path"] for model in models)],
        *([name.replace("_", " "), *(f"{model[name]:.3f}" for model in models)] for name in names),
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    if "win_rate" in result:
        lines.append(f"the second scores higher on {result['win_rate']:.1%} of {result['prompts']} prompts")
    else:
        lines.append(f"{result['prompts']} prompts")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def run() -> int:
    """The console command rlhf-evaluate. Returns the exit code."""
    return run_program(main)


if __name__ == "__main__":
    sys.exit(run())
