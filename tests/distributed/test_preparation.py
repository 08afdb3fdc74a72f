"""Data preparation by several processes: ranks that start together, differ, or are killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from common.data.prepare import prepare
from common.data.tokenization import load_tokenizer, make_codec
from tests.launching import ROOT
from tests.preparation import pairs, request, write
from tests.tokenizers_built import byte_level_bpe

# How the programs begin that run as processes of their own: their arguments are the root, a tokenizer, and others.
START = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from common.data.prepare import prepare
from common.data.tokenization import load_tokenizer, make_codec
from tests.preparation import request
codec = make_codec(load_tokenizer(sys.argv[2]), "human_assistant")
"""


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    return byte_level_bpe(tmp_path_factory.mktemp("bpe"))


def start_process(tmp_path: Path, tokenizer_directory: Path, data: str, local_rank: int) -> subprocess.Popen:
    """Another process that prepares the same request and prints what it got."""
    program = START + (
        "data = prepare(request(Path(sys.argv[3]), sys.argv[4]), codec)\n"
        "print(len(data.train), len(data.eval), sum(data.train['length']))\n"
    )
    arguments = map(str, (ROOT, tokenizer_directory, tmp_path, data))
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "LOCAL_RANK": str(local_rank)},
    )


def test_processes_end_with_a_program_that_is_killed(tmp_path):
    program = (
        "import os, sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from common.data import parallel\n"
        "parallel.cores = lambda: 3\n"
        "for number in parallel.in_order(lambda number: os.getpid(), range(100)):\n"
        "    print(number, flush=True)\n"
        "    time.sleep(0.1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(ROOT)], stdout=subprocess.PIPE, text=True)
    numbers = [int(next(process.stdout)) for _ in range(20)]
    process.kill()
    process.wait()
    others = set(numbers) - {process.pid}
    assert others
    running = [psutil.Process(number) for number in others if psutil.pid_exists(number)]
    _, alive = psutil.wait_procs(running, timeout=30)
    assert all(left.status() == psutil.STATUS_ZOMBIE for left in alive)


def test_processes_that_start_together_agree(tmp_path, tokenizer_directory):
    """Two first ranks and one that waits for them: no error, one result."""
    path = write(tmp_path / "d.jsonl", pairs(300))
    processes = [start_process(tmp_path, tokenizer_directory, path, local_rank) for local_rank in (1, 0, 0)]
    printed = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    data = prepare(request(tmp_path, path), make_codec(load_tokenizer(str(tokenizer_directory)), "human_assistant"))
    assert printed == {f"{len(data.train)} {len(data.eval)} {sum(data.train['length'])}\n"}
    assert len(list((tmp_path / "cache").glob("*/train.arrow"))) == 1


def test_ranks_that_read_different_data_say_so(tmp_path, tokenizer_directory):
    """Each in a directory of its own, with a file of the same name: as if the file had changed in between."""
    program = START + (
        "import torch.distributed as dist\n"
        "from common.data.prepare import agree_on\n"
        "from common.errors import UserError\n"
        "same, other = (prepare(request(Path('.'), name), codec) for name in ('same.jsonl', 'other.jsonl'))\n"
        "dist.init_process_group('gloo', init_method=f'file://{sys.argv[3]}', rank=int(sys.argv[4]), world_size=2)\n"
        "agree_on(same)\n"
        "try:\n"
        "    agree_on(same, other)\n"
        "except UserError as error:\n"
        "    print(error, flush=True)\n"
        "import os; os._exit(0)\n"
    )  # with gloo's threads about, now and then Python aborts at its own end
    processes = []
    for rank in (0, 1):
        write(tmp_path / str(rank) / "same.jsonl", pairs(30))
        write(tmp_path / str(rank) / "other.jsonl", pairs(30, start=rank))
        arguments = map(str, (ROOT, tokenizer_directory, tmp_path / "meeting", rank))
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", program, *arguments],
                stdout=subprocess.PIPE,
                text=True,
                cwd=tmp_path / str(rank),
                env={**os.environ, "WORLD_SIZE": "2"},
            )
        )
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert said[0] == said[1] and "rank 1 has read other data than rank 0" in said[0]


def test_no_rank_depends_on_another(tmp_path, tokenizer_directory):
    """A rank that read another state of the files than the rest has no one to wait for."""
    process = start_process(tmp_path, tokenizer_directory, write(tmp_path / "d.jsonl", pairs(30)), local_rank=1)
    try:
        assert process.communicate(timeout=60)[0]
    finally:
        process.kill()
