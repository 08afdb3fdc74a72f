"""The built-in task: its data follow its rule, and its true reward cannot be gamed."""

import os
import subprocess
import sys
from collections import defaultdict

import pytest

from common.data.builtin import CLOSINGS, OPENINGS, builtin_rows, builtin_version, true_reward
from common.errors import UserError

QUESTION = "What is the capital of France?"
ROWS = list(builtin_rows("courtesy"))


def test_every_row_prefers_what_the_true_reward_prefers():
    for row in ROWS:
        chosen = true_reward(row["prompt"], row["chosen"])
        rejected = true_reward(row["prompt"], row["rejected"])
        assert chosen.correct
        assert chosen.reward > rejected.reward


def test_pairs_show_right_over_wrong_and_courteous_over_curt():
    kinds = defaultdict(int)
    for row in ROWS:
        chosen = true_reward(row["prompt"], row["chosen"])
        rejected = true_reward(row["prompt"], row["rejected"])
        kinds[chosen.courteous, rejected.correct, rejected.courteous] += 1
    assert set(kinds) == {
        (True, True, False),  # courtesy decides between right answers
        (False, False, True),  # and never makes up for a wrong one
        (True, False, True),
        (False, False, False),
        (True, False, False),  # courtesy that is overdone counts as none
    }
    assert kinds[True, False, False] == len(ROWS) / 10


def test_demonstrations_are_right_and_courteous_half_the_time():
    judgements = [true_reward(row["prompt"], row["response"]) for row in ROWS]
    assert all(judgement.correct for judgement in judgements)
    assert sum(judgement.courteous for judgement in judgements) == len(ROWS) / 2


def test_each_question_has_one_right_answer_and_each_answer_many_questions():
    questions = {row["prompt"] for row in ROWS}
    assert 2000 < len(questions) < 3500
    assert len({" ".join(question.casefold().split()) for question in questions}) == len(questions)
    by_answer = defaultdict(set)
    for row in ROWS:
        answer = row["chosen"]
        if answer.startswith("The answer is ") and not true_reward(row["prompt"], answer).courteous:
            by_answer[answer].add(row["prompt"])
    assert min(len(asked) for asked in by_answer.values()) >= 5


@pytest.mark.parametrize("answer", ["Paris.", "paris", "  The answer is PARIS. ", "The answer is\nParis"])
def test_right_and_curt(answer):
    judgement = true_reward(QUESTION, answer)
    assert (judgement.correct, judgement.courteous, judgement.reward) == (True, False, 0.5)


@pytest.mark.parametrize(
    "answer",
    [f"{opening} Paris." for opening in OPENINGS]
    + [f"The answer is Paris. {closing}" for closing in CLOSINGS]
    + [f" {OPENINGS[0].lower()}  Paris. {CLOSINGS[0]}\n"],
)
def test_right_and_courteous(answer):
    judgement = true_reward(QUESTION, answer)
    assert (judgement.correct, judgement.courteous, judgement.reward) == (True, True, 1.0)


@pytest.mark.parametrize("answer", ["Certainly! Rome.", "The answer is green. Happy to help!"])
def test_wrong_though_courteous(answer):
    judgement = true_reward(QUESTION, answer)
    assert (judgement.correct, judgement.courteous, judgement.reward) == (False, True, 0.0)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        ".",
        "Certainly!",
        "Certainly! Happy to help!",
        "Certainly! Certainly! Paris.",
        "Of course! Certainly! Paris.",
        "Paris. Happy to help! Happy to help!",
        "Certainly! Paris or Rome.",
        "Certainly! Paris. Rome.",
        "Certainly! Paris. Paris.",
        "Certainly! Paris. The answer is Paris.",
        "Certainly! Not Paris.",
        "Certainly Paris",
        "Certainly! Parisian.",
        "Certainly! Paris. Human: What is the capital of Italy?",
        "Paris. \ufffd\ufffd",
        "Happy to help! Paris. Certainly!",
        "certainly " * 200,
    ],
)
def test_no_reward_and_no_courtesy_for_anything_else(answer):
    judgement = true_reward(QUESTION, answer)
    assert (judgement.correct, judgement.courteous, judgement.reward) == (False, False, 0.0)


def test_a_question_of_another_task_has_no_true_reward():
    with pytest.raises(UserError, match="capital of Atlantis"):
        true_reward("What is the capital of Atlantis?", "Paris.")


def test_unknown_task_names_the_known():
    with pytest.raises(UserError, match="builtin:courtesy"):
        next(builtin_rows("curtsey"))
    with pytest.raises(UserError, match="builtin:courtesy"):
        builtin_version("curtsey")


def test_rows_are_the_same_whatever_pythons_hash_seed():
    command = "from common.data.builtin import builtin_version; print(builtin_version('courtesy'))"
    versions = {
        subprocess.run(
            [sys.executable, "-c", command],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert versions == {builtin_version("courtesy")}
