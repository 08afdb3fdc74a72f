"""A new option needs one edit: all that the project does with it follows from its declaration."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from common.checkpoints.manager import Checkpoints
from common.checkpoints.training_state import TrainingState
from common.config.option import Phase
from common.config.parser import option, options, parse, save_config
from common.errors import AlreadyComplete, UserError
from common.training.engine import check_engine_options
from common.training.memory import memory_advice
from step1_sft.config import SFTConfig
from tests.logs import NoLog


@dataclass(frozen=True, kw_only=True)
class ExtendedConfig(SFTConfig):
    """Step 1 with two more options"""

    focus: float = option(
        1.0,
        "weight of rare tokens",
        above=0,
        deepspeed_keys=("data_efficiency.focus",),
        relieves=(Phase.TRAINING_STEP,),
        advice="lower {flag}",
    )
    shout: bool = option(False, "print in capitals", affects="nothing")
    judge_name_or_path: str | None = option(None, "a model that judges", names_model=True)


@pytest.fixture
def config(tmp_path) -> ExtendedConfig:
    return ExtendedConfig(output_dir=str(tmp_path / "out"), focus=2.0)


def test_a_changed_value_refuses_resume_only_if_the_option_affects_the_result(config):
    path = save_checkpoint(config)
    with pytest.raises(UserError, match=r"--focus was 2.0, now 3.0"):
        Checkpoints(replace(config, focus=3.0), ["key"]).find()
    assert Checkpoints(replace(config, focus=3.0, resume_anyway=True), ["key"]).find() == path
    assert Checkpoints(replace(config, shout=True), ["key"]).find() == path


def test_the_record_of_a_complete_run_covers_its_options_and_models(config, tmp_path):
    def is_complete(config: ExtendedConfig) -> bool:
        return Checkpoints(config, ["key"])._completed_run().exists()

    judge = tmp_path / "judge"
    judge.mkdir()
    (judge / "model.safetensors").write_bytes(b"weights")
    config = replace(config, judge_name_or_path=str(judge))
    (tmp_path / "out/logs").mkdir(parents=True)
    Checkpoints(config, ["key"]).discard()
    assert is_complete(config) and is_complete(replace(config, shout=True))
    assert not is_complete(replace(config, focus=3.0))
    (judge / "model.safetensors").write_bytes(b"changed")
    assert not is_complete(config)


def save_checkpoint(config: SFTConfig) -> Path:
    first = Checkpoints(config, ["key"])
    saver = first.restore(first.find(), TrainingState({}), NoLog())
    saver.save(5, 5)
    return saver.saved[1]


def test_a_checkpoint_from_before_the_option_counts_as_made_with_its_default(tmp_path):
    path = save_checkpoint(SFTConfig(output_dir=str(tmp_path / "out")))
    later = ExtendedConfig(output_dir=str(tmp_path / "out"))
    assert Checkpoints(later, ["key"]).find() == path
    with pytest.raises(UserError, match=r"made with another configuration: --focus was 1.0, now 3.0: run the same"):
        Checkpoints(replace(later, focus=3.0), ["key"]).find()


@pytest.mark.parametrize("focus", [1.0, 2.0])
def test_a_checkpoint_with_an_option_that_is_not_known_any_more_is_taken_with_a_note(focus, tmp_path, capsys):
    path = save_checkpoint(ExtendedConfig(output_dir=str(tmp_path / "out"), focus=focus))
    capsys.readouterr()
    without = SFTConfig(output_dir=str(tmp_path / "out"))
    assert Checkpoints(without, ["key"]).find() == path
    (note,) = capsys.readouterr().out.splitlines()
    assert note == (
        f"note: {path} was made with options that this version does not know and ignores: "
        f"--focus {focus}, --judge_name_or_path None, --shout False"
    )
    with pytest.raises(UserError, match=r"--learning_rate was .*, now 0.5"):
        Checkpoints(replace(without, learning_rate=0.5), ["key"]).find()


def test_a_result_from_before_the_option_is_that_of_its_default(tmp_path):
    finished = SFTConfig(output_dir=str(tmp_path / "out"))
    (tmp_path / "out/logs").mkdir(parents=True)
    Checkpoints(finished, ["key"]).discard()
    later = ExtendedConfig(output_dir=str(tmp_path / "out"))
    with pytest.raises(AlreadyComplete):
        Checkpoints(later, ["key"]).find()
    assert Checkpoints(replace(later, focus=3.0), ["key"]).find() is None
    assert Checkpoints(replace(later, judge_name_or_path="owner/judge"), ["key"]).find() is None


@pytest.mark.parametrize("focus", [1.0, 2.0])
def test_a_result_of_an_option_that_is_not_known_any_more_is_found_with_a_note(focus, tmp_path, capsys):
    (tmp_path / "out/logs").mkdir(parents=True)
    Checkpoints(ExtendedConfig(output_dir=str(tmp_path / "out"), focus=focus), ["key"]).discard()
    with pytest.raises(AlreadyComplete):
        Checkpoints(SFTConfig(output_dir=str(tmp_path / "out")), ["key"]).find()
    (note,) = capsys.readouterr().out.splitlines()
    assert note == (
        f"note: {tmp_path}/out/logs/finished.json was made with options that this version does not know and ignores: "
        f"--focus {focus}, --judge_name_or_path None"
    )
    assert Checkpoints(SFTConfig(output_dir=str(tmp_path / "out"), seed=9), ["key"]).find() is None


def test_the_key_of_deepspeeds_configuration_that_it_owns_is_refused_with_its_flag(config, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"data_efficiency": {"focus": 3.0}}))
    with pytest.raises(UserError, match=r"--deepspeed_config .*ds.json: leave out data_efficiency.focus; --focus dec"):
        check_engine_options(replace(config, deepspeed_config=str(path)))


def test_the_advice_for_out_of_memory_names_it():
    assert "--focus" in memory_advice(ExtendedConfig(), Phase.TRAINING_STEP)
    assert "--focus" not in memory_advice(ExtendedConfig(), Phase.EVALUATION)


def test_it_is_in_the_help_and_in_the_saved_recipe(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse(ExtendedConfig, ["--help"])
    shown = capsys.readouterr().out
    assert "--focus X" in shown and "weight of rare tokens [default 1]" in shown
    assert "Step 1 with two more options:" in shown and options(ExtendedConfig)["seed"].group == "Run"
    save_config(config, tmp_path / "recipe.yaml")
    saved = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert saved["focus"] == 2.0 and saved["shout"] is False
    assert parse(ExtendedConfig, ["--config", str(tmp_path / "recipe.yaml")]) == config
