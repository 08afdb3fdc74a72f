"""Responses of the inference programs against what `transformers` itself generates, and against one another."""

import threading
from dataclasses import replace

import pytest
import torch

from common.runtime.terminal import escape_controls
from inference.decoding import respond, stream_response
from inference.dialogue import Dialogue
from inference.loading import load_actor
from inference.options import DecodingOptions, LoadOptions
from tests.chat_model import AGAIN, ANSWERS, CAPITAL, RED, SING, prompt_of

GREEDY = DecodingOptions(max_new_tokens=40)
PROMPTS = [prompt_of(turns) for turns in ANSWERS] + [prompt_of((SING,))]


@pytest.fixture(scope="module")
def actor(chat_model):
    return load_actor(str(chat_model), LoadOptions())


def generated(actor, prompt, **options) -> list[int]:
    """Without our code around it: ids up to the end token."""
    ids = torch.tensor([actor.codec.encode_prompt(prompt)])
    end, pad = actor.codec.end_id, actor.codec.pad_id
    new = actor.model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=end, pad_token_id=pad, **options)[
        0, ids.shape[1] :
    ].tolist()
    return new[: new.index(end)] if end in new else new


def test_batches_say_what_each_prompt_gets_alone(actor):
    alone = [generated(actor, prompt, max_new_tokens=40, do_sample=False) for prompt in PROMPTS]
    for batch_size in (1, 2, 5):
        for order in (PROMPTS, PROMPTS[::-1]):
            answers = dict(zip(order, respond(actor, order, GREEDY, batch_size)))
            assert [list(answers[prompt].ids) for prompt in PROMPTS] == alone
    known = [answers[prompt] for prompt in PROMPTS[:-1]]
    assert [answer.text for answer in known] == list(ANSWERS.values())
    assert all(answer.ended for answer in known)
    song = answers[PROMPTS[-1]]
    assert not song.ended and len(song.ids) == 40


@pytest.mark.parametrize("decoding", [GREEDY, replace(GREEDY, num_beams=3)])
def test_a_streamed_answer_is_the_answer(decoding, actor):
    for prompt, answer in zip(PROMPTS, respond(actor, PROMPTS, decoding, batch_size=1)):
        ids = list(stream_response(actor, actor.codec.encode_prompt(prompt), decoding))
        assert tuple(token for token in ids if token != actor.codec.end_id) == answer.ids
        assert "".join(actor.codec.stream(ids)) == answer.text


def test_beams_find_what_transformers_finds(actor):
    decoding = replace(GREEDY, num_beams=4)
    answers = respond(actor, PROMPTS, decoding, batch_size=1)
    assert [list(answer.ids) for answer in answers] == [
        generated(actor, prompt, max_new_tokens=40, num_beams=4, do_sample=False) for prompt in PROMPTS
    ]


def test_closing_a_response_stream_stops_generation(actor):
    threads = threading.active_count()
    endless = replace(GREEDY, max_new_tokens=450)
    ids = stream_response(actor, actor.codec.encode_prompt(prompt_of((SING,))), endless)
    next(ids)
    assert threading.active_count() == threads + 1
    ids.close()
    assert threading.active_count() == threads


def test_an_error_in_generation_is_raised_in_the_reader_of_the_stream(actor):
    with pytest.raises((IndexError, RuntimeError)):
        list(stream_response(actor, [10**9], GREEDY))


def test_sampling_depends_on_the_seed_alone(actor):
    decoding = replace(GREEDY, temperature=3.0)

    def answers(seed):
        torch.manual_seed(seed)
        return respond(actor, PROMPTS, decoding, batch_size=2)

    assert answers(1) == answers(1) != answers(2)


@pytest.mark.parametrize("size", [2, 3])
def test_no_ngram_occurs_twice_in_an_answer(size, actor):
    decoding = replace(GREEDY, no_repeat_ngram_size=size)
    (answer,) = respond(actor, PROMPTS[-1:], decoding, batch_size=1)
    ngrams = list(zip(*(answer.ids[i:] for i in range(size))))
    assert ngrams and len(set(ngrams)) == len(ngrams)


@pytest.mark.parametrize("rule", [{"no_repeat_ngram_size": 2}, {"repetition_penalty": 1.3}])
def test_rules_against_repetition_leave_a_repeated_question_its_answer(rule, actor):
    asked_twice = prompt_of((CAPITAL, ANSWERS[CAPITAL,], CAPITAL))
    (answer,) = respond(actor, [asked_twice], replace(GREEDY, **rule), batch_size=1)
    assert answer.text == ANSWERS[CAPITAL,] and answer.ended


def test_what_the_models_directory_recommends_changes_nothing(actor):
    before = respond(actor, PROMPTS, GREEDY, batch_size=1)
    actor.model.generation_config.repetition_penalty = 50.0
    actor.model.generation_config.max_length = 3
    assert respond(actor, PROMPTS, GREEDY, batch_size=1) == before


def test_a_dialogue_keeps_its_newest_turns_and_its_system_prompt(actor):
    codec = actor.codec
    dialogue = Dialogue(codec, max_prompt_tokens=80, system="Be brief.")
    forgotten = 0
    for number in range(6):
        ids, notice = dialogue.ask(f"Question number {number}?")
        text = codec.tokenizer.decode(ids)
        assert len(ids) <= 80 and "Be brief." in text
        assert text.endswith(f"number {number}?\n\nAnswer:")
        forgotten += notice is not None
        dialogue.add_response("It is so.")
    assert 0 < forgotten < 6
    dialogue.reset()
    assert dialogue.ask(AGAIN) == Dialogue(codec, system="Be brief.").ask(AGAIN)


def test_nothing_a_terminal_obeys_is_shown():
    written = ANSWERS[RED,] + "".join(map(chr, range(0xA0))) + "\u202e\u2066 caf\u00e9 \u2713\n\t"
    shown = escape_controls(written)
    assert all(character.isprintable() or character in "\n\t" for character in shown)
    assert shown.endswith(" caf\u00e9 \u2713\n\t") and len(shown) == len(written)
