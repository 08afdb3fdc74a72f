"""A file of a user's own swaps the estimator (docs/examples/reinforce.py) or the reward, and runs all of step 3."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from common.artifacts.export import write_model
from common.data.tokenization import load_tokenizer, make_codec
from common.models.builtin import materialise
from common.models.loading import load_scalar_model
from tests.launching import ROOT, launch

FLAGS = (
    "--data_path builtin:courtesy --data_split 1,1,1 --max_rows 200 --no_enable_tensorboard --dtype fp32 "
    "--per_device_generation_batch_size 4 --per_device_training_batch_size 2 --max_prompt_seq_len 32 "
    "--max_answer_seq_len 8 --max_iterations 2 --num_warmup_steps 0 --eval_prompts 4 --actor_learning_rate 1e-3"
)

PROGRAM = f"""
import sys

sys.path[0] = {str(ROOT)!r}

from common.runtime.distributed import rank
from common.runtime.program import launch
from step3_ppo.main import main


def length(inputs):
    return inputs.rollout.response_lengths.float(){{on_rank}}


if __name__ == "__main__":
    launch(main, reward=length)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, builtin_cache) -> dict[str, Path]:
    """Output directories by estimator: that of the example, and the product's default."""
    place = tmp_path_factory.mktemp("estimator")
    base = str(materialise("builtin:tiny-opt", builtin_cache))
    codec = make_codec(load_tokenizer(base), "human_assistant")
    reward_model = load_scalar_model(base, codec, dtype=torch.float32, seed=7)
    write_model(reward_model, dict(reward_model.state_dict()), codec, place / "reward")
    for name, chosen in (("reinforce", []), ("gae", ["--advantage", "gae"])):
        launch(
            ROOT / "docs" / "examples" / "reinforce.py",
            *FLAGS.split(),
            *chosen,
            "--actor_model_name_or_path",
            base,
            "--critic_model_name_or_path",
            str(place / "reward"),
            "--data_output_path",
            str(place / "data"),
            "--output_dir",
            str(place / name),
            ranks=2,
        )
    return {name: place / name for name in ("reinforce", "gae")}


def training(output: Path) -> list[dict]:
    rows = [json.loads(line) for line in (output / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["phase"] == "train"]


def test_the_estimator_of_ones_own_is_the_one_that_trains(runs):
    own, default = (load_file(run / "actor" / "model.safetensors") for run in runs.values())
    assert own.keys() == default.keys() and any(not torch.equal(own[name], default[name]) for name in own)
    rows = {name: training(run) for name, run in runs.items()}
    assert [len(steps) for steps in rows.values()] == [2, 2]
    assert rows["reinforce"][0]["reward"] == rows["gae"][0]["reward"]  # the first rollouts are of the same weights
    assert yaml.safe_load((runs["reinforce"] / "run_config.yaml").read_text())["advantage"] == "reinforce"


def test_it_builds_measures_and_saves_no_critic(runs):
    assert (runs["gae"] / "critic").exists() and "explained_variance" in training(runs["gae"])[-1]
    assert not (runs["reinforce"] / "critic").exists()
    assert not [
        name for name in training(runs["reinforce"])[-1] if "critic" in name or "value" in name or "variance" in name
    ]


def with_own_reward(place: Path, on_rank: str = "", check: bool = True) -> subprocess.CompletedProcess:
    """A run on the length of the responses. Both actor and critic start from a language model."""
    (place / "program.py").write_text(PROGRAM.format(on_rank=on_rank))
    return launch(
        place / "program.py",
        *FLAGS.split(),
        *("--draw_answer_lengths", "--critic_learning_rate", "1e-3"),
        *("--actor_model_name_or_path", "builtin:tiny-opt", "--critic_model_name_or_path", "builtin:tiny-opt"),
        *("--data_output_path", str(place / "data"), "--output_dir", str(place / "output")),
        ranks=2,
        check=check,
    )


def test_a_reward_of_ones_own_is_what_is_trained_on_with_a_critic_from_a_language_model(tmp_path):
    said = with_own_reward(tmp_path).stdout
    assert "the critic starts from the language model builtin:tiny-opt, with a new score head" in said
    steps = training(tmp_path / "output")
    assert [step["reward"] for step in steps] == pytest.approx([step["response_length"] for step in steps])
    assert len(steps) == 2 and len({step["reward"] for step in steps}) == 2
    assert all("explained_variance" in step and step["critic_gradient_norm"] > 0 for step in steps)
    critic = load_file(tmp_path / "output" / "critic" / "model.safetensors")
    assert critic["score.weight"].shape[0] == 1


def test_scores_that_differ_between_ranks_end_the_run_in_one_line(tmp_path):
    done = with_own_reward(tmp_path, on_rank=" + rank()", check=False)
    printed = done.stdout + done.stderr
    assert done.returncode != 0 and "Traceback" not in printed
    errors = [line for line in printed.splitlines() if "the reward length gave other scores" in line]
    assert len(errors) == 1 and "rank 1" in errors[0]
