"""Which checkpoint a run resumes from, and which it refuses."""

import hashlib
import json
import pickle
import re

import pytest
import torch
from safetensors.torch import save

from common.artifacts.tracking import Tracker
from common.checkpoints.config_changes import batches_of_all_ranks, plain_config
from common.checkpoints.manager import Checkpoints
from common.checkpoints.state import FORMAT
from common.checkpoints.training_state import TrainingState
from common.config.parser import options, parse
from common.errors import UserError
from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig

PPO = ("--actor_model_name_or_path", "actor", "--critic_model_name_or_path", "critic")


def checkpoints(tmp_path, *flags, data=("key",), config_class=SFTConfig):
    config = parse(config_class, ["--output_dir", str(tmp_path / "out"), *flags])
    return Checkpoints(config, data)


def saved(tmp_path, step=7, manager=None, **changes):
    manager = manager or checkpoints(tmp_path)
    state = {
        "format": FORMAT,
        "step": step,
        "optimizer_steps": step,
        "world_size": 1,
        "data": ["key"],
        "config": plain_config(manager.config),
        "batches": batches_of_all_ranks(manager.config),
        "state_dict": {},
        "tracker": {"step": step, "bytes": 0, "seconds": 1.5},
        **changes,
    }

    def write(shards):
        shards.add("state.json", lambda file: file.write(json.dumps(state).encode()))
        for number in range(state["world_size"]):
            shards.add(
                f"rank{number}.safetensors", lambda file: file.write(save({"random.cpu": torch.get_rng_state()}))
            )

    return manager.store.save(step, write)


def test_the_newest_checkpoint_is_found(tmp_path):
    assert checkpoints(tmp_path).find() is None
    saved(tmp_path, 7)
    path = saved(tmp_path, 9)
    assert checkpoints(tmp_path).find() == path
    assert checkpoints(tmp_path, "--log_interval", "3", "--timeout", "9").find() == path
    assert (
        checkpoints(
            tmp_path,
            "--eval_interval",
            "3",
            "--eval_iters",
            "9",
            "--per_device_eval_batch_size",
            "2",
            "--save_interval",
            "1",
            "--print_loss",
        ).find()
        == path
    )


def test_a_certain_checkpoint_is_taken(tmp_path):
    path = saved(tmp_path, 7)
    saved(tmp_path, 9)
    assert checkpoints(tmp_path, "--resume", str(path)).find() == path
    (path / "state.json").write_text("")
    with pytest.raises(UserError, match="--resume .*step-7: state.json has 0 bytes"):
        checkpoints(tmp_path, "--resume", str(path)).find()


@pytest.mark.parametrize(
    "flags, changes, message",
    [
        (["--learning_rate", "0.5"], {}, "--learning_rate was .*, now 0.5"),
        (
            [],
            {"world_size": 4, "batches": {"rows per optimizer step": 64}},
            "made by 4 ranks with 64 rows per optimizer step, and this run of 1 has 16: use "
            "--per_device_train_batch_size 16 --gradient_accumulation_steps 4, or --resume never",
        ),
        (["--learning_rate", "0.5"], {"world_size": 4, "config": {}}, "--learning_rate was 9.65e-06, now 0.5"),
        ([], {"batches": {"prompts per iteration": 8}}, "is a checkpoint of another step"),
        ([], {"data": ["other"]}, "the data has other rows"),
    ],
)
def test_what_would_change_the_result_is_refused(tmp_path, flags, changes, message):
    saved(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        checkpoints(tmp_path, *flags).find()


@pytest.mark.parametrize(
    "flags, advice",
    [
        (["--per_device_train_batch_size", "16"], "--per_device_train_batch_size 12 --gradient_accumulation_steps 1"),
        (["--per_device_train_batch_size", "5"], "--per_device_train_batch_size 4 --gradient_accumulation_steps 3"),
    ],
)
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
    manager = checkpoints(
        tmp_path,
        *PPO,
        "--per_device_generation_batch_size",
        "4",
        "--per_device_training_batch_size",
        "8",
        config_class=PPOConfig,
    )
    path = saved(tmp_path, manager=manager)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UserError,
        match="made by 1 rank with 8 prompts per iteration and 8 answers per optimizer step, "
        "and this run of 2 has 36 and 32",
    ) as raised:
        checkpoints(
            tmp_path,
            *PPO,
            "--per_device_generation_batch_size",
            "3",
            "--generation_batches",
            "1",
            "--gradient_accumulation_steps",
            "1",
            config_class=PPOConfig,
        ).find()
    advice = str(raised.value).split(": use ")[1].split(",")[0]
    assert advice == (
        "--per_device_generation_batch_size 2 --generation_batches 2 "
        "--per_device_training_batch_size 4 --gradient_accumulation_steps 1"
    )
    assert checkpoints(tmp_path, *PPO, *advice.split(), config_class=PPOConfig).find() == path
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="has .*: use a number of ranks that divides 8 and 8, or --resume never"):
        checkpoints(tmp_path, *PPO, config_class=PPOConfig).find()


def test_ppo_goes_on_with_other_evaluations(tmp_path):
    path = saved(tmp_path, manager=checkpoints(tmp_path, *PPO, config_class=PPOConfig))
    other = checkpoints(
        tmp_path, *PPO, "--eval_interval", "3", "--eval_prompts", "9", "--print_answers", config_class=PPOConfig
    )
    assert other.find() == path


@pytest.mark.parametrize("config_class, models", [(SFTConfig, ()), (RewardConfig, ()), (PPOConfig, PPO)])
def test_settings_that_do_not_affect_training_may_change(config_class, models, tmp_path):
    """Intervals of evaluation and logging, batch sizes of evaluations, and what is printed."""
    path = saved(tmp_path, manager=checkpoints(tmp_path, *models, config_class=config_class))
    known, flags = options(config_class), ["--data_output_path", str(tmp_path / "elsewhere")]
    for name in (
        "eval_interval",
        "eval_iters",
        "eval_prompts",
        "per_device_eval_batch_size",
        "log_interval",
        "save_interval",
        "print_answers_interval",
    ):
        flags += [f"--{name}", "7"] if name in known else []
    for name in ("print_loss", "print_answers", "no_enable_tensorboard"):
        flags += [f"--{name}"] if name.removeprefix("no_") in known else []
    assert len(flags) >= 12
    assert checkpoints(tmp_path, *models, *flags, config_class=config_class).find() == path


@pytest.mark.parametrize("number, age", [(FORMAT - 1, "older"), (FORMAT + 1, "newer"), (None, "older")])
def test_a_checkpoint_of_another_format_is_not_passed_over(number, age, tmp_path, capsys):
    """Neither for the one before, nor for a new start: the training since would be lost."""
    saved(tmp_path, 7)
    path = saved(tmp_path, 9)
    state = json.loads((path / "state.json").read_text()) | {"format": number, "world_size": {"data": 1}}
    if number is None:
        del state["format"]
    replaced(path, "state.json", json.dumps(state).encode())
    said = (
        f"{path}: it has format {number or 0}, an? {age} one than format {FORMAT} of this version: "
        "use the version that made it, or go on from another checkpoint, --resume PATH, or start anew, --resume never"
    )
    for flags in ((), ("--resume", str(path))):
        with pytest.raises(UserError, match=said):
            checkpoints(tmp_path, *flags).find()
    assert capsys.readouterr().out == ""
    assert checkpoints(tmp_path, "--resume", "never").find() is None


def test_fields_of_the_state_that_are_not_known_are_ignored(tmp_path):
    path = saved(tmp_path, 7, colour="blue")
    assert checkpoints(tmp_path).find() == path


def test_resume_anyway_accepts_a_changed_configuration(tmp_path):
    path = saved(tmp_path, data=["other"])
    assert checkpoints(tmp_path, "--learning_rate", "0.5", "--resume_anyway").find() == path


def test_a_new_start_keeps_the_old_checkpoints_aside(tmp_path):
    saved(tmp_path)
    assert checkpoints(tmp_path, "--resume", "never").find() is None
    assert (tmp_path / "out" / "checkpoints-1" / "step-7" / "state.json").is_file()
    saved(tmp_path)
    assert checkpoints(tmp_path, "--resume", "never").find() is None
    assert (tmp_path / "out" / "checkpoints-2").is_dir()


def replaced(path, name, content):
    """Puts `content` in the place of a file of a checkpoint, None for no file, and lets the manifest agree."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"][name]
    (path / name).unlink()
    if content is not None:
        (path / name).write_bytes(content)
        manifest["files"][name] = len(content), hashlib.sha256(content).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))


def without(name):
    return lambda state: json.dumps({key: value for key, value in state.items() if key != name}).encode()


def with_values(**changes):
    return lambda state: json.dumps({**state, **changes}).encode()


@pytest.mark.parametrize(
    "content, why",
    [
        (lambda state: pickle.dumps(state), "'utf-8' codec"),
        (lambda state: b"\xff" * 9, "'utf-8' codec"),
        (lambda state: b"[]", "it is no object"),
        (lambda state: b"[" * 100_000, "nested too deep"),
        (lambda state: None, "state.json cannot be used: No such file"),
        (without("config"), "it has no config"),
        (without("world_size"), "it has no world_size"),
        (without("state_dict"), "it has no state_dict"),
        (without("tracker"), "it has no tracker"),
        (with_values(world_size="2"), "world_size is '2'"),
        (with_values(world_size=0), "world_size is 0"),
        (with_values(world_size=10**9), "world_size is 1000000000"),
        (with_values(world_size=True), "world_size is 'True'"),
        (with_values(format="2"), "format is '2'"),
        (with_values(format=True), "format is 'True'"),
        (with_values(format=float(FORMAT)), f"format is '{float(FORMAT)}'"),
        (with_values(step=-1), "step is -1"),
        (with_values(step=1.5), "step is '1.5'"),
        (with_values(config=[]), r"config is '\[\]'"),
        (with_values(data="key"), "data is 'key'"),
        (with_values(batches={"rows per optimizer step": "many"}), "rows per optimizer step is 'many'"),
        (with_values(tracker={"step": 1, "bytes": 2}), "it has no seconds"),
        (with_values(tracker={"step": 1, "bytes": 2, "seconds": float("nan")}), "seconds is nan"),
        (with_values(world_size=2), "rank1.safetensors cannot be used: No such file"),
    ],
)
def test_a_damaged_state_json_is_named_and_the_checkpoint_before_is_used(content, why, tmp_path, capsys):
    before, newest = saved(tmp_path, 7), saved(tmp_path, 9)
    replaced(newest, "state.json", content(json.loads((newest / "state.json").read_text())))
    assert checkpoints(tmp_path).find() == before
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: checkpoint {newest} is not whole (") and re.search(why, line)
    with pytest.raises(UserError, match=f"--resume {newest}: .*{why}"):
        checkpoints(tmp_path, "--resume", str(newest)).find()


@pytest.mark.parametrize(
    "content, why",
    [
        (pickle.dumps({"random.cpu": 1}), "rank0.safetensors cannot be used: "),
        (b"", "rank0.safetensors cannot be used: "),
        (b"\xff" * 8 + b"{}", "rank0.safetensors cannot be used: "),
        (None, "rank0.safetensors cannot be used: No such"),
        (save({"other": torch.ones(1)}), "rank0.safetensors has no random.cpu"),
    ],
)
def test_a_damaged_rank_file_is_named_and_the_checkpoint_before_is_used(content, why, tmp_path, capsys):
    before, newest = saved(tmp_path, 7), saved(tmp_path, 9)
    replaced(newest, "rank0.safetensors", content)
    assert checkpoints(tmp_path).find() == before
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{newest} is not whole ({why}" in line


def test_a_checkpoint_that_the_disk_does_not_give_is_not_passed_over(tmp_path):
    """The disk may give it later; a run that goes on from the one before would delete it."""
    saved(tmp_path, 7)
    path = saved(tmp_path, 9)
    (path / "manifest.json").unlink()
    (path / "manifest.json").symlink_to("/proc/self/mem")  # whose reading is an I/O error
    said = f"{path}: it cannot be read: .*: see to the disk and start again, or .* --resume PATH, .* --resume never"
    with pytest.raises(UserError, match=said):
        checkpoints(tmp_path).find()


@pytest.mark.parametrize("values", [{}, {"skipped": "many"}, {"skipped": {}, "consecutive_skips": []}])
def test_a_state_dict_of_another_kind_is_one_error_line(values, tmp_path):
    manager = checkpoints(tmp_path)
    path = saved(tmp_path, 7, manager, state_dict=values)
    state = TrainingState({}, load_state_dict=lambda state: int(state["skipped"]) + int(state["consecutive_skips"]))
    with pytest.raises(UserError, match=f"{path}: it does not hold what this run needs .*--resume never"):
        manager.restore(path, state, Tracker(tmp_path / "out", tensorboard=False))
