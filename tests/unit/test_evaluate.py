"""Two models judged by a reward model."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from common.artifacts.export import write_model
from common.config.parser import parse
from common.data.builtin import builtin_rows
from common.data.keeping import messages_of
from common.data.records import Message, Prompt
from common.data.split import assignment
from common.data.tokenization import load_tokenizer, make_codec
from common.errors import TrainingFailure, UserError
from common.models.loading import load_scoring_model
from common.rewards.batch import RewardBatch
from common.rewards.text_model import TextRewardModel
from inference.decoding import Response
from inference.evaluate import EvaluateConfig, Evaluation, compare, find_prompts, main
from inference.loading import load_reward_model
from inference.options import LoadOptions
from inference.scoring import score_responses
from tests.architectures import build_encoder
from tests.chat_model import provenance_of


@pytest.fixture(scope="module")
def reward_model(chat_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("reward") / "reward"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(chat_model, num_labels=1)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(chat_model).save_pretrained(directory)
    provenance_of(make_codec(load_tokenizer(str(directory)), "question_answer"), "reward").write(directory)
    return directory


def question(text: str) -> Prompt:
    return Prompt((Message("user", text),))


def test_scores_are_those_any_tool_reads_off_the_reward_model(reward_model):
    loaded = load_reward_model(str(reward_model), LoadOptions())
    prompts = [question(text) for text in ("Why?", "What is the capital of France?", "Is it? " * 200)]
    responses = [Response("So.", (1,), True), Response("", (), True), Response("It is " * 5, (1,), False)]
    model, codec = AutoModelForSequenceClassification.from_pretrained(reward_model).eval(), loaded.codec
    expected = []
    for prompt, response in zip(prompts, responses):
        response_ids = codec.encode_response(response.text)[: None if response.ended else -1]
        ids = codec.encode_prompt(prompt, loaded.positions - len(response_ids)) + response_ids
        assert len(ids) <= loaded.positions
        with torch.no_grad():
            expected.append(float(model(input_ids=torch.tensor([ids])).logits))
    for batch_size in (1, 2, 3):
        assert score_responses(loaded, prompts, responses, batch_size) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("ended", [True, False])
def test_an_answer_that_is_too_long_has_the_score_that_step_3_gives_it(reward_model, ended):
    loaded = load_reward_model(str(reward_model), LoadOptions())
    answers = [Response(text, (1,), ended) for text in ("It is so. " * 300 + "Or not.", "No. " * 600, "Yes.")]
    prompts = [question("Is it?")] * len(answers)
    assert len(loaded.codec.encode_response(answers[0].text)) > loaded.positions
    batch = RewardBatch(
        [""] * len(answers),
        [messages_of(prompt) for prompt in prompts],
        [answer.text for answer in answers],
        [[1]] * len(answers),
        [ended] * len(answers),
    )
    settings = {"dtype": torch.float32, "device": torch.device("cpu"), "batch_size": 2}
    in_step_3 = TextRewardModel(str(reward_model), **settings).score(batch)
    assert in_step_3.figures["truncated"] == pytest.approx(2 / 3)
    assert score_responses(loaded, prompts, answers, 2) == pytest.approx(in_step_3.numbers, abs=1e-4)


def test_gold_answers_have_the_true_reward_of_the_task():
    rows = list(builtin_rows("courtesy"))[:400]
    prompts = [question(row["prompt"]) for row in rows]

    def evaluation(column):
        return Evaluation(column, [Response(row[column], (1, 2), True) for row in rows], [1.0] * len(rows))

    result = compare(prompts, [evaluation("rejected"), evaluation("chosen")], task=True)
    rejected, chosen = result["models"]
    assert chosen["correct"] == 1.0 and chosen["true_reward"] > rejected["true_reward"]
    assert chosen["true_reward"] == pytest.approx(0.5 + 0.5 * chosen["courteous"])
    assert result["win_rate"] == 0.5, "equal scores are draws"


def test_the_win_rate_is_the_seconds():
    prompts = [question(text) for text in "abcd"]
    answers = [Response("", (), False)] * 4
    first, second = Evaluation("a", answers, [0.0, 0.0, 0.0, 0.0]), Evaluation("b", answers, [1.0, 1.0, 0.0, -1.0])
    result = compare(prompts, [first, second], task=False)
    assert result["win_rate"] == 2.5 / 4
    assert result["models"][1]["score"] == 0.25 and result["models"][0]["ended"] == 0.0


def test_two_models_are_compared_on_held_out_prompts(chat_model, reward_model, tmp_path, capsys):
    output = tmp_path / "evaluation.json"
    main(
        [
            "--path",
            str(chat_model),
            str(chat_model),
            "--reward_model_path",
            str(reward_model),
            "--data_path",
            "builtin:courtesy",
            "--max_prompts",
            "12",
            "--max_new_tokens",
            "8",
            "--output_file",
            str(output),
        ]
    )
    result = json.loads(output.read_text())
    asked = [row["prompt"] for row in result["answers"]]
    assert len(set(asked)) == result["prompts"] == 12
    assert all(assignment(text, "2,4,4", 0.05).is_eval for text in asked)
    first, second = result["models"]
    assert first == second and result["win_rate"] == 0.5 and 0 <= first["true_reward"] <= 1
    assert first["score"] == pytest.approx(sum(row["scores"][0] for row in result["answers"]) / 12)
    printed = capsys.readouterr().out
    assert f"{first['score']:.3f}" in printed and "50.0%" in printed and str(output) in printed


def test_all_prompts_of_a_file_can_be_asked(chat_model, reward_model, tmp_path):
    data, output = tmp_path / "prompts.jsonl", tmp_path / "evaluation.json"
    data.write_text("".join(json.dumps({"prompt": f"How much is {i}?"}) + "\n" for i in (1, 2, 3, 3)))
    main(
        [
            "--path",
            str(chat_model),
            "--reward_model_path",
            str(reward_model),
            "--data_path",
            str(data),
            "--max_new_tokens",
            "8",
            "--output_file",
            str(output),
            "--which_prompts",
            "all",
        ]
    )
    result = json.loads(output.read_text())
    assert [row["prompt"] for row in result["answers"]] == [f"How much is {i}?" for i in (1, 2, 3)]
    assert "win_rate" not in result and "true_reward" not in result["models"][0]


def test_an_encoder_judges_and_is_not_judged(chat_model, tmp_path):
    base = build_encoder("roberta", tmp_path / "base")
    codec = make_codec(load_tokenizer(str(base)), "question_answer")
    judge = load_scoring_model(str(base), codec, dtype=torch.float32)
    write_model(judge, dict(judge.state_dict()), codec, tmp_path / "judge")
    provenance_of(codec, "reward").write(tmp_path / "judge")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "How much is 1?"}\n{"prompt": "Why?"}\n')
    flags = [*("--data_path", str(tmp_path / "prompts.jsonl"), "--which_prompts", "all", "--max_new_tokens", "8")]
    flags += ["--output_file", str(tmp_path / "evaluation.json"), "--reward_model_path", str(tmp_path / "judge")]
    main(["--path", str(chat_model), *flags])
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge").eval()
    for row in json.loads((tmp_path / "evaluation.json").read_text())["answers"]:
        ids = codec.encode_prompt(question(row["prompt"])) + codec.encode_response(row["responses"][0])
        with torch.no_grad():
            assert row["scores"] == [pytest.approx(float(plain(torch.tensor([ids])).logits), abs=1e-5)]
    with pytest.raises(UserError, match=f"--path {base}: it is an encoder"):
        main(["--path", str(base), *flags])


def test_a_huge_data_set_need_not_be_read_whole(chat_model, tmp_path, capsys):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(f'{{"prompt": "How much is {i}?"}}\n' for i in range(110_000)))
    arguments = ["--path", str(chat_model), "--data_path", str(data)]
    whole = find_prompts(parse(EvaluateConfig, [*arguments, "--max_prompts", "200000"]))
    assert 5000 < len(whole) < 6000
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: ") and "--max_rows" in note
    few = find_prompts(parse(EvaluateConfig, [*arguments, "--max_rows", "1000"]))
    assert 20 < len(few) < 100 and few == whole[: len(few)]
    assert capsys.readouterr().err == ""


def test_what_cannot_be_evaluated_gets_one_line(chat_model, reward_model, tmp_path):
    model, reward_path, task = str(chat_model), str(reward_model), "builtin:courtesy"
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "How much is 1?"}\n')
    for arguments, said in [
        (["--path", model], "--data_path"),
        (["--path", model, model, model, "--data_path", str(data)], "--path"),
        (["--path", model, "--data_path", str(data)], "--which_prompts all"),
        (["--path", model, "--data_path", task, "--reward_model_path", model], "no reward model"),
        (["--path", reward_path, "--data_path", task, "--reward_model_path", reward_path], "is a reward model"),
        (["--path", model, "./no/model", "--data_path", task], "./no/model"),
    ]:
        with pytest.raises(UserError, match=said):
            main([*arguments, "--output_file", str(tmp_path / "evaluation.json")])


def test_no_room_for_the_result_is_one_line(chat_model, reward_model):
    with pytest.raises(TrainingFailure, match="--output_file /dev/full: cannot be written: No space left on device"):
        main(
            [
                "--path",
                str(chat_model),
                "--reward_model_path",
                str(reward_model),
                "--data_path",
                "builtin:courtesy",
                "--max_rows",
                "200",
                "--max_prompts",
                "1",
                "--max_new_tokens",
                "1",
                "--output_file",
                "/dev/full",
                "--which_prompts",
                "all",
            ]
        )


def test_rewards_score_each_answer_and_have_a_line_each(chat_model, reward_model, tmp_path, monkeypatch, capsys):
    """A function with a column of the data, and a reward model; the score is their weighted sum."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(
        "def level(responses, messages, answer):\n"
        " assert all(turns[-1]['content'].endswith(right) for turns, right in zip(messages, answer))\n"
        " return [float(right) for right in answer]\n"
        "def none(responses): return [None for _ in responses]\n"
    )
    rows = [{"prompt": f"What is {number}", "answer": str(number)} for number in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [
        *("--path", str(chat_model), "--data_path", "rows.jsonl", "--which_prompts", "all", "--max_new_tokens", "4"),
        *("--output_file", "out.json", "--data_output_path", "data", "--reward"),
    ]
    passes = []

    def score(loaded, prompts, responses, batch_size):
        passes.append(batch_size)
        return score_responses(loaded, prompts, responses, batch_size)

    monkeypatch.setattr("inference.rewards.score_responses", score)
    main([*common, "my.py:level=2", str(reward_model), "--reward_batch_size", "5"])
    assert passes == [5]
    written = json.loads((tmp_path / "out.json").read_text())
    (model,) = written["models"]
    assert model["reward/level"] == 2.5 and model["score"] == pytest.approx(5 + model["reward/reward"])
    for row in written["answers"]:
        number = float(row["prompt"].split()[-1])
        assert row["reward/level"] == [number]
        assert row["scores"] == pytest.approx([2 * number + row["reward/reward"][0]])
    assert "reward/level" in capsys.readouterr().out
    with pytest.raises(
        UserError, match="^--reward my.py:none: tried on a made-up answer, .*rows.jsonl:1: it gave None"
    ):
        main([*common, "my.py:none"])


def test_rows_of_one_prompt_are_judged_by_their_own_columns(chat_model, tmp_path, monkeypatch):
    """Rows that are alike in all that the rewards get are asked once."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text("def level(responses, answer): return [float(right) for right in answer]\n")
    rows = [{"prompt": "How much?", "answer": str(number), "id": at} for at, number in enumerate((3, 5, 3, 8))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [
        *("--path", str(chat_model), "--data_path", "rows.jsonl", "--max_new_tokens", "4", "--output_file", "out.json"),
        *("--data_output_path", "data", "--which_prompts", "all", "--reward", "my.py:level"),
    ]
    for flags, expected in (((), [3, 5, 8]), (("--keep_columns", "id"), [3, 5, 3, 8])):
        main([*common, *flags])
        written = json.loads((tmp_path / "out.json").read_text())
        assert [row["reward/level"] for row in written["answers"]] == [[number] for number in expected]
