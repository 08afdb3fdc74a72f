"""Text to ids and back: end tokens, padding, special tokens, fingerprints."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from common.data.options import naming_flags
from common.data.records import Message, Prompt
from common.data.tokenization import load_tokenizer, make_codec, tokenizer_fingerprint
from common.errors import UserError
from tests.tokenizers_built import byte_level_bpe, llama_prepending, llama_sentencepiece

CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
NASTY = [
    "Paris",
    " Paris",
    "  two  spaces ",
    "",
    "a\n\nb",
    "\nfirst",
    "naïve café 東京 😀",
    "say </s> and <s> and <pad>",
    "<unk>",
    "{}",
    "tab\tx",
    "<|endoftext|>",
]


@pytest.fixture(scope="module", params=[byte_level_bpe, llama_sentencepiece, llama_prepending])
def directory(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def codec(directory):
    return make_codec(load_tokenizer(str(directory)), "human_assistant")


def asked(text: str) -> Prompt:
    return Prompt((Message("user", text),))


@pytest.mark.parametrize("text", NASTY)
def test_an_answer_comes_back_as_it_was(codec, text):
    ids = codec.encode_response(text)
    assert codec.decode_response(ids) == text
    assert codec.decode_response(ids[:-1]) == text
    assert codec.decode_response([*ids, *codec.encode_response("after the end")]) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=40))
def test_any_answer_comes_back(codec, text):
    assert codec.decode_response(codec.encode_response(text)) == text


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.sampled_from("aé東😀 \n"), max_size=20))
def test_the_stream_says_the_same_as_the_whole(codec, text):
    ids = codec.encode_response(text)
    assert "".join(codec.stream(ids)) == text
    assert all("\ufffd" not in piece for piece in codec.stream(ids))


def test_the_stream_does_not_wait_for_the_end(codec):
    pieces = list(codec.stream(codec.encode_response("Paris is the capital, of course.")))
    assert len(pieces) > 5


@pytest.mark.parametrize("text", NASTY)
def test_one_end_token_at_the_end_and_no_special_token_in_a_text(codec, text):
    special = set(codec.tokenizer.all_special_ids) - ({codec.tokenizer.unk_token_id} - {codec.end_id})
    response, question = codec.encode_response(text), codec.encode_prompt(asked(text))
    assert response[-1] == codec.end_id
    assert special.isdisjoint(response[:-1])
    assert special.isdisjoint(question[1:])


def test_the_start_token_stands_once_at_the_start(codec):
    ids = codec.encode_prompt(asked("What is the capital?"))
    assert ids[0] == codec.tokenizer.bos_token_id
    assert ids.count(codec.tokenizer.bos_token_id) == 1
    assert codec.encode_text("plain")[0] == codec.tokenizer.bos_token_id


def test_prompt_and_answer_read_as_the_whole_transcript(codec):
    """Joined as ids they decode to the transcript, with one space after the cue for both families."""
    ids = codec.encode_prompt(asked("Capital?")) + codec.encode_response("Paris")
    assert codec.tokenizer.decode(ids, skip_special_tokens=True) == "\n\nHuman: Capital?\n\nAssistant: Paris"


def test_a_cut_prompt_keeps_its_start_token_and_its_end(codec):
    whole = codec.encode_prompt(asked("What is the capital of country 7?"))
    cut = codec.encode_prompt(asked("What is the capital of country 7?"), max_tokens=9)
    assert len(cut) == 9
    assert cut == [whole[0], *whole[-8:]]
    assert codec.encode_prompt(asked("x"), max_tokens=1000) == codec.encode_prompt(asked("x"))


def test_a_word_that_is_made_the_end_token_is_spelt_out_in_a_text(directory):
    """Its merges lead from plain characters to the token, in spite of the library's own guard."""
    tokenizer = load_tokenizer(str(directory))
    word = max((token for token in tokenizer.get_vocab() if token.isalpha() and token.isascii()), key=len)
    codec = make_codec(tokenizer, "human_assistant", add_eot_token=True, eot_token=word)
    text = f"{word} and{word}{word} or{word}."
    assert codec.end_id in tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert codec.encode_response(text).count(codec.end_id) == 1
    assert codec.end_id not in codec.encode_prompt(asked(text))
    assert codec.decode_response(codec.encode_response(text)) == text


@pytest.mark.parametrize("build", [byte_level_bpe, llama_sentencepiece])
def test_chat_templates_write_special_tokens_and_users_do_not(tmp_path, build):
    tokenizer = load_tokenizer(str(build(tmp_path)))
    tokenizer.chat_template = CHATML
    codec = make_codec(tokenizer, "chat")
    start, end = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    ids = codec.encode_prompt(asked("Hi <s>"))
    assert (ids.count(start), ids.count(end)) == (2, 1)
    assert ids[0] == start
    assert codec.decode_response(codec.encode_response("Hello there")) == "Hello there"


def test_chat_prompt_and_answer_are_the_ids_of_the_rendered_dialogue(tmp_path):
    tokenizer = load_tokenizer(str(llama_sentencepiece(tmp_path)))
    tokenizer.chat_template = CHATML
    codec = make_codec(tokenizer, "chat")
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Paris is"}], tokenize=False
    )
    whole = tokenizer.encode(rendered.rstrip("\n"), add_special_tokens=False)
    assert codec.encode_prompt(asked("Hi")) + codec.encode_response("Paris is") == whole


def test_added_end_token(directory):
    before = load_tokenizer(str(directory))
    size = len(before)
    codec = make_codec(before, "human_assistant", add_eot_token=True, eot_token="<|end|>")
    assert codec.end_id == size == len(codec.tokenizer) - 1
    assert codec.tokenizer.eos_token == codec.end_token == "<|end|>"
    assert codec.encode_response("a <|end|> b").count(codec.end_id) == 1
    assert codec.decode_response(codec.encode_response("a <|end|> b")) == "a <|end|> b"


def test_an_end_token_of_the_vocabulary_is_used_as_it_is(tmp_path):
    tokenizer = load_tokenizer(str(byte_level_bpe(tmp_path, specials=("<|endoftext|>",))))
    size, known = len(tokenizer), tokenizer.convert_tokens_to_ids("<|endoftext|>")
    codec = make_codec(tokenizer, "human_assistant", add_eot_token=True)
    assert (codec.end_id, len(tokenizer)) == (known, size)


def test_without_any_end_token_the_flag_is_named(tmp_path):
    tokenizer = load_tokenizer(str(byte_level_bpe(tmp_path, bos=None, eos=None, unk=None)))
    with pytest.raises(UserError, match="--add_eot_token"), naming_flags():
        make_codec(tokenizer, "human_assistant")


@pytest.mark.parametrize(
    "named, expected",
    [
        (dict(), "<pad>"),  # its own
        (dict(pad="</s>", unk="<s>"), "<s>"),  # the unknown token
        (dict(pad=None, unk=None, specials=("<|a|>",)), "<pad>"),  # a special made for padding
        (dict(pad="</s>", unk=None, eos="<pad>", bos="<pad>"), "</s>"),  # its own, whatever its name
    ],
)
def test_padding_is_never_the_end_token(tmp_path, named, expected):
    tokenizer = load_tokenizer(str(byte_level_bpe(tmp_path, **named)))
    assert tokenizer.pad_token == expected
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_padding_gives_way_when_its_token_becomes_the_end_token(tmp_path):
    tokenizer = load_tokenizer(str(byte_level_bpe(tmp_path)))
    codec = make_codec(tokenizer, "human_assistant", add_eot_token=True, eot_token="<pad>")
    assert codec.end_token == "<pad>"
    assert codec.pad_id != codec.end_id


def test_saved_and_loaded_it_is_the_same_tokenizer(directory, tmp_path):
    codec = make_codec(load_tokenizer(str(directory)), "human_assistant", add_eot_token=True)
    codec.tokenizer.save_pretrained(tmp_path)
    again = make_codec(load_tokenizer(str(tmp_path)), "human_assistant")
    assert (again.end_id, again.pad_id) == (codec.end_id, codec.pad_id)
    assert tokenizer_fingerprint(again.tokenizer) == tokenizer_fingerprint(codec.tokenizer)
    assert again.encode_prompt(asked("Hi </s>")) == codec.encode_prompt(asked("Hi </s>"))


def test_the_fingerprint_tells_tokenizers_apart(directory, tmp_path):
    tokenizer = load_tokenizer(str(directory))
    plain = tokenizer_fingerprint(tokenizer)
    assert plain == tokenizer_fingerprint(load_tokenizer(str(directory)))
    tokenizer.chat_template = CHATML
    chatty = tokenizer_fingerprint(tokenizer)
    tokenizer.add_tokens(["<more>"])
    assert len({plain, chatty, tokenizer_fingerprint(tokenizer)}) == 3


@pytest.mark.parametrize(
    "section, step",
    [
        ("normalizer", dict(type="Lowercase")),
        ("normalizer", dict(type="NFKC")),
        ("normalizer", dict(type="NFD")),
        ("normalizer", dict(type="StripAccents")),
        ("normalizer", dict(type="Strip", strip_left=True, strip_right=False)),
        ("pre_tokenizer", dict(type="Digits", individual_digits=True)),
        ("pre_tokenizer", dict(type="Punctuation", behavior="Isolated")),
    ],
)
def test_the_fingerprint_sees_what_is_done_to_text_before_the_vocabulary(tmp_path, section, step):
    before, after = tmp_path / "before", tmp_path / "after"
    for path in (before, after):
        path.mkdir()
        build_words(path)
    content = json.loads((after / "tokenizer.json").read_text())
    steps = "normalizers" if section == "normalizer" else "pretokenizers"
    rest = [content[section]] if content[section] else []
    content[section] = {"type": "Sequence", steps: [step, *rest]}
    (after / "tokenizer.json").write_text(json.dumps(content))
    of = [tokenizer_fingerprint(load_tokenizer(str(path))) for path in (before, after)]
    assert of[0] != of[1]


def test_the_fingerprint_sees_the_scores_of_a_unigram_model(tmp_path):
    fingerprints = set()
    for name, score in (("a", -3.0), ("b", -3.5), ("same", -3.0)):
        model = Unigram([("<unk>", 0.0), ("</s>", 0.0), *((letter, -2.0) for letter in "qzx"), ("qzx", score)], 0)
        path = tmp_path / name
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="<unk>", eos_token="</s>").save_pretrained(
            path
        )
        tokenizer = load_tokenizer(str(path))
        fingerprints.add(tokenizer_fingerprint(tokenizer))
        tokenizer.save_pretrained(path / "again")
        fingerprints.add(tokenizer_fingerprint(load_tokenizer(str(path / "again"))))
    assert len(fingerprints) == 2


def build_words(path):
    """A byte-level tokenizer with an entry for each byte and two merges."""
    letters = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(
        BPE({letter: i for i, letter in enumerate([*letters, "</s>", "12", ")."])}, [("1", "2"), (")", ".")])
    )
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(path)


def test_directories_without_a_tokenizer_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "opt", "architectures": ["OPTForCausalLM"]}')
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=path.name):
            load_tokenizer(str(path))
