"""A model directory with an adapter, which transformers would load silently: it is named, refused, or merged."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from common.artifacts.model_source import resolve_model
from common.artifacts.provenance import read_provenance
from common.data.tokenization import load_tokenizer, make_codec
from common.errors import UserError, named_by
from common.models.loading import load_causal_lm, load_scalar_model
from common.paths import writing_to
from inference.loading import load_actor, load_reward_model
from inference.merge_lora import main as merge_lora
from inference.options import LoadOptions
from step1_sft.main import main as step1
from step2_reward.main import main as step2
from step3_ppo.main import main as step3
from tests.adapters import base_model, write_adapter
from tests.chat_model import provenance_of

IDS = torch.arange(10, 30)[None]


@pytest.fixture(params=["causal", "reward"])
def alone(request, chat_model, tmp_path):
    """(kind, directory) of an adapter, in the output directory of the step that made it."""
    write_adapter(request.param, chat_model, tmp_path / "output" / "adapter")
    codec = make_codec(load_tokenizer(str(chat_model)), "question_answer")
    provenance_of(codec, "reward" if request.param == "reward" else "sft").write(tmp_path / "output")
    return request.param, tmp_path / "output" / "adapter"


@pytest.fixture
def model_with_adapter(chat_model, tmp_path):
    """A whole model of its own, with an adapter of another base in its directory."""
    directory = tmp_path / "both"
    shutil.copytree(chat_model, directory)
    whole = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.mul_(1.1)
    whole.save_pretrained(directory)
    write_adapter("causal", chat_model, tmp_path / "adapter")
    for path in (tmp_path / "adapter").iterdir():
        shutil.copy(path, directory / path.name)
    return directory


def together(kind, base, adapter) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(base_model(kind, base), adapter).eval()(input_ids=IDS).logits


def computed(kind, source) -> torch.Tensor:
    load = load_scalar_model if kind == "reward" else load_causal_lm
    model = load(source, make_codec(load_tokenizer(source), "question_answer"), dtype=torch.float32).eval()
    with torch.no_grad():
        return (model.classifier if kind == "reward" else model)(input_ids=IDS).logits


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    return str(error.value)


def test_every_program_refuses_a_model_directory_with_an_adapter(model_with_adapter, tmp_path):
    output = ["--data_path", "builtin:courtesy", "--output_dir", str(tmp_path / "out"), "--dtype", "fp32"]
    for said in (
        refusal(step1, ["--model_name_or_path", str(model_with_adapter), *output]),
        refusal(step2, ["--model_name_or_path", str(model_with_adapter), *output]),
        refusal(
            step3,
            [
                "--actor_model_name_or_path",
                str(model_with_adapter),
                "--critic_model_name_or_path",
                str(model_with_adapter),
                *output,
            ],
        ),
        refusal(named_by("--path")(load_actor), str(model_with_adapter), LoadOptions()),
    ):
        assert str(model_with_adapter) in said and "adapter_config.json" in said and "--merge_adapter" in said
    assert not (tmp_path / "out").exists()
    assert "--base" in refusal(
        merge_lora, ["--path", str(model_with_adapter), "--output_dir", str(tmp_path / "merged")]
    )


def test_it_is_laid_over_the_model_beside_it_when_asked_for(model_with_adapter, chat_model, tmp_path, capsys):
    source = resolve_model(str(model_with_adapter), tmp_path / "cache", merge_adapter=True)
    assert str(model_with_adapter) in capsys.readouterr().err
    shutil.copytree(model_with_adapter, tmp_path / "whole", ignore=shutil.ignore_patterns("adapter*"))
    expected = together("causal", tmp_path / "whole", tmp_path / "adapter")
    torch.testing.assert_close(computed("causal", source), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, together("causal", chat_model, tmp_path / "adapter"), atol=0.1)
    assert read_provenance(source) == read_provenance(model_with_adapter)
    actor = load_actor(str(model_with_adapter), LoadOptions(merge_adapter=True, data_output_path=str(tmp_path / "c")))
    with torch.no_grad():
        torch.testing.assert_close(actor.model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_without_a_model_is_refused_with_advice_or_merged(alone, chat_model, tmp_path):
    kind, directory = alone
    said = refusal(named_by("--model_name_or_path")(resolve_model), str(directory), tmp_path / "cache")
    assert "inference/merge_lora.py" in said and "--merge_adapter" in said and str(directory) in said
    source = resolve_model(str(directory), tmp_path / "cache", merge_adapter=True)
    torch.testing.assert_close(computed(kind, source), together(kind, chat_model, directory), rtol=1e-4, atol=1e-4)
    assert read_provenance(source) == read_provenance(directory)
    load = {"causal": load_actor, "reward": load_reward_model}[kind]
    load(str(directory), LoadOptions())  # inference has always merged it


@pytest.mark.parametrize("alone", ["causal"], indirect=True)
def test_the_merged_model_is_called_in_errors_what_the_user_called_it(alone, tmp_path):
    argv = ["--model_name_or_path", str(alone[1]), "--merge_adapter", "--template", "alpaca", "--dtype", "fp32"]
    argv += ["--data_output_path", str(tmp_path / "cache"), "--data_path", "builtin:courtesy"]
    said = refusal(step1, [*argv, "--output_dir", str(tmp_path / "out")])
    assert said.startswith(f"--model_name_or_path {alone[1]}: it was trained with template 'question_answer', but ")
    assert str(tmp_path / "cache") not in said


def test_it_is_merged_once_until_the_adapter_changes(alone, tmp_path):
    directory = alone[1]
    resolve = lambda: resolve_model(str(directory), tmp_path / "cache", merge_adapter=True)
    first = resolve()
    made = (tmp_path / "cache").stat().st_mtime_ns
    assert resolve() == first and (tmp_path / "cache").stat().st_mtime_ns == made
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2}))
    second = resolve()
    assert second != first
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    assert resolve() not in (first, second)


def test_a_base_that_is_gone_is_named(alone, tmp_path):
    directory = alone[1]
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "./gone"}))
    said = refusal(lambda: resolve_model(str(directory), tmp_path / "cache", merge_adapter=True))
    assert "./gone" in said and str(directory) in said and "\n" not in said


def test_a_full_disk_for_the_merged_model_is_one_line(alone, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(UserError) as error:
        with writing_to("--data_output_path", tmp_path / "cache"):
            resolve_model(str(alone[1]), tmp_path / "cache", merge_adapter=True)
    said = str(error.value)
    assert "--data_output_path" in said and str(tmp_path / "cache") in said and "\n" not in said
