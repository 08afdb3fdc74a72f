"""Rows that share a sequence give the same loss and gradients as rows in sequences of their own."""

import pytest
import torch
import transformers as hf
from datasets import Dataset

from common.batching.collate import collate_demonstrations
from common.batching.sampler import MicroBatch
from common.data.tokenization import load_tokenizer, make_codec
from common.models.loading import load_causal_lm
from common.models.logprobs import next_token_loss_sum
from step1_sft import packing
from step1_sft.packing import Packing, packing_of
from tests.architectures import CONFIGS, FURTHER_CONFIGS, build_model
from tests.launching import at_length

LENGTHS = [(3, 5), (9, 2), (1, 7), (4, 4), (6, 1)]
APART = MicroBatch((0, 1, 2, 3, 4), (True,) * 5)
PACKED = MicroBatch((1, 0, 2, 4, 3), (True,) * 5, packs=(3, 2))
ALIBI = ("bloom", "falcon-rw", "mpt")  # their positions come from a (B, L) mask
OWN_ATTENTION = ("falcon", "falcon-40b", "gpt-neo")  # code that no other attention can replace
PACKABLE = [name for name in CONFIGS if name not in ALIBI]
PACKABLE += at_length(name for name in FURTHER_CONFIGS if name not in ALIBI)


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(4)
    ids = lambda length: torch.randint(10, 300, (length,), generator=generator).tolist()
    return Dataset.from_dict(
        {
            "prompt_ids": [ids(prompt) for prompt, _ in LENGTHS],
            "response_ids": [ids(response) for _, response in LENGTHS],
        }
    )


def load(name, tmp_path, builtin_cache, dtype=torch.float32, **changes):
    directory = str(build_model(name, tmp_path / name, builtin_cache, **changes))
    codec = make_codec(load_tokenizer(directory), "human_assistant")
    return load_causal_lm(directory, codec, dtype=dtype, dropout=0.0)


def engine_around(model):
    """As much of an engine as the probe needs."""

    class Engine:
        module, eval, train = model, model.eval, model.train

        def __call__(self, **inputs):
            return model(**inputs)

    return Engine()


def loss_and_gradients(model, rows, micro_batch, train_on_prompt, way=None):
    batch = collate_demonstrations(rows, micro_batch, 1, train_on_prompt)
    if way is Packing.FLAT:
        batch = batch.flat()
    loss, count = next_token_loss_sum(model, batch.inputs(model.dtype), batch.loss_mask)
    model.zero_grad()
    loss.backward()
    return (
        loss.detach(),
        count,
        {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None},
    )


@pytest.fixture
def varlen(monkeypatch):
    """Attention of variable length that needs no GPU, in the place of flash-attention's; it is told the same."""

    def attention(module, query, key, value, mask, cu_seq_lens_q=None, scaling=None, dropout=0.0, **others):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        assert mask is None and (cu_seq_lens_q is None or len(query) == 1)
        bounds = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                *(tensor[:, :, start:end] for tensor in (query, key, value)), is_causal=True, scale=scaling
            )
            for start, end in zip(bounds, bounds[1:])
        ]
        return torch.cat(parts, 2).transpose(1, 2).contiguous(), None

    hf.AttentionInterface.register("varlen", attention)
    hf.AttentionMaskInterface.register("varlen", hf.AttentionMaskInterface()["flash_attention_2"])
    monkeypatch.setattr(packing, "VARLEN", "varlen")
    monkeypatch.setattr(packing, "supports_varlen", lambda dtype: dtype != torch.float32)


@pytest.mark.parametrize(
    "way, train_on_prompt", [(Packing.MASKED, False), (Packing.MASKED, True), (Packing.FLAT, False)]
)
@pytest.mark.parametrize("name", PACKABLE)
def test_loss_and_gradients_are_those_of_rows_on_their_own(
    name, way, train_on_prompt, rows, varlen, tmp_path, builtin_cache
):
    if way is Packing.FLAT and name in OWN_ATTENTION:
        return
    model = load(name, tmp_path, builtin_cache)
    expected, count, gradients = loss_and_gradients(model, rows, APART, train_on_prompt)
    if way is Packing.FLAT:
        model.set_attn_implementation("varlen")
    found, packed_count, packed_gradients = loss_and_gradients(model, rows, PACKED, train_on_prompt, way)
    assert packed_count == count and expected > 10
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert packed_gradients.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        assert (packed_gradients[parameter] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, parameter


@torch.no_grad()
@pytest.mark.parametrize("name", PACKABLE)
def test_no_position_sees_another_row(name, rows, tmp_path, builtin_cache):
    """Other tokens in one row change its own logits and, bit for bit, no others."""
    model = load(name, tmp_path, builtin_cache).eval()
    batch = collate_demonstrations(rows, PACKED, 1)
    changed = batch.input_ids.clone()
    within = batch.rows == 1
    changed[within] = (changed[within] + 7) % 300
    before = model(**batch.inputs(model.dtype)).logits
    after = model(**{**batch.inputs(model.dtype), "input_ids": changed}).logits
    assert (after[within] != before[within]).any()
    assert torch.equal(after[~within], before[~within])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*CONFIGS, *at_length(FURTHER_CONFIGS)])
def test_the_probe_finds_what_can_be_packed(name, dtype, tmp_path, builtin_cache):
    way = packing_of(engine_around(load(name, tmp_path, builtin_cache, dtype)), 128)
    assert way == (None if name in ALIBI else Packing.MASKED)


@pytest.mark.parametrize("name", [*CONFIGS, *at_length(FURTHER_CONFIGS)])
def test_flash_attention_is_taken_where_it_is_and_can_be(name, varlen, tmp_path, builtin_cache):
    model = load(name, tmp_path, builtin_cache, torch.bfloat16)
    plain = model.config._attn_implementation
    stays = name in ALIBI or name in OWN_ATTENTION
    masked = None if name in ALIBI else Packing.MASKED
    assert packing_of(engine_around(model), 128) == (masked if stays else Packing.FLAT)
    assert model.config._attn_implementation == (plain if stays else "varlen")
    model.save_pretrained(tmp_path / "saved")
    assert "varlen" not in (tmp_path / "saved/config.json").read_text()
    precise = load(name, tmp_path, builtin_cache)  # in fp32, which flash-attention has not
    assert packing_of(engine_around(precise), 128) == masked


def refuse(*given, **named):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


@pytest.mark.parametrize(
    "worse",
    [lambda attend: lambda *given, cu_seq_lens_q=None, **named: attend(*given, **named), lambda attend: refuse],
    ids=["sees-through-the-bounds", "refuses"],
)
def test_attention_that_cannot_is_not_taken(worse, varlen, tmp_path, builtin_cache):
    hf.AttentionInterface.register("varlen", worse(hf.AttentionInterface()["varlen"]))
    model = load("llama", tmp_path, builtin_cache, torch.bfloat16)
    plain = model.config._attn_implementation
    assert packing_of(engine_around(model), 128) is Packing.MASKED
    assert model.config._attn_implementation == plain


def test_a_model_that_refuses_the_mask_fails_the_probe_and_nothing_else():
    falcon = hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True)
    )
    engine = engine_around(falcon)
    assert packing_of(engine, 128) is None
    assert falcon.training and falcon(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_finds_a_window_that_the_mask_would_override(dtype, tmp_path, builtin_cache):
    model = load("mistral", tmp_path, builtin_cache, dtype, sliding_window=32)
    assert packing_of(engine_around(model), 32) is Packing.MASKED
    assert packing_of(engine_around(model), 128) is None


# Rotary positions are relative, so that those models need no positions to start again.
IGNORED = [(name, "attention_mask") for name in PACKABLE] + [("opt", "position_ids"), ("opt-350m", "position_ids")]


@pytest.mark.parametrize("name, ignored", IGNORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_finds_a_model_that_ignores_the_mask_or_the_positions(name, dtype, ignored, tmp_path, builtin_cache):
    model = load(name, tmp_path, builtin_cache, dtype)
    forward = model.forward

    def forgetful(input_ids, attention_mask=None, position_ids=None, **others):
        if ignored == "attention_mask" and attention_mask is not None:
            attention_mask = torch.ones_like(input_ids)
        if ignored == "position_ids" and position_ids is not None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **others)

    model.forward = forgetful
    assert packing_of(engine_around(model), 64) is None
