"""A damaged checkpoint is not used, and a save that fails leaves earlier checkpoints unchanged."""

import itertools
import os
import re
import resource
import sys

import pytest
import torch

from common.checkpoints.errors import CheckpointError
from common.checkpoints.shard_writer import Shards
from common.checkpoints.store import MANIFEST, PARTIAL, POINTER, CheckpointStore, NotSaved

SHARD = "actor/engine/shard"


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def content(text):
    def write(shards):
        shards.add("actor/engine/shard", lambda file: file.write(text.encode() * 1000))
        shards.add("state", lambda file: file.write(text.encode()))

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


@pytest.mark.parametrize("keep", range(1, 7))
def test_as_many_are_kept_as_asked_for(tmp_path, keep):
    store = CheckpointStore(tmp_path / "checkpoints", keep=keep)
    for step in range(1, 8):
        store.prune(store.save(step, content(str(step))))
        kept = {f"step-{number}" for number in range(max(1, step - keep + 1), step + 1)}
        assert {path.name for path in store.directory.iterdir()} == {POINTER, *kept}


def test_a_read_error_does_not_count_as_damage(store):
    """A disk that answers with an error may answer well later: going on from before would delete what is there."""
    for step in (10, 20):
        store.save(step, content(str(step)))
    shard = store.directory / "step-20" / SHARD
    size = shard.stat().st_size
    shard.unlink()
    shard.symlink_to("/proc/self/mem")  # whose reading is an I/O error
    manifest = store.directory / "step-20" / MANIFEST
    manifest.write_text(manifest.read_text().replace(str(size), "0"))
    with pytest.raises(CheckpointError, match=f"step-20: it cannot be read: {SHARD}: Input/output error"):
        newest(store)
    manifest.unlink()
    manifest.symlink_to("/proc/self/mem")
    with pytest.raises(CheckpointError, match=f"{MANIFEST}: Input/output error"):
        newest(store)


@pytest.mark.parametrize(
    "damage, why",
    [
        (lambda path: (path / SHARD).write_text(""), f"{SHARD} has 0 bytes, not 2,000"),
        (lambda path: os.truncate(path / SHARD, 1999), f"{SHARD} has 1,999 bytes, not 2,000"),
        (lambda path: (path / SHARD).write_text("21" + "20" * 999), f"{SHARD} has other content than was written"),
        (lambda path: (path / "state").unlink(), "state: No such file or directory"),
        (lambda path: (path / MANIFEST).write_text(""), f"{MANIFEST} cannot be read"),
        (lambda path: (path / MANIFEST).write_text("[1, 2]"), f"{MANIFEST} cannot be read"),
        (lambda path: (path / MANIFEST).write_bytes(b"\xff\x00"), f"{MANIFEST} cannot be read"),
        (lambda path: (path / MANIFEST).write_text("[" * 100_000), f"{MANIFEST} cannot be read"),
        (lambda path: (path / MANIFEST).write_text('{"files": {}}'), f"{MANIFEST} lists no files"),
        (lambda path: (path / MANIFEST).write_text('{"files": {"a\\u0000b": [1, ""]}}'), "null"),
        (lambda path: (path / MANIFEST).write_text('{"files": {"state": [NaN, ""]}}'), f"{MANIFEST} cannot be read"),
        (
            lambda path: (path / MANIFEST).write_text('{"files": {"state": [Infinity, ""]}}'),
            f"{MANIFEST} cannot be read",
        ),
    ],
)
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


@pytest.mark.parametrize("size", [10, 1000, 50_000])
def test_a_disk_that_refuses_leaves_the_old_checkpoint(store, size):
    """A file may not grow beyond 30,000 bytes: some fit, one does not, and the rest is only counted."""
    store.save(10, content("10"))
    before = sorted(path.name for path in store.directory.iterdir())

    def write(shards):
        shards.add("first", lambda file: file.write(b"x" * size))
        shards.add("second", lambda file: torch.save({"weight": torch.ones(10_000)}, file))
        shards.add("third", lambda file: file.write(b"x" * 10))

    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, usual[1]))
    try:
        with pytest.raises(NotSaved, match="File too large") as refused:
            store.save(20, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert str(store.directory) in str(refused.value)
    needed = int(re.search(r"takes ([0-9,]+) bytes", str(refused.value))[1].replace(",", ""))
    assert 40_000 + size < needed < 45_000 + size
    assert sorted(path.name for path in store.directory.iterdir()) == before
    assert newest(store)[0].name == "step-10"
    store.save(30, write)
    path, said = newest(store)
    assert path.name == "step-30" and torch.load(path / "second")["weight"].sum() == 10_000
    assert sum(file.stat().st_size for file in path.iterdir() if file.name != MANIFEST) == needed


def test_a_file_in_the_way_is_a_failed_save(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(NotSaved, match="takes 1,001 bytes: (Not a directory|File exists)"):
        CheckpointStore(tmp_path / "checkpoints", keep=1).save(1, content("1"))


def test_files_of_an_interrupted_save_do_not_block_the_next_save(store):
    store.save(10, content("10"))
    for step in (10, 20):
        _left_over(store, step)
    store.save(20, content("20"))
    assert newest(store)[0].name == "step-20"
    _left_over(store, 30)
    store.clean()
    assert sorted(path.name for path in store.directory.iterdir()) == [POINTER, "step-10", "step-20"]


def _left_over(store, step):
    shards = Shards(store.directory / f"{PARTIAL}-{step}-0123abcd")
    content("x")(shards)
    assert (shards.directory / SHARD).is_file()


def test_a_directory_that_cannot_be_removed_does_not_block_a_save(store, tmpfs):
    """As over NFS, where a process that hangs keeps its files. A mount serves as well as an obstacle."""
    _left_over(store, 20)
    (left,) = store.directory.glob(f"{PARTIAL}-*")
    tmpfs(left)
    store.save(20, content("20"))
    assert left.exists() and newest(store)[0].name == "step-20"


def test_checkpoints_of_later_steps_are_deleted_by_the_next_save(store):
    """Damaged, or of a run that went on from before: neither counts among those that stay."""
    for step in (10, 20, 30):
        store.save(step, content(str(step)))
    (store.directory / "step-30" / SHARD).write_text("")
    assert newest(store)[0].name == "step-20"
    store.save(25, content("25"))
    assert sorted(path.name for path in store.directory.iterdir()) == [POINTER, "step-20", "step-25"]


def test_a_machine_that_does_not_see_the_directory_is_told(store):
    def write(shards):
        content("10")(shards)
        shards.files["from-elsewhere"] = (10, "")

    with pytest.raises(NotSaved, match="does not see from-elsewhere as rank 0 has written it"):
        store.save(10, write)
    assert newest(store) == (None, [])


@pytest.mark.parametrize("call", ["os.rename", "os.replace", "os.fsync", "shutil.rmtree"])
def test_a_run_that_ends_anywhere_in_a_save_leaves_a_whole_checkpoint(store, call, monkeypatch):
    """Ends at the first call, at the second, and so on, until one is not reached."""
    step = 10
    for first in (5, step):
        store.save(first, content(str(first)))
    for number in itertools.count():
        module, name = call.split(".")
        usual, calls = getattr(sys.modules[module], name), itertools.count()

        def ending(*args, **kwargs):
            if next(calls) == number:
                raise KeyboardInterrupt
            return usual(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(sys.modules[module], name, ending)
            try:
                store.save(step + 10, content(str(step + 10)))
                break
            except KeyboardInterrupt:
                pass
        found, said = newest(store)
        assert found.name in (f"step-{step}", f"step-{step + 10}") and not said
        assert (found / "state").read_text() == found.name.removeprefix("step-")
        store.clean()
        if found.name != f"step-{step}":
            step += 10
    assert number > 0


def test_a_run_that_ends_while_checkpoints_are_discarded_leaves_whole_ones(store, monkeypatch):
    store.save(10, content("10"))
    store.save(20, content("20"))

    def ending(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", ending)
        with pytest.raises(KeyboardInterrupt):
            store.delete()
    assert newest(store)[1] == []
