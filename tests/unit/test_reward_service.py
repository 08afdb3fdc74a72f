"""Rewards from a service, against a real server on this machine."""

import json
import logging

import pytest

from common.rewards.errors import RewardError
from common.rewards.service import ServiceReward, ServiceSettings
from tests.rewards import Server, batch_of

SECRET = "s3cret-t0ken"


@pytest.fixture
def served():
    servers = []

    def start(*answers) -> Server:
        servers.append(Server(*answers))
        return servers[-1]

    yield start
    for server in servers:
        server.released.set()
        server.shutdown()
        server.server_close()


def lengths(body) -> str:
    return json.dumps({"scores": [len(text) for text in body["responses"]], "figures": {"batch": len(body["prompts"])}})


def asked(server: Server, batch, **settings):
    """(scores, the pauses that were made)."""
    pauses = []
    reward = ServiceReward(server.url, ServiceSettings(**settings), pauses.append)
    try:
        return reward.score(batch), pauses
    finally:
        reward.close()


def test_a_service_gets_all_of_each_response_in_batches(served):
    server = served((200, lengths))
    batch = batch_of("a", "bb", "ccc", answer=["x", None, {"deep": [1]}])
    scores, _ = asked(server, batch, batch_size=2)
    assert scores.numbers == [1.0, 2.0, 3.0] and scores.figures == {"batch": pytest.approx(5 / 3)}
    assert [len(request["responses"]) for request in server.requests] == [2, 1]
    assert server.requests[1] == {
        "prompts": ["prompt 2"],
        "messages": [[{"role": "user", "content": "question 2"}]],
        "responses": ["ccc"],
        "response_ids": [[2]],
        "columns": {"answer": [{"deep": [1]}]},
    }
    assert server.headers == [None, None]


def test_a_bare_list_is_an_answer_too(served):
    assert asked(served((200, "[1, 2.5]")), batch_of("a", "b"))[0].numbers == [1.0, 2.5]


@pytest.mark.parametrize("status", (429, 500, 503))
def test_a_service_that_is_busy_is_asked_again_with_growing_pauses(served, status):
    scores, pauses = asked(served((status, ""), (status, ""), (200, lengths)), batch_of("abc"))
    assert scores.numbers == [3.0] and pauses == [0.5, 1.0]


@pytest.mark.parametrize(
    "answer, said, attempts",
    [
        ((500, ""), "it answered 500 Internal Server Error, at each of 3 attempts (--reward_retries)", 3),
        ((404, "no such path"), "it answered 404 Not Found: 'no such path'", 1),
        ((302, ""), "it answered 302", 1),
        ((200, "hello"), "it answered with 'hello', which is no JSON", 1),
        ((200, '{"score": 1}'), 'it must answer with {"scores": [...]} or a list of numbers', 1),
        ((200, "[1, 2, 3]"), "it gave 3 scores for 2 responses", 1),
        ((200, '{"scores": [1, 2], "figures": 3}'), "its figures are no object", 1),
        ((200, '"many"'), "it must answer with", 1),
    ],
)
def test_a_service_that_fails_is_one_line_for_every_response(served, answer, said, attempts):
    server = served(answer)
    scores, _ = asked(server, batch_of("a", "b"), retries=2)
    assert [failure.response for failure in scores.failures] == [0, 1] and scores.numbers == [0.0, 0.0]
    assert said in scores.failures[0].why and "\n" not in scores.failures[0].why
    assert len(server.requests) == attempts


@pytest.mark.parametrize("value", ("null", "NaN", '"high"', "Infinity"))
def test_a_score_that_is_no_number_is_that_responses_failure(served, value):
    scores, _ = asked(served((200, f"[1, {value}]")), batch_of("a", "b"))
    assert [failure.response for failure in scores.failures] == [1] and scores.numbers == [1.0, 0.0]


def test_a_service_that_does_not_answer_in_time_or_is_not_there_is_asked_again(served):
    server = served((0, ""), (200, lengths))
    scores, pauses = asked(server, batch_of("abc"), timeout=0.5)
    assert scores.numbers == [3.0] and pauses == [0.5]
    scores, pauses = asked(served((0, "")), batch_of("a"), timeout=0.2, retries=1)
    assert scores.failures[0].why.startswith("it gave no answer within 0.2 seconds (--reward_timeout), at each of 2")
    gone = ServiceReward("http://127.0.0.1:9/", ServiceSettings(retries=1), lambda seconds: None)
    assert gone.score(batch_of("a")).failures[0].why.startswith("it cannot be reached")


@pytest.mark.parametrize("value, sent", [(SECRET, f"Bearer {SECRET}"), (f"Basic {SECRET}", f"Basic {SECRET}")])
def test_the_authorisation_comes_from_the_environment_and_is_never_shown(served, monkeypatch, caplog, value, sent):
    monkeypatch.setenv("REWARD_TOKEN", value)
    caplog.set_level(logging.DEBUG)
    server = served((401, f"the header was {sent}"))
    scores, _ = asked(server, batch_of("a"), header_env="REWARD_TOKEN")
    assert server.headers == [sent]
    assert "401" in scores.failures[0].why and SECRET not in scores.failures[0].why
    assert SECRET not in caplog.text


@pytest.mark.parametrize("value", (None, " ", "two\nlines", "caf\u00e9"))
def test_an_authorisation_that_cannot_be_sent_is_refused_by_its_name(monkeypatch, value):
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("REWARD_TOKEN", value)
    with pytest.raises(RewardError, match="^REWARD_TOKEN: the environment variable") as error:
        ServiceReward("http://host/", ServiceSettings(header_env="REWARD_TOKEN"))
    assert value is None or not value.strip() or value not in str(error.value)


def test_a_column_that_json_cannot_hold_is_one_line(served):
    scores, _ = asked(served((200, lengths)), batch_of("a", weight=[float("nan")]))
    assert "cannot be written as JSON" in scores.failures[0].why
