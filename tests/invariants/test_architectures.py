"""What must hold for a model of every supported architecture, with any padding beside a row."""

import inspect
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from common.artifacts.export import write_model
from common.batching.collate import unmasked
from common.data.tokenization import load_tokenizer, make_codec
from common.models.calibration import Calibration
from common.models.loading import load_causal_lm, load_scalar_model
from common.models.logprobs import gather_response, response_log_probs
from common.models.lora import adapters_disabled, add_lora, linear_modules, merged_state_dict
from common.models.scalar import score_at_last_token
from tests.architectures import CONFIGS, FURTHER_CONFIGS, build_model
from tests.given_logits import GivenLogits
from tests.launching import at_length

PROMPTS, RESPONSES = torch.tensor([3, 9, 1]), torch.tensor([5, 2, 7])


@pytest.fixture(scope="module", params=[*CONFIGS, *at_length(FURTHER_CONFIGS)])
def directory(request, tmp_path_factory, builtin_cache):
    return build_model(request.param, tmp_path_factory.mktemp(request.param), builtin_cache)


@pytest.fixture(scope="module")
def codec(directory):
    return make_codec(load_tokenizer(str(directory)), "human_assistant")


@pytest.fixture(scope="module")
def batch(codec):
    """(tokens, attention mask), right-padded with the END token: a mask made by comparing tokens would show."""
    lengths = PROMPTS + RESPONSES
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(10, 300, (3, int(lengths.max()) + 4), generator=generator)
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    tokens[torch.arange(3), lengths - 1] = codec.end_id
    return tokens.masked_fill(mask == 0, codec.end_id), mask


def causal(directory, codec):
    return load_causal_lm(str(directory), codec, dtype=torch.float32, dropout=0.0).eval()


def scalar(directory, codec):
    return load_scalar_model(str(directory), codec, dtype=torch.float32, dropout=0.0, seed=7).eval()


def positions(model, mask):
    """Counted from the first real token, as in generation; GPT-2 would count the padding before it too."""
    takes_them = "position_ids" in inspect.signature(model.forward).parameters
    return {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if takes_them else {}


@torch.no_grad()
def test_padding_changes_no_log_prob_and_no_value(directory, codec, batch):
    tokens, mask = batch
    policy, critic = causal(directory, codec), scalar(directory, codec)
    together = response_log_probs(policy, unmasked(tokens), PROMPTS, RESPONSES)
    masked = response_log_probs(policy, {"input_ids": tokens, "attention_mask": mask}, PROMPTS, RESPONSES)
    torch.testing.assert_close(masked, together, atol=1e-5, rtol=1e-5)
    values = gather_response(critic(**unmasked(tokens)), PROMPTS, RESPONSES)
    for row in range(3):
        length, prompt, response = int(PROMPTS[row] + RESPONSES[row]), PROMPTS[row : row + 1], RESPONSES[row : row + 1]
        alone, ones = tokens[row : row + 1, :length], torch.ones(1, length, dtype=torch.long)
        log_probs = response_log_probs(policy, {"input_ids": alone, "attention_mask": ones}, prompt, response)
        torch.testing.assert_close(together[row, : int(response)], log_probs[0], atol=1e-5, rtol=1e-5)
        value = gather_response(critic(alone, ones), prompt, response)
        torch.testing.assert_close(values[row, : int(response)], value[0], atol=1e-5, rtol=1e-5)
        # Left padding, as prompts have it in generation.
        padded = torch.cat([torch.full((1, 4), codec.pad_id), alone], 1)
        left_mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), ones], 1)
        logits = policy(
            **policy.prepare_inputs_for_generation(
                padded,
                attention_mask=left_mask,
                use_cache=False,
                is_first_iteration=True,
                **positions(policy, left_mask),
            )
        ).logits[:, 4:]
        left_padded = response_log_probs(GivenLogits(logits), {"input_ids": alone}, prompt, response)
        torch.testing.assert_close(left_padded, log_probs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_reward_model_scores_alike_in_plain_transformers(directory, codec, batch, tmp_path):
    assert_scores_alike(directory, codec, *batch, tmp_path)


@torch.no_grad()
def test_reward_model_scores_alike_if_the_end_token_is_the_padding_token(directory, batch, tmp_path):
    directory = shutil.copytree(directory, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(directory)
    assert AutoTokenizer.from_pretrained(directory).pad_token_id == tokenizer.eos_token_id
    codec = make_codec(load_tokenizer(str(directory)), "human_assistant")
    assert_scores_alike(directory, codec, *batch, tmp_path / "written")


def assert_scores_alike(directory, codec, tokens, mask, tmp_path):
    """Ours and those of plain transformers for what we have written; rows of unequal lengths, both paddings."""
    model = scalar(directory, codec)
    ours = score_at_last_token(model(tokens, mask), mask.sum(1))
    assert len(set(ours.tolist())) == 3
    write_model(model, dict(model.state_dict()), codec, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert plain.config.num_labels == 1 and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert plain.config.pad_token_id == tokenizer.pad_token_id
    rows = [tokens[row, : int(mask[row].sum())].tolist() for row in range(3)]
    for side in ("right", "left"):
        tokenizer.padding_side = side
        padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        scores = plain(**padded, **positions(plain, padded.attention_mask)).logits.squeeze(-1)
        torch.testing.assert_close(scores, ours, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_lora_is_the_base_when_off_and_the_merged_model_when_on(directory, codec, batch, tmp_path):
    tokens, mask = batch
    base = causal(directory, codec)(input_ids=tokens, attention_mask=mask).logits
    model = causal(directory, codec)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = len(linear_modules(model))
    add_lora(model, dim=4, alpha=16, dropout=0.0, modules="auto", base_name="base", seed=0)
    torch.testing.assert_close(model(input_ids=tokens, attention_mask=mask).logits, base, atol=0, rtol=0)
    randomise_adapters(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * layers and all("lora_" in name for name in trained)
    adapted = model(input_ids=tokens, attention_mask=mask).logits
    assert (adapted - base)[mask.bool()].abs().max() > 0.1
    with adapters_disabled(model):
        torch.testing.assert_close(model(input_ids=tokens, attention_mask=mask).logits, base, atol=0, rtol=0)

    write_model(model, dict(model.state_dict()), codec, tmp_path / "merged", tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    real = mask.bool()
    torch.testing.assert_close(
        merged(input_ids=tokens, attention_mask=mask).logits[real], adapted[real], atol=1e-4, rtol=1e-4
    )
    after = {
        name.replace(".base_layer.", "."): value for name, value in model.state_dict().items() if "lora_" not in name
    }
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)

    from peft import PeftModel

    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "adapter").eval()
    torch.testing.assert_close(
        reloaded(input_ids=tokens, attention_mask=mask).logits[real], adapted[real], atol=1e-5, rtol=1e-5
    )


def test_lora_keeps_a_score_head_trainable_and_saves_it(directory, codec, tmp_path):
    model = scalar(directory, codec)
    add_lora(
        model.classifier,
        dim=2,
        alpha=None,
        dropout=0.0,
        modules="auto",
        base_name="base",
        seed=0,
    )
    assert model.classifier.score.weight.requires_grad
    state = {name.removeprefix("classifier."): value for name, value in model.state_dict().items()}
    assert not any("lora_" in name for name in merged_state_dict(model.classifier, state))
    write_model(model, dict(model.state_dict()), codec, tmp_path / "merged", tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.score.weight"], model.classifier.score.weight)


@torch.no_grad()
def test_a_lora_critic_keeps_the_reward_model_it_started_from(directory, codec, batch, tmp_path):
    tokens, mask = batch
    real = mask.bool()
    expected = scalar(directory, codec)(tokens, mask)
    critic = load_scalar_model(
        str(directory), codec, dtype=torch.float32, dropout=0.0, seed=7, calibration=Calibration(2.0, 3.0)
    ).eval()
    names = set(critic.classifier.state_dict())
    critic.keep_reward_head()
    add_lora(
        critic.classifier,
        dim=2,
        alpha=None,
        dropout=0.0,
        modules="auto",
        base_name="base",
        seed=0,
    )
    randomise_adapters(critic)
    critic.classifier.score.weight.add_(0.5)
    learnt = critic(tokens, mask)
    with adapters_disabled(critic):
        assert torch.equal(critic(tokens, mask, reward=True)[real], expected[real])
    assert torch.equal(critic(tokens, mask)[real], learnt[real])
    assert (learnt * 3 + 2 - expected)[real].abs().min() > 1e-3
    write_model(critic, dict(critic.state_dict()), codec, tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == names
    saved = score_at_last_token(scalar(tmp_path, codec)(tokens, mask), mask.sum(1))
    torch.testing.assert_close(saved, score_at_last_token(learnt * 3 + 2, mask.sum(1)), atol=1e-4, rtol=1e-4)


def randomise_adapters(model):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
