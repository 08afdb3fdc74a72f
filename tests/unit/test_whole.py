"""Models with more or fewer weights than their config.json describes are refused when read and when written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from common.artifacts.export import write_model
from common.artifacts.publish import publishing
from common.config.parser import parse
from common.data.tokenization import load_tokenizer, make_codec
from common.errors import TrainingFailure, UserError
from common.models import loading
from common.models.completeness import problem
from common.models.configuration import gives_scores
from common.models.loading import load_causal_lm, load_scalar_model
from step1_sft.config import SFTConfig
from tests.architectures import CONFIGS, FURTHER_CONFIGS, build_model
from tests.launching import at_length


@pytest.fixture
def directory(tmp_path, builtin_cache):
    return build_model("llama", tmp_path / "model", builtin_cache)


def codec_of(directory):
    return make_codec(load_tokenizer(str(directory)), "human_assistant")


def load(directory):
    return load_causal_lm(str(directory), codec_of(directory), dtype=torch.float32)


def change_config(directory, **changes) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def change_weights(directory, change) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def notes(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]


def test_a_config_of_fewer_layers_than_there_are_weights_of_is_refused(directory):
    change_config(directory, num_hidden_layers=1)
    with pytest.raises(UserError, match="hold 9 weights more .* such as model.layers.1.input_layernorm.weight"):
        load(directory)


def test_heads_that_others_leave_with_an_actor_are_named_and_left_out(directory, capsys):
    loading._note.cache_clear()
    change_weights(directory, lambda weights: weights.update({"v_head.summary.weight": torch.ones(1, 32)}))
    load(directory)
    load(directory)
    (line,) = notes(capsys)
    assert str(directory) in line and "v_head.summary.weight" in line


def test_what_older_versions_saved_besides_weights_is_no_matter(directory, capsys):
    loading._note.cache_clear()
    change_weights(
        directory,
        lambda weights: weights.update(
            {
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                "decoder.version": torch.ones(1),
                "model.layers.0.attn.masked_bias": torch.ones(()),
            }
        ),
    )
    load(directory)
    assert not notes(capsys)


def test_a_language_models_head_is_left_over_where_scores_are_wanted(directory, capsys):
    loading._note.cache_clear()
    load_scalar_model(str(directory), codec_of(directory), dtype=torch.float32)
    assert "lm_head.weight" in notes(capsys)[0]


@pytest.mark.parametrize("labels", [2, 3])
def test_a_classifier_of_several_labels_is_named_as_such(directory, tmp_path, labels):
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=labels)
    model.save_pretrained(tmp_path / "labels")
    codec = codec_of(directory)
    codec.tokenizer.save_pretrained(tmp_path / "labels")
    with pytest.raises(UserError, match=f"classifier of {labels} labels.*one score"):
        gives_scores(str(tmp_path / "labels"))
    with pytest.raises(UserError, match=f"classifier of {labels} labels"):
        load_scalar_model(str(tmp_path / "labels"), codec, dtype=torch.float32)


@pytest.mark.parametrize("name", [*CONFIGS, *at_length(FURTHER_CONFIGS)])
def test_what_the_steps_write_is_whole(name, tmp_path, builtin_cache):
    directory = build_model(name, tmp_path / "model", builtin_cache)
    codec = codec_of(directory)
    for kind, model in (
        ("causal", load(directory)),
        ("scalar", load_scalar_model(str(directory), codec, dtype=torch.float32)),
    ):
        write_model(model, dict(model.state_dict()), codec, tmp_path / kind)
        assert problem(tmp_path / kind) is None


def lose(name):
    return lambda directory: change_weights(directory, lambda weights: weights.pop(name))


def cut(directory) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "missing": (lose("model.layers.1.mlp.up_proj.weight"), "1 of its weights are missing.*up_proj"),
    "unexpected": (lambda directory: change_config(directory, num_hidden_layers=1), "9 of its weights are unexpected"),
    "shape": (lambda directory: change_config(directory, intermediate_size=48), "mismatched|shapes"),
    "no weights": (lambda directory: (directory / "model.safetensors").unlink(), "no file named"),
    "cut": (cut, "incomplete|covered"),
    "adapter": (lambda directory: (directory / "adapter_config.json").write_text("{}"), "adapter_config.json"),
    "no config": (lambda directory: (directory / "config.json").unlink(), "config.json"),
}


@pytest.mark.parametrize("parts, left", [(["actor"], ["actor"]), (["actor", "ema"], ["actor", "ema"])])
def test_what_an_earlier_run_left_of_other_models_is_removed(directory, tmp_path, parts, left):
    output = tmp_path / "output"
    for part in ("actor", "critic", "ema"):
        shutil.copytree(directory, output / part)
    for other in ("adapter/critic", "notes"):
        (output / other).mkdir(parents=True)
    config = parse(SFTConfig, ["--output_dir", str(output), "--model_name_or_path", str(tmp_path)])
    with publishing(
        config,
        codec_of(directory),
        {},
        step="ppo",
        base="x",
        parts=parts,
        possible_parts=("actor", "critic", "ema"),
    ):
        pass
    assert sorted(path.name for path in output.iterdir() if path.is_dir()) == [*left, "notes"]


@pytest.mark.parametrize("damage, said", DAMAGE.values(), ids=DAMAGE)
def test_no_provenance_is_written_for_a_result_that_is_not_whole(directory, tmp_path, damage, said):
    config = parse(SFTConfig, ["--output_dir", str(directory), "--model_name_or_path", str(tmp_path)])
    codec = codec_of(directory)
    with publishing(config, codec, {}, step="sft", base="x"):
        pass
    assert (directory / "provenance.json").is_file()
    with pytest.raises(TrainingFailure, match=said) as failure:
        with publishing(config, codec, {}, step="sft", base="x"):
            damage(directory)
    assert str(directory) in str(failure.value) and "\n" not in str(failure.value)
    assert not (directory / "provenance.json").exists()
