"""Models with random weights and data, for programs that are to run anywhere, and the options all benchmarks share."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    OPTForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from common.artifacts.model_source import resolve_model
from common.config.parser import Config, PathName, option
from common.data.blend import parse_data_path
from common.data.options import ProgramConfig
from common.data.reading import ReadReport, read_records
from common.data.records import Prompt
from common.errors import UserError, named_by
from common.paths import writing_to
from common.runtime.distributed import device

GENERATED = "generated"
Variant = TypeVar("Variant")
ProgramConfigT = TypeVar("ProgramConfigT", bound=ProgramConfig)
_ROWS = 3000
_TOKENS = 4096  # of the tokenizer; a model's vocabulary may be larger
_NAMED: dict[str, dict[str, Any]] = {  # the published shapes
    "opt-125m": {
        "vocab_size": 50272,
        "hidden_size": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "word_embed_proj_dim": 768,
        "max_position_embeddings": 2048,
    },
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

    def chosen(self, variants: dict[str, Variant]) -> dict[str, Variant]:
        """The variants to be measured, the plain one first."""
        return variants if self.only is None else {self.only: variants[self.only]}


def with_data(config: ProgramConfigT) -> ProgramConfigT:
    """The config with a file in the place of generated data, and prepared data kept with the benchmarks' own."""
    cache = Path(config.output_dir)
    config = replace(config, data_output_path=PathName(str(cache / "data")))
    if config.data_path == (GENERATED,):
        config = replace(config, data_path=(PathName(str(_generated(cache))),))
    return config


def random_model(name: str, flag: str, config: ProgramConfig, *, scores: bool = False) -> str:
    """The directory of a model: made with random weights for random:opt-LAYERSxWIDTH, random:opt-1.3b,
    random:opt-350m and random:opt-125m; else as the programs themselves find it.

    Args:
        config: names the data that the tokenizer is trained on, so that a token is as long as in life.
        scores: make a reward model.

    Raises:
        UserError: no such shape.
    """
    if not name.startswith("random:"):
        with writing_to("--data_output_path", config.data_output_path), named_by(flag):
            return resolve_model(name, config.data_output_path)
    shape = _shape(name.removeprefix("random:"), f"{flag} {name}")
    texts = _texts(config.data_path)
    content = json.dumps([shape, scores, texts, Path(__file__).read_text()])
    kind = "reward" if scores else "language"
    short = f"{name.removeprefix('random:')}-{kind}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    return str(_made(Path(config.output_dir) / short, lambda draft: _write_model(draft, shape, texts, scores)))


def _shape(name: str, where: str) -> dict[str, Any]:
    if name in _NAMED:
        return _NAMED[name]
    match = re.fullmatch(r"opt-(\d+)x(\d+)", name)
    if match is None or int(match[2]) % 32:
        raise UserError(
            f"{where}: no such shape; there are {', '.join(_NAMED)} and opt-LAYERSxWIDTH, the width a multiple of 32"
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


def _write_model(directory: Path, shape: dict[str, Any], texts: Sequence[str], scores: bool) -> None:
    tokenizer = _tokenizer(texts)
    tokenizer.save_pretrained(directory)
    # Activations keep their size from layer to layer, so that next tokens are spread as a trained model's are not, but
    # are not all the same either.
    config = OPTConfig(
        **shape,
        dropout=0.0,
        init_std=shape["hidden_size"] ** -0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.num_labels = 1
    torch.manual_seed(0)
    with device():
        model: PreTrainedModel = OPTForSequenceClassification(config) if scores else OPTForCausalLM(config)
    large = sum(parameter.numel() for parameter in model.parameters()) > 10**8
    (model.bfloat16() if large else model).save_pretrained(directory)


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
    prompts = [record.record for record in records]
    return [message.content for prompt in prompts if isinstance(prompt, Prompt) for message in prompt.messages]


def _generated(cache: Path) -> Path:
    """A directory with a file of comparisons whose numbers of words are spread as hh-rlhf's."""
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    return _made(cache / f"generated-{code}", _write_comparisons)


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


def _made(directory: Path, write: Callable[[Path], None]) -> Path:
    """`directory`, filled by `write` unless it is there: by one rank, and moved into place when it is whole."""
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
