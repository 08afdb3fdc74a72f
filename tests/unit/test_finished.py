"""A complete run is recognised by the same command, and by no other."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from common.artifacts.tracking import Tracker
from common.checkpoints.completed import FILE, FORMAT
from common.checkpoints.manager import Checkpoints
from common.checkpoints.training_state import TrainingState
from common.errors import AlreadyComplete, UserError
from common.runtime.program import run_program
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig


@pytest.fixture
def config(tmp_path) -> RewardConfig:
    model = tmp_path / "model"
    for directory in (model, tmp_path / "output/logs"):
        directory.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    return RewardConfig(
        model_name_or_path=str(model),
        output_dir=str(tmp_path / "output"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )


def finish(config: RewardConfig) -> None:
    (Path(config.output_dir) / "provenance.json").write_text("{}")
    Checkpoints(config, ["key"]).discard()


def is_complete(config: RewardConfig, *data: str) -> bool:
    try:
        return Checkpoints(config, data or ["key"]).find() is not None
    except AlreadyComplete as error:
        assert str(error) == (
            f"{config.output_dir} holds the result of this command already; give --resume never to train it again"
        )
        return True


def test_the_same_command_finds_its_result(config):
    assert not is_complete(config)
    finish(config)
    assert is_complete(config)
    assert is_complete(replace(config, log_interval=3, save_interval=7))
    assert is_complete(replace(config, per_device_train_batch_size=2, gradient_accumulation_steps=4)), (
        "the same batches"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.5},
        {"eval_iters": 5},
        {"resume": "never"},
        {"per_device_train_batch_size": 8},
        {"seed": 9},
        {"enable_test_mode": True, "test_stop_step": 3},
        {"model_name_or_path": "owner/other"},
    ],
)
def test_another_command_does_not_find_the_result(config, changes):
    finish(config)
    assert not is_complete(replace(config, **changes))


def test_other_data_another_model_and_a_missing_result_are_not_finished(config):
    finish(config)
    assert not is_complete(config, "other key")
    weights = Path(config.model_name_or_path) / "model.safetensors"
    weights.write_bytes(b"changed")
    assert not is_complete(config)
    weights.write_bytes(b"weights")
    assert is_complete(config)
    (Path(config.output_dir) / "provenance.json").unlink()
    assert not is_complete(config)


@pytest.mark.parametrize("content", ["", "[]", "[" * 10_000, json.dumps({"config": {}}), json.dumps({"format": "new"})])
def test_a_damaged_record_counts_as_missing(config, content):
    finish(config)
    (Path(config.output_dir) / FILE).write_text(content)
    assert not is_complete(config)


@pytest.mark.parametrize("number, age", [(FORMAT - 1, "older"), (FORMAT + 1, "newer")])
def test_a_record_of_another_format_is_neither_believed_nor_overwritten(config, number, age):
    finish(config)
    record = Path(config.output_dir) / FILE
    record.write_text(json.dumps(json.loads(record.read_text()) | {"format": number}))
    said = (
        f"{record}: it has format {number}, an? {age} one than format {FORMAT} of this version: "
        "use the version that made it, or train again with this one, --resume never"
    )
    with pytest.raises(UserError, match=said):
        is_complete(config)
    assert not is_complete(replace(config, resume="never"))


@pytest.mark.parametrize("number", [str(FORMAT), True, float(FORMAT), None])
def test_a_record_whose_format_is_no_whole_number_is_damaged(number, config):
    finish(config)
    record = Path(config.output_dir) / FILE
    record.write_text(json.dumps(json.loads(record.read_text()) | {"format": number}))
    assert not is_complete(config)


def test_fields_of_the_record_that_are_not_known_are_ignored(config):
    finish(config)
    record = Path(config.output_dir) / FILE
    record.write_text(json.dumps(json.loads(record.read_text()) | {"colour": "blue"}))
    assert is_complete(config)


def test_a_run_that_started_in_the_directory_clears_the_record(config, tmp_path):
    finish(config)
    other = replace(config, seed=9)
    Checkpoints(other, ["key"]).restore(None, TrainingState({}), Tracker(Path(config.output_dir), False))
    assert not is_complete(config) and not is_complete(other)


def test_a_result_without_its_weights_is_not_complete(config):
    weights = Path(config.output_dir) / "actor/model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"learnt")
    finish(config)
    assert is_complete(config)
    weights.unlink()
    assert not is_complete(config)


def test_another_content_of_the_deepspeed_config_is_another_command(config, tmp_path):
    override = tmp_path / "ds.json"
    override.write_text('{"zero_optimization": {"reduce_bucket_size": 1000}}')
    config = replace(config, deepspeed_config=str(override))
    finish(config)
    assert is_complete(config)
    override.write_text('{"zero_optimization": {"reduce_bucket_size": 2000}}')
    assert not is_complete(config)


def test_a_program_ends_well_when_there_is_nothing_to_do(capsys):
    def program(argv):
        raise AlreadyComplete("it is there")

    assert run_program(program, []) == 0
    assert capsys.readouterr().out == "it is there\n"


def test_another_reward_model_in_the_same_place_is_another_run(config, tmp_path):
    judge = tmp_path / "judge"
    judge.mkdir()
    (judge / "model.safetensors").write_bytes(b"weights")
    ppo = PPOConfig(
        actor_model_name_or_path=config.model_name_or_path, reward=(f"{judge}=0.5",), output_dir=config.output_dir
    )
    finish(ppo)
    assert is_complete(ppo)
    (judge / "model.safetensors").write_bytes(b"others!")
    assert not is_complete(ppo)
