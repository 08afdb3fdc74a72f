"""The parts of docs/examples/sentiment.sh that need neither its packages nor half an hour."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.config.parser import parse
from common.models.builtin import materialise
from docs.examples.sentiment_inputs import write_prompts
from step3_ppo.config import PPOConfig
from tests.launching import ROOT


@pytest.fixture
def report(monkeypatch):
    """docs/examples/sentiment_report.py, with the letters o of a text as its sentiment."""
    package, module = ModuleType("vaderSentiment"), ModuleType("vaderSentiment.vaderSentiment")
    scores = lambda text: {"compound": float(text.count("o"))}
    module.SentimentIntensityAnalyzer = lambda: SimpleNamespace(polarity_scores=scores)
    for name in ("docs.examples.sentiment", "docs.examples.sentiment_report"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys, "path", [*sys.path])
    from docs.examples import sentiment_report

    yield sentiment_report
    for name in ("docs.examples.sentiment", "docs.examples.sentiment_report"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def model(builtin_cache):
    return materialise("builtin:tiny-opt", builtin_cache)


def test_the_prompts_all_differ_and_end_where_a_word_ends(tmp_path):
    write_prompts(tmp_path / "prompts.jsonl")
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert len(set(prompts)) == len(prompts) == 192
    assert not [prompt for prompt in prompts if prompt != prompt.strip() or "{" in prompt]


def test_step_3_takes_the_flags_of_the_script(tmp_path):
    script = (ROOT / "docs/examples/sentiment.sh").read_text()
    script = script.replace("$output", str(tmp_path)).replace("$examples", "docs/examples")
    words = shlex.split(re.search(r"^flags=\((.*?)^\)$", script, re.S | re.M)[1], comments=True)
    config = parse(PPOConfig, words)
    assert config.reward == ("docs/examples/sentiment.py:sentiment",)
    assert not config.reads_reward_model and config.unused_options() == {}


def test_the_perplexity_is_that_of_the_answers_tokens_after_their_prompts(report, model):
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    pairs = [("The answer is", " good"), ("The", " other answer of two"), ("Nothing", "")]
    losses = []
    for prompt, response in pairs:
        ids, own = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, response))
        for token in own:
            with torch.no_grad():
                losses.append(-float(network(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token]))
            ids = [*ids, token]
    expected = math.exp(sum(losses) / len(losses))
    assert report.perplexity(network, tokenizer, pairs) == pytest.approx(expected, rel=1e-4)


def test_it_reports_both_answers_and_the_best_of_four(report, model, tmp_path, capsys):
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "ppo/samples").mkdir(parents=True)
    for name, response, kl in (("before", " no", 0.0), ("after", " good oo", 2.0)):
        rows = [{"prompt": f"The {thing}", "response": response, "reward": 0.0, "kl": kl} for thing in ("film", "book")]
        (tmp_path / f"ppo/samples/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ppo/logs").mkdir()
    target = math.log(4) - 0.75
    iterations = [("train", 0.0, 1.0), ("eval", 9.0, 9.0), ("train", target / 2, 2.0), ("train", target * 2, 5.0)]
    rows = [{"phase": phase, "kl": kl, "reward": reward} for phase, kl, reward in iterations]
    (tmp_path / "ppo/logs/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.main(tmp_path)
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line[:3] for line in lines[1:3]] == [["| before", "1.000", "0.00"], ["| after", "4.000", "2.00"]]
    assert lines[3][0] == "| best of 4 before" and lines[3][2] == f"{target:.2f}"
    assert lines[4][:3] == ["| in training, at that KL", "3.000", f"{target:.2f}"]  # a third of the way from 2 to 5
