"""A column of the data holds each row's margin: how it is read, kept with the pairs, and used in the loss."""

import json

import pytest
import torch

from common.batching.collate import collate_comparisons
from common.batching.sampler import MicroBatch
from common.data.options import naming_flags
from common.data.prepare import prepare
from common.data.request import data_key
from common.data.tokenization import load_tokenizer, make_codec
from common.errors import UserError
from step2_reward.config import RewardConfig
from step2_reward.loss import bradley_terry_loss_sum
from step2_reward.task import RewardTask
from tests.preparation import pairs, request, write
from tests.tokenizers_built import byte_level_bpe


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return make_codec(load_tokenizer(str(byte_level_bpe(tmp_path_factory.mktemp("bpe")))), "human_assistant")


def with_margins(values) -> list[dict]:
    return [row | {"strength": value} for row, value in zip(pairs(len(values)), values)]


def prepared(tmp_path, codec, rows, column="strength", **changes):
    source = write(tmp_path / "data" / "pairs.jsonl", rows)
    return prepare(request(tmp_path, source, kind="comparison", margin_column=column, **changes), codec)


def margins_by_answer(data, codec) -> dict[str, float]:
    rows = [row for part in (data.train, data.eval) for row in part]
    return {codec.decode_response(row["chosen_ids"]): row["margin"] for row in rows}


def test_every_pair_has_the_margin_of_its_row(tmp_path, codec):
    values = [0, 1, 2.5, "0.75", *range(36)]
    found = margins_by_answer(prepared(tmp_path, codec, with_margins(values)), codec)
    assert found == {f"The sum is {2 * i}.": float(value) for i, value in enumerate(values)}


def test_all_pairs_of_a_row_have_its_margin(tmp_path, codec):
    rows = [row | {"rejected": ["No.", "Nobody knows."], "strength": i} for i, row in enumerate(pairs(40))]
    data = prepared(tmp_path, codec, rows)
    assert len(data.train) + len(data.eval) == 80
    assert margins_by_answer(data, codec) == {f"The sum is {2 * i}.": float(i) for i in range(40)}


@pytest.mark.parametrize(
    "value, said",
    [
        (None, "'strength' is missing"),
        ("", "'strength' is missing"),
        ("much", "'strength' is no number"),
        (True, "'strength' is no number"),
        ([1], "'strength' is no number"),
        ("nan", "'strength' is no number"),
        ("inf", "'strength' is no number"),
        (-0.5, "'strength' is below 0"),
    ],
)
def test_a_row_without_a_margin_is_a_bad_row_with_its_file_and_line(value, said, tmp_path, codec):
    rows = with_margins([1.0] * 40)
    rows[7]["strength"] = value
    with pytest.raises(UserError) as refused, naming_flags():
        prepared(tmp_path, codec, rows, max_bad_fraction=0.0)
    assert f"pairs.jsonl:8: {said}" in str(refused.value) and "\n" not in str(refused.value)
    data = prepared(tmp_path, codec, rows, max_bad_fraction=0.1)
    assert len(data.train) + len(data.eval) == 39


def test_a_column_that_no_row_has_is_named_with_its_flag(tmp_path, codec):
    with pytest.raises(UserError, match="--margin_column strenght: .*no such column; did you mean strength"):
        with naming_flags():
            prepared(tmp_path, codec, with_margins([1.0] * 20), "strenght")


def test_the_column_is_not_listed_as_unused(tmp_path, codec):
    rows = with_margins([1.0] * 20)
    used, unused = (prepared(tmp_path, codec, rows, column).report for column in ("strength", None))
    (used,), (unused,) = used.read.sources.values(), unused.read.sources.values()
    assert "strength" not in used.unused and "strength" in unused.unused


def test_only_data_with_margins_has_another_key_and_another_column(tmp_path, codec):
    source = write(tmp_path / "data" / "pairs.jsonl", with_margins([1.0] * 20))
    keys = {
        column: data_key(request(tmp_path, source, kind="comparison", margin_column=column), codec)
        for column in (None, "strength", "other")
    }
    assert len(set(keys.values())) == 3
    assert "margin" not in prepared(tmp_path, codec, with_margins([1.0] * 20), None).train.column_names


def test_the_loss_takes_each_pairs_own_margin(tmp_path, codec):
    data = prepared(tmp_path, codec, with_margins([i / 4 for i in range(40)])).train
    batch = collate_comparisons(data, MicroBatch((3, 0, 5, 5), (True, True, True, False)), codec.pad_id)
    assert batch.margins.tolist() == [data[row]["margin"] for row in (3, 0, 5, 5)]
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(batch.input_ids.shape, generator=generator)
    config = RewardConfig(margin_column="strength", centring_coef=0.1)
    loss, _ = RewardTask(config).loss_sum(lambda input_ids: numbers, batch)
    expected = torch.zeros((), dtype=torch.float64)
    for row in range(3):
        chosen, rejected = (float(numbers[at, batch.lengths[at] - 1]) for at in (row, row + 4))
        gap = torch.tensor(chosen - rejected - data[(3, 0, 5)[row]]["margin"], dtype=torch.float64)
        expected += torch.log1p(torch.exp(-gap)) + 0.1 * (chosen + rejected) ** 2
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    plain, _ = RewardTask(RewardConfig(centring_coef=0.1)).loss_sum(lambda input_ids: numbers, batch)
    chosen, rejected = (numbers.gather(1, (batch.lengths - 1)[:, None])[:, 0]).chunk(2)
    assert torch.equal(plain, bradley_terry_loss_sum(chosen, rejected, batch.real, centring=0.1)[0])


def test_a_margin_and_a_column_of_margins_contradict_each_other():
    with pytest.raises(UserError, match="--margin 1 and --margin_column strength: give one of them"):
        RewardConfig(margin=1.0, margin_column="strength").validate()


def test_rows_of_the_file_may_be_json_numbers_of_any_form(tmp_path, codec):
    rows = [json.dumps(row)[:-1] + ', "strength": 1e0}' for row in pairs(20)]
    assert set(margins_by_answer(prepared(tmp_path, codec, rows), codec).values()) == {1.0}
