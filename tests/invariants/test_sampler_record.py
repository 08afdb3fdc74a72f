"""What the sampler records of each token is what the model says of it, in both ways of generating."""

from dataclasses import replace

import pytest
import torch
import transformers as hf

from common.batching.collate import PromptBatch
from common.models.logprobs import response_log_probs
from step3_ppo.diagnostics import sampler_gap
from step3_ppo.generation import actor_rollouts
from step3_ppo.generation.actor_rollouts import ActorRollouts
from step3_ppo.generation.rollout import Rollout
from step3_ppo.generation.sampling import Sampling
from step3_ppo.sharing import share_rollout
from tests.unsharded_engine import UnshardedEngine

WHOLE = Sampling(temperature=1.0, top_p=1.0, top_k=0, min_new_tokens=0, max_new_tokens=9, samples_per_prompt=2)
EXACT = replace(WHOLE, temperature=0.8, exact=True)
TRUNCATED = {
    "top-k": replace(EXACT, top_k=5),
    "top-p": replace(EXACT, top_p=0.6, min_new_tokens=3),
    "held-back": replace(EXACT, min_new_tokens=4),
    "drawn-lengths": replace(EXACT, draw_lengths=True),
}
LENGTHS = [4, 9, 6, 1, 7]
ENDS = (3, 5, 8, 13, 21, 34, 55)  # many, so that some responses end early


@pytest.fixture(scope="module")
def engine():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.LlamaConfig(vocab_size=97, initializer_range=0.4, pad_token_id=0, **sizes)
    return UnshardedEngine(hf.LlamaForCausalLM(config))


def roll_out(engine, sampling, monkeypatch, way, slots=3) -> Rollout:
    generator = torch.Generator().manual_seed(2)
    lengths, width = torch.tensor(LENGTHS), max(LENGTHS)
    ids = torch.randint(1, 97, (len(LENGTHS), width), generator=generator)
    mask = (torch.arange(width) >= width - lengths[:, None]).long()
    prompts = PromptBatch(ids * mask, mask, lengths, torch.arange(len(LENGTHS)), torch.ones(len(LENGTHS)).bool())
    if way == "plain":
        monkeypatch.setattr(actor_rollouts, "can_decode", lambda *_: False)
    rollouts = ActorRollouts(engine, slots=slots, seed=5, end_ids=ENDS, pad_id=0)
    return share_rollout(rollouts.roll_out(prompts, sampling, iteration=1))


def trained(engine, rollout, temperature, kept):
    read = (engine.module, {"input_ids": rollout.tokens}, rollout.prompt_lengths, rollout.response_lengths)
    with torch.no_grad():
        return response_log_probs(*read, temperature, kept)


@pytest.mark.parametrize("way", ["fast", "plain"])
def test_without_truncation_the_gap_is_rounding(engine, monkeypatch, way):
    rollout = roll_out(engine, WHOLE, monkeypatch, way)
    assert rollout.kept is None and rollout.sampling_log_probs.dtype == torch.float32
    assert len(rollout.tokens) == 10 and len(set(rollout.response_lengths.tolist())) > 2
    old = trained(engine, rollout, 1.0, None)
    gap = sampler_gap(rollout.sampling_log_probs, old, rollout.response_mask)
    assert 0 < gap["sampler_gap_mean"] <= gap["sampler_gap_max"] <= 1e-4
    assert not rollout.sampling_log_probs[~rollout.response_mask].any()


@pytest.mark.parametrize("name", TRUNCATED)
@pytest.mark.parametrize("way", ["fast", "plain"])
def test_with_truncation_the_gap_is_rounding_on_the_kept_tokens_alone(engine, monkeypatch, way, name):
    sampling = TRUNCATED[name]
    rollout = roll_out(engine, sampling, monkeypatch, way)
    mask = rollout.response_mask
    exact, approximate = (trained(engine, rollout, 0.8, kept) for kept in (rollout.kept, None))
    assert sampler_gap(rollout.sampling_log_probs, exact, mask)["sampler_gap_max"] <= 1e-4
    assert sampler_gap(rollout.sampling_log_probs, approximate, mask)["sampler_gap_max"] > 1e-2
    members, (row, column) = rollout.kept.members(), mask.nonzero(as_tuple=True)
    tokens = rollout.tokens[row, rollout.prompt_lengths[row] + column]
    assert members.shape == (int(mask.sum()), 97) and members[torch.arange(len(tokens)), tokens].all()
    if sampling.top_k:
        assert (members.sum(1) == sampling.top_k).all()
    held_back = column < (9 if sampling.draw_lengths else sampling.min_new_tokens)
    assert not members[held_back][:, list(ENDS)].any()
    if sampling.top_k == 0 and sampling.top_p == 1.0:
        assert members[held_back].sum(1).eq(97 - len(ENDS)).all() and members[~held_back].all()


@pytest.mark.parametrize("name", TRUNCATED)
def test_both_ways_and_any_number_of_slots_record_the_same(engine, monkeypatch, name):
    first, *others = (
        roll_out(engine, TRUNCATED[name], monkeypatch, way, slots)
        for way, slots in (("fast", 3), ("fast", 1), ("fast", 16), ("plain", 2))
    )
    for other in others:
        assert torch.equal(other.tokens, first.tokens)
        assert torch.equal(other.kept.members(), first.kept.members())
        torch.testing.assert_close(other.sampling_log_probs, first.sampling_log_probs, rtol=0, atol=1e-4)


def test_recording_changes_no_token(engine, monkeypatch):
    for sampling in TRUNCATED.values():
        exact, plain = (roll_out(engine, replace(sampling, exact=flag), monkeypatch, "fast") for flag in (True, False))
        assert torch.equal(exact.tokens, plain.tokens) and plain.kept is None
        assert torch.equal(exact.sampling_log_probs, plain.sampling_log_probs)


def test_a_selection_keeps_the_record_of_its_rows(engine, monkeypatch):
    whole = roll_out(engine, TRUNCATED["top-p"], monkeypatch, "fast")
    rows = [7, 0, 3, 3]
    part = Rollout.concat([whole.select([7]), whole.select([0, 3, 3])])
    members, mask = whole.kept.members(), whole.response_mask
    number = torch.full(mask.shape, -1)
    number[mask] = torch.arange(int(mask.sum()))
    expected = torch.cat([number[row][mask[row]] for row in rows])
    assert torch.equal(part.kept.members(), members[expected])
    assert torch.equal(
        part.sampling_log_probs[part.response_mask],
        torch.cat([whole.sampling_log_probs[row][mask[row]] for row in rows]),
    )
    assert part.sampling_log_probs.shape == part.response_mask.shape


def test_a_rank_without_prompts_has_an_empty_record(engine):
    nothing = PromptBatch(
        torch.ones(1, 2).long(), torch.ones(1, 2).long(), torch.tensor([2]), torch.tensor([0]), torch.tensor([False])
    )
    rollout = ActorRollouts(engine, slots=2, seed=5, end_ids=ENDS, pad_id=0).roll_out(nothing, EXACT, 0)
    assert len(rollout.kept) == 0 and rollout.sampling_log_probs.shape == (0, 0)
