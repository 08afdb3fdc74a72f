"""A run that is reported to Weights & Biases, offline; what W&B wrote is read back from its files."""

import contextlib
import json
import os
import time

import psutil
import pytest
import wandb
import yaml

from common.artifacts.run import open_run
from common.artifacts.tracking import Tracker
from common.artifacts.wandb_run import start_service, without_secrets
from common.config.parser import options, parse, save_config
from common.errors import UserError
from common.runtime.signals import Stopped
from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig
from tests.wandb_records import recorded

SAMPLES = [{"prompt": "Why?", "response": "So.", "reward": 0.5}, {"prompt": "Why not?", "reward": 1, "turns": ["a"]}]


@pytest.fixture(scope="module")
def service():
    """The address of W&B's process."""
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            environment.delenv(name)
        start_service()
        yield os.environ.pop("WANDB_SERVICE")


@pytest.fixture(autouse=True)
def session(monkeypatch, tmp_path, service):
    """W&B offline, without the user's own settings; it reads its environment once in a session."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SERVICE", service)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    wandb.teardown()
    yield
    with contextlib.suppress(ConnectionError):  # of the process that a test has killed
        wandb.teardown()


def tracker(output, *flags, reward=False) -> Tracker:
    config, more = (PPOConfig, ["--actor_model_name_or_path", "./a"]) if reward else (SFTConfig, [])
    words = [*more, "--output_dir", str(output), "--report_to", "jsonl", "wandb", *flags]
    return open_run(parse(config, words))


def train(run: Tracker, steps: range, evaluated: tuple[int, ...] = (), ends: BaseException | None = None) -> None:
    """Steps with evaluations before those named, whose losses follow from the step; then an error, or the end."""
    with run:
        for step in steps:
            if step - 1 in evaluated:
                run.log("eval", step - 1, {"loss": 1 / step})
                run.samples(f"step-{step - 1}", SAMPLES)
            run.log("train", step, {"loss": 2 / step, "step_seconds": 0.1, "gradient_norm": None})
        if ends is not None:
            raise ends


def logged(rows: list[dict]) -> list[tuple]:
    return [(min(row.keys() - {"step"}), row["step"]) for row in rows]


def test_metrics_and_samples_are_recorded_over_the_step(tmp_path):
    run = tracker(tmp_path / "sft")
    run.begin()
    train(run, range(1, 4), evaluated=(0, 2))
    (found,) = recorded(tmp_path / "sft")
    assert found.name == "sft" and found.axis == {"*": "step"} and found.exit_code == 0 and not found.preempting
    assert found.rows[0] == {"step": 0, "eval/loss": 1.0}
    assert found.rows[2] == {"step": 1, "train/loss": 2.0, "train/step_seconds": 0.1}
    assert logged(found.rows) == [
        ("eval/loss", 0),
        ("samples", 0),
        ("train/loss", 1),
        ("train/loss", 2),
        ("eval/loss", 2),
        ("samples", 2),
        ("train/loss", 3),
    ]
    table = {name: found.tables[0][name] for name in ("step", "columns", "data")}
    assert table == {
        "step": 0,
        "columns": ["prompt", "response", "reward", "turns"],
        "data": [["Why?", "So.", 0.5, None], ["Why not?", None, 1, '["a"]']],
    }
    assert found.config["learning_rate"] == SFTConfig().learning_rate
    assert len((tmp_path / "sft" / "logs" / "metrics.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("ends, code", [(Stopped("stopped by SIGTERM"), 75), (ValueError("no"), 1)])
def test_a_resumed_run_goes_on_in_the_same_wandb_run_with_each_row_once(tmp_path, ends, code):
    """The checkpoint is that after step 2; step 3 and its evaluation are made again."""
    run = tracker(tmp_path / "out", "--run_name", "mine")
    run.begin()
    place = {}
    with pytest.raises(type(ends)), run:
        run.log("eval", 0, {"loss": 1.0})
        run.log("train", 1, {"loss": 2.0, "step_seconds": 0.1})
        run.log("train", 2, {"loss": 1.0, "step_seconds": 0.1})
        place = run.place(2)
        run.log("train", 3, {"loss": 2 / 3, "step_seconds": 0.1})
        run.log("eval", 3, {"loss": 0.25})
        run.samples("step-3", SAMPLES)
        raise ends
    time.sleep(1)  # W&B names a directory by the second and the id
    again = tracker(tmp_path / "out", "--run_name", "mine")
    again.begin(place)
    with again:
        again.log("eval", 2, {"loss": 0.5})  # of the step of the checkpoint, whose evaluation came after it
        again.log("train", 3, {"loss": 2 / 3, "step_seconds": 0.2})
        again.log("eval", 3, {"loss": 0.25})
        again.samples("step-3", SAMPLES)
        again.log("train", 4, {"loss": 0.5, "step_seconds": 0.1})
    first, second = recorded(tmp_path / "out")
    assert first.id == second.id and first.name == second.name == "mine"
    assert first.exit_code == code and first.preempting == (code == 75) and second.exit_code == 0
    assert [(name, step) for found in (first, second) for name, step in logged(found.rows)] == [
        ("eval/loss", 0),
        ("train/loss", 1),
        ("train/loss", 2),
        ("train/loss", 3),
        ("eval/loss", 3),
        ("samples", 3),
        ("eval/loss", 2),
        ("train/loss", 4),
    ]


def test_a_row_is_sent_once_though_the_run_is_stopped_again_before_it_comes_again(tmp_path):
    """Told to stop twice in the evaluation of one step: the second time before its figures are there."""
    place = None
    for row in ({"loss": 0.5}, None, {"loss": 0.5}):
        run = tracker(tmp_path)
        run.begin(place)
        with pytest.raises(Stopped), run:
            if place is None:
                run.log("train", 1, {"loss": 1.0})
            place = run.place(1)
            if row:
                run.log("eval", 1, row)
            raise Stopped("told to stop")
        time.sleep(1)
    assert [name for one in recorded(tmp_path) for name, _ in logged(one.rows)] == ["train/loss", "eval/loss"]


def test_rows_with_other_numbers_and_those_of_a_killed_run_are_sent_again(tmp_path):
    run = tracker(tmp_path)
    run.begin()
    place = run.place(0)
    train(run, range(1, 3))
    time.sleep(1)
    again = tracker(tmp_path)
    again.begin(place)
    again.log("train", 1, {"loss": 7.0})  # resumed with other settings
    again.log("train", 2, {"loss": 1.0})
    killed_at = again.place(0)
    again._wandb._run.finish()  # as if its process had been killed: the run has not been closed
    time.sleep(1)
    after = tracker(tmp_path)
    after.begin({**killed_at, "bytes": 0})
    train(after, range(1, 3))
    found = recorded(tmp_path)
    assert [row["train/loss"] for one in found for row in one.rows] == [2.0, 1.0, 7.0, 2.0, 1.0]
    numbers = [number for one in found for number in one.numbers]
    assert numbers == sorted(set(numbers)), "W&B refuses a row whose number does not rise"


def test_a_run_that_starts_anew_is_another_wandb_run(tmp_path):
    for _ in range(2):
        run = tracker(tmp_path)
        run.begin()
        train(run, range(1, 2))
    first, second = recorded(tmp_path)
    assert first.id != second.id


def test_nothing_secret_is_recorded_or_saved(tmp_path, monkeypatch):
    for name in ("REWARD_TOKEN", "WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "hidden-in-the-environment")
    monkeypatch.setattr("sys.argv", ["main.py", "--reward", "https://host/score?key=hidden-in-a-query"])
    services = ["https://host.example:8000/hidden-in-a-path/score?key=hidden-in-a-query=2", "http://other.example/"]
    flags = ["--reward", *services, "--reward_header_env", "REWARD_TOKEN"]
    run = tracker(tmp_path, *flags, reward=True)
    run.begin()
    train(run, range(1, 2))
    (found,) = recorded(tmp_path)
    assert found.config["reward"] == ["https://host.example/...", "http://other.example/..."]
    assert found.config["reward_header_env"] == "REWARD_TOKEN"
    files = [path for path in (tmp_path / "logs").rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 3 and [path for path in files if b"hidden" in path.read_bytes()] == []
    # The saved settings repeat the run: they have the addresses, of which the user is warned, and no more of these.
    config = parse(PPOConfig, ["--actor_model_name_or_path", "./a", *flags])
    save_config(config, tmp_path / "run_config.yaml")
    saved = yaml.safe_load((tmp_path / "run_config.yaml").read_text())
    assert [name for name, value in saved.items() if "hidden" in str(value)] == ["reward"]
    assert any("host.example" in warning for warning in config.reward_warnings())


@pytest.mark.parametrize(
    "address",
    [
        "https://user:hidden@h/x",
        "s3://hidden:hidden@h",
        "https://h?a=hidden@b",
        "https://h:hidden/x@y",
        "http://h/=hidden",
    ],
)
@pytest.mark.parametrize("cls", [SFTConfig, RewardConfig, PPOConfig])
def test_of_an_address_in_any_option_the_host_alone_is_shown(cls, address):
    kinds = {str: address, tuple: (f"a {address}", address), dict: {"column": address}}
    texts = {name: kinds[meta.kind] for name, meta in options(cls).items() if meta.kind in kinds and not meta.ignored}
    unchecked = type(cls.__name__, (cls,), {"__doc__": cls.__doc__, "__post_init__": lambda self: None})
    shown = without_secrets(unchecked(**texts))
    assert len(texts) > 15 and "hidden" not in json.dumps(shown)
    assert shown["output_dir"] == address.partition("//")[0] + "//h/..."


def test_a_server_that_cannot_be_reached_is_one_warning_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    run = tracker(tmp_path)
    run.begin()
    train(run, range(1, 4))
    said = [line for line in capsys.readouterr().out.splitlines() if "Weights & Biases" in line]
    assert len(said) == 1 and said[0].startswith("warning: ") and "0000" not in said[0]
    assert len((tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"WANDB_MODE": "online"}, "--report_to wandb: it has no API key: run `wandb login`"),
        ({"WANDB_MODE": "online", "WANDB_API_KEY": "short"}, "--report_to wandb: .*API key"),
        ({"WANDB_MODE": "sometimes"}, "--report_to wandb: its setting mode is wrong"),
    ],
)
def test_a_wandb_that_cannot_be_used_is_one_line_at_the_start(tmp_path, monkeypatch, environment, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{said}") as error:
        tracker(tmp_path)
    assert "\n" not in str(error.value) and "short" not in str(error.value)


def test_a_wandb_that_is_switched_off_records_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = tracker(tmp_path)
    run.begin()
    train(run, range(1, 3))
    assert not (tmp_path / "logs" / "wandb.json").exists()


def test_a_wandb_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr("common.runtime.requirements.find_spec", lambda name: None)
    with pytest.raises(UserError, match="^--report_to wandb: the package wandb is not installed: pip install wandb$"):
        parse(SFTConfig, ["--report_to", "wandb"])


def test_a_directory_called_wandb_is_not_the_package(monkeypatch, tmp_path):
    from common.runtime.requirements import is_installed

    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("no_such_package") and is_installed("wandb")


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--report_to wandbb", "--report_to: expected one or more of jsonl, tensorboard, wandb, got"),
        ("--run_name a", "--run_name works only with wandb in --report_to"),
        ("--report_to tensorboard wandb --no_enable_tensorboard", "contradict each other"),
        ("--report_to jsonl --tensorboard_path b", "--tensorboard_path works only with --enable_tensorboard"),
    ],
)
def test_what_contradicts_itself_is_refused(flags, said):
    with pytest.raises(UserError) as error:
        parse(SFTConfig, flags.split())
    assert said in str(error.value)


@pytest.mark.parametrize(
    "flags, tensorboard",
    [
        ("", True),
        ("--no_enable_tensorboard", False),
        ("--report_to wandb", False),
        ("--report_to wandb --enable_tensorboard", True),
        ("--report_to wandb tensorboard", True),
        ("--report_to jsonl", False),
    ],
)
def test_tensorboard_is_written_unless_others_are_named_or_it_is_switched_off(flags, tensorboard):
    assert parse(SFTConfig, flags.split()).writes_tensorboard == tensorboard


def test_a_wandb_that_breaks_down_is_one_warning_and_the_run_goes_on(tmp_path, service, capsys):
    """The last of this file: the package cannot be used in this process afterwards."""
    run = tracker(tmp_path)
    run.begin()
    run.log("train", 1, {"loss": 1.0})
    starter = service.split("-")[1]
    found = psutil.process_iter(["cmdline"])
    (process,) = [one for one in found if {"--detached", starter} <= {*(one.info["cmdline"] or ())}]
    assert process.name() == "wandb-core" and psutil.Process() not in process.parents()
    process.kill()
    process.wait()
    train(run, range(2, 5), evaluated=(3,))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1 and said[0].startswith("warning: Weights & Biases: ") and "the run goes on" in said[0]
    rows = (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 3, 4]
    assert (tmp_path / "samples" / "step-3.jsonl").exists()
