"""Every option of every step changes what its program does, or is declared to have no effect and has none."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from common.config.parser import ignored_options, options
from tests.distributed.option_inputs import make_inputs
from tests.distributed.option_rows import STEPS
from tests.launching import ROOT, launch
from tests.metrics_docs import as_documented, documented_metrics

PROGRAM = ROOT / "tests" / "distributed" / "option_cases.py"
# In test_resumed_runs.py and faults/test_numbers.py: they need a run that broke off, or numbers that are not finite.
SHOWN_ELSEWHERE = {"resume_anyway", "max_skipped_steps"}
# In unit/test_reward_service.py and unit/test_text_reward_model.py: they need a server, or another tokenizer.
SHOWN_ELSEWHERE |= {"reward_retries", "reward_header_env", "reward_batch_size", "reward_max_seq_len"}
SHOWN_ELSEWHERE |= {"run_name"}  # in unit/test_wandb_run.py: W&B's files say it
OPTIONS = [
    (name, option)
    for name, step in STEPS.items()
    for option in options(step.config)
    if option not in {*ignored_options(step.config), *SHOWN_ELSEWHERE, *options(step.shared)}
]


@pytest.fixture(scope="module")
def found(tmp_path_factory, builtin_cache) -> dict[str, dict[str, dict]]:
    """STEP, run -> its fingerprint, see `option_cases.fingerprint`."""
    inputs, output = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("options")
    make_inputs(inputs, builtin_cache)
    with pytest.MonkeyPatch.context() as environment, ThreadPoolExecutor() as pool:
        for name, value in {
            "DS_ACCELERATOR": "cpu",  # a GPU may add in another order each time
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(inputs / "hub"),
            "HF_MODULES_CACHE": str(output / "modules"),
        }.items():
            environment.setenv(name, value)
        # One core each; step 3 takes as long as the others.
        list(
            pool.map(
                lambda steps: launch(PROGRAM, str(inputs), str(output), *steps), (["ppo"], ["sft", "reward", "dpo"])
            )
        )
    return {step: json.loads((output / f"{step}.json").read_text()) for step in STEPS}


@pytest.mark.parametrize("step, option", OPTIONS)
def test_every_option_changes_what_the_program_does(found, step, option):
    assert option in STEPS[step].rows, f"--{option} of step {step}: add a row to option_rows.py that shows its effect"
    row = STEPS[step].rows[option]
    before, after = found[step][row.base], found[step][option]
    assert before["crash"] is None and after["crash"] is None
    refused = [run["error"] is not None for run in (before, after)]
    assert sum(refused) == (row.part == "error"), "one of two runs is refused if that is the effect, else none"
    assert before[row.part] != after[row.part]


@pytest.mark.parametrize("step", STEPS)
def test_the_same_flags_do_the_same(found, step):
    assert found[step]["again"] == found[step][""]
    assert found[step][""]["metrics"][-1]["phase"] == "done"


@pytest.mark.parametrize("step", STEPS)
def test_every_metric_of_every_run_is_documented(found, step):
    logged = {as_documented(name) for run in found[step].values() for record in run["metrics"] for name in record}
    assert logged - documented_metrics(step) == set(), "add a row to docs/metrics.md"


@pytest.mark.parametrize("step", STEPS)
def test_ignored_options_change_nothing_but_the_notes(found, step):
    ignored = found[step]["ignored"]
    ignored["printed"] = [line for line in ignored["printed"] if "has no effect" not in line]
    assert ignored == found[step][""]


@pytest.mark.parametrize("step", STEPS)
def test_no_row_speaks_of_an_option_that_is_not_there_or_is_ignored(step):
    assert set(STEPS[step].rows) <= {option for name, option in OPTIONS if name == step}


def test_the_documents_list_every_option_without_effect():
    page = (ROOT / "docs/deepspeed-chat.md").read_text(encoding="utf-8")
    table = page[page.index("Accepted without effect") :]
    assert {
        f"`--{name}`" for step in STEPS.values() for name in ignored_options(step.config) if f"`--{name}`" not in table
    } == set()
