"""Training that has diverged ends in one line, the same on all ranks, and publishes nothing."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.architectures import build_model
from tests.distributed.failure_cases import CASES
from tests.distributed.option_inputs import make_inputs
from tests.launching import ROOT, launch


@pytest.fixture(scope="module")
def found(tmp_path_factory, builtin_cache):
    inputs, output = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("failures")
    make_inputs(inputs, builtin_cache)
    break_partly(build_model("gpt-neox", inputs / "partly-broken", builtin_cache))
    prompts = ["Who is ~?", *(f"What comes after {number}?" for number in range(39))]
    (inputs / "one-odd.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "chosen": "Yes.", "rejected": "No."}) + "\n" for prompt in prompts * 3)
    )
    launch(ROOT / "tests" / "distributed" / "failure_cases.py", str(inputs), str(output), ranks=2)
    return json.loads((output / "found.json").read_text())


def break_partly(directory) -> None:
    """Only what is read after `~` becomes NaN, by a number too large to be normalised: the weights are finite, and the
    output embeddings are not tied to the input's."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    (broken,) = AutoTokenizer.from_pretrained(directory).encode("~", add_special_tokens=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[broken] = 3e38
    model.save_pretrained(directory)


@pytest.mark.parametrize("case", CASES)
def test_a_diverged_run_says_where_and_publishes_nothing(found, case):
    first, second = found[case]["said"]
    assert first is not None and first == second and "\n" not in first
    assert CASES[case][2] in first
    assert not found[case]["published"]
