"""Rollouts: tokens are the model's, frequencies are the softmax's, and other rows have no influence."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from scipy import stats
from transformers import FalconConfig, FalconForCausalLM

from common.batching.collate import PromptBatch
from common.data.tokenization import load_tokenizer, make_codec
from common.models.loading import load_causal_lm
from step3_ppo.generation import actor_rollouts
from step3_ppo.generation.actor_rollouts import ActorRollouts, generate
from step3_ppo.generation.cache_attention import fastest_cache_dtype
from step3_ppo.generation.continuous_batching import Decoder, Request, can_decode
from step3_ppo.generation.rollout import to_rollout
from step3_ppo.generation.sampling import Sampling, filtered_probabilities, response_limits, sample_tokens, uniforms
from step3_ppo.sharing import RolloutAbandoned, share_rollout
from tests.architectures import CONFIGS, FURTHER_CONFIGS, build_model
from tests.launching import at_length
from tests.unsharded_engine import UnshardedEngine

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, min_new_tokens=0, max_new_tokens=12)
SAMPLED = Sampling(temperature=1.0, top_p=1.0, top_k=0, min_new_tokens=0, max_new_tokens=12)
LENGTHS = [4, 11, 7, 2, 9, 5]


@pytest.fixture(scope="module", params=[*CONFIGS, *at_length(FURTHER_CONFIGS)])
def actor(request, tmp_path_factory, builtin_cache):
    directory = build_model(request.param, tmp_path_factory.mktemp(request.param), builtin_cache)
    codec = make_codec(load_tokenizer(str(directory)), "human_assistant")
    model = load_causal_lm(str(directory), codec, dtype=torch.float32, dropout=0.0)
    return UnshardedEngine(model), codec


def prompts(rows, pad_id) -> PromptBatch:
    generator = torch.Generator().manual_seed(2)
    all_rows = [torch.randint(10, 300, (length,), generator=generator) for length in LENGTHS]
    lengths = torch.tensor([LENGTHS[row] for row in rows])
    width = int(lengths.max())
    ids = torch.stack([torch.cat([torch.full((width - LENGTHS[row],), pad_id), all_rows[row]]) for row in rows])
    mask = (torch.arange(width) >= width - lengths[:, None]).long()
    return PromptBatch(ids, mask, lengths, torch.tensor(rows), torch.ones(len(rows), dtype=torch.bool))


def roll_out(actor, rows, sampling, slots=4):
    engine, codec = actor
    rollouts = ActorRollouts(engine, slots=slots, seed=5, end_ids=codec.end_ids, pad_id=codec.pad_id)
    return rollouts.roll_out(prompts(rows, codec.pad_id), sampling, iteration=1)


def plainly(actor, rows, sampling):
    engine, codec = actor
    return generate(
        engine, prompts(rows, codec.pad_id), sampling, end_ids=codec.end_ids, pad_id=codec.pad_id, seed=5, iteration=1
    )


def responses(rollout):
    return [
        rollout.tokens[row, start:end].tolist()
        for row, (start, end) in enumerate(zip(rollout.prompt_lengths.tolist(), rollout.lengths.tolist()))
    ]


def test_greedy_tokens_are_those_of_generate_row_by_row(actor):
    engine, codec = actor
    rollout = roll_out(actor, range(len(LENGTHS)), GREEDY)
    for row, response in enumerate(responses(rollout)):
        alone = prompts([row], codec.pad_id)
        plain = (
            engine.module.eval()
            .generate(
                alone.input_ids, attention_mask=alone.attention_mask, do_sample=False, max_new_tokens=12, use_cache=True
            )[0, LENGTHS[row] :]
            .tolist()
        )
        assert response == plain
        assert rollout.tokens[row, : LENGTHS[row]].tolist() == alone.input_ids[0].tolist()
        assert bool(rollout.finished[row]) == (plain[-1] == codec.end_id)


@pytest.mark.parametrize("way", [roll_out, plainly])
def test_a_response_does_not_depend_on_batch_or_slot(actor, way):
    together = responses(way(actor, [0, 1, 2, 3, 4, 5], SAMPLED))
    shuffled = responses(way(actor, [4, 2, 0], SAMPLED))
    alone = responses(way(actor, [3], SAMPLED))
    assert [together[4], together[2], together[0]] == shuffled
    assert [together[3]] == alone
    assert len({tuple(response) for response in together}) == len(LENGTHS)


@pytest.mark.parametrize(
    "slots, sampling",
    [
        (1, SAMPLED),
        (16, SAMPLED),
        (3, GREEDY),
        (3, replace(SAMPLED, temperature=0.7, top_p=0.8, top_k=50, min_new_tokens=3)),
        (3, replace(SAMPLED, draw_lengths=True, min_new_tokens=2)),
        (16, replace(SAMPLED, samples_per_prompt=3)),
    ],
    ids=["one-slot", "more-slots-than-rows", "greedy", "filtered", "drawn-lengths", "several"],
)
def test_continuous_batching_gives_the_tokens_of_the_plain_way(actor, slots, sampling):
    rows = [row for row in range(len(LENGTHS)) for _ in range(sampling.samples_per_prompt)]
    fast = roll_out(actor, range(len(LENGTHS)), sampling, slots)
    samples = [plainly_sample(actor, sampling, sample) for sample in range(sampling.samples_per_prompt)]
    expected = [samples[number % sampling.samples_per_prompt][row] for number, row in enumerate(rows)]
    assert responses(fast) == expected
    assert fast.prompt_index.tolist() == rows
    if sampling.samples_per_prompt > 1:
        assert len({tuple(response) for response in expected}) == len(expected)


def plainly_sample(actor, sampling, sample):
    engine, codec = actor
    return responses(
        generate(
            engine,
            prompts(range(len(LENGTHS)), codec.pad_id),
            sampling,
            end_ids=codec.end_ids,
            pad_id=codec.pad_id,
            seed=5,
            iteration=1,
            sample=sample,
        )
    )


def test_a_cache_of_more_precision_changes_no_token(actor):
    engine, codec = actor
    if engine.module.config._attn_implementation != "sdpa":  # one of its own, which stays: so does the dtype
        assert fastest_cache_dtype(copy.deepcopy(engine.module).bfloat16()) == torch.bfloat16
        return
    batch = prompts(range(len(LENGTHS)), codec.pad_id)
    uniform = uniforms(5, 1, batch.prompt_index, SAMPLED.max_new_tokens)
    requests = [
        Request(tuple(ids[-length:]), numbers, 0, SAMPLED.max_new_tokens)
        for ids, length, numbers in zip(batch.input_ids.tolist(), LENGTHS, uniform)
    ]
    decoder = Decoder(engine.module.eval(), SAMPLED, slots=4, end_ids=codec.end_ids, cache_dtype=torch.float64)
    found = decoder.run(requests)
    assert decoder.cache.layers[0].keys.dtype == torch.float64
    assert engine.module.config._attn_implementation == "sdpa" and engine.module.dtype == torch.float32
    assert found == responses(plainly(actor, range(len(LENGTHS)), SAMPLED))


def test_greedy_tokens_in_bf16_are_those_that_a_whole_pass_finds_likeliest(actor):
    engine, codec = actor
    model = copy.deepcopy(engine.module).bfloat16().eval()
    rollout = roll_out((UnshardedEngine(model), codec), range(len(LENGTHS)), GREEDY)
    with torch.no_grad():
        logits = model(input_ids=rollout.tokens).logits[:, :-1].float()
    chosen = logits.gather(2, rollout.tokens[:, 1:, None])[..., 0]
    behind = (logits.amax(2) - chosen) / logits.std(2)
    place = torch.arange(1, rollout.tokens.shape[1])
    response = (place >= rollout.prompt_lengths[:, None]) & (place < rollout.lengths[:, None])
    assert behind[response].max() < 0.1 < 1 < behind[place < rollout.prompt_lengths[:, None]].median()


def test_a_model_that_keeps_its_attention_writes_in_bf16(tmp_path, builtin_cache):
    tokenizer = load_tokenizer(str(build_model("llama", tmp_path, builtin_cache)))
    model = (
        FalconForCausalLM(
            FalconConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        )
        .bfloat16()
        .eval()
    )
    rollout = roll_out((UnshardedEngine(model), make_codec(tokenizer, "human_assistant")), range(len(LENGTHS)), GREEDY)
    assert (rollout.response_lengths > 0).all() and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("shortest, longest, lengths", [(3, 5, {3, 4, 5}), (0, 12, set(range(1, 13)))])
def test_drawn_lengths_are_exact_and_reach_both_limits(actor, shortest, longest, lengths):
    sampling = Sampling(5.0, 1.0, 0, min_new_tokens=shortest, max_new_tokens=longest, draw_lengths=True)
    limits = response_limits(5, 1, torch.arange(200), sampling)
    assert set(limits[:, 0].tolist()) == lengths and torch.equal(limits[:, 0], limits[:, 1])
    engine, codec = UnshardedEngine(copy.deepcopy(actor[0].module)), actor[1]
    engine.module.get_output_embeddings().register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([codec.end_id]), 50.0)
    )  # it wants to end
    for way in (roll_out, plainly):
        rollout = way((engine, codec), range(len(LENGTHS)), sampling)
        assert rollout.response_lengths.tolist() == limits[: len(LENGTHS), 1].tolist() and not rollout.finished.any()


def test_a_kept_cache_leaves_nothing_of_earlier_rollouts(actor):
    engine, codec = actor
    rollouts = ActorRollouts(engine, slots=4, seed=5, end_ids=codec.end_ids, pad_id=codec.pad_id)
    again = ActorRollouts(engine, slots=4, seed=5, end_ids=codec.end_ids, pad_id=codec.pad_id, keep_cache=False)
    batch = prompts(range(len(LENGTHS)), codec.pad_id)
    for sampling in (SAMPLED, replace(SAMPLED, max_new_tokens=3), replace(SAMPLED, max_new_tokens=20)):
        assert responses(rollouts.roll_out(batch, sampling, 1)) == responses(again.roll_out(batch, sampling, 1))
    assert rollouts.cache.columns == max(LENGTHS) + 20 and again.cache is None


def test_fillers_are_not_answered(actor):
    engine, codec = actor
    batch = prompts([0, 1, 1], codec.pad_id)
    batch.real[2] = False
    rollouts = ActorRollouts(engine, slots=2, seed=5, end_ids=codec.end_ids, pad_id=codec.pad_id)
    rollout = rollouts.roll_out(batch, GREEDY, 0)
    assert rollout.prompt_index.tolist() == [0, 1]


def test_a_rank_that_is_told_to_stop_abandons_its_rollout_on_all_ranks(actor, monkeypatch):
    engine, codec = actor
    rollouts = ActorRollouts(engine, slots=2, seed=5, end_ids=codec.end_ids, pad_id=codec.pad_id)
    monkeypatch.setattr(actor_rollouts, "stop_requested", lambda: "SIGTERM")
    rollout = rollouts.roll_out(prompts(range(3), codec.pad_id), SAMPLED, iteration=1)
    assert rollout is None
    with pytest.raises(RolloutAbandoned):
        share_rollout(rollout)


@pytest.mark.parametrize("name, window", [("mistral", "sliding_window"), ("gpt-neo", "window_size")])
def test_windows_shorter_than_the_sequence_are_left_to_the_plain_way(name, window, tmp_path, builtin_cache):
    directory = build_model(name, tmp_path, builtin_cache, **{window: 8})
    codec = make_codec(load_tokenizer(str(directory)), "human_assistant")
    actor = UnshardedEngine(load_causal_lm(str(directory), codec, dtype=torch.float32, dropout=0.0)), codec
    assert can_decode(actor[0].module.config, 8) and not can_decode(actor[0].module.config, 9)
    assert responses(roll_out(actor, range(6), SAMPLED)) == responses(plainly(actor, range(6), SAMPLED))


def test_min_new_tokens_holds_back_the_end_token(actor):
    rollout = roll_out(actor, [0, 1], Sampling(5.0, 1.0, 0, min_new_tokens=12, max_new_tokens=12))
    assert rollout.response_lengths.tolist() == [12, 12] and not rollout.finished.any()


@pytest.mark.parametrize("way", [roll_out, plainly])
def test_each_of_several_end_tokens_ends_a_response_and_is_held_back(actor, way):
    """A model may have its tokenizer's end token and its template's, and whatever else its publisher ends at."""
    engine, codec = actor
    free = responses(way(actor, range(len(LENGTHS)), SAMPLED))
    often = free[0][1]  # a token that the first response has
    two = make_codec(codec.tokenizer, codec.template.name, further_ends=[often])
    ended = way((engine, two), range(len(LENGTHS)), SAMPLED)
    for before, after, finished in zip(free, responses(ended), ended.finished.tolist()):
        cut = next((at + 1 for at, token in enumerate(before) if token in two.end_ids), len(before))
        assert after == before[:cut] and finished == (after[-1] in two.end_ids)
    assert responses(ended)[0][-1] == often
    held = way((engine, two), range(len(LENGTHS)), replace(SAMPLED, min_new_tokens=4))
    assert not any(set(two.end_ids) & set(response[:4]) for response in responses(held))


def test_a_long_rollout_shows_how_far_it_is(actor, monkeypatch, capsys):
    monkeypatch.setattr(actor_rollouts, "SECONDS_BEFORE_BAR", 0)
    monkeypatch.setattr(actor_rollouts, "tqdm", partial(actor_rollouts.tqdm, mininterval=0, miniters=1))
    fast = ActorRollouts(actor[0], slots=4, seed=5, end_ids=actor[1].end_ids, pad_id=actor[1].pad_id)
    plain = copy.copy(fast)
    plain._why_plain = lambda longest: "a test asks for it"
    for rollouts in (fast, plain):
        rollouts.roll_out(prompts(range(len(LENGTHS)), actor[1].pad_id), replace(GREEDY, samples_per_prompt=2), 1)
        shown = capsys.readouterr().err
        assert "rollout:   0%" in shown and "12/12" in shown


def test_training_mode_is_back_after_a_rollout(actor):
    roll_out(actor, [0], GREEDY)
    assert actor[0].module.training


def test_sampled_frequencies_match_the_softmax():
    logits = torch.tensor([[0.5, -1.0, 2.0, 0.0, 1.0]]).expand(20_000, 5)
    for sampling in (SAMPLED, Sampling(0.7, 1.0, 0, 0, 1), Sampling(1.0, 0.8, 0, 0, 1), Sampling(1.3, 1.0, 3, 0, 1)):
        uniform = uniforms(3, 0, torch.arange(20_000), 1)[:, 0]
        counts = sample_tokens(logits, uniform, sampling).tokens.bincount(minlength=5).double()
        expected = filtered_probabilities(logits[:1], sampling)[0].double()
        expected = expected / expected.sum() * 20_000
        kept = expected > 0
        assert counts[~kept].sum() == 0
        assert stats.chisquare(counts[kept].numpy(), expected[kept].numpy()).pvalue > 1e-3


def test_top_k_and_top_p_keep_the_likeliest_tokens():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    kept = lambda top_p, top_k: (filtered_probabilities(logits, Sampling(1.0, top_p, top_k, 0, 1))[0] > 0).tolist()
    assert kept(1.0, 2) == [True, True, False, False]
    assert kept(0.5, 0) == [True, False, False, False]
    assert kept(0.6, 0) == [True, True, False, False]
    assert kept(1.0, 0) == [True] * 4


def test_uniform_numbers_at_the_edges_give_real_tokens():
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]]).expand(2, 4)
    edges = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    assert sample_tokens(logits, edges, SAMPLED).tokens.tolist() == [0, 2]


def test_uniforms_are_keyed_by_everything_and_nothing_else():
    first = uniforms(1, 2, torch.tensor([7, 8]), 5)
    assert torch.equal(first, uniforms(1, 2, torch.tensor([8, 7]), 5).flip(0))
    assert torch.equal(first[:, :3], uniforms(1, 2, torch.tensor([7, 8]), 3))
    for other in (
        uniforms(0, 2, torch.tensor([7, 8]), 5),
        uniforms(1, 3, torch.tensor([7, 8]), 5),
        uniforms(1, 2, torch.tensor([7, 8]), 5, sample=1),
    ):
        assert not torch.equal(first, other)


def test_a_response_is_cut_after_its_first_end_token_even_where_that_is_the_padding():
    batch = prompts([3, 0], pad_id=2)  # prompt lengths 2 and 4
    generated = torch.tensor([[50, 2, 2, 2], [60, 61, 62, 63]])
    rollout = to_rollout(
        torch.cat([batch.input_ids, generated], 1), batch, end_ids=(2,), pad_id=2, limits=torch.tensor([4, 4])
    )
    assert rollout.response_lengths.tolist() == [2, 4]
    assert rollout.finished.tolist() == [True, False]
    assert rollout.response_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert responses(rollout) == [[50, 2], [60, 61, 62, 63]]
