"""The smallest models and data on which every option can show what it does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import transformers as hf
from datasets import Features, Value
from datasets.arrow_writer import ArrowWriter

from common.artifacts.compatibility import text_of
from common.artifacts.provenance import Provenance
from common.data.tokenization import load_tokenizer, make_codec
from tests.adapters import write_adapter
from tests.architectures import build_model

TEMPLATE = "human_assistant"
DATED = (
    "{{ strftime_now('%d %B %Y') }}{% for m in messages %}{{ '\n' + m['role'] + ': ' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nassistant: ' }}{% endif %}"
)
# A model that brings its own code: transformers runs it only where that is allowed.
OWN_CODE = """
from transformers import OPTConfig, OPTForCausalLM, OPTForSequenceClassification

class OwnConfig(OPTConfig):
    model_type = "own"

class OwnModel(OPTForCausalLM):
    config_class = OwnConfig

class OwnScorer(OPTForSequenceClassification):
    config_class = OwnConfig
"""


def make_inputs(directory: Path, cache_dir: Path) -> None:
    """Models, data and a DeepSpeed configuration, under the names that `option_rows` uses."""
    for seed, prefix in enumerate(("", "other-")):
        _build_language_model(directory / f"{prefix}model", cache_dir, seed)
        _build_reward_model(directory / f"{prefix}model", directory / f"{prefix}reward_model")
    _add_code(directory / "model", directory / "own-code")
    _calibrate(directory / "reward_model", directory / "calibrated")
    _adapt(directory / "model", directory / "adapted")
    for name in ("model", "reward_model"):
        shutil.copytree(directory / name, directory / f"dated-{name}")
        tokenizer = load_tokenizer(str(directory / name))
        tokenizer.chat_template = DATED
        tokenizer.save_pretrained(directory / f"dated-{name}")
    shutil.copytree(directory / "reward_model", directory / "stopping-reward_model")
    stopping = make_codec(
        load_tokenizer(str(directory / "reward_model")), TEMPLATE, add_eot_token=True, eot_token="<|stop|>"
    )
    stopping.tokenizer.save_pretrained(directory / "stopping-reward_model")
    _write_rows(directory / "pairs.jsonl", [_pair(number) for number in range(40)])
    _write_rows(
        directory / "several.jsonl", [_pair(number) | {"rejected": ["No.", "Nobody knows."]} for number in range(40)]
    )
    _write_rows(directory / "other.jsonl", [_pair(number) for number in range(100, 140)])
    (directory / "two-keys.json").write_text(
        json.dumps(
            {key: [_pair(number + start) for number in range(40)] for key, start in (("first", 0), ("second", 300))}
        )
    )
    western = [
        _pair(number) | {"prompt": f"O\u00f9 est {number}?", "chosen": f"Voil\u00e0 {number}."} for number in range(40)
    ]
    (directory / "western.jsonl").write_bytes(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in western).encode("cp1252")
    )
    _write_rows(directory / "spoilt.jsonl", [*(_pair(number) for number in range(40)), {"prompt": "And then?"}, {}])
    _write_rows(directory / "texts.jsonl", [{"text": f"After {n} comes {n + 1}."} for n in range(8)])
    for name in ("counting", "cooking"):
        _write_hub_texts(directory / "hub", name)
    shutil.copy(Path(__file__).with_name("reward_functions.py"), directory / "rewards.py")
    (directory / "deepspeed.json").write_text('{"zero_optimization": {"reduce_bucket_size": 100000}}')


def _build_language_model(directory: Path, cache_dir: Path, seed: int) -> None:
    build_model(
        "opt",
        directory,
        cache_dir,
        seed,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        dropout=0.1,
    )
    model = hf.AutoModelForCausalLM.from_pretrained(directory)
    end = model.get_output_embeddings().weight[model.config.eos_token_id].detach()
    with torch.no_grad():  # about every fourth token ends an answer, so that some answers end and some are cut
        model.model.decoder.final_layer_norm.bias.copy_(end * 5 / end.square().sum())
    model.save_pretrained(directory)


def _build_reward_model(language_model: Path, directory: Path) -> None:
    torch.manual_seed(0)
    reward_model = hf.AutoModelForSequenceClassification.from_pretrained(language_model, num_labels=1)
    torch.nn.init.normal_(reward_model.score.weight)
    reward_model.save_pretrained(directory)
    hf.AutoTokenizer.from_pretrained(language_model).save_pretrained(directory)


def _add_code(model: Path, directory: Path) -> None:
    shutil.copytree(model, directory)
    (directory / "own.py").write_text(OWN_CODE)
    config = json.loads((directory / "config.json").read_text())
    classes = {
        "AutoConfig": "OwnConfig",
        "AutoModelForCausalLM": "OwnModel",
        "AutoModelForSequenceClassification": "OwnScorer",
    }
    config |= {"model_type": "own", "auto_map": {auto: f"own.{name}" for auto, name in classes.items()}}
    (directory / "config.json").write_text(json.dumps(config))


def _calibrate(reward_model: Path, directory: Path) -> None:
    """The reward model, with the mean and spread of its scores beside it as step 2 writes them."""
    shutil.copytree(reward_model, directory)
    codec = make_codec(load_tokenizer(str(reward_model)), TEMPLATE)
    Provenance(
        step="reward", base="", data_split="1,1,1", eval_fraction=0.2, score_mean=0.5, score_std=2.0, **text_of(codec)
    ).write(directory)


def _adapt(model: Path, directory: Path) -> None:
    """The model, with an adapter of it in its directory."""
    shutil.copytree(model, directory)
    write_adapter("causal", model, directory)


def _pair(number: int) -> dict[str, object]:
    return {
        "prompt": f"What comes after {number}?",
        "question": f"Count on from {number}, please.",
        "chosen": f"It is {number + 1}.",
        "rejected": f"No number follows {number}.",
        "strength": number % 3,
    }


def _write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_hub_texts(cache: Path, name: str) -> None:
    """The configuration `name` of the hub data set owner/texts, as `datasets` keeps it for when there is no net."""
    directory = cache / "owner___texts" / name / "0.0.0" / "0"
    directory.mkdir(parents=True)
    features = Features({"text": Value("string")})
    with ArrowWriter(path=str(directory / "texts-train.arrow"), features=features) as writer:
        for number in range(8):
            writer.write({"text": f"The {number} rules of {name}."})
        writer.finalize()
    (directory / "dataset_info.json").write_text(
        json.dumps(
            {
                "config_name": name,
                "features": features.to_dict(),
                "splits": {"train": {"name": "train", "num_examples": 8, "dataset_name": "texts"}},
            }
        )
    )
