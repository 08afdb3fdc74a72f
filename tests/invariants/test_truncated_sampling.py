"""The policy renormalised on the tokens that the sampler kept: values, gradients, and the identity of importance."""

from dataclasses import replace

import pytest
import torch
import transformers as hf
from scipy import stats

from common.models import logprobs
from common.models.token_sets import TokenSets
from step3_ppo.generation.sampling import Sampling, sample_tokens, uniforms, without_ends
from tests.given_logits import GivenLogits

LOGITS = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, 0.3], dtype=torch.float64)
ENDS = torch.tensor([2])
EXACT = Sampling(temperature=0.7, top_p=1.0, top_k=0, min_new_tokens=0, max_new_tokens=1, exact=True)
# Name: how it is sampled, whether end tokens are held back, the tokens that are kept.
WAYS = {
    "top-k": (replace(EXACT, top_k=3), False, {0, 2, 4}),
    "top-p": (replace(EXACT, top_p=0.75), False, {2, 4}),
    "both": (replace(EXACT, top_p=0.99, top_k=4), False, {0, 2, 4, 5}),
    "held-back": (replace(EXACT, min_new_tokens=1), True, {0, 1, 3, 4, 5}),
    "held-back-top-p": (replace(EXACT, min_new_tokens=1, top_p=0.6), True, {0, 4}),
    "one-token": (replace(EXACT, top_k=1), False, {2}),
}
SAMPLES = 40_000


def draw(sampling, held_back):
    logits = LOGITS.float().expand(SAMPLES, -1)
    logits = without_ends(logits, torch.full((SAMPLES,), held_back), ENDS)
    return sample_tokens(logits, uniforms(3, 0, torch.arange(SAMPLES), 1)[:, 0], sampling)


def by_definition(logits, kept, temperature=EXACT.temperature):
    """{token: its probability} in the softmax over the kept tokens."""
    weights = {token: torch.exp(logits[token] / temperature) for token in kept}
    return {token: weight / sum(weights.values()) for token, weight in weights.items()}


def trained_log_probs(logits, sampled, kept=True):
    """Log-probs of the drawn tokens, as training computes them, under a policy with these logits (V,)."""
    ones = torch.ones(SAMPLES, dtype=torch.long)
    tokens = torch.stack([torch.zeros_like(sampled.tokens), sampled.tokens], 1)
    return logprobs.response_log_probs(
        GivenLogits(logits.expand(SAMPLES, 2, -1)),
        {"input_ids": tokens},
        ones,
        ones,
        EXACT.temperature,
        TokenSets.pack(sampled.kept) if kept else None,
    )[:, 0]


@pytest.mark.parametrize("way", WAYS)
def test_what_is_drawn_recorded_and_trained_is_the_softmax_over_the_kept_tokens(way):
    sampling, held_back, kept = WAYS[way]
    sampled = draw(sampling, held_back)
    expected = by_definition(LOGITS, kept)
    counts = sampled.tokens.bincount(minlength=len(LOGITS))
    assert counts.sum() == counts[sorted(kept)].sum()
    if len(kept) > 1:
        frequencies = [counts[token].item() for token in kept]
        assert stats.chisquare(frequencies, [SAMPLES * expected[token].item() for token in kept]).pvalue > 1e-3
    assert {token for token in range(len(LOGITS)) if sampled.kept[0, token]} == kept
    assert (sampled.kept == sampled.kept[0]).all()
    log_probs = torch.tensor([expected[token].log().item() for token in sampled.tokens.tolist()], dtype=torch.float64)
    torch.testing.assert_close(sampled.log_probs.double(), log_probs, rtol=0, atol=1e-5)
    torch.testing.assert_close(trained_log_probs(LOGITS, sampled), log_probs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_that_of_the_log_prob_over_the_kept_tokens(way):
    sampling, held_back, kept = WAYS[way]
    sampled = draw(sampling, held_back)
    weights = torch.linspace(-1, 2, SAMPLES, dtype=torch.float64)
    ours, theirs = LOGITS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    (trained_log_probs(ours, sampled) * weights).sum().backward()
    expected = by_definition(theirs, kept)
    sum(expected[token].log() * weights[sampled.tokens == token].sum() for token in kept).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-6)
    assert not ours.grad[[token for token in range(len(LOGITS)) if token not in kept]].any()


@pytest.mark.parametrize("way", [way for way in WAYS if way != "one-token"])
def test_the_mean_ratio_over_the_samples_is_one_only_where_it_is_exact(way):
    """E over a ~ pi_old(. | kept) of pi_new(a | kept) / pi_old(a | kept) is 1; without the sets it is not."""
    sampling, held_back, kept = WAYS[way]
    sampled = draw(sampling, held_back)
    new = LOGITS + torch.tensor([0.2, 1.5, -0.9, 0.8, 0.3, -0.4], dtype=torch.float64)
    ratios = {
        exact: (trained_log_probs(new, sampled, exact) - trained_log_probs(LOGITS, sampled, exact)).exp()
        for exact in (True, False)
    }
    error = ratios[True].std() / SAMPLES**0.5
    assert abs(ratios[True].mean() - 1) < 4 * error
    assert abs(ratios[False].mean() - 1) > 40 * ratios[False].std() / SAMPLES**0.5
    # The approximate ratio's mean is how much more the new policy likes the kept tokens as a whole.
    whole_new, whole_old = (by_definition(logits, range(len(LOGITS))) for logits in (new, LOGITS))
    grown = sum(whole_new[token] for token in kept) / sum(whole_old[token] for token in kept)
    assert ratios[False].mean().item() == pytest.approx(grown.item(), abs=4 * ratios[False].std().item() / 200)


def test_a_head_in_chunks_renormalises_each_token_on_its_own_set(monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=97, num_key_value_heads=2, **sizes)).double()
    prompts, responses = torch.tensor([3, 5, 1]), torch.tensor([5, 2, 7])
    tokens = torch.randint(97, (3, 9))
    mask = logprobs.length_mask(responses, 7)
    row, column = mask.nonzero(as_tuple=True)
    drawn = tokens[row, prompts[row] + column]
    kept = (torch.rand(len(row), 97) < torch.linspace(0, 1, len(row))[:, None]).index_put(
        (torch.arange(len(row)), drawn), torch.tensor(True)
    )
    whole = model(input_ids=tokens).logits[row, prompts[row] - 1 + column] / 0.8
    chosen = [scaled[set_] for scaled, set_ in zip(whole, kept)]
    expected = torch.stack([whole[n, drawn[n]] - chosen[n].logsumexp(0) for n in range(len(row))])
    entropy = torch.stack([-(part.softmax(0) * part.log_softmax(0)).sum() for part in chosen])
    weights = torch.linspace(-1, 2, len(row), dtype=torch.float64)
    gradients = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    for rows in (4, len(row)):
        monkeypatch.setattr(logprobs, "CHUNK_NUMBERS", rows * 97)
        read = (model, {"input_ids": tokens}, prompts, responses, 0.8, TokenSets.pack(kept))
        found = logprobs.response_log_probs(*read)
        both = logprobs.response_log_probs_and_entropy(*read)
        torch.testing.assert_close(found[mask], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(both[0], found, rtol=0, atol=1e-12)
        torch.testing.assert_close(both[1][mask], entropy, rtol=0, atol=1e-12)
        ours = torch.autograd.grad((found[mask] * weights).sum(), list(model.parameters()))
        for gradient, brute in zip(ours, gradients):
            torch.testing.assert_close(gradient, brute, rtol=1e-9, atol=1e-12)
