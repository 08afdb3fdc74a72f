"""What must hold for models with quantised layers, of several architectures."""

import json
from itertools import product

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

import common.models.quantization as quantization
from benchmarks.memory_plan import plan
from common.artifacts.export import write_model
from common.data.tokenization import load_tokenizer, make_codec
from common.errors import InputError, ModelError
from common.models.configuration import load_config
from common.models.loading import load_causal_lm, load_scalar_model
from common.models.lora import add_lora, folded_adapters, folding_takes, linear_modules
from common.models.quantization import QuantizedLinear, check_quantization, compute_dtype, quantized_layers
from step3_ppo.generation import generation_mode as generation
from tests.architectures import CONFIGS, build_model
from tests.launching import at_length
from tests.unsharded_engine import UnshardedEngine

KINDS = ("nf4", "int8")
# Projected embeddings, no biases, transposed weights.
SHORT = [("opt-350m", "nf4"), ("llama", "int8"), ("gpt2", "nf4")]
CASES = [*SHORT, *at_length(sorted({*product(CONFIGS, KINDS)} - {*SHORT}))]
IDS = torch.arange(20, 60).view(2, 20)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, tmp_path_factory, builtin_cache):
    """The directory of a model, and the kind in which it is quantised."""
    architecture, kind = request.param
    return build_model(architecture, tmp_path_factory.mktemp(architecture), builtin_cache), kind


def codec_of(directory, **changes):
    return make_codec(load_tokenizer(str(directory)), "human_assistant", **changes)


def load(directory, kind="nf4", dtype=torch.float32, codec=None, **settings):
    codec = codec or codec_of(directory)
    return load_causal_lm(str(directory), codec, dtype=dtype, dropout=0.0, quantize=kind, **settings)


def adapted(model, base="x"):
    """With adapters that change what the model computes."""
    add_lora(model, dim=2, alpha=4, dropout=0.0, modules="auto", base_name=str(base), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name or "lora_new_row" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def with_restored_weights(directory, quantized):
    """The plain model with the numbers that the quantised one has."""
    plain = load(directory, "none")
    for name in linear_modules(plain):
        layer, restored = plain.get_submodule(name), quantized.get_submodule(name).restored().float()
        layer.weight.data = restored.T.contiguous() if isinstance(layer, Conv1D) else restored
    return plain


def test_a_quantised_model_computes_what_its_restored_weights_do(case):
    """Values and the gradients of adapters, whose inputs and outputs pass quantised layers."""
    directory, kind = case
    quantized = load(directory, kind, gradient_checkpointing=True)
    plain = with_restored_weights(directory, quantized)
    assert {type(quantized.get_submodule(name)) for name in linear_modules(plain)} == {QuantizedLinear}
    assert len(quantized_layers(quantized)) == len(linear_modules(plain))
    gradients = []
    for model in (quantized, plain):
        logits = adapted(model).train()(input_ids=IDS).logits
        logits.square().mean().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
        gradients[-1]["logits"] = logits.detach()
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 8
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind, bits, error", [("nf4", 4.2, 0.1), ("int8", 8.2, 0.01)])
def test_weights_take_few_bits_and_stay_near_what_they_were(kind, bits, error):
    layer = torch.nn.Linear(512, 384)
    quantized = QuantizedLinear(layer, kind, torch.float32)
    taken = sum(tensor.numel() * tensor.element_size() for tensor in (quantized.weight, *quantized.scale_tensors()))
    assert 8 * taken < bits * layer.weight.numel()
    off = quantized.restored() - layer.weight
    assert off.norm() < error * layer.weight.norm()


def test_the_plan_of_memory_is_what_a_model_takes(tmp_path, builtin_cache):
    directory = build_model("llama", tmp_path, builtin_cache, hidden_size=256, intermediate_size=512)
    expected = plan(load(directory, "none"), rank=2)
    for kind in KINDS:
        model = load(directory, kind)
        held = [*model.parameters(), *(scale for layer in quantized_layers(model) for scale in layer.scale_tensors())]
        taken = sum(tensor.numel() * tensor.element_size() for tensor in held)
        assert taken == pytest.approx(getattr(expected, kind), rel=1e-3)
        adapters = sum(weight.numel() for name, weight in adapted(model).named_parameters() if "lora_" in name)
        assert expected.adapters == 16 * adapters and expected.copy == folding_takes(model) / 2  # in fp32


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_rows_beside_it(kind):
    layer = QuantizedLinear(torch.nn.Linear(64, 48), kind, torch.float32)
    rows = torch.randn(3, 64)
    beside = 100 * torch.randn(5, 64)  # outliers, which LLM.int8() would treat in another way
    torch.testing.assert_close(layer(torch.cat([rows, beside]))[:3], layer(rows))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_what_is_not_quantised_is_in_fp32(case, dtype):
    directory, kind = case
    model = load(directory, kind, dtype).eval()
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        expected = with_restored_weights(directory, model).eval()(input_ids=IDS).logits
    assert logits.dtype == torch.float32 and compute_dtype(model) == dtype
    assert (logits - expected).norm() < (1e-4 if dtype == torch.float32 else 0.05) * expected.norm()
    assert any("lora_" in name for name, _ in adapted(model).named_parameters())
    for name, weight in model.named_parameters():
        few = isinstance(model.get_submodule(name.rpartition(".")[0]), QuantizedLinear) and name.endswith(".weight")
        assert weight.dtype == ({"nf4": torch.uint8, "int8": torch.int8}[kind] if few else torch.float32), name


def test_the_result_is_the_full_precision_base_with_the_adapters(case, tmp_path):
    """With an end token that the vocabulary had no room for, whose row is trained."""
    directory, kind = case
    codec = codec_of(directory, add_eot_token=True, eot_token="<|stop|>")
    model = adapted(load(directory, kind, codec=codec), directory)
    write_model(model, model.state_dict(), codec, tmp_path / "whole", tmp_path / "adapter")
    whole, info = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert "quantization_config" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(directory)
    base.resize_token_embeddings(len(codec.tokenizer))
    together = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        # Rows of the new token aside: that of the input was made here, and is only written into the whole model.
        found, expected = (one(input_ids=IDS).logits[..., :-1] for one in (whole.eval(), together))
        quantized = model.eval()(input_ids=IDS).logits[..., :-1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (quantized - expected).norm() > 1e-3 * expected.norm(), "the weights were rounded, which this must not show"
    end = whole.get_input_embeddings().weight[codec.end_id] - model.get_input_embeddings().weight[codec.end_id]
    change = model.get_input_embeddings().lora_new_row
    torch.testing.assert_close(end, change.data, rtol=1e-5, atol=1e-6)


def test_a_result_in_bf16_is_rounded_once(tmp_path, builtin_cache):
    directory = build_model("llama", tmp_path / "base", builtin_cache)
    model = adapted(load(directory, "nf4", torch.bfloat16))
    write_model(model, model.state_dict(), codec_of(directory), tmp_path / "quantised")
    plain = adapted(load(directory, "none"))  # fp32
    base = load(directory, "none", torch.bfloat16).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised").state_dict()
    for name in linear_modules(load(directory, "none")):
        layer = plain.get_submodule(name)
        exact = base[f"{name}.weight"].double() + 2 * (
            layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        )
        assert found[f"{name}.weight"].dtype == torch.bfloat16
        assert ((found[f"{name}.weight"] - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


def test_a_quantised_critic_and_its_result(tmp_path, builtin_cache):
    directory = build_model("opt", tmp_path / "base", builtin_cache)
    codec = codec_of(directory)
    model = load_scalar_model(str(directory), codec, dtype=torch.float32, dropout=0.0, seed=3, quantize="int8")
    adapted(model.classifier)
    model.classifier.score.weight.data += 1
    assert not isinstance(model.classifier.score, QuantizedLinear) and model.classifier.score.weight.requires_grad
    write_model(model, model.state_dict(), codec, tmp_path / "whole")
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(whole.score.weight, model.classifier.score.weight)
    with torch.no_grad():
        assert abs(whole(input_ids=IDS).logits[:, 0] - model.eval()(IDS)[:, -1]).max() < 0.5


def test_rollouts_are_made_on_a_folded_copy_where_it_fits(case, monkeypatch):
    directory, kind = case
    model = adapted(load(directory, kind))
    engine = UnshardedEngine(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        for free, folds in ((folding_takes(model) + 1, True), (folding_takes(model), False)):
            monkeypatch.setattr(generation, "memory_available", lambda: free)
            with generation.generation_mode(engine) as module:
                found = module(input_ids=IDS).logits
                assert all((layer.whole is not None) == folds for layer in quantized_layers(module))
            assert torch.equal(found, expected) != folds
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert all(layer.whole is None for layer in quantized_layers(model))
        assert torch.equal(model.eval()(input_ids=IDS).logits, expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_without_adapters_are_restored_for_rollouts_too(tmp_path, builtin_cache):
    model = load(build_model("llama", tmp_path, builtin_cache))
    add_lora(model, dim=2, alpha=4, dropout=0.0, modules="q_proj", base_name="x", seed=0)
    with folded_adapters(model):
        assert all(layer.whole is not None for layer in quantized_layers(model))


def test_what_cannot_be_is_refused_at_the_door(monkeypatch):
    check_quantization("nf4", torch.bfloat16)
    with pytest.raises(InputError, match="bf16 or fp32"):
        check_quantization("int8", torch.float16)
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    check_quantization("none", torch.float16)
    with pytest.raises(InputError, match="bitsandbytes is not installed: pip install bitsandbytes"):
        check_quantization("nf4", torch.bfloat16)


def test_a_base_that_is_saved_in_few_bits_is_refused(tmp_path, builtin_cache):
    directory = build_model("llama", tmp_path, builtin_cache)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantised already"):
        load_config(str(directory))
