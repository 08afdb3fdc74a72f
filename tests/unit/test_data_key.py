"""The key of prepared data follows what was prepared, and not how the code that prepared it is written."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common.artifacts.tracking import Tracker
from common.checkpoints.manager import Checkpoints, TrainingState
from common.config.parser import parse
from common.data import prepared_files
from common.data import request as request_module
from common.data.prepare import prepare
from common.data.prepared_files import READY
from common.data.request import data_key
from common.data.tokenization import load_tokenizer, make_codec
from common.errors import UserError
from common.paths import ROOT
from step1_sft.config import SFTConfig
from tests.preparation import pairs, request, write
from tests.tokenizers_built import byte_level_bpe

OF_A_COPY = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
from tests.preparation import request
from common.data import request as module
from common.data.tokenization import load_tokenizer, make_codec
from common.models.builtin import _fingerprint
assert module.__file__.startswith(sys.argv[1])
codec = make_codec(load_tokenizer(sys.argv[2]), "human_assistant")
print(module.data_key(request(Path(sys.argv[4]), sys.argv[3]), codec), _fingerprint())
"""


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    return str(byte_level_bpe(tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="module")
def codec(tokenizer_directory):
    return make_codec(load_tokenizer(tokenizer_directory), "human_assistant")


def test_a_changed_comment_changes_no_key(tmp_path, codec, tokenizer_directory):
    from common.models.builtin import _fingerprint

    path = write(tmp_path / "d.jsonl", pairs(10))
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "common", copy / "common", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "preparation.py", copy / "tests")
    for file in [*(copy / "common" / "data").glob("*.py"), copy / "common" / "models" / "builtin.py"]:
        file.write_text(f"{file.read_text()}\n# Another comment.\n")
    asked = request(tmp_path, path)
    Path(asked.cache_dir).mkdir()
    run = subprocess.run(
        [sys.executable, "-c", OF_A_COPY, str(copy), tokenizer_directory, path, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert run.stdout.split() == [data_key(asked, codec), _fingerprint()], run.stderr


def test_another_format_is_another_key(tmp_path, codec, monkeypatch):
    asked = request(tmp_path, write(tmp_path / "d.jsonl", pairs(10)))
    Path(asked.cache_dir).mkdir()
    before = data_key(asked, codec)
    assert data_key(replace(asked, max_bad_fraction=0.5, cache_dir=str(asked.cache_dir)), codec) == before
    monkeypatch.setattr(request_module, "FORMAT", request_module.FORMAT + 1)
    assert data_key(asked, codec) != before


def test_a_run_resumes_over_the_same_key_and_no_other(tmp_path, codec, monkeypatch):
    path = write(tmp_path / "d.jsonl", pairs(10))
    asked = request(tmp_path, path)
    config = parse(SFTConfig, ["--data_path", path, "--output_dir", str(tmp_path / "out")])
    checkpoints = Checkpoints(config, [prepare(asked, codec).key])
    checkpoints.restore(None, TrainingState({}), Tracker(Path(config.output_dir), False)).save(3, 3)
    assert Checkpoints(config, [prepare(asked, codec).key]).find() is not None
    for module in (request_module, prepared_files):
        monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    with pytest.raises(UserError, match="the data has other rows, or is prepared in another way"):
        Checkpoints(config, [prepare(asked, codec).key]).find()


def relabelled(directory: Path, change) -> None:
    """Change what a directory says of itself, with the right checksum."""
    values = json.loads((directory / READY).read_text().split("\n", 1)[1])
    change(values)
    content = json.dumps(values, indent=2)
    (directory / READY).write_text(f"{prepared_files._text_checksum(content)}\n{content}\n")


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda v: v.update(format=99), "it has format 99, a newer one than format"),
        (lambda v: v.pop("format"), "it has format 0, an older one than format"),
    ],
)
def test_data_of_another_format_is_prepared_anew_with_one_line(tmp_path, codec, capsys, change, said):
    asked = request(tmp_path, write(tmp_path / "d.jsonl", pairs(30)))
    first = prepare(asked, codec)
    directory = Path(asked.cache_dir) / first.key
    relabelled(directory, change)
    again = prepare(asked, codec)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{directory}: ") and said in line and line.endswith("it has to be prepared again")
    assert again.train.to_list() == first.train.to_list()
    prepare(asked, codec)
    assert capsys.readouterr().out == ""


def test_fields_that_are_not_known_are_ignored(tmp_path, codec, capsys):
    asked = request(tmp_path, write(tmp_path / "d.jsonl", pairs(30)))
    first = prepare(asked, codec)

    def add(values: dict) -> None:
        values["written_by"] = "a later version"
        values["report"]["new_count"] = 3
        values["report"]["read"]["new_count"] = 3
        for counts in values["report"]["read"]["sources"].values():
            counts["new_count"] = 3

    relabelled(Path(asked.cache_dir) / first.key, add)
    again = prepare(asked, codec)
    assert capsys.readouterr().out == "" and again.report == first.report
