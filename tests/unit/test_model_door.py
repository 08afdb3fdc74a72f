"""Unusable model directories are refused with the name of the file at fault, before a long run begins."""

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from common.artifacts.model_source import resolve_model
from common.data.tokenization import load_tokenizer, make_codec
from common.errors import UserError
from common.models.checks import check_files
from common.models.loading import load_causal_lm, load_scalar_model
from inference.loading import load_actor, load_reward_model
from inference.options import LoadOptions
from tests.architectures import CONFIGS, FURTHER_CONFIGS, build_model
from tests.launching import at_length


@pytest.fixture
def directory(tmp_path, builtin_cache):
    return build_model("llama", tmp_path / "model", builtin_cache)


def refusal(directory) -> str:
    with pytest.raises(UserError) as refused:
        resolve_model(str(directory), directory.parent)
    with pytest.raises(UserError) as again:
        load_actor(str(directory), LoadOptions(data_output_path=str(directory.parent)))
    assert str(again.value) == str(refused.value)
    assert str(refused.value).startswith(f"{directory}: ") and "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("hidden_size", -64),
        ("hidden_size", 10**12),
        ("hidden_size", "64"),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 10**9),
        ("vocab_size", -5),
        ("vocab_size", 10**15),
        ("num_attention_heads", 0),
        ("num_attention_heads", 3),
        ("intermediate_size", -1),
        ("max_position_embeddings", -4),
        ("hidden_act", "nonsense"),
        ("eos_token_id", "x"),
    ],
)
def test_a_config_json_that_describes_no_model_is_named(name, value, directory):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    assert f"{path} describes no model" in refusal(directory)


@pytest.mark.parametrize(
    "content",
    ['{"max_new_tokens": -3}', "[]", '{"a":', "[" * 100_000, '"text"', '{"cache_implementation": "nonsense"}'],
)
def test_a_damaged_generation_config_is_named(content, directory):
    (directory / "generation_config.json").write_text(content)
    assert f"{directory}/generation_config.json describes no model" in refusal(directory)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 10) + b"not json..",
        b"",
        pickle.dumps({"a": 1}),
        struct.pack("<Q", 2) + b"{}" + bytes(100),
    ],
    ids=["absurd", "no json", "empty", "pickle", "longer"],
)
def test_a_damaged_weight_file_is_named(content, directory):
    (directory / "model.safetensors").write_bytes(content)
    assert f"{directory}/model.safetensors is damaged and cannot be loaded: " in refusal(directory)


def test_a_configuration_that_is_nested_too_deep_is_named(directory):
    (directory / "config.json").write_text("[" * 100_000)
    assert f"{directory}/config.json is not valid JSON" in refusal(directory)


def test_a_folder_in_the_place_of_a_weight_file_is_named(directory):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").mkdir()
    assert f"{directory}/model.safetensors cannot be read" in refusal(directory)


@pytest.mark.parametrize("name", [*CONFIGS, *at_length(FURTHER_CONFIGS)])
def test_every_architecture_passes(name, tmp_path, builtin_cache):
    directory = build_model(name, tmp_path / name, builtin_cache)
    assert resolve_model(str(directory), tmp_path) == str(directory)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_found_before_they_are_used(number, directory):
    weights = load_file(directory / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    weights[key][3, 5] = number
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    codec = make_codec(load_tokenizer(str(directory)), "human_assistant")
    for load in (load_causal_lm, load_scalar_model):
        with pytest.raises(UserError, match=f"{directory}: the model's weights are not finite.*up_proj"):
            load(str(directory), codec, dtype=torch.float32)
    with pytest.raises(UserError, match=f"{directory}: the model's weights are not finite"):
        load_actor(str(directory), LoadOptions())
    path = directory / "config.json"
    values = {**json.loads(path.read_text()), "architectures": ["LlamaForSequenceClassification"]}
    path.write_text(json.dumps(values))
    weights["score.weight"] = torch.ones(1, weights[key].shape[1])
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{directory}: the model's weights are not finite"):
        load_reward_model(str(directory), LoadOptions())


def test_an_adapter_that_is_not_finite_is_found(directory, tmp_path):
    codec = make_codec(load_tokenizer(str(directory)), "human_assistant")
    model = get_peft_model(
        load_causal_lm(str(directory), codec, dtype=torch.float32),
        LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path=str(directory)),
    )
    for key, weight in model.named_parameters():
        if "lora_B" in key:
            weight.data.fill_(float("nan"))
    model.peft_config["default"].base_model_name_or_path = str(directory)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="adapter: the model's weights are not finite"):
        load_actor(str(tmp_path / "adapter"), LoadOptions())


def test_the_checks_run_no_code_of_a_model(directory, monkeypatch):
    """Not even where a terminal could be asked."""
    (directory / "own.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
        "from transformers import OPTConfig as OwnConfig\n"
    )
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps(config | {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}})
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    check_files(directory)
    assert not list(Path(directory).rglob("ran"))
