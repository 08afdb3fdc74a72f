"""Loading models: damaged or incomplete ones are refused, and requested settings are applied."""

import json

import pytest
import torch
from huggingface_hub.utils import http_backoff
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from common.artifacts.export import write_model
from common.artifacts.model_source import resolve_model
from common.data.tokenization import load_tokenizer, make_codec
from common.errors import ModelError, UserError
from common.models.configuration import check_length, max_length
from common.models.loading import load_causal_lm, load_scalar_model
from common.training.memory import memory_status
from tests.architectures import CONFIGS, FURTHER_CONFIGS, build_model
from tests.launching import at_length


@pytest.fixture
def directory(tmp_path, builtin_cache):
    return build_model("llama", tmp_path / "model", builtin_cache)


def load(directory, **choices):
    codec = make_codec(load_tokenizer(str(directory)), "human_assistant")
    return load_causal_lm(str(directory), codec, dtype=torch.float32, **choices)


def test_weights_that_are_missing_are_named_and_not_made_up(directory):
    weights = load_file(directory / "model.safetensors")
    lost = weights.pop("model.layers.1.mlp.up_proj.weight")
    assert lost.numel()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lack 1 .*up_proj"):
        load(directory)


def test_a_truncated_weight_file_is_one_line(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{directory}: .*cannot be loaded"):
        load(directory)


def test_code_in_a_model_directory_is_not_run(directory, tmp_path):
    canary = tmp_path / "canary"
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config["model_type"] = "evil"
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    with pytest.raises(UserError):
        load(directory)
    assert not canary.exists()


def test_weights_are_mapped_and_not_copied(tmp_path, builtin_cache):
    directory = build_model("llama", tmp_path / "large", builtin_cache, intermediate_size=65_536)
    size = (directory / "model.safetensors").stat().st_size
    assert size > 40 * 2**20
    before = memory_status("RssAnon")
    model = load(directory)  # kept, with all it holds
    assert memory_status("RssAnon") - before < size / 4, model


@pytest.mark.parametrize("name", [*CONFIGS, *at_length(FURTHER_CONFIGS)])
def test_dropout_is_set_everywhere_or_left_alone(name, tmp_path, builtin_cache):
    directory = build_model(name, tmp_path / name, builtin_cache)
    probabilities = lambda model: {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert probabilities(load(directory, dropout=0.0)) <= {0.0}
    model = load(directory, dropout=0.3)
    tokens = torch.randint(10, 200, (1, 8))
    if any("dropout" in key for key in model.config.to_dict()):
        first, second = (model.train()(input_ids=tokens).logits for _ in range(2))
        assert not torch.equal(first, second)


def test_a_full_vocabulary_grows_for_an_added_end_token(directory):
    codec = make_codec(load_tokenizer(str(directory)), "human_assistant", add_eot_token=True)
    before = load(directory)
    model = load_causal_lm(str(directory), codec, dtype=torch.float32)
    rows = before.get_input_embeddings().num_embeddings
    assert codec.end_id == rows == model.get_input_embeddings().num_embeddings - 1
    assert model.get_output_embeddings().weight.shape[0] == rows + 1
    assert torch.equal(model.get_input_embeddings().weight[:rows], before.get_input_embeddings().weight)
    assert model.config.eos_token_id == codec.end_id == model.generation_config.eos_token_id
    assert load_scalar_model(str(directory), codec, dtype=torch.float32).classifier.config.vocab_size > rows


def test_a_new_head_depends_on_the_seed_alone(directory):
    codec = make_codec(load_tokenizer(str(directory)), "human_assistant")
    models = [load_scalar_model(str(directory), codec, dtype=torch.float32, seed=seed) for seed in (1, 1, 2)]
    heads = [model.classifier.score.weight.detach() for model in models]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert float(heads[0].std()) == pytest.approx((heads[0].shape[1] + 1) ** -0.5, rel=0.5)


def test_a_builtin_model_is_a_directory(tmp_path):
    assert (tmp_path / "cache").exists() is False
    path = resolve_model("builtin:tiny-llama", tmp_path / "cache")
    assert load(path).config.model_type == "llama"


@pytest.mark.parametrize(
    "name, said",
    [
        ("models/stf", "did you mean models/sft?"),
        ("models/a/b", ""),
        ("models.old", "it is a file"),
        ("rows.jsonl", ""),
        ("output/sft", "step1_sft/main.py makes it"),
        ("output/reward", "step2_reward/main.py makes it"),
        ("output/ppo", "step3_ppo/main.py makes it"),
        ("output/sft/old", ""),
        ("-model", ""),
        ("a--b", ""),
    ],
)
def test_a_mistyped_directory_is_not_looked_for_on_the_hub(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "sft").mkdir(parents=True)
    (tmp_path / "models.old").write_text("")
    with pytest.raises(UserError) as error:
        resolve_model(name, tmp_path)
    assert str(error.value).startswith(f"{name}: no such model directory")
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["facebook/opt-1.3b", "gpt2", "mistralai/Mistral-7B-v0.1"])
def test_what_may_be_on_the_hub_is_looked_for_there_and_that_is_said(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert resolve_model(name, tmp_path) == name
    (line,) = capfd.readouterr().err.splitlines()
    assert name in line and "hub" in line
    with pytest.raises(Exception, match="refused"):
        http_backoff("HEAD", "http://127.0.0.1:9", max_retries=2, base_wait_time=0)
    assert capfd.readouterr().err == "", "each failed attempt is not worth a line"


def test_sequences_longer_than_the_model_can_read_are_refused(directory, tmp_path, builtin_cache):
    positions = max_length(str(directory))
    assert positions == AutoConfig.from_pretrained(directory).max_position_embeddings
    check_length(str(directory), positions)
    with pytest.raises(ModelError, match=f"{directory}: it has room for {positions} tokens, not for {positions + 1}"):
        check_length(str(directory), positions + 1)
    endless = build_model("bloom", tmp_path / "bloom", builtin_cache)
    assert max_length(str(endless)) is None
    check_length(str(endless), 10**9)


def test_a_reward_model_that_lost_its_head_is_refused(directory, tmp_path):
    codec = make_codec(load_tokenizer(str(directory)), "human_assistant")
    scalar = load_scalar_model(str(directory), codec, dtype=torch.float32)
    write_model(scalar, dict(scalar.state_dict()), codec, tmp_path / "reward")
    load_scalar_model(str(tmp_path / "reward"), codec, dtype=torch.float32)
    weights = load_file(tmp_path / "reward" / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "reward" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="score.weight"):
        load_scalar_model(str(tmp_path / "reward"), codec, dtype=torch.float32)


def test_a_publishers_sampling_habits_are_not_taken_over(directory, tmp_path):
    """They would alter rollouts behind PPO's back, and an inconsistent one could not be saved again."""
    (directory / "generation_config.json").write_text(
        json.dumps(
            {
                "repetition_penalty": 1.3,
                "no_repeat_ngram_size": 2,
                "temperature": 0.9,
                "top_p": 0.6,
                "do_sample": False,
                "suppress_tokens": [30, 31],
                "min_new_tokens": 5,
            }
        )
    )
    model = load(directory)
    assert model.generation_config.repetition_penalty in (None, 1.0)
    assert not model.generation_config.suppress_tokens and not model.generation_config.min_new_tokens
    codec = make_codec(load_tokenizer(str(directory)), "human_assistant")
    write_model(model, dict(model.state_dict()), codec, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == codec.end_id and "repetition_penalty" not in saved
