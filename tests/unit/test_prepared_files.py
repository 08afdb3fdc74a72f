"""Prepared data on disk: verified at every start, and shared with colleagues."""

import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest

from common.data import prepared_files
from common.data.file_lock import locked
from common.data.options import naming_flags
from common.data.prepare import prepare
from common.data.prepared_files import Damaged, seal, unseal
from common.data.tokenization import load_tokenizer, make_codec
from common.errors import UserError
from tests.preparation import pairs, request, write
from tests.tokenizers_built import byte_level_bpe

DEEP = "[" * 10_000 + "]" * 10_000


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return make_codec(load_tokenizer(str(byte_level_bpe(tmp_path_factory.mktemp("bpe")))), "human_assistant")


def folder(tmp_path: Path) -> Path:
    (path,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    return path


def change(path: Path, at: float) -> None:
    """Other bits in a few bytes; neither the size nor the times tell."""
    times = path.stat()
    content = bytearray(path.read_bytes())
    for place in range(int(at * len(content)), int(at * len(content)) + 4):
        content[place] ^= 0x7F
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda path: change(path / "train.arrow", 0.5), "train.arrow has changed"),
        (lambda path: change(path / "train.arrow", 0.8), "train.arrow has changed"),
        (lambda path: change(path / "eval.arrow", 0.5), "eval.arrow has changed"),
        (lambda path: change(path / "tested.npy", 0.9), "tested.npy has changed"),
        (lambda path: change(path / "READY", 0.5), "READY"),
        (lambda path: (path / "READY").write_text(DEEP), "READY|it cannot be read"),
        (
            lambda path: (path / "READY").write_text(f"{prepared_files._text_checksum(DEEP)}\n{DEEP}\n"),
            "it cannot be read",
        ),
        (lambda path: (path / "READY").write_bytes(b"\xff\xfe"), "it cannot be read"),
        (lambda path: (path / "train.arrow").unlink(), "train.arrow is missing"),
        (lambda path: os.truncate(path / "train.arrow", 100), "train.arrow has 100 bytes, not "),
    ],
)
def test_damage_is_said_in_one_line_and_the_data_prepared_again(tmp_path, codec, capsys, damage, said):
    asked = request(tmp_path, write(tmp_path / "d.jsonl", pairs(60)))
    first = prepare(asked, codec)
    rows = first.train.to_list(), first.eval.to_list()
    assert capsys.readouterr().out == ""
    damage(folder(tmp_path))
    again = prepare(asked, codec)
    assert (again.train.to_list(), again.eval.to_list()) == rows
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{folder(tmp_path)} is damaged: ") and line.endswith("; it has to be prepared again")
    assert any(word in line for word in said.split("|"))
    prepare(asked, codec)
    assert capsys.readouterr().out == ""


def test_the_ranks_of_one_launch_read_all_bytes_once(tmp_path, monkeypatch):
    """The first for all; another launch, or files that have changed meanwhile, again."""
    (tmp_path / "rows").write_bytes(b"rows" * 1000)
    seal(tmp_path, '{"rows": 4}')
    read = []
    checksum = prepared_files._checksum
    monkeypatch.setattr(prepared_files, "_checksum", lambda path: read.append(path.name) or checksum(path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for _ in range(3):
        assert unseal(tmp_path) == '{"rows": 4}'
    assert read == ["rows"]
    change(tmp_path / "rows", 0.5)
    with pytest.raises(Damaged, match="rows has changed"):
        unseal(tmp_path)
    change(tmp_path / "rows", 0.5)
    unseal(tmp_path)
    assert read == ["rows"] * 3
    monkeypatch.setattr(prepared_files.os, "getppid", os.getpid)  # of another launcher
    unseal(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "1")
    unseal(tmp_path)
    assert read == ["rows"] * 5


@pytest.mark.parametrize("umask, shared", [(0o022, 0o044), (0o002, 0o064), (0o077, 0o000)])
def test_files_and_folders_follow_the_umask(tmp_path, codec, umask, shared):
    before = os.umask(umask)
    try:
        prepare(request(tmp_path, write(tmp_path / "d.jsonl", pairs(30))), codec)
    finally:
        os.umask(before)
    made = [path for path in [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]]
    assert {path.suffix for path in made} >= {".arrow", ".npy", ".lock"}
    for path in made:
        mode = stat.S_IMODE(path.stat().st_mode)
        executable = (shared & 0o044) >> 2 if path.is_dir() else 0
        assert mode & 0o077 == shared | executable, path


@pytest.fixture
def colleague():
    """A folder that is not this user's to write to, once `leave` was called."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    root = os.geteuid() == 0

    def leave() -> None:
        for path in [place, *place.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        if root:  # whom no mode hinders
            os.seteuid(65534)

    yield place, leave
    if root:
        os.seteuid(0)
    for path in [place, *place.rglob("*")]:
        path.chmod(0o755)
    shutil.rmtree(place)


def test_what_is_prepared_is_used_where_nothing_may_be_written(colleague, codec):
    place, leave = colleague
    path = write(place / "d.jsonl", pairs(30))
    other = write(place / "e.jsonl", pairs(30))
    first = prepare(request(place, path), codec).train.to_list()
    leave()
    assert prepare(request(place, path), codec).train.to_list() == first
    with (
        pytest.raises(UserError, match=f"--data_output_path {place}/cache: cannot be written to.*not prepared there"),
        naming_flags(),
    ):
        prepare(request(place, other, max_tokens=100), codec)


def test_each_launch_reads_what_is_prepared_once(tmp_path, codec, monkeypatch):
    """Two launches that share a directory, their ranks in turn."""
    asked, read = request(tmp_path, write(tmp_path / "d.jsonl", pairs(60))), []
    prepare(asked, codec)
    checksum = prepared_files._checksum
    monkeypatch.setattr(prepared_files, "_checksum", lambda path: read.append(path) or checksum(path))
    for launch in ("a", "b", "a", "b", "a", "b"):
        monkeypatch.setattr(prepared_files, "_launch", lambda: [launch])
        unseal(folder(tmp_path))
    assert len(read) == 2 * len(set(read))


def test_a_lock_that_belongs_to_a_colleague_is_waited_for(colleague):
    """Its file may only be read, but the directory may be written to."""
    place, _ = colleague
    lock = place / "shared.lock"
    lock.touch()
    lock.chmod(0o444)
    place.chmod(0o777)
    if os.geteuid() == 0:
        os.seteuid(65534)
    with locked(lock, "a colleague") as writable, open(lock, "rb") as other:
        assert writable
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
