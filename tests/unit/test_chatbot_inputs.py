"""Models that the chatbot cannot use, and wrong options, end in one clear line."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from common.errors import UserError
from inference.chatbot import main


def copy(model: Path, target: Path, **config) -> Path:
    shutil.copytree(model, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return target


def no_directory(model, target):
    return target / "nowhere"


def no_model(model, target):
    target.mkdir()
    return target


def a_file(model, target):
    target.write_text("hello")
    return target


def broken_json(model, target):
    (copy(model, target) / "config.json").write_text('{"model_type": ')
    return target


def broken_weights(model, target):
    path = copy(model, target) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    return target


def no_weights(model, target):
    (copy(model, target) / "model.safetensors").unlink()
    return target


def weights_of_another_shape(model, target):
    return copy(model, target, hidden_size=32)


def a_pickle_that_runs_code(model, target):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(target) + "-exploded",)

    no_weights(model, target)
    torch.save({"weight": Bomb()}, target / "pytorch_model.bin")
    return target


def code_of_its_own(model, target):
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    copy(model, target, model_type="own", auto_map=own)
    (target / "own.py").write_text(f"import os\nos.mkdir({str(target) + '-exploded'!r})\n")
    return target


def no_tokenizer(model, target):
    for path in copy(model, target).glob("token*"):
        path.unlink()
    (target / "provenance.json").unlink()
    return target


def another_tokenizer(model, target):
    path = copy(model, target) / "tokenizer.json"
    content = json.loads(path.read_text())
    ids = content["model"]["vocab"]
    ids["q"], ids["z"] = ids["z"], ids["q"]
    path.write_text(json.dumps(content))
    return target


def broken_provenance(model, target):
    (copy(model, target) / "provenance.json").write_text("[]")
    return target


def reward_model(model, target):
    copy(model, target)
    AutoModelForSequenceClassification.from_pretrained(model, num_labels=1).save_pretrained(target)
    return target


def broken_adapter(model, target):
    target.mkdir()
    (target / "adapter_config.json").write_text("{")
    return target


def adapter_without_its_base(model, target):
    target.mkdir()
    (target / "adapter_config.json").write_text('{"base_model_name_or_path": "./gone"}')
    return target


@pytest.mark.parametrize(
    "make, said",
    [
        (no_directory, "no such model directory"),
        (no_model, "no config.json"),
        (a_file, "no such model"),
        (broken_json, "not valid JSON"),
        (broken_weights, "cannot be loaded"),
        (no_weights, "cannot be loaded"),
        (weights_of_another_shape, "shapes differ"),
        (a_pickle_that_runs_code, "pickle"),
        (code_of_its_own, "with code of its own, which runs only where that is allowed: add --trust_remote_code"),
        (no_tokenizer, "tokenizer"),
        (another_tokenizer, "tokenizer"),
        (broken_provenance, "damaged"),
        (reward_model, "reward model"),
        (broken_adapter, "damaged"),
        (adapter_without_its_base, "gone"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_talked_to_gets_one_line(make, said, chat_model, tmp_path):
    directory = make(chat_model, tmp_path / "model")
    with pytest.raises(UserError) as raised:
        main(["--path", str(directory)])
    message = str(raised.value)
    assert said in message and str(directory) in message and "\n" not in message
    if make not in (no_tokenizer, broken_provenance):  # these name the file at fault
        assert message.startswith(f"--path {directory}: ")
    assert not Path(f"{directory}-exploded").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--device", "tpu"], "--device tpu"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--top_p", "0.5"], "--top_p"),
        (["--temperature", "-1"], "--temperature"),
        (["--template", "alpaca"], "question_answer"),
        (["--max_new_tokens", "512"], "--max_new_tokens"),
        (["--no_repeat_ngram", "5"], "did you mean"),
    ],
)
def test_wrong_options_get_one_line(arguments, said, chat_model):
    with pytest.raises(UserError, match=re.escape(said)):
        main(["--path", str(chat_model), *arguments])
