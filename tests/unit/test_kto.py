"""KTO: its loss and its z_0 against their definitions in float64, its rows, and what its options refuse."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from alternatives.dpo.batches import collate_feedback
from alternatives.dpo.config import DPOConfig
from alternatives.dpo.kto_loss import KTOOptions, kl_baseline, kto_loss_sum, kto_metrics
from alternatives.dpo.loss import Responses
from alternatives.dpo.main import main as dpo
from alternatives.dpo.mismatched import mismatched_rows, with_mismatched
from alternatives.dpo.task import DPOTask
from common.batching.sampler import MicroBatch
from common.config.parser import parse
from common.data.blend import parse_data_path
from common.data.read_report import ReadReport
from common.data.reading import read_records
from common.errors import DataError, UserError
from common.training.metrics import add_sums

OPTIONS = KTOOptions(beta=0.3, desirable_weight=1.4, undesirable_weight=0.6)
DESIRABLE = torch.tensor([True, False, True, False, False])
REAL = torch.tensor([True, True, False, True, True])


def responses(seed: int) -> Responses:
    drawn = torch.Generator().manual_seed(seed)
    log_probs, reference = (-9 * torch.rand(5, generator=drawn, dtype=torch.float64) for _ in range(2))
    return Responses(log_probs.requires_grad_(), reference, torch.ones(5, dtype=torch.long))


def value(log_p: float, log_ref: float, good: bool, z0: float) -> float:
    """v(x, y) of arXiv:2402.01306, eq. 8, with r the log of a ratio of probabilities."""
    r = math.log(math.exp(log_p) / math.exp(log_ref))
    if good:
        return OPTIONS.desirable_weight / (1 + math.exp(-OPTIONS.beta * (r - z0)))
    return OPTIONS.undesirable_weight / (1 + math.exp(-OPTIONS.beta * (z0 - r)))


@pytest.mark.parametrize("z0", (0.0, 2.5))
def test_the_loss_is_its_definition(z0):
    given_ = responses(1)
    found, sums = kto_loss_sum(given_, DESIRABLE, REAL, torch.tensor(z0, dtype=torch.float64), OPTIONS)
    rows = zip(given_.log_probs.tolist(), given_.reference.tolist(), DESIRABLE.tolist(), REAL.tolist())
    weights = {True: OPTIONS.desirable_weight, False: OPTIONS.undesirable_weight}
    wanted = sum(weights[good] - value(log_p, ref, good, z0) for log_p, ref, good, counts in rows if counts)
    assert found.item() == pytest.approx(wanted, rel=1e-12)
    assert float(sums["rows"]) == 4 and float(sums["loss"]) == pytest.approx(wanted)


def test_good_responses_rise_bad_ones_fall_and_fillers_and_the_baseline_have_no_gradient():
    given_ = responses(2)
    baseline = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    kto_loss_sum(given_, DESIRABLE, REAL, baseline, OPTIONS)[0].backward()
    gradient = given_.log_probs.grad
    assert (gradient[DESIRABLE & REAL] < 0).all() and (gradient[~DESIRABLE & REAL] > 0).all()
    assert gradient[2] == 0 and baseline.grad is None


def test_the_baseline_is_the_mean_over_the_rows_and_never_below_zero():
    total = lambda number: torch.tensor(number, dtype=torch.float64)
    assert float(kl_baseline(total(6.0), total(4.0))) == 1.5
    assert float(kl_baseline(total(-6.0), total(4.0))) == 0
    assert float(kl_baseline(total(0.0), total(0.0))) == 0


def test_metrics_do_not_depend_on_micro_batches():
    given_, z0 = responses(3), torch.tensor(0.75)
    sums = lambda rows: kto_loss_sum(
        Responses(given_.log_probs[rows], given_.reference[rows], given_.lengths[rows]),
        DESIRABLE[rows],
        REAL[rows],
        z0,
        OPTIONS,
    )[1]
    whole, parts = kto_metrics(sums(slice(5))), kto_metrics(add_sums([sums(slice(2)), sums(slice(2, 5))]))
    assert parts == pytest.approx(whole) and whole["z0"] == 0.75
    reward = (OPTIONS.beta * (given_.log_probs - given_.reference)).tolist()
    assert whole["desirable_reward"] == pytest.approx(reward[0])
    assert whole["undesirable_reward"] == pytest.approx((reward[1] + reward[3] + reward[4]) / 3)
    assert whole["reward_margin"] == pytest.approx(whole["desirable_reward"] - whole["undesirable_reward"])


def test_what_there_are_no_rows_of_has_no_mean():
    bad = torch.zeros(5, dtype=torch.bool)
    metrics = kto_metrics(kto_loss_sum(responses(4), bad, REAL, torch.tensor(0.0), OPTIONS)[1])
    assert {*metrics} == {"loss", "z0", "undesirable_reward"}


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=40).filter(lambda dialogues: len(set(dialogues)) > 1))
def test_a_mismatched_response_is_of_another_dialogue(dialogues):
    dialogues = np.array(dialogues)
    partners = mismatched_rows(dialogues)
    assert (dialogues[partners] != dialogues).all()
    if len(set(np.unique(dialogues, return_counts=True)[1].tolist())) == 1:
        assert sorted(partners.tolist()) == list(range(len(dialogues)))


@pytest.mark.parametrize("max_tokens", (6, 20))
def test_mismatched_sequences_are_the_prompt_and_a_foreign_response_cut_to_fit(max_tokens):
    rows = Dataset.from_dict(
        {
            "prompt_ids": [[1, 1], [2, 2, 2, 2], [3]],
            "response_ids": [[10], [20, 21], [30, 31, 32, 33, 34]],
            "dialogue": [5, 6, 7],
            "desirable": [True, False, True],
            "length": [3, 6, 6],
        }
    )
    rows = with_mismatched(rows, max_tokens, "rows").add_column("reference", [[0.5 * at, -at] for at in range(3)])
    batch = collate_feedback(rows, MicroBatch((2, 1), (True, False)), pad_id=0)
    wanted = [[3, 10], [2, 2, 2, 2, 30, 31, 32, 33, 34][:max_tokens]]
    other = batch.responses(mismatched=True)
    assert [ids[:length].tolist() for ids, length in zip(other.input_ids, other.lengths)] == wanted
    assert rows["length"][1] == len(wanted[1]) and max(rows["length"]) <= max_tokens
    own = batch.responses()
    assert own.input_ids[0].tolist() == [3, 30, 31, 32, 33, 34] and own.input_ids[1].tolist() == [2, 2, 2, 2, 20, 21]
    assert own.response_lengths.tolist() == [5, 2] and batch.desirable.tolist() == [True, False]
    assert own.reference.tolist() == [1.0, 0.5] and other.reference.tolist() == [-2.0, -1.0]


def test_rows_of_one_dialogue_are_refused():
    rows = Dataset.from_dict(
        {"prompt_ids": [[1]] * 2, "response_ids": [[2], [3]], "dialogue": [5, 5], "length": [2, 2]}
    )
    with pytest.raises(DataError, match="all rows: they are of one dialogue"):
        with_mismatched(rows, 8, "all rows")


def read(tmp_path, *rows: dict, **more):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = ReadReport()
    records = [found.record for found in read_records(parse_data_path([str(path)]), "feedback", report=report, **more)]
    return [(record.response, record.desirable) for record in records], report


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q?", "completion": "A.", "label": True},
        {"prompt": [{"role": "user", "content": "Q?"}], "completion": [{"role": "assistant", "content": "A."}]},
        {"instruction": "Q?", "input": "", "output": "A."},
        {"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]},
    ],
)
@pytest.mark.parametrize("column, good, bad", [("label", True, False), ("kto_tag", "true", "false"), ("label", 1, 0)])
def test_labelled_rows_are_read(tmp_path, row, column, good, bad):
    row = {name: value for name, value in row.items() if name != "label"}
    found, _ = read(tmp_path, {**row, column: good}, {**row, column: bad})
    assert found == [("A.", True), ("A.", False)]


def test_a_row_without_its_label_is_a_bad_row(tmp_path):
    labels = (False, None, "")
    found, report = read(tmp_path, *({"prompt": "Q?", "response": "A.", "label": label} for label in labels))
    assert found == [("A.", False)]
    (counts,) = report.sources.values()
    assert (counts.total, counts.usable) == (3, 1)


def test_a_comparison_is_a_good_and_a_bad_response(tmp_path):
    row = {"prompt": "Q?", "chosen": "A.", "rejected": ["B.", "C."]}
    assert read(tmp_path, row)[0] == [("A.", True), ("B.", False), ("A.", True), ("C.", False)]
    assert read(tmp_path, row, pairs_per_prompt=1)[0] == [("A.", True), ("B.", False)]


def test_ties_are_left_out(tmp_path):
    pair = {"prompt": "Q?", "chosen": "A.", "rejected": "B.", "chosen_score": 1, "rejected_score": 1}
    assert read(tmp_path, pair)[0] == []


def test_demonstrations_without_labels_are_refused_with_what_is_needed(tmp_path):
    with pytest.raises(UserError, match=r"not labelled answers, which need .*label beside prompt/response"):
        read(tmp_path, {"prompt": "Q?", "response": "A."})


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--desirable_weight 2", "--desirable_weight has no meaning with --loss_type sigmoid: it is for kto"),
        ("--loss_type kto --sft_coef 0.5", "--sft_coef has no meaning with --loss_type kto: it is for sigmoid, robust"),
        ("--loss_type kto --label_smoothing 0.1", "--label_smoothing has no meaning with --loss_type kto"),
        ("--loss_type kto --desirable_weight 0 --undesirable_weight 0", "nothing would be learnt from"),
    ],
)
def test_options_of_other_losses_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        parse(DPOConfig, flags.split())


def test_a_task_for_pairs_is_refused():
    with pytest.raises(UserError, match="--loss_type kto: DPOTask is no KTOTask, which it needs"):
        dpo(["--loss_type", "kto"], task=DPOTask)
