"""Wrong input ends in one line that names flag, file and row, before any model is loaded."""

import json

import pytest
from transformers import AutoTokenizer

from common.models.builtin import materialise
from step1_sft.main import main as step1
from step2_reward.main import main as step2
from step3_ppo.main import main as step3
from tests.refusals import refusal


@pytest.fixture
def good(tmp_path, builtin_cache):
    """Arguments of steps 1 and 2 that would work; a test spoils one."""
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"Question {n}?", "chosen": f"Yes {n}.", "rejected": f"No {n}."}) + "\n"
            for n in range(60)
        )
    )
    return {
        "--model_name_or_path": str(materialise("builtin:tiny-opt", builtin_cache)),
        "--data_path": str(tmp_path / "rows.jsonl"),
        "--output_dir": str(tmp_path / "out"),
        "--data_output_path": str(tmp_path / "data"),
    }


@pytest.mark.parametrize(
    "flag, value, said",
    [
        (
            "--model_name_or_path",
            "./nowhere/model",
            ["--model_name_or_path ./nowhere/model", "no such model directory"],
        ),
        ("--model_name_or_path", "builtin:huge", ["builtin:huge", "builtin:tiny-opt"]),
        ("--data_path", "./missing.jsonl", ["--data_path", "missing.jsonl"]),
        ("--data_path", "builtin:rudeness", ["builtin:rudeness", "courtesy"]),
        ("--dtype", "fp16", ["--dtype fp16", "use fp32 or bf16"]),
        ("--zero_stage", "4", ["--zero_stage", "0, 1, 2, 3"]),
        ("--template", "chat", ["--template chat", "human_assistant"]),
        ("--learnin_rate", "1", ["--learnin_rate", "did you mean --learning_rate"]),
        ("--max_seq_len", "3", ["--max_seq_len"]),
        ("--max_seq_len", "4096", ["--max_seq_len", "4096", "room for 512"]),
        ("--data_split", "0,1,1", ["--data_split 0,1,1", "step 1"]),
        ("--deepspeed_config", "nothing.json", ["--deepspeed_config nothing.json"]),
        ("--columns", "prompt=inquiry", ["inquiry", "prompt"]),
    ],
)
def test_step_1_refuses(good, flag, value, said):
    message = refusal(step1, {**good, flag: value})
    for part in said:
        assert part in message


def test_a_directory_that_is_no_model_is_named(good, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json" in refusal(step1, {**good, "--model_name_or_path": str(tmp_path / "empty")})
    (tmp_path / "empty" / "config.json").write_text("{broken")
    assert "not valid JSON" in refusal(step1, {**good, "--model_name_or_path": str(tmp_path / "empty")})


@pytest.mark.parametrize(
    "line, why",
    [
        (b'{"prompt": "broken', "JSON"),
        (b'{"prompt": "q", "chosen": "\xff\xfe", "rejected": "r"}', "UTF-8"),
        (b'{"prompt": "", "chosen": "a", "rejected": "b"}', "empty"),
        (b'{"chosen": "a", "rejected": "b"}', "prompt"),
        (b'{"prompt": "q", "chosen": "same", "rejected": "same"}', "same"),
        (b'{"prompt": "q\\u0000", "chosen": "a", "rejected": "b"}', "NUL"),
    ],
)
def test_too_many_bad_rows_are_shown_with_file_and_line(good, tmp_path, line, why):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(path.read_bytes() + b"".join(line + b"\n" for _ in range(20)))
    message = refusal(step2, good)
    assert "20 of 80 rows" in message and "rows.jsonl:61" in message and why in message and "--max_bad_rows" in message


def test_rows_without_an_answer_cannot_train_a_reward_model(good, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "response": "a"}\n' * 30)
    message = refusal(step2, good)
    assert "comparisons" in message and "prompt, response" in message


def test_an_unknown_layout_lists_what_was_found_and_what_is_understood(good, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"inquiry": "q", "reply": "a"}\n' * 30)
    message = refusal(step1, good)
    assert "inquiry" in message and "instruction" in message


def test_a_reward_model_needs_held_out_pairs(good):
    assert "--eval_fraction" in refusal(step2, {**good, "--eval_fraction": "0"})


def test_step_3_names_the_step_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "step1_sft/main.py" in refusal(step3, {})


def test_step_3_refuses_a_language_model_as_reward_model(good):
    model = good.pop("--model_name_or_path")
    message = refusal(step3, {**good, "--actor_model_name_or_path": model, "--critic_model_name_or_path": model})
    assert "--critic_model_name_or_path" in message and "no reward model" in message


def test_step_3_names_models_as_the_user_did(good):
    """A built-in model is loaded from a path in the cache, which says nothing to the user."""
    models = {name: "builtin:tiny-opt" for name in ("--actor_model_name_or_path", "--critic_model_name_or_path")}
    del good["--model_name_or_path"]
    assert refusal(step3, {**good, **models}).startswith("--critic_model_name_or_path builtin:tiny-opt is no reward")
    message = refusal(step3, {**good, **models, "--max_answer_seq_len": "4096"})
    assert message.startswith("--max_prompt_seq_len and --max_answer_seq_len are too large for --actor_model_name_or_p")
    assert "builtin:tiny-opt: it has room for 512 tokens" in message and message.endswith("lower the length")


def test_a_reward_model_is_not_taken_for_a_language_model(good, tmp_path):
    import shutil

    reward = tmp_path / "reward"
    shutil.copytree(good["--model_name_or_path"], reward)
    config = json.loads((reward / "config.json").read_text())
    (reward / "config.json").write_text(json.dumps({**config, "architectures": ["OPTForSequenceClassification"]}))
    assert "is a reward model" in refusal(step1, {**good, "--model_name_or_path": str(reward)})
    del good["--model_name_or_path"]
    assert "--actor_model_name_or_path" in refusal(
        step3, {**good, "--actor_model_name_or_path": str(reward), "--critic_model_name_or_path": str(reward)}
    )


def test_step_3_refuses_models_trained_on_other_text(good, tmp_path, builtin_cache):
    """The actor says that it was trained with another template, and with another tokenizer."""
    import shutil

    from common.artifacts.compatibility import text_of
    from common.artifacts.provenance import Provenance
    from common.data.tokenization import load_tokenizer, make_codec

    actor = tmp_path / "actor"
    shutil.copytree(good.pop("--model_name_or_path"), actor)
    text = text_of(make_codec(load_tokenizer(str(actor)), "human_assistant"))
    arguments = {**good, "--actor_model_name_or_path": str(actor), "--critic_model_name_or_path": str(actor)}
    for changed, said in (({"template": "alpaca"}, "template 'alpaca'"), ({"tokenizer": "f" * 64}, "tokenizer 'fff")):
        Provenance(step="sft", base="x", data_split="2,4,4", eval_fraction=0.05, **{**text, **changed}).write(actor)
        message = refusal(step3, arguments)
        assert said in message and str(actor) in message


@pytest.mark.parametrize(
    "mean, std, said",
    [
        (0.5, 0.0, "standard deviation 0"),
        (0.5, -1.0, "standard deviation -1"),
        ("NaN", 1.0, "NaN"),
        (0.5, "NaN", "NaN"),
        (0.5, "Infinity", "Infinity"),
    ],
)
def test_step_3_refuses_a_scale_that_nothing_can_be_measured_in(good, tmp_path, mean, std, said):
    import shutil

    from common.artifacts.compatibility import text_of
    from common.artifacts.provenance import FILE, Provenance
    from common.data.tokenization import load_tokenizer, make_codec

    model = good.pop("--model_name_or_path")
    reward_model = tmp_path / "reward_model"
    shutil.copytree(model, reward_model)
    config = json.loads((reward_model / "config.json").read_text())
    (reward_model / "config.json").write_text(json.dumps({**config, "architectures": ["OPTForSequenceClassification"]}))
    text = text_of(make_codec(load_tokenizer(model), "human_assistant"))
    Provenance(
        step="reward", base="x", data_split="2,4,4", eval_fraction=0.05, score_mean=0.25, score_std=0.125, **text
    ).write(reward_model)
    written = (reward_model / FILE).read_text()
    (reward_model / FILE).write_text(written.replace("0.25", str(mean)).replace("0.125", str(std)))
    message = refusal(
        step3, {**good, "--actor_model_name_or_path": model, "--critic_model_name_or_path": str(reward_model)}
    )
    assert str(reward_model) in message and said in message


def test_provenance_is_strict_json(tmp_path):
    from common.artifacts.provenance import Provenance

    with pytest.raises(ValueError):
        Provenance("reward", "x", "t", "h", "e", "p", "2,4,4", 0.05, score_mean=float("nan")).write(tmp_path)
    assert not (tmp_path / "provenance.json").exists()


@pytest.fixture
def step_1_made(good, tmp_path, monkeypatch):
    """An actor as step 1 leaves it, but for the training, from the given options; the working directory is its own."""
    import shutil

    from common.artifacts.publish import publishing
    from common.config.parser import parse
    from common.data.tokenization import load_tokenizer, make_codec
    from step1_sft.config import SFTConfig

    monkeypatch.chdir(tmp_path)
    actor = tmp_path / "actor"
    shutil.copytree(good["--model_name_or_path"], actor)

    def made(**options: str) -> str:
        given = {**good, **{f"--{name}": value for name, value in options.items()}, "--output_dir": str(actor)}
        config = parse(SFTConfig, [word for pair in given.items() for word in pair])
        with publishing(config, make_codec(load_tokenizer(str(actor)), "human_assistant"), {}, step="sft", base="x"):
            pass
        return str(actor)

    (tmp_path / "linked").symlink_to(tmp_path / "rows.jsonl")
    return made


@pytest.mark.parametrize("then", ["rows.jsonl", ".", "linked"])
@pytest.mark.parametrize("now", ["./rows.jsonl", "{absolute}", "../{directory}", "linked"])
def test_two_split_rules_for_the_same_data_are_refused_however_it_is_spelt(good, tmp_path, step_1_made, then, now):
    """Else step 3 would train on prompts that step 1 was trained on."""
    actor = step_1_made(data_path=then, data_split="1,1,1")
    now = now.format(absolute=tmp_path / "rows.jsonl", directory=tmp_path.name)
    message = refusal(step2, {**good, "--model_name_or_path": actor, "--data_path": now, "--eval_fraction": "0.05"})
    assert "--data_split 1,1,1" in message and "2,4,4" in message and actor in message


@pytest.mark.parametrize(
    "then, now",
    [
        ({"data_path": "elsewhere.jsonl", "data_split": "1,1,1"}, {}),
        ({"data_split": "1, 1, 1"}, {"--data_split": "1,1,1"}),
        ({"data_split": "0.2,0.4,0.4"}, {"--data_split": "2,4,4"}),
    ],
)
def test_other_data_or_the_same_rule_otherwise_written_is_no_matter(good, step_1_made, then, now):
    actor = step_1_made(**then, eval_fraction="0")
    message = refusal(step2, {**good, "--model_name_or_path": actor, **now, "--eval_fraction": "0"})
    assert "no pair is held out" in message  # the next thing that is wrong


@pytest.mark.parametrize("whole", ["./rows.jsonl", "."])
def test_what_step_1_had_whole_is_for_no_other_step(good, step_1_made, whole):
    actor = step_1_made(data_path="elsewhere.jsonl", sft_only_data_path=whole)
    message = refusal(step2, {**good, "--model_name_or_path": actor})
    assert "--sft_only_data_path" in message and "--data_split 2,4,4" in message and "rows.jsonl" in message
    again = {"--model_name_or_path": actor, "--output_dir": "again", "--eval_fraction": "0"}
    message = refusal(step1, {**good, **again, "--data_path": "builtin:courtesy", "--sft_only_data_path": "rows.jsonl"})
    assert "--eval_fraction 0.05" in message and "--eval_fraction 0," in message


def test_nothing_of_an_earlier_result_is_touched(good, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "model.safetensors").write_bytes(b"precious")
    (output / "run_config.yaml").write_text("precious")
    refusal(step1, {**good, "--model_name_or_path": "./nowhere"})
    refusal(step1, {**good, "--data_path": "./missing.jsonl"})
    assert (output / "model.safetensors").read_bytes() == b"precious"
    assert (output / "run_config.yaml").read_text() == "precious"


def test_an_output_directory_that_is_a_file_is_refused(good, tmp_path):
    (tmp_path / "out").write_text("")
    assert "--output_dir" in refusal(step1, good)


def test_the_model_may_not_be_overwritten_by_its_own_training(good):
    good["--output_dir"] = good["--model_name_or_path"]
    assert "would overwrite" in refusal(step1, good)


def test_the_builtin_tokenizer_is_untouched_by_refusals(good):
    """Refused runs leave the shared model directory loadable."""
    assert AutoTokenizer.from_pretrained(good["--model_name_or_path"]).eos_token_id is not None
