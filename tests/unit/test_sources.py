"""Finding sources: paths, directories, saved data sets, hub names; their splits and their fingerprints."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from common.data.blend import SourceSpec, parse_data_path
from common.data.options import naming_flags
from common.data.reading import fingerprint
from common.data.sources import hub_source, open_source
from common.errors import UserError
from common.paths import ROOT, unreachable_hub
from step1_sft.config import SFTConfig
from step3_ppo.config import PPOConfig


def lines(path: Path, *prompts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def content(source):
    """(split, prompt) of every row."""
    return [(part.split, row.values["prompt"]) for part in source.parts for row in part.rows()]


def opened(name):
    return open_source(SourceSpec(str(name)))


def test_a_file_is_training_data_whatever_its_name(tmp_path):
    assert content(opened(lines(tmp_path / "test.jsonl", "a", "b"))) == [("train", "a"), ("train", "b")]


def test_a_directory_is_read_as_the_hub_would(tmp_path):
    lines(tmp_path / "data" / "train-00001-of-00002.jsonl", "b")
    lines(tmp_path / "data" / "train-00000-of-00002.jsonl", "a")
    lines(tmp_path / "data" / "validation.jsonl", "c")
    lines(tmp_path / "test" / "part.jsonl", "d")
    lines(tmp_path / "other" / "contest.jsonl", "e")
    lines(tmp_path / ".cache" / "train.jsonl", "hidden")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("text")
    source = opened(tmp_path)
    assert content(source) == [("train", "a"), ("train", "b"), ("test", "c"), ("test", "d")]
    assert source.left_out == ["other/contest.jsonl"]


def test_files_without_a_split_in_their_names_are_training_data(tmp_path):
    lines(tmp_path / "one.jsonl", "a")
    lines(tmp_path / "test.jsonl", "b")
    assert content(opened(tmp_path)) == [("train", "a"), ("test", "b")]


def test_test_data_alone_are_the_data(tmp_path):
    lines(tmp_path / "test.jsonl", "a")
    assert content(opened(tmp_path)) == [("train", "a")]


def test_saved_data_sets(tmp_path):
    train, test = ({"prompt": [name]} for name in ("a", "b"))
    one = datasets.Dataset.from_dict(train)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=one, test=datasets.Dataset.from_dict(test)).save_to_disk(str(tmp_path / "two"))
    assert content(opened(tmp_path / "one")) == [("train", "a")]
    assert sorted(content(opened(tmp_path / "two"))) == [("test", "b"), ("train", "a")]
    assert opened(tmp_path / "one").parts[0].digest() == opened(tmp_path / "two").parts[0].digest()
    (next((tmp_path / "one").glob("*.arrow"))).write_bytes(b"damaged")
    with pytest.raises(UserError, match="--data_path.*saved data set"), naming_flags():
        opened(tmp_path / "one")


def test_hub_sets_are_loaded_by_datasets(tmp_path, monkeypatch):
    """The library loads a directory by the same call as a hub name, so only the net is missing here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines(Path("owner/name/data/train.jsonl"), "a", "b")
    lines(Path("owner/name/data/validation.jsonl"), "c")
    lines(Path("owner/name/data/test.jsonl"), "d")
    source = hub_source(SourceSpec("owner/name"))
    assert sorted(content(source)) == [("test", "c"), ("test", "d"), ("train", "a"), ("train", "b")]
    (train,) = (part for part in source.parts if part.split == "train")
    assert [row.location for row in train.rows()] == ["owner/name[train]:1", "owner/name[train]:2"]
    assert train.digest() == train.digest() != source.parts[-1].digest()


def offline(program, directory, **variables):
    """The lines on standard output and standard error of a program without a hub."""
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=directory,
        env=dict(os.environ, HF_HOME=str(directory / "cache"), PYTHONPATH=str(ROOT), **variables),
    )
    return run.stdout.splitlines(), run.stderr


@pytest.mark.parametrize("name, near", [("no-owner/no-such-set", ""), ("wikitext", ""), ("my_pair", "my_pairs")])
def test_an_unreachable_hub_is_one_clear_line(name, near, tmp_path):
    lines(tmp_path / "my_pairs" / "data.jsonl", "a")
    program = (
        "from common.data.sources import open_source; from common.data.blend import SourceSpec\n"
        "from common.errors import UserError\n"
        "from common.data.options import naming_flags\n"
        "try:\n"
        f"    with naming_flags(): open_source(SourceSpec({name!r}))\n"
        "except UserError as error: print(error)"
    )
    (line,), _ = offline(program, tmp_path, HF_HUB_OFFLINE="1")
    assert line.startswith(f"--data_path {name}: it is no local path, and")
    assert "HF_HUB_OFFLINE=1" in line and f"not in the cache, {tmp_path}/cache/datasets:" in line
    assert ("did you mean my_pairs?" in line) == bool(near)


def test_a_model_that_is_not_in_the_cache_is_one_clear_line(tmp_path):
    program = (
        "from common.models.configuration import load_config; from common.data.tokenization import load_tokenizer\n"
        "from common.errors import UserError\n"
        "for load in (lambda: load_config('owner/name', '--path'), lambda: load_tokenizer('owner/name')):\n"
        "    try: load()\n"
        "    except UserError as error: print(error)"
    )
    said, _ = offline(program, tmp_path, HF_HUB_OFFLINE="1")
    assert len(said) == 2
    for line in said:
        assert "owner/name: " in line and "HF_HUB_OFFLINE=1" in line
        assert f"not in the cache, {tmp_path}/cache/hub: load it once online" in line


def test_without_a_network_the_hub_cannot_be_reached():
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        try:
            raise LocalEntryNotFoundError("looked in vain")
        except LocalEntryNotFoundError as cause:
            raise OSError("We couldn't connect\nCheck your connection") from cause
    except OSError as error:
        assert unreachable_hub(error, "/there").startswith(
            "the hub cannot be reached, and it is not in the cache, /there: "
        )
    assert unreachable_hub(OSError("no such file")) is None


@pytest.mark.parametrize(
    "name", ["nowhere.jsonl", "./nowhere", "no/such/path", "data/no.jsonl", "nowhere.csv", "data/rows", "output/pairs"]
)
def test_a_path_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="--data_path.*does not exist"), naming_flags():
        opened(name)


def test_the_nearest_path_is_offered(tmp_path):
    lines(tmp_path / "my_pairs.jsonl", "a")
    with pytest.raises(UserError, match="my_pairs.jsonl"):
        opened(tmp_path / "my_pair.jsonl")


def test_what_holds_no_data(tmp_path):
    (tmp_path / "README.txt").write_text("text")
    (tmp_path / "notes.md").write_text("text")
    for name in (tmp_path, tmp_path / "notes.md"):
        with pytest.raises(UserError, match="--data_path.*jsonl"), naming_flags():
            opened(name)


def test_an_unknown_builtin_task():
    with pytest.raises(UserError, match="builtin:courtsy"):
        opened("builtin:courtsy")


def test_the_flag_that_named_the_source_is_in_the_message(tmp_path):
    (spec,) = parse_data_path([str(tmp_path / "nowhere.jsonl")])
    for config, flag in (
        (SFTConfig(data_path=("a",), sft_only_data_path=(spec.name,)), "--sft_only_data_path"),
        (PPOConfig(data_path=("a",), unsupervised_dataset_name=spec.name), "--unsupervised_dataset_name"),
        (PPOConfig(data_path=(spec.name,)), "--data_path"),
    ):
        with pytest.raises(UserError, match=f"^{flag} {spec.name}: it does not exist"), config.naming_flags():
            open_source(spec)
    long = "x" * 5000
    config = SFTConfig(data_path=("a",), sft_only_data_path=(long,))
    with pytest.raises(UserError, match="^--sft_only_data_path x{200}: cannot be read"), config.naming_flags():
        open_source(config.unsplit_sources()[0])


def test_a_fingerprint_follows_content_and_choices_but_not_the_place(tmp_path):
    first = tmp_path / "first"
    lines(first / "train.jsonl", "a", "b")
    shutil.copytree(first, tmp_path / "second")

    def of(name, columns=None, max_rows=None, weight=1.0):
        return fingerprint(SourceSpec(str(tmp_path / name), weight), columns, max_rows)

    same = of("first")
    assert of("second") == of("first") == same
    different = [of("first", {"prompt": "prompt"}), of("first", None, 1), of("first", weight=0.5)]
    lines(tmp_path / "second" / "train.jsonl", "a", "c")
    different.append(of("second"))
    lines(first / "test.jsonl", "a")
    different.append(of("first"))
    assert len({same, *different}) == 1 + len(different)
    assert fingerprint(SourceSpec("builtin:courtesy"), None, None) == fingerprint(
        SourceSpec("builtin:courtesy"), None, None
    )
