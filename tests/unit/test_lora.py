"""Which layers get adapters, and what happens when none does."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from common.data.tokenization import load_tokenizer, make_codec
from common.errors import UserError, named_by
from common.models.loading import load_causal_lm
from common.models.lora import add_lora, folded_adapters, folding_takes, has_lora, linear_modules
from tests.architectures import CONFIGS, FURTHER_CONFIGS, build_model
from tests.launching import at_length


@pytest.fixture
def model(tmp_path, builtin_cache):
    directory = build_model("llama", tmp_path / "model", builtin_cache)
    return load_causal_lm(
        str(directory), make_codec(load_tokenizer(str(directory)), "human_assistant"), dtype=torch.float32
    )


def adapt(model, modules, dim=4, alpha=None):
    return add_lora(model, dim=dim, alpha=alpha, dropout=0.0, modules=modules, base_name="x", seed=0)


def adapted(model) -> set[str]:
    return {name.rsplit(".lora_", 1)[0] for name, _ in model.named_parameters() if ".lora_" in name}


def test_parts_of_names_choose_layers(model):
    adapt(model, "q_proj, layers.1.mlp")
    assert adapted(model) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")),
    }
    assert has_lora(model)


def test_nothing_matched_is_an_error_that_lists_what_there_is(model):
    with pytest.raises(UserError, match="--lora_module_name decoder.layers.: matches no linear .*down_proj.*q_proj"):
        with named_by("--lora_module_name"):
            adapt(model, "decoder.layers.")
    assert not has_lora(model)


@pytest.mark.parametrize("alpha, scale", [(None, 1 / 4), (8, 2.0), (2, 0.5)])
def test_alpha_scales_as_in_peft_and_is_one_where_it_is_not_given(model, alpha, scale):
    adapt(model, "q_proj", dim=4, alpha=alpha)
    assert {module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")} == {scale}


LEARNING_RATE = 5e-4


def first_step_of_adam(parameters, output, target) -> None:
    (output - target).square().mean().backward()
    torch.optim.Adam(parameters, lr=LEARNING_RATE).step()


def first_step_of_ours(size, rank, alpha, inputs, target) -> float:
    """How far Adam's first step moves the weight, adapters included: the root of its mean square."""
    model = torch.nn.Sequential(torch.nn.Linear(size, size, bias=False))
    adapt(model, "0", rank, alpha)
    before = model[0].base_layer.weight.detach().clone()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first_step_of_adam(trained, model(inputs), target)
    with folded_adapters(model):
        return float((model[0].base_layer.weight - before).square().mean().sqrt())


def first_step_of_the_published(size, rank, inputs, target) -> float:
    """The same of the adapters that DeepSpeed-Chat trains: x W + x R L / rank, L from 0, R Kaiming over its columns."""
    right = torch.nn.Parameter(torch.empty(size, rank))
    torch.nn.init.kaiming_uniform_(right, a=5**0.5)
    left = torch.nn.Parameter(torch.zeros(rank, size))
    before = right.detach().clone()
    first_step_of_adam([right, left], inputs @ right @ left / rank, target)
    assert torch.equal(right, before), "left starts at 0, so right has no gradient yet"
    return float((right @ left / rank).detach().square().mean().sqrt())


@pytest.mark.parametrize("size, rank", [(256, 128), (512, 16)])
def test_a_step_of_the_published_recipe_has_its_published_size(size, rank):
    torch.manual_seed(0)
    inputs, target = torch.randn(2, 2048, size)
    ours, published = (
        first_step_of_ours(size, rank, None, inputs, target),
        first_step_of_the_published(size, rank, inputs, target),
    )
    assert ours == pytest.approx(published, rel=0.05)
    # Signs, nearly independent, times terms of variance 1 / (3 rank), rank of them, scaled by 1 / rank.
    assert published == pytest.approx(LEARNING_RATE / (rank * 3**0.5), rel=0.2)


@pytest.mark.parametrize("size, rank, alpha", [(256, 16, 32), (512, 16, 16)])
def test_a_step_with_alpha_has_the_size_that_peft_gives_it(size, rank, alpha):
    torch.manual_seed(0)
    inputs, target = torch.randn(2, 2048, size)
    expected = alpha / rank * LEARNING_RATE * (rank / (3 * size)) ** 0.5
    assert first_step_of_ours(size, rank, alpha, inputs, target) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", [*CONFIGS, *at_length(FURTHER_CONFIGS)])
def test_auto_finds_every_linear_layer_but_the_outputs(name, tmp_path, builtin_cache):
    directory = build_model(name, tmp_path / name, builtin_cache)
    model = load_causal_lm(
        str(directory), make_codec(load_tokenizer(str(directory)), "human_assistant"), dtype=torch.float32
    )
    found = {name.rsplit(".", 1)[-1] for name in linear_modules(model)}
    assert found and not found & {"lm_head", "embed_out", "score"}
    layers = [module for module in model.modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    assert len(linear_modules(model)) == len(layers) - (model.get_output_embeddings() in layers)


def test_the_memory_that_folding_takes_is_known_before(model):
    adapt(model, "q_proj,down_proj")
    before = {weight.data_ptr() for weight in model.parameters()}
    expected = folding_takes(model)
    with folded_adapters(model):
        assert expected == sum(weight.nbytes for weight in model.parameters() if weight.data_ptr() not in before) > 0
