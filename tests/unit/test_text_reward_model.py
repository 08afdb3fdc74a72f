"""Reward models with a tokenizer and an architecture of their own."""

import pytest
import torch
import transformers as hf

from common.artifacts.compatibility import text_of
from common.artifacts.provenance import Provenance
from common.data.keeping import prompt_of
from common.data.tokenization import load_tokenizer, make_codec
from common.errors import ModelError, UserError
from common.models.builtin import materialise
from common.rewards.batch import RewardBatch
from common.rewards.reading import check_reward_model, check_text_model, reads_ids_of, scores_last_token
from common.rewards.text_model import TextRewardModel, plain_dialogue
from tests.architectures import build_model
from tests.rewards import TINY, WORDS, word_tokenizer
from tests.tokenizers_built import llama3_bpe

ENCODERS = {
    "bert": (hf.BertConfig, {"max_position_embeddings": 24}, 24),
    "roberta": (hf.RobertaConfig, {"max_position_embeddings": 25, "pad_token_id": 0, "type_vocab_size": 1}, 24),
    "deberta-v2": (hf.DebertaV2Config, {"max_position_embeddings": 24}, 24),
}


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request, tmp_path_factory):
    """Directory, model, tokenizer and the most tokens of an encoder with one label."""
    directory = tmp_path_factory.mktemp(request.param)
    config_class, changes, room = ENCODERS[request.param]
    torch.manual_seed(0)
    config = config_class(vocab_size=len(WORDS), num_labels=1, **{**TINY, "pad_token_id": 0, **changes})
    model = hf.AutoModelForSequenceClassification.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    return directory, model, word_tokenizer(directory), room


def batch_of(dialogues, responses) -> RewardBatch:
    messages = [
        [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, turns)] for turns in dialogues
    ]
    count = len(responses)
    return RewardBatch([""] * count, messages, responses, [[0]] * count, [True] * count)


def scorer(directory, **settings) -> TextRewardModel:
    settings = {"batch_size": 2, "dtype": torch.float32, **settings}
    return TextRewardModel(str(directory), device=torch.device("cpu"), **settings)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_an_encoder_of_few_bits_scores_nearly_the_same(encoder, dtype):
    directory = encoder[0]
    batch = batch_of([["what is two plus three ?"], ["a ?"]], ["five", "a b c d"])
    scores = {kind: scorer(directory, dtype=dtype, quantize=kind).score(batch).numbers for kind in ("none", "int8")}
    assert scores["int8"] != scores["none"]
    assert scores["int8"] == pytest.approx(scores["none"], rel=0.1, abs=0.1)


def test_an_encoder_reads_a_pair_of_texts(encoder):
    directory, model, tokenizer, _ = encoder
    dialogues = [["what is two plus three ?"], ["a ?"], ["what ?", "five", "what is six ?"]]
    responses = ["five", "a b c d", "six"]
    expected = []
    for turns, response in zip(dialogues, responses):
        prompt = turns[0] if len(turns) == 1 else "User: what ?\nAssistant: five\nUser: what is six ?"
        with torch.no_grad():
            expected.append(float(model(**tokenizer(prompt, response, return_tensors="pt")).logits))
    for settings in ({"batch_size": 1}, {"batch_size": 3}, {"offload": True}):
        scores = scorer(directory, **settings).score(batch_of(dialogues, responses))
        assert scores.numbers == pytest.approx(expected, abs=1e-5)
        assert scores.figures == {"truncated": 0.0}


def test_what_is_too_long_loses_its_beginning_and_that_is_said_once(encoder, capsys):
    directory, model, tokenizer, room = encoder
    reward = scorer(directory)
    assert reward.max_tokens == room
    long = " ".join(["a b c d e f"] * 9)
    batch = batch_of([[f"{long} what is six ?"], ["a ?"]], ["six five", "a"])
    for _ in range(2):
        scores = reward.score(batch)
    kept = f"{long} what is six ?".split()[-(room - 3 - 2) :]
    with torch.no_grad():
        expected = float(model(**tokenizer(" ".join(kept), "six five", return_tensors="pt")).logits)
    assert scores.numbers[0] == pytest.approx(expected, abs=1e-5) and scores.figures == {"truncated": 0.5}
    assert capsys.readouterr().out.count(f"reads {room} tokens at most: longer dialogues lose their beginning") == 1
    assert len(reward.score(batch_of([["a ?"]], [long])).numbers) == 1  # a response without end is cut as well


def test_a_shorter_limit_wins_over_that_of_the_model(encoder):
    directory, model, tokenizer, _ = encoder
    reward = scorer(directory, max_tokens=16)
    assert reward.max_tokens == 16 and scorer(directory, max_tokens=1000).max_tokens == scorer(directory).max_tokens
    words = " ".join(["a b c d e f"] * 3).split()
    scores = reward.score(batch_of([[" ".join(words)]], ["six five"]))
    with torch.no_grad():
        expected = float(model(**tokenizer(" ".join(words[-(16 - 3 - 2) :]), "six five", return_tensors="pt")).logits)
    assert scores.numbers == pytest.approx([expected], abs=1e-5) and scores.figures == {"truncated": 1.0}


def test_an_encoder_reads_text_and_never_the_actors_ids(encoder):
    directory, *_ = encoder
    assert not scores_last_token(str(directory))
    check_reward_model(str(directory))
    check_text_model(str(directory))


def test_a_classifier_of_several_labels_is_refused(tmp_path):
    hf.BertConfig(vocab_size=8, num_labels=2, architectures=["BertForSequenceClassification"], **TINY).save_pretrained(
        tmp_path
    )
    with pytest.raises(ModelError, match="a classifier of 2 labels"):
        check_text_model(str(tmp_path))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    config = hf.BertConfig(vocab_size=3, num_labels=1, architectures=["BertForSequenceClassification"], **TINY)
    config.save_pretrained(tmp_path)
    word_tokenizer(tmp_path)
    with pytest.raises(ModelError, match=f"its tokenizer has {len(WORDS)} tokens and its config.json 3"):
        check_text_model(str(tmp_path))


def test_padding_that_a_tokenizer_lacks_needs_no_row_of_embeddings(tmp_path):
    tokenizer = hf.AutoTokenizer.from_pretrained(llama3_bpe(tmp_path))
    torch.manual_seed(0)
    sizes = {**TINY, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "num_labels": 1}
    model = hf.AutoModelForSequenceClassification.from_config(hf.LlamaConfig(**sizes))
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path)
    check_text_model(str(tmp_path))
    assert load_tokenizer(str(tmp_path)).pad_token_id == len(tokenizer)
    dialogues, responses = [["What is it?"], ["a"]], ["The sum is 8, naturally.", "No."]
    together, alone = (
        scorer(tmp_path, batch_size=size).score(batch_of(dialogues, responses)).numbers for size in (2, 1)
    )
    assert together == pytest.approx(alone, abs=1e-5) and together[0] != together[1]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory, builtin_cache):
    """A decoder with a score head, and its codec."""
    base = build_model("llama", tmp_path_factory.mktemp("base"), builtin_cache)
    directory = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(1)
    model = hf.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(directory)
    codec = make_codec(load_tokenizer(str(base)), "question_answer")
    codec.tokenizer.save_pretrained(directory)
    return directory, model.eval(), codec


def provenance(codec) -> Provenance:
    return Provenance(step="reward", base="x", data_split="2,4,4", eval_fraction=0.05, **text_of(codec))


def test_a_decoder_with_a_provenance_reads_its_own_template_up_to_the_last_token(decoder, tmp_path):
    directory, model, codec = decoder
    provenance(codec).write(directory)
    reward = scorer(directory)
    batch = batch_of([["Why?"], ["What is the capital of France?"]], ["So.", "It is Paris."])
    for finished in (True, False):
        part = RewardBatch(batch.prompts, batch.messages, batch.responses, batch.response_ids, [finished] * 2)
        expected = []
        for messages, response in zip(batch.messages, batch.responses):
            response_ids = codec.encode_response(response)[: None if finished else -1]
            with torch.no_grad():
                ids = torch.tensor([codec.encode_prompt(prompt_of(messages)) + response_ids])
                expected.append(float(model(input_ids=ids).logits))
        assert reward.score(part).numbers == pytest.approx(expected, abs=1e-4)


def test_whether_a_model_reads_the_actors_ids_depends_on_tokens_and_template(decoder, builtin_cache):
    directory, _, codec = decoder
    provenance(codec).write(directory)
    same = make_codec(load_tokenizer(str(directory)), "question_answer")
    assert reads_ids_of(same, str(directory))
    assert not reads_ids_of(make_codec(load_tokenizer(str(directory)), "human_assistant"), str(directory))
    other = make_codec(load_tokenizer(str(materialise("builtin:tiny-llama", builtin_cache))), "question_answer")
    assert not reads_ids_of(other, str(directory))
    with pytest.raises(UserError, match="it is no reward model"):
        check_reward_model(str(materialise("builtin:tiny-opt", builtin_cache)))


def test_a_dialogue_without_a_template_is_its_only_question_or_its_turns():
    assert plain_dialogue([{"role": "user", "content": "Why?"}]) == "Why?"
    turns = [("system", "Be brief."), ("user", "Why?")]
    assert plain_dialogue([{"role": role, "content": text} for role, text in turns]) == "System: Be brief.\nUser: Why?"
