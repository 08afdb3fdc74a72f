"""The output head computed chunk by chunk at the targets: equal results to full logits, in less memory."""

import weakref

import pytest
import torch
import transformers as hf
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.data.tokenization import load_tokenizer, make_codec
from common.models import logprobs
from common.models.loading import load_causal_lm
from common.models.lora import add_lora
from tests.architectures import CONFIGS, FURTHER_CONFIGS, build_model

PROMPTS, RESPONSES = torch.tensor([3, 9, 1, 4]), torch.tensor([5, 2, 7, 0])
TEMPERATURE = 0.7


def batch(vocabulary):
    generator = torch.Generator().manual_seed(1)
    lengths = PROMPTS + RESPONSES
    tokens = torch.randint(10, vocabulary, (4, int(lengths.max()) + 2), generator=generator)
    return {"input_ids": tokens, "attention_mask": logprobs.length_mask(lengths, tokens.shape[1]).long()}


def from_whole_logits(model, inputs):
    """Log-probs and entropy of the response tokens, one after the other in row order, from logits everywhere."""
    logits = model(**inputs, use_cache=False).logits
    rows = [
        (logits[row, p - 1 : p - 1 + r], inputs["input_ids"][row, p : p + r])
        for row, (p, r) in enumerate(zip(PROMPTS.tolist(), RESPONSES.tolist()))
    ]
    distribution = torch.distributions.Categorical(logits=torch.cat([row[0] for row in rows]) / TEMPERATURE)
    return distribution.log_prob(torch.cat([row[1] for row in rows])), distribution.entropy()


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_equal_ways(model, inputs, monkeypatch):
    """Values, and the gradients of a loss that weighs every token differently, in many chunks and in one."""
    expected, entropy = from_whole_logits(model, inputs)
    weights = torch.linspace(-1, 2, len(expected))
    gradients = gradients_of(model, (expected * weights).sum())
    mask = logprobs.length_mask(RESPONSES, int(RESPONSES.max()))
    for rows in (5, len(expected)):
        monkeypatch.setattr(logprobs, "CHUNK_NUMBERS", rows * model.config.vocab_size)
        read = (model, inputs, PROMPTS, RESPONSES, TEMPERATURE)
        found, found_entropy = logprobs.response_log_probs_and_entropy(*read)
        torch.testing.assert_close(found[mask], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found_entropy[mask], entropy, rtol=1e-5, atol=1e-6)
        found = logprobs.response_log_probs(*read)
        torch.testing.assert_close(found[mask], expected, rtol=1e-5, atol=1e-6)
        for name, gradient in gradients_of(model, (found[mask] * weights).sum()).items():
            assert (gradient - gradients[name]).norm() <= 1e-5 * gradients[name].norm() + 1e-6, name


@pytest.mark.parametrize(
    "name, tied, lora",
    [
        *((name, True, lora) for name in CONFIGS for lora in (False, True)),
        ("llama", False, False),
        *(
            pytest.param(name, tied, lora, marks=pytest.mark.long)
            for name in FURTHER_CONFIGS
            for tied, lora in ((True, False), (True, True), (False, True))
        ),
    ],
)
def test_values_and_gradients_are_those_of_whole_logits(name, tied, lora, tmp_path, builtin_cache, monkeypatch):
    directory = build_model(name, tmp_path, builtin_cache, tie_word_embeddings=tied)
    model = load_causal_lm(
        str(directory),
        make_codec(load_tokenizer(str(directory)), "human_assistant"),
        dtype=torch.float32,
        dropout=0.0,
        gradient_checkpointing=lora,
    ).train()
    if lora:
        add_lora(model, dim=2, alpha=4, dropout=0.0, modules="auto", base_name="base", seed=0)
        for parameter in model.parameters():
            if parameter.requires_grad:  # B starts at 0, which would hide every gradient of A
                torch.nn.init.normal_(parameter, std=0.1)
    assert_equal_ways(model, batch(model.config.vocab_size), monkeypatch)


@pytest.mark.parametrize(
    "config_class, changes",
    [
        (hf.GraniteConfig, {"logits_scaling": 3.0}),
        (hf.CohereConfig, {"logit_scale": 0.3}),
        (hf.Gemma2Config, {"final_logit_softcapping": 0.5, "head_dim": 8}),
        (hf.FalconH1Config, {"lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8}),
    ],
    ids=["scaled down", "scaled", "capped", "multiplied"],
)
def test_logits_that_change_after_the_head_are_read_after_the_change(config_class, changes, monkeypatch):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    model = hf.AutoModelForCausalLM.from_config(config_class(**sizes, pad_token_id=0, **changes)).train()
    inputs = batch(97)
    head = model.get_output_embeddings()
    with torch.no_grad():
        hidden = []
        hook = head.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
        assert not torch.allclose(model(**inputs).logits, head(hidden[0]))
        hook.remove()
    assert_equal_ways(model, inputs, monkeypatch)


def test_the_model_has_its_own_head_again_even_after_a_failure(tmp_path, builtin_cache):
    model = hf.AutoModelForCausalLM.from_pretrained(build_model("opt", tmp_path, builtin_cache))
    inputs = batch(100)
    before = model(**inputs).logits
    logprobs.response_log_probs(model, inputs, PROMPTS, RESPONSES)
    assert torch.equal(model(**inputs).logits, before)
    with pytest.raises(IndexError):
        logprobs.response_log_probs(model, inputs, PROMPTS + 40, RESPONSES)
    assert torch.equal(model(**inputs).logits, before)


class PeakBytes(TorchDispatchMode):
    """The most bytes that the tensors made within the context have held at one time."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [32, pytest.param(512, marks=pytest.mark.long)])
def test_memory_is_a_fifth_of_that_of_whole_logits(length, dtype, monkeypatch):
    """Of a training pass with OPT's vocabulary, all tokens but the first being targets.

    The chunks are those of length 512; a quicker case has as much less of everything.
    """
    rows, vocabulary = 16, 50_272
    monkeypatch.setattr(logprobs, "CHUNK_NUMBERS", logprobs.CHUNK_NUMBERS * length // 512)
    ones = torch.ones(rows, length, dtype=torch.long)
    lengths = torch.ones(rows, dtype=torch.long), torch.full((rows,), length - 1)

    def whole(model, ones):
        logits = model(input_ids=ones, attention_mask=ones, use_cache=False).logits[:, :-1].float()
        return (logits / TEMPERATURE).log_softmax(-1).gather(-1, ones[:, 1:, None]).sum()

    def chunked(model, ones):
        inputs = {"input_ids": ones, "attention_mask": ones}
        return logprobs.response_log_probs(model, inputs, *lengths, TEMPERATURE).sum()

    def peak(compute, ones):
        model = hf.AutoModelForCausalLM.from_config(
            hf.OPTConfig(
                vocab_size=vocabulary,
                hidden_size=8,
                word_embed_proj_dim=8,
                ffn_dim=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                max_position_embeddings=length,
                dropout=0.0,
            ),
            dtype=dtype,
        )
        with PeakBytes() as tracked:
            compute(model, ones).backward()
        return tracked.peak

    with FakeTensorMode():  # sizes without numbers: the whole logits would take gigabytes here
        expected = peak(whole, torch.ones(rows, length, dtype=torch.long))
    found = peak(chunked, ones)
    assert expected > 2 * rows * length * vocabulary * 4
    assert 5 * found < expected, (found, expected)
