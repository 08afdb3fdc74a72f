"""Encoders as reward models: what holds for every family, with its own tokenizer and any padding beside a row."""

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from common.artifacts.export import write_model
from common.data.records import Message, Prompt
from common.data.tokenization import load_tokenizer, make_codec, tokenizer_fingerprint
from common.errors import UserError
from common.models.completeness import problem
from common.models.configuration import (
    EncoderError,
    check_gives_values,
    check_language_model,
    check_length,
    gives_scores,
    max_length,
)
from common.models.heads import head_names, score_projection
from common.models.loading import load_scalar_model, load_scoring_model
from common.models.lora import adapters_disabled, add_lora, linear_modules
from common.models.scalar import EncoderModel, sequence_scores
from inference.decoding import Response
from inference.loading import LoadedModel, load_reward_model
from inference.options import LoadOptions
from inference.scoring import score_responses
from step3_ppo.inputs import check_critic_kind
from tests.architectures import ENCODERS, build_encoder

PROMPTS = [Prompt((Message("user", text),)) for text in ("How much is 3 plus 21?", "Why?", "What is it? " * 9)]
ANSWERS = ["the sum is 24, naturally.", "Paris", "the capital of country 7 is Paris, of course " * 3]
MISSING = {
    "deberta-v3": {"pooler.dense", "classifier"},
    "deberta-v2": {"pooler.dense", "classifier"},
    "roberta": {"classifier.dense", "classifier.out_proj"},
    "bert": {"classifier"},
}


@pytest.fixture(scope="module", params=ENCODERS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def directory(name, tmp_path_factory):
    return build_encoder(name, tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def codec(directory):
    return make_codec(load_tokenizer(str(directory)), "human_assistant")


@pytest.fixture(scope="module")
def rows(codec):
    return [codec.encode_prompt(prompt) + codec.encode_response(text) for prompt, text in zip(PROMPTS, ANSWERS)]


def encoder(directory, codec, **settings):
    return load_scoring_model(
        str(directory), codec, **{"dtype": torch.float32, "dropout": 0.0, "seed": 7} | settings
    ).eval()


def padded(rows, filler, wider=4):
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = torch.full((len(rows), int(lengths.max()) + wider), filler)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
    return input_ids, lengths


def test_texts_begin_and_end_as_the_tokenizer_has_it(codec, rows):
    start, end = codec.tokenizer.cls_token_id, codec.tokenizer.sep_token_id
    assert codec.end_id == end and codec.pad_id not in (start, end)
    for ids in rows:
        assert ids[0] == start and ids[-1] == end and set(ids[1:-1]).isdisjoint({start, end, codec.pad_id})


def test_a_prompt_that_is_cut_keeps_its_start(codec):
    whole = codec.encode_prompt(PROMPTS[2])
    for most in (codec.shortest_prompt, 7, len(whole) - 1):
        assert codec.encode_prompt(PROMPTS[2], most) == [whole[0], *whole[len(whole) - most + 1 :]]


def test_what_looks_like_a_special_token_is_text(codec):
    special = [token for token in codec.tokenizer.all_special_tokens if token != codec.tokenizer.unk_token]
    ids = codec.encode_response(" and ".join(special))
    assert set(ids[:-1]).isdisjoint(codec.tokenizer.convert_tokens_to_ids(special))


def test_the_tokenizer_is_the_same_after_it_was_saved(codec, rows, tmp_path):
    codec.tokenizer.save_pretrained(tmp_path)
    again = make_codec(load_tokenizer(str(tmp_path)), "human_assistant")
    assert tokenizer_fingerprint(again.tokenizer) == tokenizer_fingerprint(codec.tokenizer)
    assert again.end_id == codec.end_id and again.pad_id == codec.pad_id
    assert again.encode_prompt(PROMPTS[0]) + again.encode_response(ANSWERS[0]) == rows[0]


@torch.no_grad()
def test_padding_changes_no_score(directory, codec, rows):
    model = encoder(directory, codec)
    assert isinstance(model, EncoderModel)
    together = sequence_scores(model, *padded(rows, codec.pad_id))
    assert together.dtype == torch.float32 and len(set(together.tolist())) == len(rows)
    # Filled with the END token: a mask made by comparing tokens would show. RoBERTa counts it in no position before it.
    torch.testing.assert_close(sequence_scores(model, *padded(rows, codec.end_id)), together, atol=1e-5, rtol=1e-5)
    alone = torch.cat([sequence_scores(model, *padded([row], codec.pad_id, wider=0)) for row in rows])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_plain_transformers_gives_the_same_scores(directory, codec, rows, tmp_path):
    model = encoder(directory, codec)
    ours = sequence_scores(model, *padded(rows, codec.pad_id))
    write_model(model, dict(model.state_dict()), codec, tmp_path)
    assert problem(tmp_path) is None and gives_scores(str(tmp_path))
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)
    plain = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert plain.config.num_labels == 1 and plain.config.pad_token_id == tokenizer.pad_token_id
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    torch.testing.assert_close(plain(**batch).logits.squeeze(-1), ours, atol=1e-5, rtol=1e-5)
    again = encoder(tmp_path, codec, seed=8)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(sequence_scores(again, *padded(rows, codec.pad_id)), ours, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_in_bf16_the_head_computes_in_fp32(directory, codec, rows):
    exact = sequence_scores(encoder(directory, codec), *padded(rows, codec.pad_id))
    model = encoder(directory, codec, dtype=torch.bfloat16)
    scores = sequence_scores(model, *padded(rows, codec.pad_id))
    assert scores.dtype == torch.float32 and (scores != scores.bfloat16().float()).any()
    torch.testing.assert_close(scores, exact, atol=0.1, rtol=0.1)


def test_a_new_head_depends_on_the_seed_alone(name, directory, codec):
    torch.manual_seed(1)
    models = [encoder(directory, codec, seed=seed).classifier for seed in (1, 1, 2)]
    new = [{part: model.get_submodule(part) for part in MISSING[name]} for model in models]
    for part, layer in new[0].items():
        assert torch.equal(layer.weight, new[1][part].weight) and not torch.equal(layer.weight, new[2][part].weight)
        assert not layer.bias.any()
    last = score_projection(models[0])
    assert float(last.weight.detach().std()) == pytest.approx((last.in_features + 1) ** -0.5, rel=0.5)
    kept = [
        {key: value for key, value in model.state_dict().items() if key.rpartition(".")[0] not in MISSING[name]}
        for model in models
    ]
    assert all(torch.equal(kept[0][key], kept[2][key]) for key in kept[0])


def test_a_pooler_that_was_not_pretrained_is_new_too(codec, tmp_path):
    """BERT's masked language model comes without one."""
    directory = build_encoder("bert", tmp_path / "bert")
    hf.BertForMaskedLM.from_pretrained(directory).save_pretrained(directory)
    own = make_codec(load_tokenizer(str(directory)), "human_assistant")
    first, second = (encoder(directory, own).classifier for _ in range(2))
    weight = first.bert.pooler.dense.weight
    assert torch.equal(weight, second.bert.pooler.dense.weight) and weight.any()


def test_weights_that_are_no_part_of_a_head_must_be_there(directory, codec, tmp_path):
    hf.AutoConfig.from_pretrained(directory).save_pretrained(tmp_path)
    weights = load_file(directory / "model.safetensors")
    lost = next(name for name in sorted(weights) if "layer.1" in name and "query" in name and "weight" in name)
    save_file(
        {name: value for name, value in weights.items() if name != lost},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match=f"lack 1 of the model's weights, such as {lost}"):
        encoder(tmp_path, codec)
    save_file(
        weights | {lost.replace("layer.1", "layer.7"): weights[lost].clone()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match="hold 1 weights more than"):
        encoder(tmp_path, codec)


def test_a_trained_head_that_was_lost_is_not_made_anew(directory, codec, tmp_path):
    model = encoder(directory, codec)
    write_model(model, dict(model.state_dict()), codec, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = next(key for key in weights if key.endswith(("classifier.weight", "out_proj.weight")))
    save_file(
        {key: value for key, value in weights.items() if key != head}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match=f"lack 1 of the model's weights, such as {head}"):
        encoder(tmp_path, codec)


@pytest.mark.parametrize("labels", [2, 3])
def test_a_classifier_of_several_labels_is_named_as_such(directory, tmp_path, labels):
    hf.AutoModelForSequenceClassification.from_pretrained(directory, num_labels=labels).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"classifier of {labels} labels.*one score"):
        gives_scores(str(tmp_path))


def test_an_encoder_writes_no_text_and_gives_no_values(directory, codec):
    with pytest.raises(EncoderError, match="it is an encoder .*, which reads text and writes none"):
        check_language_model(str(directory))
    for refusing in (check_gives_values, lambda source: load_scalar_model(source, codec, dtype=torch.float32)):
        with pytest.raises(EncoderError, match="it is an encoder .*no value at each token"):
            refusing(str(directory))
    with pytest.raises(EncoderError, match=f"leave --critic_model_name_or_path out and say --reward {directory}:"):
        check_critic_kind(str(directory))


@torch.no_grad()
def test_the_longest_sequence_is_as_long_as_the_positions(directory, codec):
    """RoBERTa's begin behind its padding token's id, so two of its positions are never used."""
    longest = max_length(str(directory))
    assert longest == 256
    check_length(str(directory), longest)
    with pytest.raises(UserError, match="room for 256 tokens"):
        check_length(str(directory), longest + 1)
    model = encoder(directory, codec)
    assert sequence_scores(model, torch.full((1, longest), 9), torch.tensor([longest])).isfinite().all()


def test_dropout_is_the_one_that_was_asked_for(directory, codec, rows):
    batch = padded(rows, codec.pad_id)
    for dropout, equal in ((0.0, True), (0.3, False)):
        model = encoder(directory, codec, dropout=dropout).train()
        assert torch.equal(*(sequence_scores(model, *batch) for _ in range(2))) == equal
    probabilities = {layer.p for layer in model.modules() if isinstance(layer, torch.nn.Dropout)}
    assert probabilities == {0.3}


@torch.no_grad()
def test_lora_is_the_base_when_off_and_the_merged_model_when_on(directory, codec, rows, tmp_path):
    batch = padded(rows, codec.pad_id)
    model = encoder(directory, codec)
    base = sequence_scores(model, *batch)
    inner = model.classifier
    head = {name for name, _ in inner.named_parameters() if name.startswith(tuple(head_names(inner)))}
    layers = linear_modules(inner)
    assert layers and not [name for name in layers if name.startswith(tuple(head_names(inner)))]
    add_lora(inner, dim=4, alpha=16, dropout=0.0, modules="auto", base_name=str(directory), seed=0)
    trained = {name for name, parameter in inner.named_parameters() if parameter.requires_grad}
    assert head <= trained and len(trained - head) == 2 * len(layers)
    assert torch.equal(sequence_scores(model, *batch), base)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in inner.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    with adapters_disabled(model):
        assert torch.equal(sequence_scores(model, *batch), base)
    for parameter in (inner.get_parameter(name) for name in sorted(head)):
        parameter.add_(0.05)
    adapted = sequence_scores(model, *batch)
    assert (adapted - base).abs().max() > 1e-3
    write_model(model, dict(model.state_dict()), codec, tmp_path / "merged", tmp_path / "adapter")
    merged = encoder(tmp_path / "merged", codec)
    torch.testing.assert_close(sequence_scores(merged, *batch), adapted, atol=1e-4, rtol=1e-4)
    # The adapter brings the trained head over a base that has none.
    loaded = load_reward_model(
        str(tmp_path / "adapter"), LoadOptions(data_output_path=str(tmp_path), dtype="fp32", device="cpu")
    )
    torch.testing.assert_close(sequence_scores(loaded.model, *batch), adapted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_answers_are_scored_as_whole_texts(directory, codec):
    """Also one that was cut at its longest, and one that is too long to be read whole."""
    model = encoder(directory, codec)
    loaded = LoadedModel(model, codec, torch.device("cpu"), 40)
    answers = [Response("Paris", (), True), Response("Paris", (), False), Response("the sum is 24, " * 40, (), True)]
    found = score_responses(loaded, [PROMPTS[0]] * 3, answers, batch_size=2)
    prompt, ids = codec.encode_prompt(PROMPTS[0]), codec.encode_response("Paris")
    expected = float(sequence_scores(model, torch.tensor([prompt + ids]), torch.tensor([len(prompt + ids)])))
    assert found[:2] == pytest.approx([expected] * 2, abs=1e-5)
    long = codec.encode_response(answers[2].text)
    cut = prompt[:1] + prompt[-1:] + long[-(40 - 2) :]  # it loses its beginning, as in step 3
    assert len(cut) == 40
    assert found[2] == pytest.approx(float(sequence_scores(model, torch.tensor([cut]), torch.tensor([40]))), abs=1e-5)
