"""Step 3 converges to the exact optimum of a task that can be enumerated; with any one of these defects it does not."""

from __future__ import annotations

import json
import sys

import pytest

from tests.end_to_end.closed_form_cases import CASES
from tests.launching import ROOT, run

HEALTHY = ("rloo", "gae")
DEFECTS = [name for name in CASES if name not in HEALTHY]
ITERATIONS = 150  # as many for what is healthy as for what is not


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, dict]:
    """Exact figures of each case, by its name; all of them ran in one process."""
    program, directory = ROOT / "tests/end_to_end/closed_form_cases.py", tmp_path_factory.mktemp("closed_form")
    done = run([sys.executable, str(program), str(directory), str(ITERATIONS), *CASES], timeout=1500)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("name", HEALTHY)
def test_an_estimator_converges_to_the_optimum(outcomes, name):
    outcome = outcomes[name]
    assert outcome["total_variation"] < 0.05
    assert outcome["reward"] - outcome["start"] == pytest.approx(outcome["best_reward"] - outcome["start"], rel=0.02)
    assert outcome["reward"] - outcome["start"] == pytest.approx(outcome["frontier"] - outcome["start"], rel=0.02)
    assert outcome["kl"] == pytest.approx(outcome["best_kl"], rel=0.02)
    assert outcome["reached"]


@pytest.mark.parametrize("name", DEFECTS)
def test_with_a_defect_it_does_not(outcomes, name):
    assert not outcomes[name]["reached"] and outcomes[name]["total_variation"] > 0.1


@pytest.mark.long
def test_every_estimator_reaches_it_for_three_betas(tmp_path):
    run([sys.executable, str(ROOT / "benchmarks/proof/closed_form.py"), "--output_dir", str(tmp_path)], timeout=3600)
