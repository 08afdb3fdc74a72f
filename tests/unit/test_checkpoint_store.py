"""A checkpoint is whole, or it is not taken; a save that fails leaves what was there."""
import errno
import os

import pytest

from common.checkpoint_store import MANIFEST, POINTER, CheckpointStore, NotSaved


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def content(text):
    def write(directory):
        (directory / "engine").mkdir()
        (directory / "engine" / "shard").write_text(text * 1000)
        (directory / "state").write_text(text)
    return write


def newest(store):
    said = []
    return store.newest_whole(said.append), said


def test_the_newest_is_found_and_old_ones_go(store):
    assert newest(store) == (None, [])
    for step in (10, 20, 30):
        store.save(step, content(str(step)))
    assert sorted(path.name for path in store.directory.iterdir()) == [POINTER, "step-20", "step-30"]
    path, said = newest(store)
    assert path.name == "step-30" and (path / "state").read_text() == "30" and not said


@pytest.mark.parametrize("damage, why", [
    (lambda path: (path / "engine/shard").write_text(""), "engine/shard has 0 bytes, not 2,000"),
    (lambda path: os.truncate(path / "engine/shard", 1999), "engine/shard has 1,999 bytes, not 2,000"),
    (lambda path: (path / "engine/shard").write_text("21" + "20" * 999),
     "engine/shard has other content than was written"),
    (lambda path: (path / "state").unlink(), "state: No such file or directory"),
    (lambda path: (path / MANIFEST).write_text(""), f"{MANIFEST} cannot be read"),
    (lambda path: (path / MANIFEST).write_text("[1, 2]"), f"{MANIFEST} cannot be read"),
    (lambda path: (path / MANIFEST).write_bytes(b"\xff\x00"), f"{MANIFEST} cannot be read"),
])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(store, damage, why):
    store.save(10, content("10"))
    store.save(20, content("20"))
    damage(store.directory / "step-20")
    path, (said,) = newest(store)
    assert path.name == "step-10"
    assert "step-20 is not whole" in said and why in said


@pytest.mark.parametrize("pointer", ["step-99", "", "\0", "../../etc"])
def test_a_pointer_to_nothing_hides_no_checkpoint(store, pointer):
    store.save(10, content("10"))
    (store.directory / POINTER).write_text(pointer)
    assert newest(store)[0].name == "step-10"


@pytest.mark.parametrize("moment", ["before", "during"])
def test_a_disk_that_refuses_leaves_the_old_checkpoint(store, moment):
    store.save(10, content("10"))
    before = sorted(path.name for path in store.directory.iterdir())

    def write(directory):
        if moment == "during":
            content("20")(directory)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(NotSaved, match=f"(?s){store.directory}.*No space left on device.*of about [0-9,]+"):
        store.save(20, write)
    assert sorted(path.name for path in store.directory.iterdir()) == before
    assert newest(store)[0].name == "step-10"
    store.save(30, content("30"))
    assert newest(store)[0].name == "step-30"


def test_a_file_in_the_way_is_a_failed_save(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(NotSaved, match="Not a directory|File exists"):
        CheckpointStore(tmp_path / "checkpoints", keep=1).save(1, content("1"))


def test_left_overs_of_an_interrupted_save_block_nothing(store):
    store.save(10, content("10"))
    for step in (10, 20):
        content("x")(_made(store.directory / f".partial-{step}"))
    store.save(20, content("20"))
    assert newest(store)[0].name == "step-20"
    content("x")(_made(store.directory / ".partial-30"))
    store.clean()
    assert sorted(path.name for path in store.directory.iterdir()) == [POINTER, "step-10", "step-20"]


def _made(directory):
    directory.mkdir(parents=True)
    return directory
