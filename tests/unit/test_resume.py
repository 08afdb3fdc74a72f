"""Which checkpoint a run goes on from, and which it refuses."""
import json

import pytest

from common.config import parse
from common.errors import UserError
from common.resume import Checkpoints, _batches, _plain
from step1_sft.config import SFTConfig
from step3_ppo.config import PPOConfig

PPO = ("--actor_model_name_or_path", "actor", "--critic_model_name_or_path", "critic")


def checkpoints(tmp_path, *flags, data=("key",), config_class=SFTConfig):
    config = parse(config_class, ["--output_dir", str(tmp_path / "out"), *flags])
    return Checkpoints(config, data)


def saved(tmp_path, step=7, made=None, **changes):
    made = made or checkpoints(tmp_path)
    state = {"step": step, "world_size": 1, "data": ["key"], "config": _plain(made.config),
             "batches": _batches(made.config), **changes}
    return made.store.save(step, lambda shards: shards.add(
        "state.json", lambda file: file.write(json.dumps(state).encode())))


def test_the_newest_checkpoint_is_found(tmp_path):
    assert checkpoints(tmp_path).find() is None
    saved(tmp_path, 7)
    path = saved(tmp_path, 9)
    assert checkpoints(tmp_path).find() == path
    assert checkpoints(tmp_path, "--log_interval", "3", "--timeout", "9").find() == path
    assert checkpoints(tmp_path, "--eval_interval", "3", "--eval_iters", "9", "--per_device_eval_batch_size", "2",
                       "--save_interval", "1", "--print_loss").find() == path


def test_a_certain_checkpoint_is_taken(tmp_path):
    path = saved(tmp_path, 7)
    saved(tmp_path, 9)
    assert checkpoints(tmp_path, "--resume", str(path)).find() == path
    (path / "state.json").write_text("")
    with pytest.raises(UserError, match="--resume .*step-7: state.json has 0 bytes"):
        checkpoints(tmp_path, "--resume", str(path)).find()


@pytest.mark.parametrize("flags, changes, message", [
    (["--learning_rate", "0.5"], {}, "--learning_rate was .*, now 0.5"),
    ([], {"world_size": 4, "batches": {"rows per optimizer step": 64}},
     "made by 4 ranks with 64 rows per optimizer step, and this run of 1 has 16: use --per_device_train_batch_size 16 "
     "--gradient_accumulation_steps 4, or --resume never"),
    ([], {"world_size": 4, "config": {}}, "--learning_rate was None"),
    ([], {"data": ["other"]}, "the data has other rows"),
])
def test_what_would_change_the_result_is_refused(tmp_path, flags, changes, message):
    saved(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        checkpoints(tmp_path, *flags).find()


@pytest.mark.parametrize("flags, advice", [
    (["--per_device_train_batch_size", "16"], "--per_device_train_batch_size 12 --gradient_accumulation_steps 1"),
    (["--per_device_train_batch_size", "5"], "--per_device_train_batch_size 4 --gradient_accumulation_steps 3"),
])
def test_another_number_of_ranks_goes_on_with_the_flags_it_is_told(tmp_path, monkeypatch, flags, advice):
    path = saved(tmp_path, world_size=4, batches={"rows per optimizer step": 24})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=advice):
        checkpoints(tmp_path, *flags).find()
    assert checkpoints(tmp_path, *advice.split()).find() == path
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(UserError, match="a number of ranks that divides 24"):
        checkpoints(tmp_path).find()


def test_both_batches_of_ppo_stay_the_same(tmp_path, monkeypatch):
    """Where one batch of rollouts is too small for an optimizer step, an iteration makes more than it was asked for."""
    made = checkpoints(tmp_path, *PPO, "--per_device_generation_batch_size", "4", "--per_device_training_batch_size",
                       "8", config_class=PPOConfig)
    path = saved(tmp_path, made=made)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="made by 1 rank with 8 prompts per iteration and 8 answers per optimizer step, "
                                        "and this run of 2 has 36 and 32") as told:
        checkpoints(tmp_path, *PPO, "--per_device_generation_batch_size", "3", "--generation_batches", "1",
                    "--gradient_accumulation_steps", "1", config_class=PPOConfig).find()
    advice = str(told.value).split(": use ")[1].split(",")[0]
    assert advice == ("--per_device_generation_batch_size 2 --generation_batches 2 "
                      "--per_device_training_batch_size 4 --gradient_accumulation_steps 1")
    assert checkpoints(tmp_path, *PPO, *advice.split(), config_class=PPOConfig).find() == path


def test_ppo_goes_on_with_other_evaluations(tmp_path):
    path = saved(tmp_path, made=checkpoints(tmp_path, *PPO, config_class=PPOConfig))
    other = checkpoints(tmp_path, *PPO, "--eval_interval", "3", "--eval_prompts", "9", "--print_answers",
                        config_class=PPOConfig)
    assert other.find() == path


def test_changes_that_are_meant_are_taken(tmp_path):
    path = saved(tmp_path, data=["other"])
    assert checkpoints(tmp_path, "--learning_rate", "0.5", "--resume_anyway").find() == path


def test_a_new_start_keeps_the_old_checkpoints_aside(tmp_path):
    saved(tmp_path)
    assert checkpoints(tmp_path, "--resume", "never").find() is None
    assert (tmp_path / "out" / "checkpoints-1" / "step-7" / "state.json").is_file()
    saved(tmp_path)
    assert checkpoints(tmp_path, "--resume", "never").find() is None
    assert (tmp_path / "out" / "checkpoints-2").is_dir()
