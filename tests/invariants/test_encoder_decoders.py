"""Encoder-decoder models have the losses, log-probs and tokens of transformers: the prompt is the source."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from datasets import Dataset

from common.artifacts.export import write_model
from common.batching.collate import PromptBatch, collate_demonstrations, unmasked
from common.batching.sampler import MicroBatch
from common.data.records import Message, Prompt
from common.data.templates import TEXT_TEMPLATES
from common.data.tokenization import load_tokenizer, make_codec
from common.errors import ModelError, UserError
from common.models.added_token import AddedTokenError
from common.models.completeness import problem
from common.models.configuration import check_language_model, gives_scores
from common.models.loading import load_causal_lm, load_scalar_model, load_scoring_model
from common.models.logprobs import response_log_probs, response_log_probs_and_entropy
from common.models.lora import adapters_disabled, add_lora, folded_adapters
from common.models.scalar import sequence_scores
from step1_sft.config import SFTConfig
from step1_sft.task import SFTTask
from step2_reward.config import RewardConfig
from step2_reward.task import RewardTask
from step3_ppo.config import PPOConfig
from step3_ppo.generation.actor_rollouts import ActorRollouts
from step3_ppo.generation.rollout import Rollout
from step3_ppo.generation.sampling import Sampling
from step3_ppo.inputs import check_two_sided
from step3_ppo.models import response_values
from tests.encoder_decoders import ENCODER_DECODERS, build_encoder_decoder
from tests.unsharded_engine import UnshardedEngine


class CallableEngine(UnshardedEngine):
    """An engine that can be called too."""

    def __call__(self, **inputs):
        return self.module(**inputs)


PROMPTS = [[5, 9, 12, 1], [40, 7, 1], [6, 8, 30, 22, 15, 1], [9, 1]]
RESPONSES = [[14, 20, 1], [31, 1], [17, 25, 11, 33, 1], [28, 44, 19, 7]]
SAMPLED = Sampling(temperature=1.0, top_p=1.0, top_k=0, min_new_tokens=0, max_new_tokens=9)
GREEDY = replace(SAMPLED, temperature=0.0)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return {name: build_encoder_decoder(name, tmp_path_factory.mktemp(name)) for name in ENCODER_DECODERS}


@pytest.fixture(params=ENCODER_DECODERS)
def directory(request, directories):
    return str(directories[request.param])


def codec_of(directory, template="human_assistant"):
    return make_codec(load_tokenizer(directory), template, two_sided=True)


def load(directory, dtype=torch.float32, loader=load_causal_lm):
    return loader(directory, codec_of(directory), dtype=dtype, dropout=0.0).eval()


def rollout_of(prompts=PROMPTS, responses=RESPONSES) -> Rollout:
    rows = [torch.tensor(prompt + response) for prompt, response in zip(prompts, responses)]
    each = torch.ones(len(rows), dtype=torch.long)
    return Rollout(
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        torch.tensor(list(map(len, prompts))),
        torch.tensor(list(map(len, responses))),
        each.bool(),
        each,
        each.bool(),
        each,
    )


def row_logits(model, prompt, response):
    """(R, V) logits of a response on its own, by the forward of transformers."""
    return model(input_ids=torch.tensor([prompt]), labels=torch.tensor([response])).logits[0]


@pytest.mark.parametrize("template", ["human_assistant", "alpaca", "none"])
def test_source_and_target_are_texts_as_the_tokenizer_makes_them(directories, template):
    codec = codec_of(str(directories["t5"]), template)
    prompt = Prompt((Message("user", "What is the capital?"),))
    ids, answer = codec.encode_prompt(prompt), "Paris is the capital, of course."
    assert ids == codec.tokenizer(TEXT_TEMPLATES[template].prompt_text(prompt)).input_ids
    response = codec.encode_response(answer, prompt)
    assert response == codec.tokenizer(answer).input_ids and response[-1] == codec.end_id
    assert codec.decode_response(response) == answer == "".join(codec.stream(response))
    assert codec.decode_response([codec.end_id]) == ""
    assert codec.encode_prompt(prompt, max_tokens=5) == ids[-5:] and ids[-1] == codec.tokenizer.eos_token_id
    assert len(codec.cut_prompt(ids, codec.shortest_prompt)) == 2


@pytest.mark.parametrize("real", [(True, True, True), (True, False, False), (False, False, False)])
def test_the_loss_of_step_1_is_that_of_transformers(directory, real):
    model = load(directory, torch.float64)
    twin = copy.deepcopy(model)
    rows = Dataset.from_dict({"prompt_ids": PROMPTS, "response_ids": RESPONSES})
    batch = collate_demonstrations(rows, MicroBatch((2, 0, 1), real), pad_id=0)
    task = SFTTask(SFTConfig())
    loss, sums = task.loss_sum(CallableEngine(model), batch)
    loss.backward()
    expected = torch.zeros(())
    for row in (row for row, counts in zip((2, 0, 1), real) if counts):
        logits = row_logits(twin, PROMPTS[row], RESPONSES[row])
        mean = twin(input_ids=torch.tensor([PROMPTS[row]]), labels=torch.tensor([RESPONSES[row]])).loss
        assert torch.allclose(
            mean * len(RESPONSES[row]), F.cross_entropy(logits, torch.tensor(RESPONSES[row]), reduction="sum")
        )
        expected = expected + mean * len(RESPONSES[row])
    assert torch.allclose(loss, expected.double(), rtol=1e-10)
    assert int(sums["tokens"]) == int(task.count(batch)) == sum(len(RESPONSES[r]) for r, c in zip((2, 0, 1), real) if c)
    if any(real):
        expected.backward()
        for (name, weight), other in zip(model.named_parameters(), twin.parameters()):
            assert torch.allclose(weight.grad, other.grad, rtol=1e-8, atol=1e-10), name


def test_log_probs_and_entropies_are_those_of_each_response_on_its_own(directory):
    model, rollout = load(directory, torch.float64), rollout_of()
    lengths = rollout.prompt_lengths, rollout.response_lengths
    log_probs, entropy = response_log_probs_and_entropy(model, unmasked(rollout.tokens), *lengths, temperature=0.7)
    assert torch.equal(log_probs, response_log_probs(model, unmasked(rollout.tokens), *lengths, temperature=0.7))
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        expected = (row_logits(model, prompt, response) / 0.7).log_softmax(-1)
        found = log_probs[row, : len(response)]
        assert torch.allclose(found, expected[range(len(response)), response], atol=1e-10)
        assert torch.allclose(entropy[row, : len(response)], -(expected.exp() * expected).sum(-1), atol=1e-10)
        assert not log_probs[row, len(response) :].any()


def test_values_are_read_where_the_logits_emit_the_token(directory):
    critic, rollout = load(directory, loader=load_scalar_model), rollout_of()
    values = response_values(critic, rollout)
    inner = critic.classifier
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        hidden = inner.transformer(
            input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *response[:-1]]])
        ).last_hidden_state
        expected = inner.classification_head(hidden)[0, :, 0]
        assert torch.allclose(values[row, : len(response)], expected, atol=1e-5)
    assert values.std() > 1e-3
    actor = load(directory)
    for name in ("shared.weight", "decoder.block.1.layer.1.EncDecAttention.q.weight"):
        assert torch.equal(inner.transformer.get_parameter(name), actor.get_parameter(name))


@torch.no_grad()
def test_a_reward_model_scores_as_plain_transformers(directory, tmp_path):
    """Beside any padding, and after it was saved."""
    codec = codec_of(directory)
    model = load(directory, loader=load_scoring_model)
    rows = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES[:3])]
    lengths = torch.tensor(list(map(len, rows)))
    tokens = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True)
    scores = sequence_scores(model, F.pad(tokens, (0, 3)), lengths)
    write_model(model, dict(model.state_dict()), codec, tmp_path)
    assert problem(tmp_path) is None and gives_scores(str(tmp_path))
    plain = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    alone = torch.cat([plain(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=1e-5)
    assert scores.dtype == torch.float32 and scores.std() > 1e-3
    again = load(str(tmp_path), loader=load_scoring_model)
    torch.testing.assert_close(sequence_scores(again, tokens, lengths), scores, atol=1e-5, rtol=1e-5)


def prompt_batch(rows) -> PromptBatch:
    lengths = torch.tensor([len(PROMPTS[row]) for row in rows])
    width = int(lengths.max())
    ids = torch.tensor([[0] * (width - len(PROMPTS[row])) + PROMPTS[row] for row in rows])
    mask = (torch.arange(width) >= width - lengths[:, None]).long()
    return PromptBatch(ids, mask, lengths, torch.tensor(rows), torch.ones(len(rows), dtype=torch.bool))


def responses(model, directory, rows, sampling):
    codec = codec_of(directory)
    rollouts = ActorRollouts(UnshardedEngine(model), slots=3, seed=5, end_ids=codec.end_ids, pad_id=codec.pad_id)
    rollout = rollouts.roll_out(prompt_batch(rows), sampling, iteration=1)
    return rollout, [
        tokens[start:end]
        for tokens, start, end in zip(
            rollout.tokens.tolist(), rollout.prompt_lengths.tolist(), rollout.lengths.tolist()
        )
    ]


def test_greedy_rollouts_are_those_of_generate(directory):
    model = load(directory)
    rollout, found = responses(model, directory, [0, 1, 2, 3], GREEDY)
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=9, use_cache=True)
        assert found[row] == alone[0, 1:].tolist()
        assert rollout.tokens[row, : len(prompt)].tolist() == prompt
        assert bool(rollout.finished[row]) == (found[row][-1] == 1)


def test_sampled_rollouts_do_not_depend_on_the_batch_and_have_the_log_probs_of_training(directory):
    model = load(directory)
    rollout, together = responses(model, directory, [0, 1, 2, 3], replace(SAMPLED, samples_per_prompt=2))
    _, few = responses(model, directory, [3, 1], SAMPLED)
    assert few == [together[6], together[2]] and together[0] != together[1]
    lengths = rollout.prompt_lengths, rollout.response_lengths
    with torch.no_grad():
        trained_on = response_log_probs(model.eval(), unmasked(rollout.tokens), *lengths)
    assert torch.allclose(rollout.sampling_log_probs, trained_on, atol=1e-4)


def test_adapters_fold_into_the_weights_and_leave_them(directory):
    model, rollout = load(directory), rollout_of()
    lengths = rollout.prompt_lengths, rollout.response_lengths
    read = torch.no_grad()(lambda: response_log_probs(model, unmasked(rollout.tokens), *lengths))
    base = read()
    add_lora(model, dim=2, alpha=4, dropout=0.0, modules="auto", base_name="base", seed=1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    adapted = read()
    assert not torch.allclose(adapted, base, atol=1e-2)
    with folded_adapters(model):
        assert torch.allclose(read(), adapted, atol=1e-4)
    with adapters_disabled(model):
        assert torch.equal(read(), base)
    assert torch.equal(read(), adapted)


def test_a_saved_model_computes_the_same(directory, tmp_path):
    """Also where the output has embeddings of its own, which transformers scales otherwise."""
    model, rollout = load(directory), rollout_of()
    lengths = rollout.prompt_lengths, rollout.response_lengths
    before = response_log_probs(model, unmasked(rollout.tokens), *lengths)
    model.save_pretrained(tmp_path)
    plain = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(response_log_probs(plain, unmasked(rollout.tokens), *lengths), before, atol=1e-5)


def test_what_does_not_apply_is_refused(directories, tmp_path):
    t5 = str(directories["t5"])
    check_language_model(t5)
    with pytest.raises(UserError, match="--train_on_prompt: the model is an encoder-decoder"):
        SFTTask(SFTConfig(train_on_prompt=True)).check_model(t5)
    RewardTask(RewardConfig()).check_model(t5)
    with pytest.raises(ModelError, match="overflows in fp16: use bf16 or fp32"):
        load(t5, torch.float16)
    with pytest.raises(UserError, match="is an encoder-decoder, whose answers are scored as text: give --reward"):
        check_two_sided(PPOConfig())
    with pytest.raises(UserError, match="^--unsupervised_dataset_name is plain text"):
        check_two_sided(PPOConfig(reward=("my.py:score",), unsupervised_dataset_name="texts.jsonl"))
    model = load(t5)
    model.new_token = 7
    with pytest.raises(AddedTokenError, match="use the tokenizer's own end token"):
        add_lora(model, dim=2, alpha=4, dropout=0.0, modules="auto", base_name="base", seed=1)
    hf.BartConfig(d_model=8).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"not supported \(bart\)"):
        check_language_model(str(tmp_path))
    with pytest.raises(ModelError, match=r"not supported \(bart\)"):
        RewardTask(RewardConfig()).check_model(str(tmp_path))
