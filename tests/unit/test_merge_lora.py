"""Adapters from training are merged into complete models."""

import json
import os
import resource
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from common.artifacts.provenance import read_provenance
from common.data.tokenization import load_tokenizer, make_codec
from common.errors import TrainingFailure, UserError
from inference.loading import load_actor, load_reward_model
from inference.merge_lora import main
from inference.options import LoadOptions
from tests.adapters import CLASSES, base_model, with_adapter, write_adapter
from tests.chat_model import CAPITAL, prompt_of, provenance_of


@pytest.fixture(params=CLASSES)
def adapter(request, chat_model, tmp_path):
    """(kind, directory) of an adapter that changes its base visibly, in a step's output directory."""
    directory = tmp_path / "output" / "adapter"
    write_adapter(request.param, chat_model, directory)
    codec = make_codec(load_tokenizer(str(chat_model)), "question_answer")
    provenance_of(codec, "reward" if request.param == "reward" else "sft").write(tmp_path / "output")
    return request.param, directory


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_the_merged_model_computes_what_base_and_adapter_do(adapter, chat_model, tmp_path):
    kind, directory = adapter
    merged = tmp_path / "merged"
    main(["--path", str(directory), "--output_dir", str(merged)])

    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = torch.tensor([tokenizer.encode("Question: what is it?\n\nAnswer:")])
    whole, info = CLASSES[kind].from_pretrained(merged, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    base = base_model(kind, chat_model)
    without = logits(base, ids)
    together = logits(PeftModel.from_pretrained(base, directory), ids)
    torch.testing.assert_close(logits(whole, ids), together, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together, without, atol=0.1)
    assert whole.config.use_cache and not (merged / "adapter_config.json").exists()
    assert read_provenance(merged) == read_provenance(directory)
    rights = {path.stat().st_mode for path in merged.iterdir()}
    assert rights == {(merged / "config.json").stat().st_mode}, "who may read the one may read the others"


def test_an_adapters_directory_is_loaded_as_its_merged_model_is(adapter, tmp_path):
    kind, directory = adapter
    merged = tmp_path / "merged"
    main(["--path", str(directory), "--output_dir", str(merged)])
    load = {"causal": load_actor, "reward": load_reward_model}[kind]
    one, other = (load(str(path), LoadOptions()) for path in (directory, merged))
    ids = torch.tensor([one.codec.encode_prompt(prompt_of((CAPITAL,)))])
    assert one.codec.template.name == other.codec.template.name == "question_answer"
    states = one.model.state_dict(), other.model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert ids.shape[1] <= one.max_prompt_tokens(1)


def test_a_base_that_moved_is_named(adapter, chat_model, tmp_path):
    kind, directory = adapter
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "./gone"}))
    with pytest.raises(UserError, match="gone"):
        main(["--path", str(directory), "--output_dir", str(tmp_path / "merged")])
    main(
        [
            "--path",
            str(directory),
            "--output_dir",
            str(tmp_path / "merged"),
            "--base",
            str(chat_model),
            "--dtype",
            "bf16",
        ]
    )
    assert CLASSES[kind].from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("base", ["./gone", "gone/too", "output/sft"])
def test_a_base_that_is_nowhere_can_be_named_with_a_flag(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = adapter[1] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    with pytest.raises(UserError) as error:
        main(["--path", str(adapter[1]), "--output_dir", str(tmp_path / "merged")])
    assert base in str(error.value) and "--base" in str(error.value) and str(adapter[1]) in str(error.value)


def test_a_base_given_relative_to_the_working_directory_is_found_from_any_other(chat_model, tmp_path, monkeypatch):
    monkeypatch.chdir(chat_model.parent)
    relative = chat_model.name
    write_adapter("causal", relative, tmp_path / "output" / "adapter")
    codec = make_codec(load_tokenizer(relative), "question_answer")
    replace(provenance_of(codec, "sft"), base=relative).write(tmp_path / "output")

    monkeypatch.chdir(tmp_path)
    assert read_provenance("output").base == str(chat_model)
    main(["--path", "output/adapter", "--output_dir", "merged"])
    assert read_provenance("merged").base == str(chat_model)
    assert load_actor("output/adapter", LoadOptions()).codec.template.name == "question_answer"


@pytest.mark.parametrize("base", ["facebook/opt-1.3b", "builtin:tiny-opt"])
def test_a_base_that_is_no_directory_is_recorded_as_given(base, chat_model, tmp_path):
    model = with_adapter(base_model("causal", chat_model), base)
    assert model.lora_config.base_model_name_or_path == base
    replace(provenance_of(make_codec(load_tokenizer(str(chat_model)), "alpaca"), "sft"), base=base).write(tmp_path)
    assert read_provenance(tmp_path).base == base


def test_a_directory_of_several_adapters_names_them(adapter, tmp_path):
    """Step 3 keeps those of actor and critic side by side."""
    directory = adapter[1]
    for name in ("actor", "critic"):
        (directory / name).mkdir()
        for path in directory.glob("adapter_*"):
            (directory / name / path.name).write_bytes(path.read_bytes())
    for path in directory.glob("adapter_*"):
        path.unlink()
    for path in (directory, directory.parent):
        with pytest.raises(UserError) as error:
            main(["--path", str(path), "--output_dir", str(tmp_path / "merged")])
        assert f"{directory / 'actor'} or {directory / 'critic'}" in str(error.value)


def test_a_model_with_its_adapter_inside_names_it(adapter, chat_model, tmp_path):
    output = adapter[1].parent
    for path in chat_model.iterdir():
        (output / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=f"no adapter.*: name {adapter[1]}$"):
        main(["--path", str(output), "--output_dir", str(tmp_path / "merged")])


def test_an_adapter_of_step_3_finds_its_provenance_further_up(adapter):
    kind, directory = adapter
    deeper = directory / "actor"
    deeper.mkdir()
    for path in list(directory.glob("adapter_*")):
        os.rename(path, deeper / path.name)
    load = {"causal": load_actor, "reward": load_reward_model}[kind]
    assert load(str(deeper), LoadOptions()).codec.template.name == "question_answer"


def test_what_cannot_be_merged_gets_one_line(chat_model, tmp_path):
    model, out, file = str(chat_model), str(tmp_path / "out"), tmp_path / "file"
    file.write_text("")
    for arguments, said in [
        ([], "--path"),
        (["--path", model], "--output_dir"),
        (["--path", model, "--output_dir", out], "no adapter"),
        (["--path", model, "--output_dir", out, "--base", model], "no adapter"),
        (["--path", model, "--output_dir", model], "--output_dir"),
        (["--path", model, "--output_dir", str(file)], "--output_dir"),
        (["--path", out, "--output_dir", str(tmp_path / "merged")], "no such model directory"),
    ]:
        with pytest.raises(UserError, match=said):
            main(arguments)


def test_no_room_for_the_merged_model_is_one_line(adapter, tmp_path):
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, usual[1]))
    try:
        with pytest.raises(TrainingFailure, match="--output_dir .*merged: the model cannot be written: .*too large"):
            main(["--path", str(adapter[1]), "--output_dir", str(tmp_path / "merged")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    (tmp_path / "second" / "config.json").mkdir(parents=True)
    with pytest.raises(UserError, match=f"{tmp_path}/second/config.json is in the way"):
        main(["--path", str(adapter[1]), "--output_dir", str(tmp_path / "second")])
