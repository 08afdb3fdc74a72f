"""A result is what other tools take for a model of its family: transformers, vLLM, llama.cpp. See docs/inference.md.

vLLM and llama.cpp are not run here. What they read is: the configuration, the names of the tensors, the tokenizer.
"""

import json

import pytest
import torch
import transformers as hf
from safetensors import safe_open

from common.artifacts.export import write_model
from common.data.records import Message, Prompt
from common.data.tokenization import load_tokenizer, make_codec
from common.models.builtin import materialise
from common.models.loading import load_causal_lm
from inference.decoding import respond
from inference.loading import load_actor
from inference.options import DecodingOptions, LoadOptions
from tests.architectures import build_model
from tests.chat_model import provenance_of

# The prompts that docs/inference.md writes out for servers that take text.
WORDINGS = {
    "human_assistant": "\n\nHuman: Why?\n\nAssistant:",
    "question_answer": "Question: Why?\n\nAnswer:",
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nWhy?\n\n### Response:",
}
ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "gpt-neox": "GPTNEOX"}  # as llama.cpp calls them
QUESTION = Prompt((Message("user", "Why?"),))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def result(request, tmp_path_factory, builtin_cache):
    """A directory as step 3 leaves it, its codec, and the family."""
    base = build_model(request.param, tmp_path_factory.mktemp("base"), builtin_cache)
    codec = make_codec(load_tokenizer(str(base)), "human_assistant")
    model = load_causal_lm(str(base), codec, dtype=torch.float32)
    directory = tmp_path_factory.mktemp("ppo") / "actor"
    write_model(model, dict(model.state_dict()), codec, directory)
    provenance_of(codec, "ppo").write(directory)
    return directory, codec, request.param


def test_plain_transformers_gives_the_same_answer_by_the_files_alone(result):
    directory, codec, _ = result
    model, tokenizer = hf.AutoModelForCausalLM.from_pretrained(directory), hf.AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(WORDINGS["human_assistant"], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    actor = load_actor(str(directory), LoadOptions(dtype="fp32", device="cpu"))
    (ours,) = respond(actor, [QUESTION], DecodingOptions(max_new_tokens=12), 1)
    assert tuple(ids[: len(ours.ids)].tolist()) == ours.ids and len(ours.ids) > 1


@pytest.mark.parametrize("name", ["builtin:tiny-opt", "builtin:tiny-llama"])
def test_a_prompt_given_as_text_has_the_ids_of_the_training(name, builtin_cache):
    directory = str(materialise(name, builtin_cache))
    plain = hf.AutoTokenizer.from_pretrained(directory)
    for template, text in WORDINGS.items():
        codec = make_codec(load_tokenizer(directory), template)
        assert plain(text)["input_ids"] == codec.encode_prompt(QUESTION)


def test_the_files_say_the_family_and_the_end_token(result):
    directory, codec, _ = result
    config = json.loads((directory / "config.json").read_text())
    (architecture,) = config["architectures"]
    assert architecture in hf.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    assert "quantization_config" not in config and "auto_map" not in config
    ends = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    assert codec.end_id in (ends if isinstance(ends, list) else [ends])
    assert {"tokenizer.json", "tokenizer_config.json", "model.safetensors"} <= {
        path.name for path in directory.iterdir()
    }


def test_llama_cpp_knows_every_tensor_and_the_special_tokens(result):
    gguf = pytest.importorskip("gguf")
    directory, codec, family = result
    config = json.loads((directory / "config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[family]], config["num_hidden_layers"])
    with safe_open(directory / "model.safetensors", "pt") as tensors:
        unknown = [name for name in tensors.keys() if names.get_name(name, (".weight", ".bias")) is None]
    assert unknown == []
    vocabulary = gguf.SpecialVocab(directory, load_merges=True)
    assert vocabulary.special_token_ids["eos"] == codec.end_id and vocabulary.merges
