"""The summary of a pipeline, from files as the three steps write them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from common.data.builtin import builtin_rows
from common.data.records import Message, Prompt
from common.data.templates import get_template
from common.errors import UserError
from launch.report import FORMAT, Change, make_report, question_of, render, write_summary
from tests.launching import ROOT

QUESTIONS = list(dict.fromkeys(row["prompt"] for row in builtin_rows("courtesy")))[:8]
RIGHT = {row["prompt"]: row["chosen"] for row in builtin_rows("courtesy")}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluations(*metrics):
    rows = [{"phase": "eval", "step": step, "seconds": 30.0 * step, **values} for step, values in enumerate(metrics)]
    return [
        *rows,
        {"phase": "train", "step": 9, "seconds": 59.0, "reward": 100.0},
        {**rows[-1], "phase": "done", "seconds": 60.0},
    ]


@pytest.fixture
def outputs(tmp_path):
    write_rows(
        tmp_path / "sft/logs/metrics.jsonl",
        evaluations({"perplexity": 900.0}, {"perplexity": 30.0}, {"perplexity": 1.5}),
    )
    write_rows(tmp_path / "reward/logs/metrics.jsonl", evaluations({"accuracy": 0.5}, {"accuracy": 0.9}))
    write_rows(
        tmp_path / "ppo/logs/metrics.jsonl",
        evaluations(
            {"reward": -1.0, "kl": 0.0, "response_length": 6.0}, {"reward": 2.0, "kl": 4.0, "response_length": 8.0}
        ),
    )
    prompts = [f"\n\nHuman: {question}\n\nAssistant:" for question in QUESTIONS]
    write_rows(tmp_path / "ppo/samples/before.jsonl", [{"prompt": prompt, "response": "no idea"} for prompt in prompts])
    write_rows(
        tmp_path / "ppo/samples/after.jsonl",
        [{"prompt": prompt, "response": RIGHT[question]} for prompt, question in zip(prompts, QUESTIONS)],
    )
    return tmp_path


def report_of(outputs, **options):
    return make_report(outputs / "sft", outputs / "reward", outputs / "ppo", **options)


def test_first_and_last_evaluation_are_before_and_after(outputs):
    report = report_of(outputs)
    assert report.perplexity == Change(900.0, 1.5)
    assert report.accuracy == Change(0.5, 0.9)
    assert (report.reward, report.kl) == (Change(-1.0, 2.0), Change(0.0, 4.0))


def test_a_kl_that_was_measured_nowhere_has_no_row(outputs):
    assert "KL to the fine-tuned model" in render(report_of(outputs))
    write_rows(outputs / "ppo/logs/metrics.jsonl", evaluations({"reward": -1.0}, {"reward": 2.0}))
    assert "KL to the fine-tuned model" not in render(report_of(outputs))


def test_the_truth_is_that_of_the_answers(outputs):
    truth = report_of(outputs).truth
    assert truth.correct == Change(0.0, 1.0) and truth.courteous.before == 0.0
    assert truth.reward.before == 0.0 and truth.reward.after == 0.5 + 0.5 * truth.courteous.after


def test_the_truth_of_other_questions_is_unknown(outputs):
    rows = [{"prompt": "\n\nHuman: Who are you?\n\nAssistant:", "response": "I."}]
    for name in ("before", "after"):
        write_rows(outputs / f"ppo/samples/{name}.jsonl", rows)
    report = report_of(outputs)
    assert report.truth is None and "TRUE" not in render(report)
    assert [item.question for item in report.answers] == ["Who are you?"]


def test_cost_is_time_at_the_price(outputs):
    report = report_of(outputs, seconds=[600, 1200, 1800], price_per_hour=8.80)
    assert report.cost == pytest.approx(8.80)
    assert "60.0 minutes, which cost $8.80" in render(report)
    assert report_of(outputs).cost is None and sum(report_of(outputs).seconds.values()) == 180.0


def test_the_text_shows_each_answer_beside_the_one_before(outputs):
    report = report_of(outputs)
    text = render(report)
    for item in report.answers:
        assert item.question in text and f" | {item.after.split()[0]}" in text


def test_of_a_long_question_the_end_is_shown(outputs):
    turns = "".join(f"\n\nHuman: question {n}?\n\nAssistant: answer {n}." for n in range(4))
    last = "The story so far: " + "and then it rained again " * 40 + "so what should I pack?"
    prompt = f"{turns}\n\nHuman: {last}\n\nAssistant:"
    for cut in (prompt, prompt[30:], prompt[-400:]):  # whole; cut within an earlier turn; cut within the last
        for name in ("before", "after"):
            write_rows(outputs / f"ppo/samples/{name}.jsonl", [{"prompt": cut, "response": "Boots."}])
        shown = render(report_of(outputs)).split("answers after PPO\n\n")[1].split("  Boots.")[0].splitlines()
        assert len(shown) == 3 and shown[0].startswith("... ") and shown[-1].endswith("so what should I pack?")
        assert max(map(len, shown)) <= 77


def test_the_summary_is_json_with_the_same_figures(outputs):
    write_summary(report_of(outputs), outputs / "summary.json")
    summary = json.loads((outputs / "summary.json").read_text())
    assert summary["perplexity"] == {"before": 900.0, "after": 1.5} and summary["format"] == FORMAT


def test_a_step_that_was_not_finished_is_named(outputs):
    (outputs / "reward/logs/metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"reward/logs/metrics.jsonl.*has the step been finished"):
        report_of(outputs)


@pytest.mark.parametrize("number, step", [(1, "sft"), (2, "reward"), (3, "ppo")])
def test_a_step_that_broke_off_is_named(number, step, outputs):
    path = outputs / step / "logs/metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=rf"{outputs / step}: step {number} \({step}\) was not finished"):
        report_of(outputs)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(UserError, match=f"{path} has a row that was not written whole"):
        report_of(outputs)


def test_what_was_not_evaluated_is_said_and_the_rest_is_shown(outputs):
    """The three steps may have trained for days by then."""
    for step in ("reward", "ppo"):
        write_rows(outputs / step / "logs/metrics.jsonl", [{"phase": "done", "step": 1, "seconds": 2.0}])
    for name in ("before", "after"):
        (outputs / "ppo/samples" / f"{name}.jsonl").unlink()
    report = report_of(outputs, price_per_hour=36.0)
    lines = render(report).splitlines()
    assert [line.split("  ")[0] for line in lines if line.endswith("not evaluated")] == [
        "step 2: accuracy of the reward model",
        "step 3: mean reward",
        "",
        "",
    ]
    assert report.perplexity is not None and "which cost $" in lines[-1]


DIALOGUES = [
    (Message("user", "What is  one plus two?"),),
    (Message("system", "Be brief."), Message("user", "Who are you?")),
    (Message("user", "One?"), Message("assistant", "Yes."), Message("user", "Human: two?\n\nOr three?")),
]


@pytest.mark.parametrize("template", ["human_assistant", "question_answer", "alpaca"])
@pytest.mark.parametrize("messages", DIALOGUES, ids=["one turn", "system prompt", "two turns"])
def test_a_question_comes_out_of_its_prompt(template, messages):
    prompt = get_template(template).prompt_text(Prompt(messages))
    assert question_of(prompt) == messages[-1].content


@pytest.mark.parametrize("around", ["<|user|>\n{}\n<|assistant|>\n", "[INST] {} [/INST]"])
def test_a_question_of_the_task_is_found_in_any_wording(around):
    assert [question_of(around.format(question)) for question in QUESTIONS] == QUESTIONS
    assert question_of(around.format("Who are you?")) == around.format("Who are you?").strip()


def test_no_answer_drives_the_terminal(outputs):
    prompt = "\n\nHuman: Hi\n\nAssistant:"
    write_rows(outputs / "ppo/samples/after.jsonl", [{"prompt": prompt, "response": "\x1b[2J"}] * 8)
    shown = render(report_of(outputs))
    assert "[2J" in shown and "\x1b" not in shown


@pytest.mark.parametrize(
    "content",
    [
        b"[]\n",
        b"7\n",
        b"{}\n",
        b'{"phase": "done"}\n',
        b'{"phase": 3, "seconds": 1}\n',
        b"\xff\xfe\x00",
        b'{"phase": "done", "seconds": "long"}\n',
    ],
)
def test_metrics_that_are_none_are_named(content, outputs):
    path = outputs / "reward/logs/metrics.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}(:1)? is damaged") as refused:
        report_of(outputs)
    assert "\n" not in str(refused.value)


def test_an_evaluation_that_was_not_a_number_is_passed_over(outputs):
    path = outputs / "sft/logs/metrics.jsonl"
    path.write_text(path.read_text().replace("1.5", "null"))
    assert report_of(outputs).perplexity == Change(900.0, 30.0) and "30.00" in render(report_of(outputs))


@pytest.mark.parametrize(
    "redirection, code, said",
    [
        (">&-", 0, ""),
        ("| head -n 1 > /dev/null; exit ${PIPESTATUS[0]}", 0, ""),
        (
            "> /dev/null; rm $0/summary.json; mkdir $0/summary.json; $1 launch/summary.py $0",
            1,
            "error: {outputs}/summary.json: cannot be written: Is a directory\n",
        ),
    ],
)
def test_the_summary_ends_well_where_nobody_reads_or_something_is_in_the_way(redirection, code, said, outputs):
    done = subprocess.run(
        ["bash", "-c", f"$1 launch/summary.py $0 {redirection}", outputs, sys.executable],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (code, said.format(outputs=outputs))
    assert (outputs / "summary.json").exists()
