"""Rollouts: the tokens are the model's own, the frequencies the softmax's, and nothing but the prompt decides."""
import pytest
import torch
from scipy import stats

from common.data.collate import PromptBatch
from common.data.tokenization import load_tokenizer, make_codec
from common.models.factory import load_causal_lm
from step3_ppo.rollout import Sampling, filtered_probabilities, generate, sample_tokens, to_rollout, uniforms
from tests.architectures import CONFIGS, build_model

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, min_new_tokens=0, max_new_tokens=12)
SAMPLED = Sampling(temperature=1.0, top_p=1.0, top_k=0, min_new_tokens=0, max_new_tokens=12)
LENGTHS = [4, 11, 7, 2, 9, 5]


class WholeEngine:
    """What `generate` asks of an engine that holds the whole model."""

    def __init__(self, module):
        self.module, self.dp_world_size = module, 1

    def zero_optimization_partition_weights(self):
        return False

    def eval(self):
        self.module.eval()

    def train(self):
        self.module.train()


@pytest.fixture(scope="module", params=CONFIGS)
def actor(request, tmp_path_factory, builtin_cache):
    directory = build_model(request.param, tmp_path_factory.mktemp(request.param), builtin_cache)
    codec = make_codec(load_tokenizer(str(directory)), "human_assistant")
    model = load_causal_lm(str(directory), "--model", codec, dtype=torch.float32, dropout=0.0)
    return WholeEngine(model), codec


def prompts(rows, pad_id) -> PromptBatch:
    generator = torch.Generator().manual_seed(2)
    all_rows = [torch.randint(10, 300, (length,), generator=generator) for length in LENGTHS]
    lengths = torch.tensor([LENGTHS[row] for row in rows])
    width = int(lengths.max())
    ids = torch.stack([torch.cat([torch.full((width - LENGTHS[row],), pad_id), all_rows[row]]) for row in rows])
    mask = (torch.arange(width) >= width - lengths[:, None]).long()
    return PromptBatch(ids, mask, lengths, torch.tensor(rows), torch.ones(len(rows), dtype=torch.bool))


def roll_out(actor, rows, sampling):
    engine, codec = actor
    return generate(engine, prompts(rows, codec.pad_id), sampling, end_id=codec.end_id, pad_id=codec.pad_id, seed=5,
                    iteration=1)


def responses(rollout):
    return [rollout.tokens[row, start:end].tolist() for row, (start, end)
            in enumerate(zip(rollout.prompt_lengths.tolist(), rollout.lengths.tolist()))]


def test_greedy_tokens_are_those_of_generate_row_by_row(actor):
    engine, codec = actor
    rollout = roll_out(actor, range(len(LENGTHS)), GREEDY)
    for row, response in enumerate(responses(rollout)):
        alone = prompts([row], codec.pad_id)
        plain = engine.module.eval().generate(alone.input_ids, attention_mask=alone.attention_mask, do_sample=False,
                                              max_new_tokens=12, use_cache=True)[0, LENGTHS[row]:].tolist()
        assert response == plain
        assert rollout.tokens[row, :LENGTHS[row]].tolist() == alone.input_ids[0].tolist()
        assert bool(rollout.finished[row]) == (plain[-1] == codec.end_id)


def test_a_response_does_not_depend_on_batch_or_slot(actor):
    together = responses(roll_out(actor, [0, 1, 2, 3, 4, 5], SAMPLED))
    shuffled = responses(roll_out(actor, [4, 2, 0], SAMPLED))
    alone = responses(roll_out(actor, [3], SAMPLED))
    assert [together[4], together[2], together[0]] == shuffled
    assert [together[3]] == alone
    assert len({tuple(response) for response in together}) == len(LENGTHS)


def test_min_new_tokens_holds_back_the_end_token(actor):
    rollout = roll_out(actor, [0, 1], Sampling(5.0, 1.0, 0, min_new_tokens=12, max_new_tokens=12))
    assert rollout.response_lengths.tolist() == [12, 12] and not rollout.finished.any()


def test_training_mode_is_back_after_a_rollout(actor):
    roll_out(actor, [0], GREEDY)
    assert actor[0].module.training


def test_sampled_frequencies_match_the_softmax():
    logits = torch.tensor([[0.5, -1.0, 2.0, 0.0, 1.0]]).expand(20_000, 5)
    for sampling in (SAMPLED, Sampling(0.7, 1.0, 0, 0, 1), Sampling(1.0, 0.8, 0, 0, 1), Sampling(1.3, 1.0, 3, 0, 1)):
        uniform = uniforms(3, 0, torch.arange(20_000), 1)[:, 0]
        counts = sample_tokens(logits, uniform, sampling).bincount(minlength=5).double()
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
    assert sample_tokens(logits, edges, SAMPLED).tolist() == [0, 2]


def test_uniforms_are_keyed_by_everything_and_nothing_else():
    first = uniforms(1, 2, torch.tensor([7, 8]), 5)
    assert torch.equal(first, uniforms(1, 2, torch.tensor([8, 7]), 5).flip(0))
    assert torch.equal(first[:, :3], uniforms(1, 2, torch.tensor([7, 8]), 3))
    for other in (uniforms(0, 2, torch.tensor([7, 8]), 5), uniforms(1, 3, torch.tensor([7, 8]), 5),
                  uniforms(1, 2, torch.tensor([7, 8]), 5, sample=1)):
        assert not torch.equal(first, other)


def test_a_response_is_cut_after_its_first_end_token_even_where_that_is_the_padding():
    batch = prompts([3, 0], pad_id=2)  # prompt lengths 2 and 4
    generated = torch.tensor([[50, 2, 2, 2], [60, 61, 62, 63]])
    rollout = to_rollout(torch.cat([batch.input_ids, generated], 1), batch, end_id=2, pad_id=2, max_new_tokens=4)
    assert rollout.response_lengths.tolist() == [2, 4]
    assert rollout.finished.tolist() == [True, False]
    assert rollout.response_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert responses(rollout) == [[50, 2], [60, 61, 62, 63]]
