"""Preparing data: rows become ids once, are split, and are found again."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from common.artifacts.model_source import resolve_model
from common.data import encoding, parallel
from common.data.options import naming_flags
from common.data.prepare import prepare, prepare_many
from common.data.request import DataRequest
from common.data.split import dialogue_hash
from common.data.tokenization import load_tokenizer, make_codec
from common.errors import UserError
from common.paths import writing_to
from tests.preparation import pairs, request, write
from tests.tokenizers_built import byte_level_bpe, llama_sentencepiece

PHASES = (0, 1, 2)


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    return byte_level_bpe(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def codec(tokenizer_directory):
    return make_codec(load_tokenizer(str(tokenizer_directory)), "human_assistant")


def dialogues(dataset) -> list[int]:
    return list(dataset["dialogue"])


def rows_read(data) -> int:
    return sum(counts.total for counts in data.report.read.sources.values())


def prepared_file(tmp_path: Path, name: str = "train.arrow") -> Path:
    (path,) = (tmp_path / "cache").glob(f"*/{name}")
    return path


@pytest.mark.parametrize(
    "kind, answers",
    [("demonstration", ["response_ids"]), ("prompt", []), ("comparison", ["chosen_ids", "rejected_ids"])],
)
def test_rows_are_the_codecs_ids_of_every_record(tmp_path, codec, kind, answers):
    data = prepare(request(tmp_path, write(tmp_path / "d.jsonl", pairs(40)), kind=kind), codec)
    assert set(data.train.column_names) == {"prompt_ids", *answers, "length", "dialogue"}
    seen = []
    for row in [*data.train, *data.eval]:
        text = codec.tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)
        number = int(text.split()[3])
        assert text == f"\n\nHuman: What is {number} plus {number}?\n\nAssistant:"
        assert row["prompt_ids"][0] == codec.tokenizer.bos_token_id
        expected = [codec.encode_response(f"The sum is {2 * number}."), codec.encode_response("No idea.")]
        assert [row[answer] for answer in answers] == expected[: len(answers)]
        assert row["length"] == len(row["prompt_ids"]) + max([0, *(len(row[answer]) for answer in answers)])
        seen.append(number)
    assert sorted(seen) == list(range(40))
    assert data.report.train_rows == len(data.train) and data.report.eval_rows == len(data.eval) > 0


def test_no_prompt_in_two_phases_or_in_training_and_evaluation(tmp_path, codec):
    path = write(tmp_path / "d.jsonl", pairs(200))
    data = [prepare(request(tmp_path, path, phase=phase), codec) for phase in PHASES]
    held_out = set(dialogues(data[0].eval))
    assert all(set(dialogues(part.eval)) == held_out for part in data)
    together = [dialogue for part in data for dialogue in dialogues(part.train)] + list(held_out)
    assert len(together) == len(set(together)) == 200
    assert rows_read(data[0]) == 200
    assert data[0].report.other_phases == len(data[1].train) + len(data[2].train)


def test_a_sources_own_test_data_is_for_evaluation(tmp_path, codec):
    write(tmp_path / "set" / "train.jsonl", pairs(30))
    write(tmp_path / "set" / "test.jsonl", pairs(10, start=25))
    data = prepare(request(tmp_path, str(tmp_path / "set"), eval_fraction=0.0), codec)
    assert (len(data.train), len(data.eval)) == (25, 15)
    assert set(dialogues(data.train)).isdisjoint(dialogues(data.eval))


def test_a_step_evaluates_on_no_test_prompt_that_another_may_train_on(tmp_path, codec):
    """Steps may read different sources: what is test data to one may be training data to another."""
    write(tmp_path / "set" / "train.jsonl", pairs(10))
    write(tmp_path / "set" / "test.jsonl", pairs(100, start=10))
    other = write(tmp_path / "other.jsonl", pairs(110))
    trained, evaluated = (
        [set(dialogues(getattr(prepare(request(tmp_path, path, phase=phase), codec), side))) for phase in PHASES]
        for path, side in ((other, "train"), (str(tmp_path / "set"), "eval"))
    )
    for phase, held_out in enumerate(evaluated):
        for other_phase in {*PHASES} - {phase}:
            assert held_out.isdisjoint(trained[other_phase])
    assert len(set().union(*evaluated)) >= 100 and all(evaluated)


def test_what_one_request_holds_out_no_other_trains_on(tmp_path, codec):
    write(tmp_path / "set" / "train.jsonl", pairs(50))
    write(tmp_path / "set" / "test.jsonl", pairs(10, start=45))
    further = write(tmp_path / "further.jsonl", pairs(60))
    split = request(tmp_path, str(tmp_path / "set"), phase=0, eval_fraction=0.0)
    whole = request(tmp_path, further, eval_fraction=0.0)
    data = prepare_many([split, whole], codec)
    test_prompts = {dialogue_hash(row["prompt"]) for row in pairs(10, start=45)}
    assert set(dialogues(data.eval)) < test_prompts and len(data.eval) > 0
    assert set(dialogues(data.train)).isdisjoint(test_prompts)
    assert len(data.train) == data.report.train_rows == len(prepare(split, codec).train) + 50
    assert rows_read(data) == 120


def test_a_test_prompt_that_is_not_evaluated_is_not_trained_on_either(tmp_path, codec):
    """Its own answer may be too long, or bad; another source's answer to it is not for training."""
    write(tmp_path / "set" / "train.jsonl", pairs(10))
    write(tmp_path / "set" / "test.jsonl", [{**row, "chosen": "so " * 300} for row in pairs(5, start=40)])
    split = request(tmp_path, str(tmp_path / "set"), eval_fraction=0.0)
    whole = request(tmp_path, write(tmp_path / "further.jsonl", pairs(10, start=40)), eval_fraction=0.0)
    for _ in range(2):  # prepared, and read from the cache
        data = prepare_many([split, whole], codec)
        assert (len(data.train), len(data.eval), data.report.too_long) == (10 + 5, 0, 5)


def test_a_phase_may_live_on_unsplit_data_alone(tmp_path, codec):
    path = write(tmp_path / "d.jsonl", pairs(20))
    nothing = request(tmp_path, path, phase=0, data_split="0,1,1")
    with pytest.raises(UserError, match="--data_split"), naming_flags():
        prepare(nothing, codec)
    whole = request(tmp_path, write(tmp_path / "e.jsonl", pairs(20, start=50)))
    assert len(prepare_many([nothing, whole], codec).train) == len(prepare(whole, codec).train)


def test_repeated_rows_are_trained_on_repeatedly_and_evaluated_once(tmp_path, codec):
    path = write(tmp_path / "d.jsonl", pairs(40))
    once, twice = (prepare(request(tmp_path, path + weight), codec) for weight in ("", ":2"))
    assert sorted(dialogues(twice.train)) == sorted(dialogues(once.train) * 2)
    assert sorted(dialogues(twice.eval)) == sorted(dialogues(once.eval))


def test_long_prompts_lose_their_beginning_and_long_answers_their_place(tmp_path, codec):
    rows = [
        {"prompt": "so " * 100 + "what?", "response": "Short."},
        {"prompt": "Why?", "response": "so " * 100},
        {"prompt": "How?", "response": "Well."},
    ]
    path = write(tmp_path / "d.jsonl", rows)
    data = prepare(request(tmp_path, path, max_tokens=40, eval_fraction=0.0), codec)
    assert (data.report.too_long, data.report.prompts_cut, len(data.train)) == (1, 1, 2)
    cut = data.train[0]
    assert cut["length"] == 40 and cut["response_ids"] == codec.encode_response("Short.")
    assert cut["prompt_ids"][0] == codec.tokenizer.bos_token_id
    assert codec.tokenizer.decode(cut["prompt_ids"]).endswith("so what?\n\nAssistant:")


def test_plain_text_is_cut_into_pieces_without_loss(tmp_path, codec):
    texts = ["The capital is Paris. " * 30, "Short."]
    path = write(tmp_path / "d.jsonl", [{"text": text} for text in texts])
    data = prepare(request(tmp_path, path, kind="text", max_tokens=50, eval_fraction=0.0), codec)
    assert max(data.train["length"]) == 50
    together = [token for ids in data.train["input_ids"] for token in ids]
    assert together == [token for text in texts for token in codec.encode_text(text.strip())]


def test_several_processes_prepare_what_one_does(tmp_path, codec, monkeypatch):
    """Chunks of a few rows by three processes, whose results come back in order; one chunk all refused or cut."""
    rows = pairs(60) + [{**row, "prompt": "so " * 200 + row["prompt"]} for row in pairs(20, start=60)]
    rows += [{**row, "chosen": "so " * 200} for row in pairs(10, start=80)]
    path = write(tmp_path / "d.jsonl", rows)
    alone = prepare(request(tmp_path, path, kind="comparison"), codec)
    monkeypatch.setattr(parallel, "cores", lambda: 3)
    monkeypatch.setattr(parallel, "_ALONE", 1)
    monkeypatch.setattr(encoding, "_CHUNK", 4)
    together = prepare(request(tmp_path, path, kind="comparison", cache_dir=tmp_path / "other"), codec)
    assert together.train.to_list() == alone.train.to_list()
    assert together.eval.to_list() == alone.eval.to_list()
    assert together.report == alone.report and (alone.report.too_long, alone.report.prompts_cut) == (10, 20)


def test_a_failure_in_another_process_ends_the_preparation(tmp_path, codec, monkeypatch):
    """Of the code, it passes through; of the machine, such as a want of memory, it is one line."""
    monkeypatch.setattr(parallel, "cores", lambda: 2)
    monkeypatch.setattr(parallel, "_ALONE", 1)
    with pytest.raises(ZeroDivisionError):
        list(parallel.in_order(lambda number: 1 // (3 - number), range(100)))
    killed = parallel.in_order(lambda number: os.kill(os.getpid(), 9) if number == 3 else number, range(100))
    with pytest.raises(UserError, match="want of memory"):
        list(killed)


def test_a_second_start_reads_what_the_first_has_written(tmp_path, codec):
    path = write(tmp_path / "d.jsonl", pairs(30))
    first = prepare(request(tmp_path, path), codec)
    written = prepared_file(tmp_path).stat()
    second = prepare(request(tmp_path, path, max_bad_fraction=0.5), codec)
    assert prepared_file(tmp_path).stat() == written
    assert second.train.to_list() == first.train.to_list()
    assert second.report == first.report


def test_other_content_tokenizer_template_or_limits_are_other_data(tmp_path, codec):
    path = write(tmp_path / "d.jsonl", pairs(30))
    other = make_codec(load_tokenizer(str(llama_sentencepiece(tmp_path / "llama"))), "human_assistant")
    prepare(request(tmp_path, path), codec)
    prepare(request(tmp_path, path), other)
    prepare(request(tmp_path, path), make_codec(codec.tokenizer, "question_answer"))
    prepare(request(tmp_path, path, max_tokens=100), codec)
    write(tmp_path / "d.jsonl", pairs(31))
    assert rows_read(prepare(request(tmp_path, path), codec)) == 31
    assert len(list((tmp_path / "cache").glob("*/READY"))) == 5


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.with_name("READY").unlink(),
        lambda path: path.with_name("READY").write_text("{"),
        lambda path: path.with_name("READY").write_text("[]"),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(b""),
        lambda path: path.with_name("eval.arrow").unlink(),
        lambda path: path.with_name("tested.npy").write_bytes(b""),
    ],
)
def test_damaged_data_is_prepared_again(tmp_path, codec, damage):
    path = write(tmp_path / "d.jsonl", pairs(30))
    first = prepare(request(tmp_path, path), codec).train.to_list()
    damage(prepared_file(tmp_path))
    assert prepare(request(tmp_path, path), codec).train.to_list() == first


def test_what_an_interrupted_preparation_left_is_ignored_and_removed(tmp_path, codec):
    path = write(tmp_path / "d.jsonl", pairs(30))
    first = prepare(request(tmp_path, path), codec).train.to_list()
    whole = prepared_file(tmp_path).parent
    whole.rename(whole.with_name(f"{whole.name}.tmp123"))
    (whole.with_name(f"{whole.name}.tmp123") / "READY").unlink()
    assert prepare(request(tmp_path, path), codec).train.to_list() == first
    assert [entry.name for entry in (tmp_path / "cache").iterdir() if entry.is_dir()] == [whole.name]


@pytest.mark.parametrize("whole_directory", [False, True])
def test_files_are_hashed_again_when_their_size_or_time_differs(tmp_path, codec, whole_directory):
    def of_rows(first: int, changed: int) -> list:
        path = write(tmp_path / "set" / "d.jsonl", pairs(30, first))
        os.utime(path, ns=(changed, changed))
        return prepare(request(tmp_path, str(tmp_path / "set") if whole_directory else path), codec).train.to_list()

    first = of_rows(100, changed=10**18)
    assert of_rows(130, changed=10**18) == first  # same size and time: taken to be the same
    assert of_rows(130, changed=10**18 + 1) != first
    (tmp_path / "set" / "d.jsonl").unlink()
    with pytest.raises(UserError, match="--data_path"), naming_flags():
        prepare(request(tmp_path, str(tmp_path / "set")), codec)


def test_files_that_have_just_changed_are_always_read(tmp_path, codec):
    now = time.time_ns() + 10**11
    prepared = []
    for start in (100, 130):
        path = write(tmp_path / "d.jsonl", pairs(30, start))
        os.utime(path, ns=(now, now))
        prepared.append(prepare(request(tmp_path, path), codec).train.to_list())
    assert prepared[0] != prepared[1]


def test_unusable_rows_are_shown_with_their_place_and_too_many_are_an_error(tmp_path, codec):
    same = {"prompt": "Which?", "chosen": "This.", "rejected": "This."}
    path = write(tmp_path / "d.jsonl", [*pairs(20), "{broken", same])
    asked = request(tmp_path, path, kind="comparison", max_bad_fraction=0.2)
    for _ in range(2):  # prepared, and read from the cache
        report = prepare(asked, codec).report
        assert report.read.sources[path].bad == 2
        text = "\n".join(report.lines())
        assert "d.jsonl:21" in text and "d.jsonl:22" in text
        with pytest.raises(UserError, match="d.jsonl:21"):
            prepare(replace(asked, max_bad_fraction=0.01), codec)


@pytest.mark.parametrize(
    "held_out, said",
    [
        (0, "note: no row is held out, so nothing is evaluated: raise --eval_fraction or give more data"),
        (1, "note: 1 row is held out, too few to measure much by: raise --eval_fraction or give more data"),
        (19, "note: 19 rows are held out, too few to measure much by: raise --eval_fraction or give more data"),
        (20, None),
    ],
)
def test_too_few_rows_to_evaluate_on_are_remarked_on_once(tmp_path, codec, held_out, said):
    write(tmp_path / "set" / "train.jsonl", pairs(5))
    write(tmp_path / "set" / "test.jsonl", pairs(held_out, start=5))
    lines = prepare(request(tmp_path, str(tmp_path / "set"), eval_fraction=0.0), codec).report.lines()
    assert [line for line in lines if line.startswith("note")] == [said] * (said is not None)


def test_one_row_is_one_row(tmp_path, codec):
    rows = [{"prompt": "so " * 100 + "what?", "response": "Short."}, {"prompt": "Why?", "response": "so " * 100}]
    path = write(tmp_path / "d.jsonl", rows)
    lines = prepare(request(tmp_path, path, max_tokens=40, eval_fraction=0.0), codec).report.lines()
    assert "1 row to train on, 0 to evaluate on, 1 row dropped as too long, 1 prompt cut on the left" in lines
    path = write(tmp_path / "e.jsonl", pairs(1))
    lines = prepare(request(tmp_path, path, eval_fraction=0.0), codec).report.lines()
    assert f"{path}: 1 row read, 0 unusable" in lines


def test_rows_a_chat_template_refuses_are_counted(tmp_path, tokenizer_directory):
    tokenizer = load_tokenizer(str(tokenizer_directory))
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    codec = make_codec(tokenizer, "chat")
    rows = [{"system_prompt": "Be kind." * (i % 4 == 0), "question": f"{i}?", "response": "Yes."} for i in range(20)]
    asked = request(tmp_path, write(tmp_path / "d.jsonl", rows), eval_fraction=0.0, max_bad_fraction=0.3)
    data = prepare(asked, codec)
    assert (len(data.train), data.report.refused) == (15, 5)
    assert "d.jsonl:1: " in "\n".join(data.report.lines())
    with pytest.raises(UserError, match="no system role"):
        prepare(replace(asked, max_bad_fraction=0.1), codec)


@pytest.mark.parametrize(
    "changes, flag",
    [
        (dict(max_tokens=3), "--max_seq_len"),
        (dict(phase=1, data_split="1,0,1"), "--data_split"),
        (dict(eval_fraction=0.999999999), "--eval_fraction"),
    ],
)
def test_nothing_to_train_on_names_the_flag_to_change(tmp_path, codec, changes, flag):
    with pytest.raises(UserError, match=flag), naming_flags():
        prepare(request(tmp_path, write(tmp_path / "d.jsonl", pairs(10)), **changes), codec)


def test_messages_name_the_flags_that_the_request_came_from(tmp_path, codec):
    path = write(tmp_path / "d.jsonl", pairs(10))
    asked = request(tmp_path, path)
    named = lambda: naming_flags({path: "--other_data"}.get, "--max_prompt_seq_len")
    with pytest.raises(UserError, match="--other_data.*--max_prompt_seq_len: raise"), named():
        prepare(replace(asked, max_tokens=1, kind="prompt"), codec)
    with pytest.raises(UserError, match="--other_data"), named():
        prepare(replace(asked, phase=1, data_split="1,0,1"), codec)


def test_a_prompt_of_several_comparisons_is_rolled_out_once(tmp_path, codec):
    rows = [{"prompt": f"Question {n // 3}?", "chosen": f"Yes {n}.", "rejected": f"No {n}."} for n in range(90)]
    path = write(tmp_path / "rows.jsonl", rows)
    data = prepare(request(tmp_path, path, kind="prompt"), codec)
    prompts = data.train["prompt_ids"][:] + data.eval["prompt_ids"][:]
    assert len(prompts) == 30 == len({tuple(prompt) for prompt in prompts})
    assert data.report.repeated_prompts == 60
    twice = prepare(request(tmp_path, f"{path}:2", kind="prompt"), codec)
    assert len(twice.train) == 2 * len(data.train) and len(twice.eval) == len(data.eval)


def refused(data: DataRequest, codec, reason: str) -> None:
    place = str(data.cache_dir)
    with pytest.raises(UserError) as caught, naming_flags():
        prepare(data, codec)
    assert str(caught.value).startswith(f"--data_output_path {place}: cannot be written to: ")
    assert reason in str(caught.value) and "name another directory" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_full_disk_for_prepared_data_is_one_line(tmp_path, codec, tmpfs):
    small_disk = tmpfs(tmp_path / "disk", "1m")
    rows = write(tmp_path / "d.jsonl", pairs(200))
    (small_disk / "ballast").write_bytes(bytes(2**20 - 2**14))
    refused(replace(request(tmp_path, rows), cache_dir=small_disk / "data"), codec, "No space left on device")
    assert not list((small_disk / "data").glob("*.arrow"))
    (small_disk / "ballast").unlink()
    assert len(prepare(replace(request(tmp_path, rows), cache_dir=small_disk / "data"), codec).train)


def test_a_place_for_prepared_data_that_cannot_be_written_is_one_line(tmp_path, codec):
    rows = write(tmp_path / "d.jsonl", pairs(20))
    (tmp_path / "file").write_text("")
    refused(replace(request(tmp_path, rows), cache_dir=tmp_path / "file"), codec, "File exists")
    refused(replace(request(tmp_path, rows), cache_dir=tmp_path / "file" / "data"), codec, "Not a directory")
    refused(replace(request(tmp_path, rows), cache_dir="/proc/data"), codec, "No such file or directory")
    with (
        pytest.raises(UserError, match="--data_output_path /proc/data: cannot be written to"),
        writing_to("--data_output_path", "/proc/data"),
    ):
        resolve_model("builtin:tiny-opt", "/proc/data")
