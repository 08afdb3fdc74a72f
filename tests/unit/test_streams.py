"""Standard streams that are closed, left by their reader or on a full disk; too few file handles."""

import os
import resource
import subprocess
import sys

import pytest

from common.runtime.streams import TolerantStream, until_reader_leaves
from tests.launching import ROOT

STARTING = """
import sys
from common.runtime.requirements import require_environment
require_environment()
"""
PROGRAM = (
    STARTING
    + """
import os
from common.runtime.program import run_program
from common.runtime.streams import until_reader_leaves
def main():
"""
)


def run(program: str, redirection: str = "", rank: str = "0") -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "$0" {redirection}', program],
        cwd=ROOT,
        env={**os.environ, "RANK": rank},
        capture_output=True,
        text=True,
    )


def test_no_file_gets_the_number_of_a_stream_that_is_closed(tmp_path):
    done = run(
        STARTING
        + f"""
import os
with open({str(tmp_path / "data")!r}, "w") as file:
    os.write(1, b"what a library prints")
    print("and what we print")
    file.write(f"{{file.fileno()}} {{sys.stdin.read()!r}}")
print("still here", file=sys.stderr)
""",
        "<&- >&-",
    )
    assert (done.returncode, done.stderr) == (0, "still here\n")
    number, read = (tmp_path / "data").read_text().split()
    assert int(number) > 2 and read == "''"
    assert run(STARTING + "print('fine', file=sys.stderr); print('said')", "2>&-").stdout == "said\n"


WRITES = "    for _ in range(20): print('x' * 10_000, flush=True)\n"
WANTS = "    with until_reader_leaves():\n    " + WRITES.replace("print", "assert not print")
ENDS = "    print('done', file=sys.stderr)\nsys.exit(run_program(main))"


@pytest.mark.parametrize(
    "work, redirection, code, said",
    [
        (WRITES, "| head -c 1 > /dev/null; exit ${PIPESTATUS[0]}", 0, "done"),
        (WANTS, "| head -c 1 > /dev/null; exit ${PIPESTATUS[0]}", 0, "done"),
        (WRITES, ">&-", 0, "done"),
        (
            WANTS,
            ">&-",
            1,
            "error: standard output, where the answers go, is closed: open it, or give a file to write to",
        ),
        (
            WRITES,
            "> /dev/full",
            0,
            "warning: standard output cannot be written: No space left on device: the rest of it is lost\ndone",
        ),
        (WANTS, "> /dev/full", 1, "error: standard output cannot be written: No space left on device"),
    ],
    ids=["left", "left by who is wanted", "closed", "wanted and closed", "full", "wanted and full"],
)
def test_output_that_nobody_can_read_ends_nothing_but_work_that_is_for_it(work, redirection, code, said):
    done = run(PROGRAM + work + ENDS, redirection)
    assert (done.returncode, done.stderr) == (code, said + "\n")


def test_a_reader_that_stays_gets_all(capsys):
    with until_reader_leaves():
        assert not isinstance(sys.stdout, TolerantStream)
        print("an answer", end="")
    assert capsys.readouterr().out == "an answer"
    with pytest.raises(ValueError), until_reader_leaves():
        raise ValueError("of the work")


def test_the_streams_own_errors_are_no_matter_of_the_work():
    """An OSError of the work itself, such as a broken pipe to a process, is not taken for a reader that left."""
    with pytest.raises(BrokenPipeError), until_reader_leaves():
        raise BrokenPipeError("of another pipe")


def with_handles(soft: int, hard: int, rank: str = "0") -> subprocess.CompletedProcess:
    program = STARTING + "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "RANK": rank},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
    )


def test_too_few_file_handles_are_raised_or_refused_in_one_line():
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert with_handles(16, most).stdout == "1024\n"
    assert with_handles(2048, 4096).stdout == "2048\n"
    assert with_handles(300, 300).stdout == "300\n"
    refused = with_handles(16, 16)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        "error: this shell lets a program open 16 files, and 256 are needed: raise the limit, ulimit -n 1024\n"
    )
    assert with_handles(16, 16, rank="1").stderr == ""
