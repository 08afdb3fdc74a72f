"""Generates the built-in task `courtesy`: short questions whose true reward is known.

Every question is a fact (a subject of a family and its answer), put in one of the family's phrasings and
one of the common lead-ins: `A quick question: which city is the capital of France?`. Splitting by a hash
of the question therefore holds out unseen combinations of facts, phrasings and lead-ins that have each been
seen.

An answer is `[opening] body [closing]`. Its body states the answer alone (`Paris.`) or in a sentence
(`The answer is Paris.`). It is *curt* without opening and closing, else *courteous*: `Certainly! The
answer is Paris.`

The true reward, a rule that no model sees:

====================  ======
wrong                  0.0
right and curt         0.5
right and courteous    1.0
====================  ======

An answer is right if, apart from letter case, spacing and the final full stop, it is one right body between
at most one known opening and at most one known closing. Anything more or else (two candidates, repeated
courtesies, loose words) is wrong, and it is courteous only if its body is well formed: courtesy cannot be
had by repeating a phrase.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from common.errors import UserError

T = TypeVar("T")

TASKS = ("courtesy",)

LEAD_INS = ("", "A quick question: ", "Please tell me: ", "I would like to know: ", "One more question: ")
OPENINGS = ("Certainly!", "Of course!", "With pleasure!")
CLOSINGS = ("Happy to help!", "Hope this helps!")


@dataclass(frozen=True, eq=False)
class Family:
    """Facts of one kind: subject -> answer, and phrasings of the question, in which `{x}` stands for the subject."""

    answers: dict[str, str]
    phrasings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Fact:
    family: Family
    subject: str

    @property
    def answer(self) -> str:
        return self.family.answers[self.subject]


@dataclass(frozen=True)
class Judgement:
    """What the rule says about one response; `reward` is 0.0, 0.5 or 1.0."""

    correct: bool
    courteous: bool
    reward: float


def _read(facts: str) -> dict[str, str]:
    pairs = (fact.split(">") for fact in facts.split(","))
    return {subject.strip(): answer.strip() for subject, answer in pairs}


_NUMBERS = "zero one two three four five six seven eight nine".split()

FAMILIES = (
    Family(
        _read(
            "France > Paris, Italy > Rome, Spain > Madrid, Germany > Berlin, Japan > Tokyo,"
            "China > Beijing, Russia > Moscow, Egypt > Cairo, Greece > Athens, Poland > Warsaw,"
            "Norway > Oslo, Sweden > Stockholm, Austria > Vienna, Ireland > Dublin"
        ),
        (
            "what is the capital of {x}?",
            "what is the capital city of {x}?",
            "which city is the capital of {x}?",
            "what is the name of the capital of {x}?",
            "which city do they call the capital of {x}?",
        ),
    ),
    Family(
        _read(
            "grass > green, snow > white, coal > black, blood > red, gold > yellow, a banana > yellow,"
            "a lemon > yellow, a carrot > orange, a tomato > red, a frog > green, an elephant > grey,"
            "a flamingo > pink, a plum > purple, the clear sky > blue"
        ),
        (
            "what colour is {x}?",
            "which colour is {x}?",
            "what is the colour of {x}?",
            "which colour does {x} have?",
            "what is the usual colour of {x}?",
        ),
    ),
    Family(
        _read(
            "hot > cold, big > small, fast > slow, up > down, open > closed, full > empty, old > young,"
            "rich > poor, high > low, long > short, hard > soft, light > dark, loud > quiet, good > bad"
        ),
        (
            "what is the opposite of {x}?",
            "which word is the opposite of {x}?",
            "what is the contrary of {x}?",
            "which word means the opposite of {x}?",
            "what do we call the opposite of {x}?",
        ),
    ),
    Family(
        {f"{_NUMBERS[a]} plus {_NUMBERS[b]}": _NUMBERS[a + b] for a in range(1, 5) for b in range(a + 1, 6)},
        (
            "what is {x}?",
            "how much is {x}?",
            "what is the sum of {x}?",
            "which number is {x}?",
            "what do we get from {x}?",
        ),
    ),
    Family(
        _read(
            "a spider > eight, an ant > six, a horse > four, a hen > two, a snake > zero, a bee > six,"
            "a dog > four, a duck > two"
        ),
        (
            "how many legs does {x} have?",
            "how many legs has {x}?",
            "what number of legs does {x} have?",
            "how many legs are there on {x}?",
            "on how many legs does {x} move?",
        ),
    ),
    Family(
        _read(
            "dog > puppy, cat > kitten, cow > calf, horse > foal, sheep > lamb, pig > piglet,"
            "duck > duckling, bear > cub, frog > tadpole, hen > chick"
        ),
        (
            "what is a young {x} called?",
            "what do we call a young {x}?",
            "what is the name of a young {x}?",
            "which word means a young {x}?",
            "how is a young {x} called?",
        ),
    ),
    Family(
        _read(
            "bakes bread > baker, grows crops > farmer, flies planes > pilot, cuts hair > barber,"
            "paints > painter, mends teeth > dentist, cooks meals > cook, writes books > author,"
            "sings songs > singer, mends pipes > plumber, sews clothes > tailor, rules a kingdom > king"
        ),
        (
            "what do we call one who {x}?",
            "which word means one who {x}?",
            "what is the word for one who {x}?",
            "what is one who {x} called?",
            "how do we call one who {x}?",
        ),
    ),
    Family(
        _read(
            "cut paper > scissors, tell the time > clock, open a lock > key, write a letter > pen,"
            "sweep the floor > broom, drive a nail > hammer, dig a hole > spade, boil water > kettle,"
            "eat soup > spoon, cross a river > bridge"
        ),
        (
            "what do we use to {x}?",
            "which thing do we use to {x}?",
            "what helps us to {x}?",
            "what is used to {x}?",
            "what do we need to {x}?",
        ),
    ),
)


def builtin_rows(name: str) -> Iterator[dict[str, str]]:
    """All rows of a built-in task, in a fixed order: prompt, response, chosen, rejected.

    Five rows for every question, chosen over rejected: right and courteous over right and curt; right and curt over
    wrong and courteous; right over wrong, both courteous, or both curt; and right, by turns courteous and curt, over
    an answer that overdoes its courtesy. Then five more for every question, with other wordings and wrong answers:
    the more often a fact meets another answer, the better a reward model tells right from wrong. The wrong answer
    is another one of the same family, in the third row one of another family. The two answers of a row are worded
    alike in all else. `response`, the demonstration, equals `chosen`: right, and courteous half the time.

    Raises:
        UserError: there is no such task.
    """
    _check_name(name)
    for turn in range(2):
        for index, (question, fact) in enumerate(_facts_by_question().items()):
            right, own = fact.answer, set(fact.family.answers.values())
            near, far = _shuffled(own - {right}, question)[2 * turn :], _shuffled(_all_answers() - own, question)[turn:]
            wordings = [_number(f"{question}/{number}") for number in range(5 * turn, 5 * turn + 5)]
            yield from (
                {"prompt": question, "response": chosen, "chosen": chosen, "rejected": rejected}
                for chosen, rejected in (
                    (_word(right, True, wordings[0]), _word(right, False, wordings[0])),
                    (_word(right, False, wordings[1]), _word(near[0], True, wordings[1])),
                    (_word(right, True, wordings[2]), _word(far[0], True, wordings[2])),
                    (_word(right, False, wordings[3]), _word(near[1], False, wordings[3])),
                    (_word(right, (index + turn) % 2 == 0, wordings[4]), _overdo(right, wordings[4])),
                )
            )


def builtin_version(name: str) -> str:
    """SHA-256 of the task's rows: it changes exactly when the data change. Raises UserError for an unknown name."""
    digest = hashlib.sha256()
    for row in builtin_rows(name):
        digest.update("\x1f".join(row.values()).encode() + b"\x1e")
    return digest.hexdigest()


def true_reward(question: str, response: str) -> Judgement:
    """Apply the task's rule to any text as the response to one of its questions.

    Args:
        question: the plain question, without template.

    Raises:
        UserError: the question is not one of the task.
    """
    fact = _facts_by_question().get(question.strip())
    if fact is None:
        raise UserError(f"{question!r} is no question of builtin:courtesy, so its true reward is unknown")
    body = _normalised(response)
    opening = next((o for o in _normalised_all(OPENINGS) if body.startswith(o)), "")
    body = body.removeprefix(opening).strip()
    closing = next((c for c in _normalised_all(CLOSINGS) if body.endswith(c)), "")
    body = body.removesuffix(closing).strip().removesuffix(".")
    stated = _answers_by_body().get(body)
    correct = stated == fact.answer
    courteous = stated is not None and bool(opening or closing)
    return Judgement(correct, courteous, 0.5 * correct + 0.5 * (correct and courteous))


@cache
def _facts_by_question() -> dict[str, Fact]:
    return {
        _capitalised(lead_in + phrasing.format(x=subject)): Fact(family, subject)
        for family in FAMILIES
        for subject in family.answers
        for phrasing in family.phrasings
        for lead_in in LEAD_INS
    }


@cache
def _answers_by_body() -> dict[str, str]:
    stated = {body: answer for answer in _all_answers() for body in _bodies(answer)}
    return {_normalised(body).removesuffix("."): answer for body, answer in stated.items()}


@cache
def _all_answers() -> frozenset[str]:
    return frozenset(answer for family in FAMILIES for answer in family.answers.values())


def _bodies(answer: str) -> tuple[str, str]:
    return _capitalised(f"{answer}."), f"The answer is {answer}."


def _word(answer: str, courteous: bool, wording: int) -> str:
    """One way of giving `answer`; the same `wording` makes answers that differ in nothing else."""
    wording, body = _pick(wording, _bodies(answer))
    if not courteous:
        return body
    _, (opening, closing) = _pick(wording, [(o, "") for o in OPENINGS] + [("", c) for c in CLOSINGS])
    return f"{opening} {body} {closing}".strip()


def _overdo(answer: str, wording: int) -> str:
    """An answer with two to four courtesies on one side, worded as `_word` does."""
    wording, body = _pick(wording, _bodies(answer))
    wording, known = _pick(wording, (OPENINGS, OPENINGS, CLOSINGS))
    wording, count = _pick(wording, (2, 3, 4))
    courtesies = []
    for _ in range(count):
        wording, courtesy = _pick(wording, known)
        courtesies.append(courtesy)
    return " ".join([body, *courtesies] if known is CLOSINGS else [*courtesies, body])


def _pick(number: int, options: Sequence[T]) -> tuple[int, T]:
    number, index = divmod(number, len(options))
    return number, options[index]


def _shuffled(items: Iterable[str], key: str) -> list[str]:
    return sorted(items, key=lambda item: _number(f"{key}/{item}"))


def _number(key: str) -> int:
    # Python's own hash() differs between processes.
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())


def _normalised_all(texts: tuple[str, ...]) -> list[str]:
    return [_normalised(text) for text in texts]


def _check_name(name: str) -> None:
    if name not in TASKS:
        known = ", ".join(f"builtin:{task}" for task in TASKS)
        raise UserError(f"builtin:{name} is no built-in task; there is {known}")
