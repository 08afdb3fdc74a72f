"""Which checkpoint a run goes on from, and which it refuses."""
import json

import pytest

from common.config import parse
from common.errors import UserError
from common.resume import Checkpoints, _plain
from step1_sft.config import SFTConfig


def checkpoints(tmp_path, *flags, data=("key",)):
    config = parse(SFTConfig, ["--output_dir", str(tmp_path / "out"), *flags])
    return Checkpoints(config, data)


def saved(tmp_path, step=7, **changes):
    made = checkpoints(tmp_path)
    state = {"step": step, "world_size": 1, "data": ["key"], "config": _plain(made.config), **changes}
    return made.store.save(step, lambda shards: shards.add(
        "state.json", lambda file: file.write(json.dumps(state).encode())))


def test_the_newest_checkpoint_is_found(tmp_path):
    assert checkpoints(tmp_path).find() is None
    saved(tmp_path, 7)
    path = saved(tmp_path, 9)
    assert checkpoints(tmp_path).find() == path
    assert checkpoints(tmp_path, "--log_interval", "3", "--timeout", "9").find() == path


def test_a_certain_checkpoint_is_taken(tmp_path):
    path = saved(tmp_path, 7)
    saved(tmp_path, 9)
    assert checkpoints(tmp_path, "--resume", str(path)).find() == path
    (path / "state.json").write_text("")
    with pytest.raises(UserError, match="--resume .*step-7: state.json has 0 bytes"):
        checkpoints(tmp_path, "--resume", str(path)).find()


@pytest.mark.parametrize("flags, changes, message", [
    (["--learning_rate", "0.5"], {}, "--learning_rate was .*, now 0.5"),
    ([], {"world_size": 4}, "made by 4 ranks, and this run has 1"),
    ([], {"data": ["other"]}, "the data has other rows"),
])
def test_what_would_change_the_result_is_refused(tmp_path, flags, changes, message):
    saved(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        checkpoints(tmp_path, *flags).find()


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
