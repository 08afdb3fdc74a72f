"""Files of a run that are deleted, moved or replaced while the run writes them."""

import errno
import json
import os
import shutil

import pytest

from common.artifacts.run import open_run
from common.artifacts.tracking import Tracker
from common.checkpoints.manager import Checkpoints, TrainingState
from common.config.parser import parse
from common.errors import TrainingFailure, UserError
from step1_sft.config import SFTConfig


@pytest.fixture
def output(tmp_path):
    directory = tmp_path / "out"
    directory.mkdir()
    return directory


def begun(output, tensorboard=False) -> Tracker:
    tracker = Tracker(output, tensorboard=tensorboard)
    tracker.begin()
    tracker.log("train", 1, {"loss": 1.0})
    return tracker


def steps(output) -> list[int]:
    return [json.loads(line)["step"] for line in (output / "logs" / "metrics.jsonl").read_text().splitlines()]


def delete_file(output):
    (output / "logs" / "metrics.jsonl").unlink()


def delete_folder(output):
    shutil.rmtree(output / "logs")


def move_folder(output):
    os.rename(output / "logs", output / "elsewhere")


def replace_file(output):
    path = output / "logs" / "metrics.jsonl"
    path.rename(path.with_name("old"))
    path.write_text("something else\n")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the writer whose file went
@pytest.mark.parametrize("disturb", [delete_file, delete_folder, move_folder, replace_file])
@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_metrics_file_that_goes_is_made_again_whole_and_said_once(output, disturb, tensorboard, capsys):
    tracker = begun(output, tensorboard)
    disturb(output)
    for step in (2, 3):
        tracker.log("train", step, {"loss": 1.0})
    assert tracker.lost() is None
    tracker.close()
    assert steps(output) == [1, 2, 3]
    said = [line for line in capsys.readouterr().out.splitlines() if "metrics.jsonl" in line]
    assert len(said) == 1 and "it is made again" in said[0]
    assert (output / "logs" / "tensorboard").is_dir() or not tensorboard or disturb in (delete_file, replace_file)


def test_a_checkpoint_after_the_file_was_made_again_knows_where_it_ends(output):
    tracker = begun(output)
    delete_folder(output)
    place = tracker.place(1)
    tracker.log("train", 2, {"loss": 1.0})
    tracker.close()
    again = Tracker(output, tensorboard=False)
    again.begin(place)
    again.close()
    assert steps(output) == [1]


@pytest.mark.parametrize("in_the_way", ["logs/metrics.jsonl", "logs"])
def test_metrics_wait_while_something_is_in_the_way(output, in_the_way, capsys):
    tracker = begun(output)
    path = output / in_the_way
    path.rename(output / "aside")
    path.write_text("") if in_the_way == "logs" else path.mkdir()
    for step in (2, 3):
        tracker.log("train", step, {"loss": 1.0})
    assert capsys.readouterr().out.count("metrics.jsonl cannot be written") == 1
    path.unlink() if in_the_way == "logs" else path.rmdir()
    tracker.log("train", 4, {"loss": 1.0})
    assert steps(output) == [1, 2, 3, 4]


@pytest.mark.parametrize("moved", [False, True])
def test_a_run_whose_output_directory_goes_stops_and_says_where_its_checkpoints_were(output, moved, tmp_path):
    config = parse(SFTConfig, ["--output_dir", str(output)])
    checkpoints = Checkpoints(config, ["key"])
    saver = checkpoints.restore(None, TrainingState({}), tracker := Tracker(output, tensorboard=False))
    saver.on_step_end(1)
    (output / "checkpoints").mkdir()
    os.rename(output, tmp_path / "moved") if moved else shutil.rmtree(output)
    tracker.log("train", 2, {"loss": 1.0})
    tracker.samples("before", [{"prompt": "a"}])
    with pytest.raises(TrainingFailure) as ended:
        saver.on_step_end(2)
    assert f"whose checkpoints were in {output}/checkpoints" in str(ended.value) and "\n" not in str(ended.value)
    assert (f"moved to {tmp_path}/moved under" in str(ended.value)) == moved
    assert not output.exists(), "nothing is made where the directory was"


@pytest.mark.parametrize(
    "folder",
    [
        "logs/metrics.jsonl",
        "logs/libraries.rank0.log",
        "provenance.json",
        "model.safetensors",
        "config.json",
        "run_config.yaml",
    ],
)
def test_a_folder_where_a_file_must_be_is_named_before_anything_is_written(output, folder):
    (output / folder).mkdir(parents=True)
    with pytest.raises(UserError, match=f"--output_dir {output}: {output / folder} is in the way, where a file must"):
        open_run(parse(SFTConfig, ["--output_dir", str(output)]))


@pytest.mark.parametrize("file", ["logs", "checkpoints", "adapter", "samples"])
def test_a_file_where_a_folder_must_be_is_named(output, file):
    (output / file).write_text("")
    with pytest.raises(UserError, match=f"{output / file} is in the way, where a folder must"):
        open_run(parse(SFTConfig, ["--output_dir", str(output)]))


def test_the_model_directories_of_step_3_are_checked(output):
    (output / "model.safetensors").mkdir()
    (output / "critic").write_text("")
    with pytest.raises(UserError, match=f"{output / 'critic'} is in the way"):
        open_run(parse(SFTConfig, ["--output_dir", str(output)]), ["actor", "critic"])


def test_a_metrics_file_that_cannot_be_written_is_named_before_training(output, tmp_path):
    (output / "logs").mkdir()
    (output / "logs" / "metrics.jsonl").symlink_to(tmp_path / "nowhere" / "metrics.jsonl")
    with pytest.raises(UserError, match="logs/metrics.jsonl cannot be written: No such file or directory"):
        open_run(parse(SFTConfig, ["--output_dir", str(output)]))


def test_a_tensorboard_directory_that_cannot_be_created_does_not_end_the_run(output, tmp_path, capsys):
    (tmp_path / "events").write_text("")
    tracker = Tracker(output, tensorboard_path=str(tmp_path / "events"))
    tracker.begin()
    tracker.log("train", 1, {"loss": 1.0})
    tracker.close()
    assert steps(output) == [1] and f"warning: {tmp_path}/events cannot be written" in capsys.readouterr().out


def test_a_file_system_that_does_not_answer_is_not_gone(output, monkeypatch):
    tracker = Tracker(output, tensorboard=False)
    tracker.begin()
    for error, gone in (
        (OSError(errno.ESTALE, "stale"), False),
        (PermissionError(), False),
        (FileNotFoundError(errno.ENOENT, "gone"), True),
    ):

        def refuse(path, *, error=error, **how):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("common.artifacts.tracking.os.stat", refuse)
            assert (tracker.lost() is not None) == gone
    assert tracker.lost() is None
