"""The built-in models are ordinary Hugging Face directories that hold the task well."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.data.builtin import builtin_rows
from common.errors import UserError
from common.models.builtin import BUILTIN_MODELS, materialise

ROWS = list(builtin_rows("courtesy"))[::50]


@pytest.fixture(scope="module", params=BUILTIN_MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def directory(name, tmp_path_factory):
    return materialise(name, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def model(directory):
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def digests(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


def test_the_same_files_wherever_written_and_written_once(name, directory, tmp_path):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    other = materialise(name, tmp_path / "another" / "cache")
    assert torch.equal(torch.get_rng_state(), before)
    assert digests(other) == digests(directory)
    written = (other / "model.safetensors").stat().st_mtime_ns
    assert materialise(name, tmp_path / "another" / "cache") == other
    assert (other / "model.safetensors").stat().st_mtime_ns == written


def test_callers_at_once_get_one_finished_directory(name, tmp_path):
    with ThreadPoolExecutor(3) as pool:
        found = set(pool.map(lambda _: materialise(name, tmp_path), range(3)))
    (only,) = found
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [only]
    AutoModelForCausalLM.from_pretrained(only)


def test_tokenizer_and_model_agree(tokenizer, model):
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) <= 1024
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.bos_token_id == tokenizer.bos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_text_survives_the_tokenizer_and_starts_with_bos(tokenizer):
    for row in ROWS:
        ids = tokenizer(row["prompt"])["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["prompt"]
    strange = "naïve 日本 \U0001f600"
    assert tokenizer.decode(tokenizer(strange)["input_ids"], skip_special_tokens=True) == strange


def test_questions_and_answers_are_short(tokenizer):
    def longest(*columns):
        texts = [" " + row[column] for row in ROWS for column in columns]
        return max(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])

    assert longest("prompt") <= 24
    assert longest("chosen", "rejected") <= 12


def test_the_model_generates(tokenizer, model):
    prompt = tokenizer(f"\n\nHuman: {ROWS[0]['prompt']}\n\nAssistant:", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert out.shape[1] > prompt["input_ids"].shape[1]


def test_opt_prepends_its_end_token_and_keeps_padding_apart(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(materialise("builtin:tiny-opt", tmp_path))
    assert tokenizer.bos_token == tokenizer.eos_token == "</s>"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_llama_groups_its_queries(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(materialise("builtin:tiny-llama", tmp_path))
    assert 1 < model.config.num_key_value_heads < model.config.num_attention_heads


def test_unknown_name_lists_the_known(tmp_path):
    with pytest.raises(UserError, match="builtin:tiny-opt"):
        materialise("builtin:tiny-gpt", tmp_path)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_colleagues_may_read_it_as_far_as_the_umask_says(mask, tmp_path):
    usual = os.umask(mask)
    try:
        directory = materialise("builtin:tiny-opt", tmp_path / "cache")
    finally:
        os.umask(usual)
    modes = {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()}
    assert directory.stat().st_mode & 0o777 == 0o777 & ~mask
    assert modes == dict.fromkeys(modes, 0o666 & ~mask) and "model.safetensors" in modes
