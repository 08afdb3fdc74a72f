"""Streamed rows: the same rows as prepared ones, in an order that can be taken up anywhere, and steps made of them."""

import json
from collections import Counter
from dataclasses import replace
from itertools import islice, takewhile

import pytest
from datasets import Dataset, DatasetDict, load_dataset

from common.batching.sampler import StepSampler
from common.batching.streamed_steps import StreamedSteps
from common.data import sources
from common.data.errors import BadRowsError, NothingToTrainOnError, SourceError
from common.data.prepare import prepare_many
from common.data.streaming import RowStream
from common.data.tokenization import load_tokenizer, make_codec
from common.errors import UserError
from common.supervised.streaming import first_rows, streamed
from tests.preparation import pairs, request, write
from tests.tokenizers_built import byte_level_bpe

ROWS = 120


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return make_codec(load_tokenizer(str(byte_level_bpe(tmp_path_factory.mktemp("bpe")))), "question_answer")


@pytest.fixture
def stream(codec):
    """A function from requests to the stream of their rows."""

    def of(*requests, sample=1000, block_rows=25, seed=1) -> RowStream:
        requests = streamed(requests)
        data = prepare_many(first_rows(requests, sample), codec)
        return RowStream(requests, codec, data, block_rows=block_rows, seed=seed)

    return of


def through_json(value):
    return json.loads(json.dumps(value))


def ids(table) -> list[tuple]:
    """Rows as values that can be counted."""
    return [(tuple(row["prompt_ids"]), tuple(row["response_ids"])) for row in table.to_pylist()]


def one_pass(rows: RowStream, place=None) -> list[tuple]:
    """The rows of the first pass in the order of training."""
    return [
        row for block in takewhile(lambda block: not block.place["pass"], rows.blocks(place)) for row in ids(block.rows)
    ]


def files(tmp_path) -> str:
    """A directory with two files for training and one of test data, whose first rows are among the training data."""
    write(tmp_path / "set" / "train-1.jsonl", pairs(ROWS // 2))
    write(tmp_path / "set" / "train-2.jsonl", pairs(ROWS // 2, start=ROWS // 2))
    return write(tmp_path / "set" / "test.jsonl", pairs(20, start=ROWS - 10)) and str(tmp_path / "set")


def parquet(tmp_path) -> str:
    Dataset.from_list(pairs(ROWS)).to_parquet(tmp_path / "rows.parquet")
    return str(tmp_path / "rows.parquet")


def saved(tmp_path) -> str:
    DatasetDict({"train": Dataset.from_list(pairs(ROWS)), "test": Dataset.from_list(pairs(9))}).save_to_disk(
        tmp_path / "saved"
    )
    return str(tmp_path / "saved")


@pytest.fixture(params=["files", "parquet", "saved", "hub"])
def source(request, tmp_path, monkeypatch):
    if request.param != "hub":
        return {"files": files, "parquet": parquet, "saved": saved}[request.param](tmp_path)
    shards = [str(tmp_path / f"{number}.parquet") for number in range(3)]
    for number, shard in enumerate(shards):
        Dataset.from_list(pairs(ROWS // 3, start=number * ROWS // 3)).to_parquet(shard)

    class Builder:
        hash = "version"

        @staticmethod
        def as_streaming_dataset():
            return {"train": load_dataset("parquet", data_files=shards, split="train", streaming=True)}

    monkeypatch.setattr(sources, "_hub_builder", lambda name, config_name: Builder)
    return "somebody/rows"


def test_a_pass_has_the_rows_that_would_be_prepared(tmp_path, codec, stream, source):
    ours = request(tmp_path, source, phase=0, data_split="2,1,1")
    other = request(tmp_path, write(tmp_path / "other.jsonl", pairs(60, start=500)) + ":1.5", phase=None)
    if source == "somebody/rows":  # what would be prepared of it is the same
        prepared = streamed([ours, other])
    else:
        prepared = [ours, other]
    data = prepare_many(prepared, codec)
    expected = Counter(ids(data.train.with_format("arrow")[:]))
    assert Counter(one_pass(stream(ours, other))) == expected
    # With a small sample fewer held-out rows are known, but none of them is trained on.
    assert Counter(one_pass(stream(ours, other, sample=10))) == expected


def test_a_stream_goes_on_from_any_block(tmp_path, stream, source):
    asked = request(tmp_path, source, write(tmp_path / "other.jsonl", pairs(30, start=500)))
    whole = list(islice(stream(asked).blocks(), 12))
    assert whole[-1].place["pass"] >= 2 and any(block.notes for block in whole)
    numbers = [block.first for block in whole]
    assert numbers == [sum(len(block.rows) for block in whole[:at]) for at in range(len(whole))]
    for at in (0, 1, 3, 6, 10):
        again = list(islice(stream(asked).blocks(through_json(whole[at].place)), 12 - at))
        assert [ids(block.rows) for block in again] == [ids(block.rows) for block in whole[at:]]
        for later in (0, 1):  # a run that went on is interrupted once more
            once_more = islice(stream(asked).blocks(through_json(again[later].place)), 12 - at - later)
            assert [ids(block.rows) for block in once_more] == [ids(block.rows) for block in whole[at + later :]]


def test_files_that_were_read_to_their_end_are_not_opened_again(tmp_path, stream, monkeypatch):
    asked = request(tmp_path, files(tmp_path))
    last = list(takewhile(lambda block: not block.place["pass"], stream(asked).blocks()))[-1]
    goes_on = stream(asked)
    opened = []
    read_rows = sources.read_rows
    monkeypatch.setattr(sources, "read_rows", lambda path, *rest: opened.append(path.name) or read_rows(path, *rest))
    goes_on = stream(asked)
    opened.clear()
    next(goes_on.blocks(last.place))
    assert len(set(opened)) == 1


def test_sources_are_mixed_in_the_ratio_of_their_weights(tmp_path, codec, stream):
    one, other = (write(tmp_path / f"{start}.jsonl", pairs(400, start)) for start in (0, 1000))
    rows = one_pass(stream(request(tmp_path, one, f"{other}:0.25"), block_rows=100))
    of_other = ["1" in codec.tokenizer.decode(prompt).split()[3][:-3] for prompt, _ in rows]
    first, second = sum(of_other[: len(rows) // 2]), sum(of_other[len(rows) // 2 :])
    assert 0.15 < sum(of_other) / len(rows) < 0.25 and abs(first - second) < 0.3 * sum(of_other)


def test_the_order_is_that_of_seed_and_pass(tmp_path, stream):
    asked = request(tmp_path, files(tmp_path))
    order = one_pass(stream(asked))
    assert order == one_pass(stream(asked)) and order != one_pass(stream(asked, seed=2))
    rows = [row for block in islice(stream(asked).blocks(), 20) for row in ids(block.rows)]
    second = rows[len(order) : 2 * len(order)]
    assert second != order and Counter(second) == Counter(order)


def test_what_a_stream_cannot_use_ends_the_run(tmp_path, codec, stream):
    path = write(tmp_path / "spoilt.jsonl", [*pairs(50), *[{"prompt": "", "chosen": "", "rejected": ""}] * 50])
    with pytest.raises(BadRowsError, match="spoilt"):
        one_pass(stream(request(tmp_path, path), sample=40))
    path = write(tmp_path / "turns.jsonl", pairs(50))
    rows = stream(request(tmp_path, path, phase=0, data_split="1,1,1"))
    nothing = replace(request(tmp_path, path), phase=1, data_split="1,0,0")
    rows._sources[0].request = nothing
    with pytest.raises(NothingToTrainOnError):
        next(rows.blocks())


def test_a_source_that_breaks_off_is_named_with_its_row(tmp_path, stream, monkeypatch):
    rows = stream(request(tmp_path, saved(tmp_path)), sample=20)

    def broken(table):
        yield from islice(table, 30)
        raise ConnectionError("the line is dead")

    class Table:
        def __iter__(self):
            return broken(Dataset.from_list(pairs(ROWS)))

        def state_dict(self):
            return {}

    for number, part in enumerate(parts := rows._sources[0].parts):
        parts[number] = replace(part, table=Table)
    with pytest.raises(SourceError, match="follows row 30 of .*cannot be read: the line is dead"):
        one_pass(rows)


def test_only_rows_of_the_sample_are_stored(tmp_path, codec):
    asked = streamed([request(tmp_path, write(tmp_path / "rows.jsonl", pairs(ROWS)))])
    data = prepare_many(first_rows(asked, 30), codec)
    assert data.report.read.sources[asked[0].data_path[0].name].total == 30
    assert len(data.train) + len(data.eval) == 30 and len(data.eval) > 0


def made_steps(rows: RowStream, ranks: int, total: int, done: int = 0, place=None, pack_to: int = 0) -> list:
    """For each step (the rows of all ranks sorted, the place after it)."""
    made = []
    for rank in range(ranks):
        sampler = StepSampler(
            [1],
            rows_per_micro_batch=12 // ranks,
            micro_batches_per_step=1,
            world_size=ranks,
            rank=rank,
            seed=3,
            pack_to=pack_to,
        )
        steps = StreamedSteps(rows.blocks, sampler, total)
        steps.place = place
        of_rank = []
        for micro_batches in steps.steps(1, done):
            numbers = [index for batch in micro_batches for index, real in zip(batch.indices, batch.real) if real]
            taken = steps.rows[numbers]
            of_rank.append((list(zip(map(tuple, taken["prompt_ids"]), map(tuple, taken["response_ids"]))), steps.place))
        made.append(of_rank)
    return [(sorted(row for part, _ in parts for row in part), parts[0][1]) for parts in zip(*made)]


@pytest.mark.parametrize("pack_to", [0, 100])
def test_steps_are_the_same_on_any_number_of_ranks_and_go_on_after_any_of_them(tmp_path, stream, pack_to):
    asked = request(tmp_path, write(tmp_path / "rows.jsonl", pairs(50)))
    steps = made_steps(stream(asked), 1, 13, pack_to=pack_to)
    assert all(len(rows) == 12 for rows, _ in steps)
    in_order = [row for block in islice(stream(asked).blocks(), 30) for row in ids(block.rows)]
    assert [rows for rows, _ in steps] == [sorted(in_order[at * 12 : at * 12 + 12]) for at in range(13)]
    assert [rows for rows, _ in made_steps(stream(asked), 2, 13, pack_to=pack_to)] == [rows for rows, _ in steps]
    for done in range(1, 13):
        again = made_steps(stream(asked), 1, 13, done, through_json(steps[done - 1][1]), pack_to)
        assert again == steps[done:]


def test_an_error_of_the_reader_reaches_the_loop(tmp_path, stream):
    def blocks(place):
        yield next(stream(request(tmp_path, write(tmp_path / "rows.jsonl", pairs(50)))).blocks())
        raise UserError("the source is gone")

    sampler = StepSampler([1], rows_per_micro_batch=20, micro_batches_per_step=1, world_size=1, rank=0, seed=3)
    with pytest.raises(UserError, match="the source is gone"):
        list(StreamedSteps(blocks, sampler, 5).steps(1))
