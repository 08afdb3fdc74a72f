"""Reward functions: what they get, what each wrong one is told, and functions in processes of their own."""

import os
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from common.rewards.answers import WrongAnswer, read_answer
from common.rewards.batch import RewardBatch, Scores, merged
from common.rewards.errors import Failure, RewardError
from common.rewards.function import FunctionReward, load_function
from common.rewards.opening import kept_columns, try_reward
from common.rewards.pool import PooledFunction
from tests.rewards import batch_of

TIMEOUT = 60.0  # far more than any call of these tests takes, but for those that hang


@pytest.fixture
def function(tmp_path):
    """Writes a function `f` to a file, and loads it."""

    def write(code: str, name: str = "f"):
        path = tmp_path / f"rewards_{len(list(tmp_path.iterdir()))}.py"
        path.write_text(code)
        return load_function(f"{path}:{name}")

    return write


def scores_of(function, batch: RewardBatch) -> Scores:
    return FunctionReward(function, every_failure=True).score(batch)


def test_a_function_gets_what_it_declares_and_nothing_else(function):
    declared = function(
        "def f(responses, answer, *, level=3): return [float(r == a) for r, a in zip(responses, answer)]"
    )
    assert (declared.columns, declared.optional_columns) == (("answer",), ("level",))
    batch = batch_of("4", "5", answer=["4", "6"], tests=[[], []])
    assert declared.arguments(batch).keys() == {"responses", "answer"}
    assert scores_of(declared, batch).numbers == [1.0, 0.0]
    everything = function("def f(prompts, messages, responses, response_ids, **rest): return [float(len(rest))] * 2")
    assert everything.arguments(batch).keys() == {
        *("prompts", "messages", "responses", "response_ids"),
        *("answer", "tests"),
    }
    assert kept_columns([declared, everything], ("id", "*")).required == ("answer", "id")


def test_modules_are_found_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some_package").mkdir()
    (tmp_path / "some_package" / "helper.py").write_text("SCORE = 2.0")
    (tmp_path / "some_package" / "rewards.py").write_text(
        "from some_package.helper import SCORE\ndef f(responses): return [SCORE for _ in responses]"
    )
    assert scores_of(load_function("some_package.rewards:f"), batch_of("a")).numbers == [2.0]
    with pytest.raises(RewardError, match="there is no module some_package.reward in"):
        load_function("some_package.reward:f")


@pytest.mark.parametrize(
    "code, name, said",
    [
        ("", "f", "has no function f; it has none"),
        ("def correct(responses): pass", "corect", "has no function corect; did you mean correct?; it has correct"),
        ("f = 3", "f", "has no function, but another value, of the name f"),
        ("def f(:", "f", "cannot be imported: SyntaxError: invalid syntax (rewards_0.py, line 1)"),
        ("import not_there", "f", "cannot be imported: ModuleNotFoundError: No module named 'not_there'"),
        ("1 / 0", "f", "cannot be imported: ZeroDivisionError: division by zero (rewards_0.py, line 1)"),
        ("raise SystemExit(3)", "f", "cannot be imported: SystemExit: 3"),
        ("async def f(responses): pass", "f", "is an async function"),
        ("def f(responses, /): pass", "f", "its parameter responses has no name to be given by"),
    ],
)
def test_a_function_that_cannot_be_called_is_one_line(function, code, name, said):
    with pytest.raises(RewardError) as error:
        function(code, name)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(RewardError, match="there is no file"):
        load_function(f"{tmp_path}/nowhere.py:f")


@pytest.mark.parametrize(
    "answer, numbers, figures",
    [
        ([1, 2.5, True], [1.0, 2.5, 1.0], {}),
        ((1, 2, 3), [1.0, 2.0, 3.0], {}),
        (np.array([1.0, 2.0, 3.0], np.float32), [1.0, 2.0, 3.0], {}),
        (torch.tensor([1, 2, 3]), [1.0, 2.0, 3.0], {}),
        ([np.float64(1), torch.tensor(2.0), 3], [1.0, 2.0, 3.0], {}),
        (([1, 2, 3], {"exact": np.float32(0.5)}), [1.0, 2.0, 3.0], {"exact": 0.5}),
    ],
)
def test_numbers_of_any_library_are_scores(answer, numbers, figures):
    scores = read_answer(answer, 3)
    assert (scores.numbers, scores.figures, scores.failures) == (numbers, figures, ())


@pytest.mark.parametrize(
    "answer, said",
    [
        (None, "it gave None for 3 responses"),
        (1.0, "it gave 1.0 for 3 responses"),
        ("abc", "it gave a str 'abc' for 3 responses"),
        ([1, 2], "it gave 2 scores for 3 responses"),
        (np.zeros((3, 2)).tolist()[:2], "it gave 2 scores for 3 responses"),
        (([1, 2, 3], {"exact": "much"}), "it gave a str 'much' for the figure 'exact'"),
        (([1, 2, 3], {"exact": float("nan")}), "it gave nan for the figure 'exact'"),
    ],
)
def test_an_answer_that_is_wrong_as_a_whole_says_why(answer, said):
    with pytest.raises(WrongAnswer, match=said):
        read_answer(answer, 3)


@pytest.mark.parametrize(
    "value, said",
    [
        ("None", "it gave None, which is no finite number"),
        ("float('nan')", "it gave nan, which"),
        ("-float('inf')", "it gave -inf, which"),
        ("10 ** 400", "which is no finite number"),
        ("1e300", "it gave 1e+300, which is no finite number of single precision"),
        ("exit(0)", "it raised SystemExit: 0"),
        ("'0.5'", "it gave a str '0.5', which"),
        ("[1.0]", "it gave a list, which"),
        ("{}['missing']", "it raised KeyError: 'missing' (rewards_0.py, line 1)"),
    ],
)
@pytest.mark.parametrize("workers", (0, 2))
def test_one_response_that_fails_is_named_and_the_others_have_their_scores(function, value, said, workers):
    code = f"def f(responses): return [{value} if text == 'odd' else 2.0 for text in responses]"
    loaded = function(code)
    reward = PooledFunction(loaded, workers, TIMEOUT, True) if workers else FunctionReward(loaded, True)
    try:
        batch = batch_of("a", "b", "odd", "c")
        scores = reward.score(batch)
        (failure,) = scores.failures
        assert failure.response == 2 and said in failure.why
        assert scores.numbers == [2.0, 2.0, 0.0, 2.0]
        assert failure.line("my.py:f", 3, batch.rows[2]).startswith(
            "my.py:f, on response 3 to the prompt in data.jsonl:3: it "
        )
        with pytest.raises(RewardError) as error:
            try_reward("my.py:f", reward, batch)
        assert "response 3 of 4, to the prompt in data.jsonl:3" in str(error.value)
    finally:
        reward.close()


def test_a_function_that_fails_only_on_several_responses_fails_on_all(function):
    picky = function("def f(responses): return [1.0] * min(len(responses), 1)")
    scores = scores_of(picky, batch_of("a", "b"))
    assert [failure.response for failure in scores.failures] == [0, 1]
    assert "of each response alone that is not so" in scores.failures[0].why


def test_after_the_first_failure_no_other_response_is_tried_where_one_is_enough(function, tmp_path):
    calls = tmp_path / "calls"
    code = f"def f(responses):\n open({str(calls)!r}, 'a').write('x')\n raise ValueError('no')"
    scores = FunctionReward(function(code)).score(batch_of("a", "b", "c"))
    assert len(scores.failures) == 1 and len(calls.read_text()) == 2
    assert len(scores_of(function(code), batch_of("a", "b", "c")).failures) == 3


def test_workers_give_what_the_process_itself_gives(function):
    loaded = function(
        "def f(responses, answer):\n"
        " return [len(text) + number for text, number in zip(responses, answer)], {'mean': sum(answer) / len(answer)}"
    )
    batch = batch_of("a", "bb", "ccc", "dddd", "eeeee", answer=[1, 2, 3, 4, 5])
    pool = PooledFunction(loaded, 2, TIMEOUT)
    try:
        for rows in ([0, 1, 2, 3, 4], [3], [], [1, 2]):
            part = batch.select(rows)
            assert pool.score(part) == scores_of(loaded, part)
    finally:
        pool.close()


def test_a_call_that_hangs_is_ended_and_its_worker_replaced(function):
    loaded = function(
        "import time\ndef f(responses):\n if 'hang' in responses: time.sleep(3600)\n return [1.0] * len(responses)"
    )
    pool = PooledFunction(loaded, 2, 3.0, every_failure=True)
    try:
        scores = pool.score(batch_of("a", "hang", "b", "c"))
        assert scores == Scores(
            [1.0, 0.0, 1.0, 1.0], failures=(Failure(1, "it gave no answer within 3 seconds (--reward_timeout)"),)
        )
        assert pool.score(batch_of("a", "b")).numbers == [1.0, 1.0]
    finally:
        pool.close()


def test_a_function_that_ends_its_process_is_one_failure(function):
    loaded = function(
        "import os\ndef f(responses):\n if 'end' in responses: os._exit(7)\n return [1.0] * len(responses)"
    )
    pool = PooledFunction(loaded, 1, TIMEOUT, every_failure=True)
    try:
        scores = pool.score(batch_of("a", "end"))
        assert scores.failures == (Failure(1, "it ended its process with the code 7"),)
    finally:
        pool.close()


def test_workers_end_with_the_process_that_started_them_even_if_a_call_hangs(tmp_path):
    """A rank that is killed tells its workers nothing."""
    (tmp_path / "hang.py").write_text("import time\ndef f(responses): time.sleep(3600)")
    reading, writing = os.pipe()
    rank = os.fork()
    if not rank:
        try:
            pool = PooledFunction(load_function(f"{tmp_path}/hang.py:f"), 1, 3600.0)
            pool._ask(0, batch_of("a"))
            os.write(writing, str(pool._workers[0].process.pid).encode())
            time.sleep(3600)
        finally:
            os._exit(1)
    worker = psutil.Process(int(os.read(reading, 20)))
    os.kill(rank, 9)
    os.waitpid(rank, 0)
    worker.wait(timeout=60)


def test_parts_of_a_batch_merge_to_the_scores_of_the_whole():
    parts = [
        ([0, 2], Scores([1.0, 3.0], {"exact": 1.0})),
        ([1], Scores([0.0], {"exact": 4.0, "rare": 5.0}, (Failure(0, "it gave None"),))),
    ]
    whole = merged(3, parts)
    assert whole.numbers == [1.0, 0.0, 3.0] and whole.failures == (Failure(1, "it gave None"),)
    assert whole.figures == {"exact": 2.0, "rare": 5.0}


def test_the_worker_imports_nothing_slow():
    """Each rank starts several; none may take the memory and the seconds that torch takes."""
    import subprocess
    import sys

    code = "import sys, common.rewards.worker; print('torch' in sys.modules, 'numpy' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.stdout.split() == ["False", "False"], run.stderr
