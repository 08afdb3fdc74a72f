"""Tokenizers of the two families, trained in a second and written as model directories."""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CORPUS = [
    f"Human: What is the capital of country {i}? Assistant: Paris is the capital, of course.\n\n"
    f"Question: how much is {i} plus {i * 7}? Answer: the sum is {i * 8}, <b>naturally</b> </s> <s>."
    for i in range(200)
]


def byte_level_bpe(
    directory: Path,
    *,
    bos: str | None = "</s>",
    eos: str | None = "</s>",
    pad: str | None = "<pad>",
    unk: str | None = "</s>",
    chat_template: str | None = None,
    specials: tuple[str, ...] = (),
) -> Path:
    """A byte-level BPE, like OPT's unless told otherwise: <s> 0, <pad> 1, </s> 2; </s> starts every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=450,
            special_tokens=["<s>", "<pad>", "</s>", *specials],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unk}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{k: v for k, v in named.items() if v})
    fast.chat_template = chat_template
    fast.save_pretrained(directory)
    return directory


def llama_sentencepiece(directory: Path) -> Path:
    """A sentencepiece BPE like LLaMA's: <unk> 0, <s> 1, </s> 2; <s> starts every text; no padding."""
    directory.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=450,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True})
    )
    return directory


def llama_prepending(directory: Path) -> Path:
    """The same as older converted files have it: a space goes before any text, even before a space."""
    llama = AutoTokenizer.from_pretrained(llama_sentencepiece(directory / "sentencepiece"))
    backend = llama.backend_tokenizer
    space = "\u2581"
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    backend.pre_tokenizer = None
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    return directory
