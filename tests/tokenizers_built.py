"""Tokenizers of decoders and encoders, trained in a second and written as model directories."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
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
    return _sentencepiece_bpe(directory, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True})


def gemma_sentencepiece(directory: Path) -> Path:
    """A sentencepiece BPE like Gemma's: <pad> 0, <eos> 1, <bos> 2; <bos> starts every text, and no space does."""
    return _sentencepiece_bpe(
        directory,
        {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True},
        add_dummy_prefix=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        eos_piece="<eos>",
        bos_piece="<bos>",
    )


def llama3_bpe(directory: Path) -> Path:
    """A byte-level BPE with tiktoken's pattern, as of LLaMA 3: control tokens behind all others, among them the one
    that starts every text; neither padding nor unknown token."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    start = "<|begin_of_text|>"
    tokenizer.add_special_tokens([start, "<|end_of_text|>", "<|eot_id|>"])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))]),
        ]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=start, eos_token="<|end_of_text|>").save_pretrained(
        directory
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


def _sentencepiece_bpe(directory: Path, settings: dict, **trained) -> Path:
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
        **trained,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def deberta_sentencepiece(directory: Path, corpus: Sequence[str] = CORPUS) -> Path:
    """DeBERTa-v2's and v3's as it is published: spm.model alone, [PAD] 0, [CLS] 1, [SEP] 2, [UNK] 3."""
    directory.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in corpus for line in text.split("\n") if line),
        model_writer=model,
        vocab_size=300,
        model_type="unigram",
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        unk_piece="[UNK]",
        num_threads=1,
        minloglevel=2,
    )
    (directory / "spm.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "DebertaV2Tokenizer", "do_lower_case": False, "vocab_type": "spm"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def bert_wordpiece(directory: Path, corpus: Sequence[str] = CORPUS) -> Path:
    """BERT's: vocab.txt, [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4; no token is called an end token."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=450, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    by_id = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    (directory / "vocab.txt").write_text("".join(f"{token}\n" for token in by_id), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return directory


def roberta_bpe(directory: Path, corpus: Sequence[str] = CORPUS) -> Path:
    """RoBERTa's byte-level BPE: vocab.json and merges.txt, <s> 0, <pad> 1, </s> 2, <unk> 3, <mask> 4."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.model.save(str(directory))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer"}))
    return directory
