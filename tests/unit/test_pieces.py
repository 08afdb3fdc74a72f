"""A run with another task or reward is another run, though its options are the same."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from common.artifacts.run import name_of
from common.checkpoints.completed import FILE
from common.checkpoints.manager import Checkpoints
from common.checkpoints.training_state import TrainingState
from common.errors import AlreadyComplete, UserError
from common.models.calibration import RAW
from common.rewards.function import load_function
from common.rewards.spec import RewardSpec
from common.supervised.run import run_supervised
from step1_sft.config import SFTConfig
from step1_sft.task import SFTTask
from step3_ppo.calibration import ScoreScale
from step3_ppo.inputs import RunInputs
from step3_ppo.opening import OpenedReward
from tests.launching import ROOT
from tests.logs import NoLog

FILES = {"file of rules.py:score": "sha256 0123"}
OWN, PRODUCT = {"reward": "rules.score"}, {"reward": "step3_ppo.reward.TokenRewardModel"}


class OtherTask(SFTTask):
    """A task that is not the step's own."""


def score(inputs):
    """A reward."""


@pytest.fixture
def config(tmp_path) -> SFTConfig:
    (tmp_path / "out/logs").mkdir(parents=True)
    return SFTConfig(output_dir=str(tmp_path / "out"))


def save_checkpoint(config: SFTConfig, *pieces) -> Path:
    saver = Checkpoints(config, ["key"], *pieces).restore(None, TrainingState({}), NoLog())
    saver.save(5, 5)
    return saver.saved[1]


def test_a_run_does_not_go_on_with_another_piece_unless_it_is_meant(config):
    path = save_checkpoint(config, OWN)
    assert Checkpoints(config, ["key"], OWN).find() == path
    said = "another configuration: the reward was rules.score, now step3_ppo.reward.TokenRewardModel: run the same"
    with pytest.raises(UserError, match=said):
        Checkpoints(config, ["key"], PRODUCT).find()
    assert Checkpoints(replace(config, resume_anyway=True), ["key"], PRODUCT).find() == path


def test_a_checkpoint_that_does_not_name_the_piece_is_taken(config):
    path = save_checkpoint(config)
    assert Checkpoints(config, ["key"], OWN).find() == path


def test_the_result_with_another_piece_is_another_result(config):
    Checkpoints(config, ["key"], OWN).discard()
    with pytest.raises(AlreadyComplete):
        Checkpoints(config, ["key"], OWN).find()
    assert Checkpoints(config, ["key"], PRODUCT).find() is None


def test_a_result_that_does_not_name_the_piece_is_found(config):
    Checkpoints(config, ["key"], OWN).discard()
    record = Path(config.output_dir) / FILE
    values = json.loads(record.read_text())
    assert values.pop("pieces") == OWN
    record.write_text(json.dumps(values))
    with pytest.raises(AlreadyComplete):
        Checkpoints(config, ["key"], PRODUCT).find()


@pytest.mark.parametrize("pieces", [["a"], "a", {"reward": 3}])
def test_pieces_of_another_kind_are_no_state(pieces, config, capsys):
    save_checkpoint(config, pieces)
    assert Checkpoints(config, ["key"], OWN).find() is None
    assert "is not whole (state.json cannot be used: " in capsys.readouterr().out


def test_a_piece_has_the_name_of_its_class_or_function(config):
    assert name_of(SFTTask) == name_of(SFTTask(config)) == name_of(partial(SFTTask, config)) == "step1_sft.task.SFTTask"
    assert name_of(OtherTask(config)) == f"{__name__}.OtherTask"
    assert name_of(score) == name_of(partial(score, None)) == f"{__name__}.score"


def test_in_a_file_that_is_run_the_module_is_the_files_name(tmp_path):
    program = tmp_path / "rules.py"
    program.write_text(
        "from common.artifacts.run import name_of\nclass Reward: pass\ndef score(inputs): pass\n"
        "print(name_of(score), name_of(Reward()))\n"
    )
    run = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""}
    )
    assert run.stdout.split() == ["rules.score", "rules.Reward"], run.stderr


class Reached(Exception):
    """The run would begin."""


def begins_with(monkeypatch, module: str) -> dict[str, object]:
    """The pieces that a program of `module` will start its run with, instead of starting it."""
    given: dict[str, object] = {}

    def start_run(config, *data, pieces, **others):
        given.update({what: name_of(piece) for what, piece in pieces.items()})
        raise Reached

    program = importlib.import_module(module)
    monkeypatch.setattr(program, "start_run", start_run)
    monkeypatch.setattr(program, "read_inputs", lambda *given: type("Inputs", (), {"data": [], "functions": FILES}))
    return given


@pytest.mark.parametrize("task, name", [(SFTTask, "step1_sft.task.SFTTask"), (OtherTask, f"{__name__}.OtherTask")])
def test_steps_1_and_2_name_their_task(task, name, config, monkeypatch):
    given = begins_with(monkeypatch, "common.supervised.run")
    with pytest.raises(Reached):
        run_supervised(task(config), config)
    assert given == {"task": name}


@pytest.mark.parametrize("reward, name", [(None, PRODUCT["reward"]), (score, f"{__name__}.score")])
def test_step_3_names_its_reward(reward, name, monkeypatch, tmp_path):
    from step3_ppo.main import main

    given = begins_with(monkeypatch, "step3_ppo.main")
    models = ("--actor_model_name_or_path", "owner/actor", "--critic_model_name_or_path", "owner/critic")
    with pytest.raises(Reached):
        main([*models, "--output_dir", str(tmp_path)], reward=reward)
    assert given == {"reward": name, **FILES}


def test_a_reward_function_that_was_edited_is_another_piece(config, tmp_path):
    file = tmp_path / "rules.py"
    name = f"{file}:score"

    def pieces() -> dict[str, str]:
        function = load_function(name)
        opened = OpenedReward(
            RewardSpec(name), ScoreScale(RAW), None, None, reads_ids=False, checksum=function.checksum
        )
        return RunInputs("", None, None, ScoreScale(RAW), [opened], None, None).functions

    file.write_text("def score(responses): return [1.0] * len(responses)\n")
    path = save_checkpoint(config, pieces())
    assert Checkpoints(config, ["key"], pieces()).find() == path
    file.write_text("def score(responses): return [2.0] * len(responses)\n")
    said = rf"the file of {re.escape(name)} was sha256 \w{{12}}, now sha256 \w{{12}}: run the same"
    with pytest.raises(UserError, match=said):
        Checkpoints(config, ["key"], pieces()).find()
