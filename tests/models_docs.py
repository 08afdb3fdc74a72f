"""The table of docs/models.md: which features work with which family of models, found by running them.

python tests/models_docs.py [DATA]      runs every family on 2 ranks, which takes long, checks what it did, and writes
                                        the table; DATA as in --data_path
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.models.builtin import materialise
from tests.architectures import CONFIGS, ENCODERS, FURTHER_CONFIGS, build_encoder, build_model
from tests.distributed.families import RANKS
from tests.distributed.family_features import FEATURES
from tests.launching import launch

DOCS = ROOT / "docs/models.md"
PROGRAM = ROOT / "tests/distributed/family_cases.py"
COMMAND = "python tests/models_docs.py"
Row = dict[str, str]

# Architecture of `tests.architectures`: the published models of that shape.
MODELS = {
    "opt": "OPT, OPT-IML",
    "opt-350m": "OPT-350M (norms behind the blocks, projected embeddings)",
    "llama": "LLaMA 2 and 3 (grouped-query attention), TinyLlama, Vicuna, SmolLM and SmolLM2",
    "mistral": "Mistral",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "gpt2": "GPT-2, DistilGPT2",
    "gpt-neo": "GPT-Neo",
    "gptj": "GPT-J",
    "gpt-neox": "GPT-NeoX, Pythia",
    "bloom": "BLOOM, BLOOMZ (ALiBi)",
    "falcon": "Falcon 7B (one key-value head)",
    "falcon-40b": "Falcon 40B and 180B (grouped-query attention)",
    "falcon-rw": "Falcon-RW (ALiBi)",
    "mpt": "MPT (ALiBi)",
    "phi": "Phi-1, Phi-1.5, Phi-2",
    "phi3": "Phi-3, Phi-3.5-mini, Phi-4",
    "stablelm": "StableLM 3B, StableLM 2",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3, text only (270M, 1B)",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "smollm3": "SmolLM3",
    "deberta-v3": "DeBERTa-v3 (encoder)",
    "deberta-v2": "DeBERTa-v2 (encoder)",
    "roberta": "RoBERTa (encoder)",
    "bert": "BERT (encoder)",
}

HEADER = ["models", *FEATURES]


def table(rows: dict[str, Row]) -> str:
    """The table of the page.

    Args:
        rows: for each architecture what `measured` found.
    """
    lines = [HEADER, ["---"] * len(HEADER), *([title, *rows[name].values()] for name, title in MODELS.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def documented() -> dict[str, Row]:
    """The rows of the page as it is, by the title of the models."""
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in _old_table().splitlines()]
    return {title: dict(zip(header[1:], cells, strict=True)) for title, *cells in rows}


def _old_table() -> str:
    (found,) = re.findall(rf"^\| {HEADER[0]} \|.*\n(?:\|.*\n)*", DOCS.read_text(encoding="utf-8"), re.M)
    return found


def run(architectures: Iterable[str], data: Path, cache_dir: Path, output: Path) -> None:
    """Send models of some architectures through `family_cases`."""
    for name in architectures:
        if name in ENCODERS:
            build_encoder(name, output / name / "model")
            # The ranks cannot write it: `family_cases` has a process group from its first run on.
            materialise("builtin:tiny-opt", output / name / "data")
        else:
            build_model(name, output / name / "model", cache_dir)
    launch(PROGRAM, str(data), str(output), ranks=RANKS, timeout=3600)


def measured(place: Path) -> Row:
    """What works with an architecture, by its runs in `place`; AssertionError if they gave wrong results."""
    return {name: feature(place) for name, feature in FEATURES.items()}


def main(data: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory)
        run([*CONFIGS, *FURTHER_CONFIGS, *ENCODERS], Path(data), output / "cache", output / "runs")
        new = table({name: measured(output / "runs" / name) for name in MODELS})
    DOCS.write_text(DOCS.read_text(encoding="utf-8").replace(_old_table(), new), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "builtin:courtesy")
