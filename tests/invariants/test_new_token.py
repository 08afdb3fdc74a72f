"""An end token added to a full vocabulary: with every architecture, LoRA can train a model to use it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.artifacts.export import write_model
from common.data.tokenization import load_tokenizer, make_codec
from common.models.loading import load_causal_lm, load_scalar_model
from common.models.lora import adapters_disabled, add_lora, folded_adapters
from common.models.scalar import score_at_last_token
from tests.architectures import CONFIGS, FURTHER_CONFIGS, build_model
from tests.chat_model import CAPITAL, learn, prompt_of
from tests.launching import at_length

TOKENS = torch.tensor([[5, 9, 17, 30, 12, 44, 8, 21]])


@pytest.fixture(scope="module", params=[*CONFIGS, "llama-tied", *at_length(FURTHER_CONFIGS)])
def directory(request, tmp_path_factory, builtin_cache):
    changes = {"tie_word_embeddings": True} if request.param == "llama-tied" else {}
    return build_model(
        request.param.removesuffix("-tied"), tmp_path_factory.mktemp(request.param), builtin_cache, **changes
    )


@pytest.fixture(scope="module")
def codec(directory):
    return codec_of(directory)


def codec_of(directory):
    """The text rules with an end token that is one more than the vocabulary has rows for."""
    return make_codec(load_tokenizer(str(directory)), "question_answer", add_eot_token=True, eot_token="<|stop|>")


def load(directory, codec, loader=load_causal_lm):
    return loader(str(directory), codec, dtype=torch.float32, dropout=0.0).eval()


def adapt(model, seed=3):
    add_lora(model, dim=4, alpha=8, dropout=0.0, modules="auto", base_name="base", seed=0)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def reading(codec):
    """Tokens with the new one among them."""
    tokens = TOKENS.clone()
    tokens[0, 3] = codec.end_id
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def test_its_rows_start_as_the_old_end_tokens(directory, codec):
    old = load_tokenizer(str(directory)).eos_token_id
    model = load(directory, codec)
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert codec.end_id == len(embeddings.weight) - 1
        assert torch.equal(embeddings.weight[codec.end_id], embeddings.weight[old])
        assert not torch.equal(embeddings.weight[codec.end_id], embeddings.weight[old - 1])


@torch.no_grad()
def test_all_ways_to_run_the_adapted_model_agree(directory, codec, tmp_path):
    base = load(directory, codec)(**reading(codec)).logits
    model = adapt(load(directory, codec))
    adapted = model(**reading(codec)).logits
    old = load_tokenizer(str(directory)).eos_token_id
    assert (adapted[..., codec.end_id] - adapted[..., old]).abs().min() > 1e-3, "the new token has a row of its own"
    with adapters_disabled(model):
        torch.testing.assert_close(model(**reading(codec)).logits, base, atol=0, rtol=0)
    before = model.get_input_embeddings().weight.clone()
    with folded_adapters(model):
        torch.testing.assert_close(model(**reading(codec)).logits, adapted, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.get_input_embeddings().weight, before)
    write_model(model, dict(model.state_dict()), codec, tmp_path / "merged", tmp_path / "adapter")
    assert torch.equal(model.get_input_embeddings().weight, before)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(**reading(codec)).logits, adapted, atol=1e-4, rtol=1e-4)

    from peft import PeftModel

    loaded = PeftModel.from_pretrained(load(directory, codec), tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(loaded(**reading(codec)).logits, adapted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_reward_model_reads_the_new_token_alike_when_saved(directory, codec, tmp_path):
    model = load(directory, codec, load_scalar_model)
    adapt(model.classifier)
    tokens = reading(codec)
    lengths = torch.tensor([4])  # it ends with the new token
    scores = score_at_last_token(model(**tokens), lengths)
    write_model(model, dict(model.state_dict()), codec, tmp_path / "merged", tmp_path / "adapter")
    merged = load(tmp_path / "merged", codec_of(tmp_path / "merged"), load_scalar_model)
    torch.testing.assert_close(score_at_last_token(merged(**tokens), lengths), scores, atol=1e-4, rtol=1e-4)

    from peft import PeftModel

    from common.models.scalar import ScalarModel

    loaded = ScalarModel(
        PeftModel.from_pretrained(
            load(directory, codec, load_scalar_model).classifier, tmp_path / "adapter"
        ).merge_and_unload()
    )
    torch.testing.assert_close(score_at_last_token(loaded(**tokens), lengths), scores, atol=1e-4, rtol=1e-4)


def test_lora_teaches_a_model_to_end_its_answers_with_it(tmp_path, builtin_cache):
    directory = build_model("llama", tmp_path / "model", builtin_cache, hidden_size=64, intermediate_size=128)
    plain = make_codec(load_tokenizer(str(directory)), "question_answer")
    model = load(directory, plain)
    questions = [CAPITAL, "And again?", "Why?"]

    def rows(codec):
        return [
            (codec.encode_prompt(prompt_of((question,))), codec.encode_response(f"It is {number}."))
            for number, question in enumerate(questions)
        ]

    learn(model, rows(plain))
    write_model(model, dict(model.state_dict()), plain, directory)
    codec = codec_of(directory)
    model = load(directory, codec)
    add_lora(model, dim=8, alpha=16, dropout=0.0, modules="auto", base_name="x", seed=0)
    learn(model, rows(codec))
    for prompt, response in rows(codec):
        answer = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30)[0, len(prompt) :].tolist()
        assert answer == response and answer[-1] == codec.end_id
