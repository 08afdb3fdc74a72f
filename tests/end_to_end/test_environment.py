"""launch/environment.sh if it must not install, cannot install, or runs twice at once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT

# Stands for Python and its pip where nothing can be downloaded; notes each environment it makes in $MADE.
STAND_IN = """#!/bin/sh
case "$2" in
    venv) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "$3" >> "$MADE" ;;
    pip) sleep 0.3 ;;
esac
"""


class TestEnvironment:
    """launch/environment.sh where it must not install, cannot, or is used twice at once."""

    @pytest.fixture
    def project(self, tmp_path) -> Path:
        (tmp_path / "launch").mkdir()
        shutil.copy(ROOT / "launch/environment.sh", tmp_path / "launch")
        for name in ("constraints.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, tmp_path)
        return tmp_path

    def start(self, project: Path, first: str = ":", **variables: str) -> subprocess.Popen:
        env = {key: value for key, value in os.environ.items() if key not in ("RLHF_VENV", "PYTHON")}
        env.update({"PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", **variables})
        return subprocess.Popen(
            ["bash", "-c", f"{first}; source launch/environment.sh && echo ready $VIRTUAL_ENV"],
            cwd=project,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def source(self, project: Path, **variables: str) -> subprocess.CompletedProcess:
        started = self.start(project, **variables)
        stdout, stderr = started.communicate(timeout=120)
        return subprocess.CompletedProcess(started.args, started.returncode, stdout, stderr)

    def test_scripts_started_together_install_once(self, project):
        stand_in = project / "python"
        stand_in.write_text(STAND_IN)
        stand_in.chmod(0o755)
        variables = {"PYTHON": str(stand_in), "MADE": str(project / "made"), "RLHF_VENV": "envs/own"}
        started = [self.start(project, **variables) for _ in range(3)]
        said = [process.communicate(timeout=120) for process in started]
        assert [stderr for _, stderr in said] == [""] * 3
        assert [stdout.splitlines()[-1] for stdout, _ in said] == [f"ready {project / 'envs/own'}"] * 3
        assert (project / "made").read_text().splitlines() == [str(project / "envs/own")]

    def test_another_shell_is_told_so(self, project):
        done = self.source(project, first="unset BASH_VERSION")
        assert done.returncode != 0 and done.stdout == ""
        assert done.stderr.splitlines() == ["error: launch/environment.sh needs bash: type bash, then source it there"]

    def test_leaves_alone_what_it_did_not_make(self, project):
        (project / "mine").mkdir()
        (project / "mine/notes.txt").write_text("keep")
        done = self.source(project, RLHF_VENV=str(project / "mine"))
        assert done.returncode != 0 and "ready" not in done.stdout
        assert "was not made by launch/environment.sh" in done.stderr
        assert [path.name for path in (project / "mine").iterdir()] == ["notes.txt"]

    def test_says_which_python_it_needs(self, project):
        done = self.source(project, PYTHON="no-such-python")
        assert done.returncode != 0
        assert done.stderr.startswith("error: Python 3.11 or newer is needed; no-such-python is not")

    def test_a_failed_installation_is_not_taken_for_a_finished_one(self, project):
        for _ in range(2):
            done = self.source(project)
            assert done.returncode != 0 and "ready" not in done.stdout
            assert "the installation into" in done.stderr and "failed" in done.stderr
