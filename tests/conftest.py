"""Tests import the project from this clone, installed or not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
HH_DATA = Path(os.environ.get("RLHF_HH_DATA", ROOT / "../shared/data/hh-rlhf"))


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the tests that take minutes too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session")
def length(request) -> list[str]:
    """`--long`, if it was given, for the programs that tests launch."""
    return ["--long"] if request.config.getoption("--long") else []


@pytest.fixture(scope="session")
def builtin_cache(tmp_path_factory):
    """One directory for the built-in models of all tests."""
    return tmp_path_factory.mktemp("builtin")


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory, builtin_cache):
    """Directory of the model that knows `tests.chat_model.ANSWERS`."""
    from tests.chat_model import teach

    return teach(tmp_path_factory.mktemp("chat") / "sft", builtin_cache)


@pytest.fixture(scope="session")
def option_inputs(tmp_path_factory, builtin_cache) -> Path:
    """A directory of models and data for short runs of the steps, under the names that `option_rows` uses."""
    from tests.distributed.option_inputs import make_inputs

    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory, builtin_cache)
    return directory


@pytest.fixture
def tmpfs(tmp_path):
    """Mounts a file system on a directory, of a size such as `1m`; skips the test without the right to mount."""
    mounted = []

    def mount(directory: Path, size: str = "1m") -> Path:
        directory.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(directory)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no right to mount a file system: {done.stderr}")
        mounted.append(directory)
        return directory

    yield mount
    for directory in mounted:
        subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.fixture(scope="session")
def hh_data(tmp_path_factory) -> Path:
    """Real transcript pairs, or, where there are none, invented ones of like form and faults."""
    if HH_DATA.is_dir():
        return HH_DATA
    directory = tmp_path_factory.mktemp("hh-rlhf")
    with open(directory / "pairs.jsonl", "w") as stream:
        for number in range(1500):
            turns = "".join(
                f"\n\nHuman: question {number}.{turn}?\n\nAssistant: answer {turn}." for turn in range(number % 3)
            )
            shared = f"{turns}\n\nHuman: last question {number}\n\nAssistant:"
            chosen = "" if number % 400 == 0 else f" a good answer\n\nof {number} lines"
            stream.write(json.dumps({"chosen": shared + chosen, "rejected": f"{shared} a bad answer"}) + "\n")
    return directory
