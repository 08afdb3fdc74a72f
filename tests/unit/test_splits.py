"""Splits told from names; of those that hold the same rows for several uses, one for each kind of record."""

import json
from pathlib import Path

import datasets
import pytest

from common.data.blend import SourceSpec, parse_data_path
from common.data.openings import all_keys
from common.data.reading import ReadReport, read_records
from common.data.sources import open_source
from common.data.splits import choose_splits

UF = ["train_prefs", "train_sft", "train_gen", "test_prefs", "test_sft", "test_gen"]


@pytest.mark.parametrize(
    "names, kind, train, test, test_of_other_uses",
    [
        (UF, "comparison", ["train_prefs"], ["test_prefs"], ["test_sft", "test_gen"]),
        (UF, "demonstration", ["train_sft"], ["test_sft"], ["test_prefs", "test_gen"]),
        (UF, "prompt", ["train_gen"], ["test_gen"], ["test_prefs", "test_sft"]),
        (UF, None, UF[:3], UF[3:], []),
        (["train_prefs", "train_sft", "test_sft"], "prompt", ["train_prefs"], ["test_sft"], []),
        (["train_sft", "train_gen", "test_gen"], "demonstration", ["train_sft"], ["test_gen"], []),
        (["train_sft", "test_sft"], "comparison", ["train_sft"], ["test_sft"], []),
        (["train", "train_sft", "train_prefs"], "comparison", ["train"], [], []),
        (["train_a", "train_b", "train_sft"], "comparison", ["train_a", "train_b", "train_sft"], [], []),
        (
            [
                "data/train_sft-00000-of-00002.parquet",
                "data/train_sft-00001-of-00002.parquet",
                "data/train_prefs-00000-of-00001.parquet",
            ],
            "demonstration",
            ["data/train_sft-00000-of-00002.parquet", "data/train_sft-00001-of-00002.parquet"],
            [],
            [],
        ),
        (["sft.jsonl", "prefs.jsonl"], "comparison", ["sft.jsonl", "prefs.jsonl"], [], []),
    ],
)
def test_the_split_of_the_kind_is_read(names, kind, train, test, test_of_other_uses):
    choice = choose_splits(names, kind)
    assert [
        [name for name, split in choice.splits.items() if split == wanted] for wanted in ("train", "test", "excluded")
    ] == [train, test, test_of_other_uses]


def ultrafeedback(place: Path, write) -> str:
    """Three uses of the same prompts, as the set of that name has them; each tests a prompt of its own besides."""
    for split, numbers in (("train", range(6)), ("test", range(6, 8))):
        for use, extra in (("prefs", 100), ("sft", 200), ("gen", 300)):
            own = [*numbers, *([extra] if split == "test" else [])]
            rows = [{"prompt": f"q {n}", "chosen": f"{use} {n}", "rejected": "b"} for n in own]
            write(place, f"{split}_{use}", rows)
    return str(place)


def as_lines(place, name, rows):
    place.mkdir(exist_ok=True)
    (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_saved(place, name, rows):
    datasets.Dataset.from_list(rows).save_to_disk(str(place / name))
    (place / "dataset_dict.json").write_text(json.dumps({"splits": [p.name for p in place.iterdir() if p.is_dir()]}))


@pytest.mark.parametrize("write", [as_lines, as_saved])
@pytest.mark.parametrize(
    "kind, use, own", [("comparison", "prefs", 100), ("demonstration", "sft", 200), ("prompt", "gen", 300)]
)
def test_each_row_once_and_nothing_that_any_use_tests(tmp_path, write, kind, use, own):
    name = ultrafeedback(tmp_path / "set", write)
    report, test_hashes = ReadReport(), set()
    found = list(read_records(parse_data_path([name]), kind, report=report, test_prompt_hashes=test_hashes))
    asked = [(item.split, item.record.prompt if kind != "prompt" else item.record) for item in found]
    assert [(split, prompt.first_user_turn) for split, prompt in asked] == [
        *(("test", f"q {n}") for n in (6, 7, own)),
        *(("train", f"q {n}") for n in range(6)),
    ]
    if kind != "prompt":
        answers = {getattr(item.record, "chosen", "") or item.record.response for item in found}
        assert all(answer.startswith(use) for answer in answers)
    assert test_hashes == {key for n in (6, 7, 100, 200, 300) for key in all_keys([f"q {n}"])}
    assert report.sources[name].total == 9
    said = [note for note in report.notes if "several uses" in note]
    assert len(said) == 2 and all(note.startswith(f"{name}: of its parts for several uses") for note in said)
    assert f"train_{use}" in " ".join(said).split("left out")[0]


def test_a_prompt_that_another_use_tests_is_not_trained_on(tmp_path):
    as_lines(tmp_path, "train_sft", [{"prompt": "q 1", "response": "a"}, {"prompt": "q 2", "response": "a"}])
    as_lines(tmp_path, "train_gen", [{"prompt": "q 1"}])
    as_lines(tmp_path, "test_sft", [{"prompt": "q 3", "response": "a"}])
    as_lines(tmp_path, "test_prefs", [{"prompt": "q 2", "chosen": "a", "rejected": "b"}])
    found = read_records(parse_data_path([str(tmp_path)]), "demonstration", report=ReadReport())
    assert [(item.split, item.record.prompt.first_user_turn) for item in found] == [
        ("test", "q 3"),
        ("train", "q 1"),
        ("test", "q 2"),
    ]


def test_what_a_source_holds_is_hashed_whole(tmp_path):
    """Whatever the kind: what is left out of training may still say what is tested."""
    name = ultrafeedback(tmp_path, as_lines)
    assert len(open_source(SourceSpec(name)).parts) == 6
