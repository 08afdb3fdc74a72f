"""Creates models with random weights and generated data, and declares the options that all benchmarks share."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import OPTConfig, OPTForCausalLM, OPTForSequenceClassification, PreTrainedTokenizerFast

from common.artifacts.model_source import resolve_model
from common.config.parser import Config, PathName, option
from common.data.blend import parse_data_path
from common.data.reading import ReadReport, read_records
from common.errors import UserError, named_by
from common.paths import writing_to
from common.runtime.distributed import device

GENERATED = "generated"
_ROWS = 3000
_TOKENS = 4096  # of the tokenizer; a model's vocabulary may be larger
_NAMED = {  # the published shapes
    "opt-1.3b": {
        "vocab_size": 50272,
        "hidden_size": 2048,
        "ffn_dim": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "word_embed_proj_dim": 2048,
        "max_position_embeddings": 2048,
    },
    "opt-350m": {
        "vocab_size": 50272,
        "hidden_size": 1024,
        "ffn_dim": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "word_embed_proj_dim": 512,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": False,
    },
}


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(Config):
    """Benchmark"""

    data_path: tuple[PathName, ...] = option(
        (GENERATED,), "generated: dialogues of random words, as long as real ones; else as in the programs themselves"
    )
    output_dir: PathName = option("output/benchmarks", "directory of models with random weights, data and logs")
    rounds: int = option(2, "rounds of A B B A", low=1)
    only: str | None = option(None, "measure this variant alone, for its memory", choices=("plain", "product"))

    def chosen(self, variants: dict) -> dict:
        """The variants to measure, the plain one first."""
        return variants if self.only is None else {self.only: variants[self.only]}


def with_data(config):
    """The config with `generated` replaced by a file, and prepared data kept in the benchmarks' directory."""
    cache = Path(config.output_dir)
    config = replace(config, data_output_path=str(cache / "data"))
    return replace(config, data_path=(str(_generated(cache)),)) if config.data_path == (GENERATED,) else config


def random_model(name: str, flag: str, config, *, scores: bool = False) -> str:
    """The directory of a model. random:opt-LAYERSxWIDTH, random:opt-1.3b and random:opt-350m are created with random
    weights; any other name is resolved as in the programs.

    Args:
        config: names the data that the tokenizer is trained on, so that tokens have realistic lengths.
        scores: create a reward model.

    Raises:
        UserError: the shape is unknown.
    """
    if not name.startswith("random:"):
        with writing_to("--data_output_path", config.data_output_path), named_by(flag):
            return resolve_model(name, config.data_output_path)
    shape = _shape(name.removeprefix("random:"), f"{flag} {name}")
    texts = _texts(config.data_path)
    content = json.dumps([shape, scores, texts, Path(__file__).read_text()])
    kind = "reward" if scores else "language"
    short = f"{name.removeprefix('random:')}-{kind}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    return str(_create_once(Path(config.output_dir) / short, lambda draft: _write_model(draft, shape, texts, scores)))


def _shape(name: str, subject: str) -> dict:
    if name in _NAMED:
        return _NAMED[name]
    match = re.fullmatch(r"opt-(\d+)x(\d+)", name)
    if match is None or int(match[2]) % 32:
        raise UserError(
            f"{subject}: no such shape; there are {', '.join(_NAMED)} and opt-LAYERSxWIDTH, the width a multiple of 32"
        )
    layers, width = int(match[1]), int(match[2])
    return {
        "vocab_size": _TOKENS,
        "hidden_size": width,
        "ffn_dim": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "word_embed_proj_dim": width,
        "max_position_embeddings": 1024,
    }


def _write_model(directory: Path, shape: dict, texts: Sequence[str], scores: bool) -> None:
    tokenizer = _tokenizer(texts)
    tokenizer.save_pretrained(directory)
    # With this deviation activations keep their size from layer to layer. The next tokens are then more varied than a
    # trained model's, and not all the same.
    config = OPTConfig(
        **shape,
        dropout=0.0,
        init_std=shape["hidden_size"] ** -0.5,
        num_labels=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with device():
        model = (OPTForSequenceClassification if scores else OPTForCausalLM)(config)
    large = sum(parameter.numel() for parameter in model.parameters()) > 10**8
    (model.to(torch.bfloat16) if large else model).save_pretrained(directory)


def _tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with OPT's special tokens, trained on the texts."""
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=_TOKENS,
            special_tokens=specials,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def _texts(data_path: Sequence[str]) -> list[str]:
    """Up to `_ROWS` prompts of the data."""
    records = read_records(parse_data_path(data_path), "prompt", max_rows=_ROWS, report=ReadReport())
    return [message.content for record in records for message in record.record.messages]


def _generated(cache: Path) -> Path:
    """A directory with a file of comparisons whose lengths in words are distributed as in hh-rlhf."""
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    return _create_once(cache / f"generated-{code}", _write_comparisons)


def _write_comparisons(directory: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlucmfwypvbgk", k=draw.randint(2, 8))) for _ in range(2000)]

    def text(mean: float, deviation: float, most: int) -> str:
        count = max(2, min(most, round(draw.lognormvariate(mean, deviation))))
        return " ".join(words[min(int(draw.paretovariate(0.8)), len(words)) - 1] for _ in range(count))

    with open(directory / "comparisons.jsonl", "w", encoding="utf-8") as stream:
        for number in range(_ROWS):
            row = {
                "prompt": f"{number} {text(3.94, 1.09, 700)}",
                "chosen": text(3.14, 0.85, 200),
                "rejected": f"{text(3.14, 0.85, 200)} no",
            }
            stream.write(json.dumps(row) + "\n")


def _create_once(directory: Path, write) -> Path:
    """`directory`. If it does not exist, one rank fills a temporary directory with `write` and renames it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if not directory.is_dir():
            draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
            try:
                write(draft)
                os.rename(draft, directory)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return directory
