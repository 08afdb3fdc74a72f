"""docs/examples/reinforce.py: a file of a user's own swaps the estimator and runs the whole of step 3."""

from __future__ import annotations

import json
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
