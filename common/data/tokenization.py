"""Turns text into ids and back; only this module decides prompt ids, response ids and the end token."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar, cast

from transformers import AddedToken, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from common.data.chat_template import control_tokens
from common.data.errors import NoEndTokenError
from common.data.records import Prompt, Response
from common.data.templates import CHAT, Piece, Template, get_template
from common.data.trial import try_template, try_tokenizer
from common.errors import ModelError, UserError, reason_of, refuse_own_code
from common.paths import unreachable_hub

# Each usual normalizer and pre-tokenizer changes something in this text: case, accents (composed and not),
# compatibility forms, spaces (also at both ends) and line ends, digits, punctuation, many scripts, emoji, a long word.
_PROBE = (
    "  The Quick BROWN fox's iPhone  isn't   (really) jumping, e-mail: a_b@c.de/f?g=1&h=2#i \u2014 "
    '\u201cyes\u201d\u2026 ``no\'\' -- "so," he said." [etc.], http://x.y (z). Ah...!? <b>a</b> == {1: [2]};\n\n\n'
    "  def f(x):\r\n\treturn x**2 != 1e-5;  # 3.14, 1234567 and 2,000 \u0661\u0662\n \n"
    "na\u00efve cafe\u0301 \u00c5ngstr\u00f6m STRASSE stra\u00dfe \u0130stanbul \u0141\u00f3d\u017a \ufb01sh \u00bd "
    "x\u00b2 \uff26\uff55\uff4c\uff4c\uff17\uff01 a\u00a0b\u2003c\u200bd\u3000e \u2581f \u00adg\ufeffh \x07i\n"
    "\u6771\u4eac\u3078\u884c\u304f\u3001\u30ab\uff76\uff9e\u3002 \u4e2d\u6587\u5b57abc \ud55c\uad6d\uc5b4 "
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0451\u0436 \u0645\u064e\u0631\u062d\u0628\u0627 \u05e9\u05b8 "
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \U0001f600\U0001f44d\U0001f3fd "
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 " + "a" * 120
)


def load_tokenizer(name_or_path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a padding token that is not its end token.

    A tokenizer without an end token whose separator closes every text, such as BERT's [SEP], ends texts with that.

    The choice of that token depends on the tokenizer alone, so models that share a tokenizer share it too.

    Raises:
        ModelError: there is no usable tokenizer at `name_or_path`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except Exception as error:  # a missing or damaged file can raise almost any type
        refuse_own_code(name_or_path, error)
        reason = unreachable_hub(error) or reason_of(error)
        raise ModelError(name_or_path, f"the tokenizer cannot be loaded: {reason}") from error
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:
        # transformers creates an empty tokenizer for a model that has a config but no tokenizer files.
        raise ModelError(name_or_path, "it holds no tokenizer: put its files into the model's directory")
    try_tokenizer(tokenizer, name_or_path)
    _end_with_separator(tokenizer)
    _separate_padding(tokenizer)
    return tokenizer


def published_ends(name_or_path: str) -> list[int]:
    """The ids of the tokens that end a response by the model's generation_config.json; [] without one."""
    try:
        ends = GenerationConfig.from_pretrained(name_or_path).eos_token_id
    except (OSError, ValueError, TypeError, AttributeError):  # missing, or damaged, which loading the model reports
        return []
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def make_codec(
    tokenizer: PreTrainedTokenizerBase,
    template_name: str,
    *,
    add_eot_token: bool = False,
    eot_token: str = "<|endoftext|>",
    date: str | None = None,
    further_ends: Iterable[object] = (),
    two_sided: bool = False,
) -> Codec:
    """A tokenizer's codec.

    The end token is `eot_token` with `add_eot_token`; else the one by which a chat template ends a response; else the
    tokenizer's own. With `add_eot_token` the tokenizer is changed: `eot_token` becomes a special token (under its old
    id if the vocabulary has it) and the tokenizer's `eos_token`, so that what is saved with the model says where it
    stops.

    Args:
        template_name: one of `templates.TEMPLATE_NAMES`.
        date: YYYY-MM-DD, for chat templates that write the date, see `ChatTemplate`.
        further_ends: ids of more tokens that end a response, see `published_ends`; values that are no ids of the
            tokenizer are ignored.
        two_sided: for an encoder-decoder model, see `common.data.source_target`.

    Raises:
        NoEndTokenError: the tokenizer has no end token and none is added.
        TemplateError: the template does not exist, or cannot be used with the tokenizer.
    """
    if add_eot_token:
        tokenizer.add_special_tokens({"eos_token": AddedToken(eot_token, special=True, normalized=False)})
        _separate_padding(tokenizer)
    if template_name == CHAT and tokenizer.chat_template:
        try_template(tokenizer, tokenizer.name_or_path)
    template = get_template(template_name, tokenizer, date)
    end_token = None if add_eot_token else template.end_token
    if end_token is None and tokenizer.eos_token_id is None:
        raise NoEndTokenError(tokenizer.name_or_path or "the tokenizer", "its tokenizer has no end token")
    if end_token is not None and tokenizer.eos_token_id is None:
        tokenizer.eos_token = end_token
    _separate_padding(tokenizer, end_token)
    own_end = [] if template.end_token is None else [_id_of(tokenizer, template.end_token)]
    kind = codec_class(two_sided)
    return kind(tokenizer, template, end_token or tokenizer.eos_token, [*own_end, *further_ends])


def codec_class(two_sided: bool) -> type[Codec]:
    """The class of codecs for an encoder-decoder model, or for any other."""
    from common.data.source_target import SourceTargetCodec

    return SourceTargetCodec if two_sided else Codec


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, *, chat_template: bool = True) -> str:
    """sha256 (hex) of what turns text into ids: vocabulary, merges, scores, special tokens, chat template, and the ids
    of a fixed text, which depend on the normalizer and the pre-tokenizer.

    It is the same before and after a tokenizer is saved and loaded in any file format: the formats write the normalizer
    and the pre-tokenizer differently, but the ids are the same. Without `chat_template`, equal fingerprints mean that
    two tokenizers make the same ids of the same text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    probe = " ".join([_PROBE, *sorted(tokenizer.get_added_vocab()), " "])
    content = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "merges": model.get("merges"),
        "scores": model["vocab"] if isinstance(model.get("vocab"), list) else None,  # only a unigram model's
        "probe": tokenizer.encode(probe, add_special_tokens=False, split_special_tokens=True, verbose=False),
        "special": {role: getattr(tokenizer, f"{role}_token") for role in ("bos", "eos", "pad", "unk")},
        "start": _start_ids(tokenizer),
        "chat_template": tokenizer.chat_template if chat_template else None,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Codec:
    """Prompts and responses as ids, with one tokenizer, one template and one end token.

    Prompt and response are tokenized separately and joined as ids, so a prompt has the same ids whatever follows it.
    Nothing that a user writes becomes a special token.

    Attributes:
        tokenizer, template: as given.
        end_token, end_id: the token that ends every response.
        end_ids: all tokens that end a response of the model: the end token, the tokenizer's own, and further ones.
        pad_token, pad_id: never equal to the end token.
        date: the date that the template writes, YYYY-MM-DD; '' for a template that writes none.
        shortest_prompt: tokens of the shortest prompt that `cut_prompt` can leave: the start tokens and one more.
        two_sided: whether a model reads prompts with an encoder of its own, and not as the beginning of the response.
    """

    two_sided: ClassVar[bool] = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        end_token: str,
        further_ends: Iterable[object] = (),
    ):
        self.tokenizer = tokenizer
        self.template = template
        self.end_token = end_token
        self.date = template.date if template.dated else ""
        self.end_id: int = _id_of(tokenizer, end_token)
        self.pad_token: str = tokenizer.pad_token
        self.pad_id: int = tokenizer.pad_token_id
        further = [tokenizer.eos_token_id, *further_ends]
        known = [end for end in further if type(end) is int and 0 <= end < len(tokenizer)]
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys((self.end_id, *known)))
        self._start = _start_ids(tokenizer)
        self.shortest_prompt = len(self._start) + 1
        self._special = _special_ids(tokenizer)
        # Some tokenizers (sentencepiece) put a space before a text, as at the start of a sentence. This is right for a
        # prompt and wrong for a response, which continues a text.
        letter = self._plain_ids("a")
        self._adds_space = " " in self._decoded(letter + letter).strip()
        # Their decoders remove one leading space again. This one is put before a response that is decoded.
        self._space = self._plain_ids(" ") if self._adds_space else []
        self._lead = self._ids([Piece(template.lead, template.name == CHAT)], continues=True)

    def encode_prompt(self, prompt: Prompt, max_tokens: int | None = None) -> list[int]:
        """Ids of the prompt up to and including the assistant's cue, cut as `cut_prompt` does.

        The tokenizer's start tokens come first if it puts any before a text (a chat template brings its own).
        """
        ids = self._ids(self.template.prompt_pieces(prompt))
        if self.template.name != CHAT and ids[: len(self._start)] != self._start:
            ids = self._start + ids
        return ids if max_tokens is None else self.cut_prompt(ids, max_tokens)

    def cut_prompt(self, ids: list[int], max_tokens: int) -> list[int]:
        """At most `max_tokens` ids: the start token and the last of the others, where the question is."""
        if len(ids) <= max_tokens:
            return ids
        start = self._start if ids[: len(self._start)] == self._start else []
        return start + ids[len(ids) - max(max_tokens - len(start), 0) :]

    def encode_response(self, response: Response, prompt: Prompt | None = None) -> list[int]:
        """Ids of a response as it follows the cue, and the end token.

        Args:
            prompt: a chat template may write a response differently for another prompt; None: a plain question.
        """
        ids = self._ids(self.template.response_pieces(response, prompt), continues=True)
        return ids if ids[-1:] == [self.end_id] else [*ids, self.end_id]

    def encode_text(self, text: str) -> list[int]:
        """Ids of a plain document: start tokens, the text, the end token. No template."""
        return self._start + self._text_ids(text) + [self.end_id]

    def decode_response(self, ids: Sequence[int]) -> str:
        """The response in `ids`, up to the end token if any, without special tokens and the template's lead."""
        ids = list(ids)
        ids = ids[: self.end_of(ids)]
        if self._lead[: len(ids)] == ids:
            return ""
        start = self._behind_lead(ids)
        if start is not None:
            text = self._shown(ids[start:])
        else:  # the end of the lead and the beginning of the response may be one token
            text = self._shown(ids).removeprefix(self.template.lead)
        return text.removesuffix(self.template.tail) if self.template.tail else text

    def _behind_lead(self, ids: list[int]) -> int | None:
        """Where the text of the response begins: behind the lead. None if the ids do not contain the lead.

        A lead with special tokens may come late, after other channels such as reasoning.
        """
        lead = self._lead
        last = len(ids) - len(lead) if self._special.intersection(lead) else 0
        return next((at + len(lead) for at in range(last, -1, -1) if ids[at : at + len(lead)] == lead), None)

    def end_of(self, ids: Sequence[int]) -> int:
        """The index of the first token that ends a response; the number of ids if there is none."""
        return next((at for at, token in enumerate(ids) if token in self.end_ids), len(ids))

    def _shown(self, ids: list[int]) -> str:
        return self._decoded(self._space + ids)[len(self._decoded(self._space)) :]

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The response piece by piece, while its ids arrive; joined, the pieces are its `decode_response`."""
        seen: list[int] = []
        shown = ""
        for token in ids:
            if token in self.end_ids:
                break
            seen.append(token)
            if self._special.intersection(self._lead) and self._behind_lead(seen) is None:
                continue  # a late lead may still come; what stands before it is not shown
            text = self.decode_response(seen)
            # The last character may lack some of its bytes; the text may be the beginning of a lead.
            if text.endswith("\ufffd") or self.template.lead.startswith(text) or not text.startswith(shown):
                continue
            if text != shown:
                yield text[len(shown) :]
            shown = text
        rest = self.decode_response(seen)[len(shown) :]
        if rest:
            yield rest

    def _decoded(self, ids: list[int]) -> str:
        return cast(str, self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _plain_ids(self, text: str) -> list[int]:
        """Ids of text in which what looks like a special token is plain text."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)

    def _raw_ids(self, text: str) -> list[int]:
        """Ids of text in which what looks like a special token is one."""
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def _ids(self, pieces: Iterable[Piece], *, continues: bool = False) -> list[int]:
        ids: list[int] = []
        for number, (text, raw) in enumerate(pieces):
            follows = continues or number > 0
            ids += self._continued(self._raw_ids, text, follows) if raw else self._text_ids(text, continues=follows)
        return ids

    def _continued(self, encode: Callable[[str], list[int]], text: str, continues: bool = True) -> list[int]:
        """Ids of a text; if it `continues` another, those that it has after a newline, where no space is added."""
        if not (self._adds_space and continues):
            return encode(text)
        before, both = encode("\n"), encode("\n" + text)
        return both[len(before) :] if both[: len(before)] == before else encode(text)

    def _text_ids(self, text: str, *, continues: bool = False) -> list[int]:
        ids = self._continued(self._plain_ids, text, continues)
        special_ids = self._special.intersection(ids)
        if not special_ids:
            return ids
        # Merges of a vocabulary may lead from plain characters to a special token, and added tokens that are not marked
        # as special are found in any text. Tokenize the characters of such a token separately.
        spelt = self.tokenizer.convert_ids_to_tokens(sorted(special_ids))
        apart = "|".join(f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in spelt)
        first, *others = re.split(apart, text)
        ids = self._continued(self._plain_ids, first, continues)
        ids += [token for piece in others for token in self._continued(self._plain_ids, piece)]
        if self._special.intersection(ids):
            raise UserError(
                f"the tokenizer turns plain text into its special token {' or '.join(spelt)}: "
                "choose a tokenizer that keeps special tokens out of text"
            )
        return ids


def _id_of(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    return cast(int, tokenizer.convert_tokens_to_ids(token))


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the tokenizer itself puts before a text, such as that of <s>."""
    return _ids_around(tokenizer)[0]


def closing_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the tokenizer itself puts behind a text, such as that of </s>."""
    return _ids_around(tokenizer)[1]


def _ids_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    bare = tokenizer.encode("a", add_special_tokens=False)
    ruled = tokenizer.encode("a", add_special_tokens=True)
    starts = [i for i in range(len(ruled)) if ruled[i : i + len(bare)] == bare]
    return (ruled[: starts[0]], ruled[starts[0] + len(bare) :]) if starts else ([], [])


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokens that control the model. The unknown token is not among them: it stands for text."""
    steering = {_id_of(tokenizer, token) for token in control_tokens(tokenizer)}
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    return steering if tokenizer.unk_token_id in named else steering - {tokenizer.unk_token_id}


def _end_with_separator(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        if tokenizer.encode("a", add_special_tokens=True)[-1:] == [tokenizer.sep_token_id]:
            tokenizer.eos_token = tokenizer.sep_token


def _separate_padding(tokenizer: PreTrainedTokenizerBase, end_token: str | None = None) -> None:
    """Give the tokenizer a padding token that is neither its end token nor `end_token`: a model must see the end token
    in order to learn it.

    The first that fits of: its own padding token; the unknown token; a special token made for padding or kept in
    reserve; a new one.
    """
    ends = {tokenizer.eos_token_id, *([_id_of(tokenizer, end_token)] if end_token else [])}
    taken = {*ends, tokenizer.bos_token_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in taken:
        tokenizer.pad_token = tokenizer.unk_token
        return
    for purpose in ("pad", "reserved", "unused"):
        for token_id, token in sorted(tokenizer.added_tokens_decoder.items()):
            if token.special and purpose in token.content.lower() and token_id not in taken:
                tokenizer.pad_token = token.content
                return
    free = [name for name in ("<pad>", "<|pad|>") if name not in tokenizer.get_vocab()]
    tokenizer.add_special_tokens({"pad_token": free[0]})
