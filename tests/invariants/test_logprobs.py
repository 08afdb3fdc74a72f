"""Log-probabilities, entropies and the next-token loss, and their gradients."""

import math

import pytest
import torch

from common.models import logprobs
from common.models.logprobs import gather_response
from tests.given_logits import GivenLogits

VOCABULARY = 11
PROMPTS, RESPONSES = torch.tensor([4, 1, 2, 3]), torch.tensor([3, 6, 1, 0])


def batch(dtype=torch.float32):
    """Logits (4, 8, V) and right-padded tokens (4, 8); the longest row is 7, so column 7 is padding."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 8, VOCABULARY, generator=generator)
    tokens = torch.randint(1, VOCABULARY, (4, 8), generator=generator)
    tokens[torch.arange(8) >= (PROMPTS + RESPONSES)[:, None]] = 0
    return logits.to(dtype), tokens


def response_log_probs(logits, tokens, *rest):
    return logprobs.response_log_probs(GivenLogits(logits), {"input_ids": tokens}, *rest)


def response_log_probs_and_entropy(logits, tokens, *rest):
    return logprobs.response_log_probs_and_entropy(GivenLogits(logits), {"input_ids": tokens}, *rest)


def next_token_loss_sum(logits, tokens, loss_mask):
    return logprobs.next_token_loss_sum(GivenLogits(logits), {"input_ids": tokens}, loss_mask)


def row_by_row(logits, tokens, temperature=1.0):
    """Response log-probs of every row alone, unpadded and in float64."""
    rows = []
    for row, (prompt, response) in enumerate(zip(PROMPTS.tolist(), RESPONSES.tolist())):
        alone = (logits[row, : prompt + response].double() / temperature).log_softmax(-1)
        rows.append([alone[p - 1, tokens[row, p]].item() for p in range(prompt, prompt + response)])
    return rows


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_padded_batch_equals_its_rows_alone(dtype, temperature):
    logits, tokens = batch(dtype)
    log_probs = response_log_probs(logits, tokens, PROMPTS, RESPONSES, temperature)
    assert log_probs.shape == (4, 6) and log_probs.dtype == torch.float32
    for row, expected in enumerate(row_by_row(logits, tokens, temperature)):
        assert log_probs[row, : len(expected)].tolist() == pytest.approx(expected, abs=1e-5)
        assert not log_probs[row, len(expected) :].any()


def test_values_are_read_where_the_token_is_predicted():
    values = torch.arange(32.0).view(4, 8)
    gathered = gather_response(values, PROMPTS, RESPONSES)
    assert gathered[0].tolist() == [3, 4, 5, 0, 0, 0]
    assert gathered[1].tolist() == [8, 9, 10, 11, 12, 13]
    assert gathered[2].tolist() == [17, 0, 0, 0, 0, 0]
    assert not gathered[3].any()
    assert gather_response(values.bfloat16(), PROMPTS, RESPONSES).dtype == torch.float32


def test_padding_has_no_influence_and_gets_no_gradient():
    logits, tokens = batch()
    values = torch.randn(4, 8)
    used = torch.zeros(4, 8, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(PROMPTS.tolist(), RESPONSES.tolist())):
        used[row, prompt - 1 : prompt + response - 1] = True

    def run(logits, values):
        logits, values = logits.clone().requires_grad_(), values.clone().requires_grad_()
        log_probs, entropy = response_log_probs_and_entropy(logits, tokens, PROMPTS, RESPONSES)
        gathered = gather_response(values, PROMPTS, RESPONSES)
        (log_probs.sum() + gathered.square().sum()).backward()
        return log_probs.detach(), entropy, gathered.detach(), logits.grad, values.grad

    clean = run(logits, values)
    for garbage in (torch.nan, torch.inf, -torch.inf):
        spoilt = run(logits.masked_fill(~used[..., None], garbage), values.masked_fill(~used, garbage))
        assert all(torch.equal(a, b) for a, b in zip(clean, spoilt))
    logit_gradient, value_gradient = clean[3:]
    assert not logit_gradient[~used].any() and logit_gradient[used].any(-1).all()
    assert not value_gradient[~used].any()


def test_the_gradient_is_the_derivative():
    logits, tokens = batch(torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: response_log_probs(z, tokens, PROMPTS, RESPONSES, 0.7), (logits,), fast_mode=True
    )


def test_bfloat16_logits_get_the_gradient_of_float32_rounded():
    logits, tokens = batch(torch.bfloat16)
    gradients = []
    for z in (logits.clone().requires_grad_(), logits.float().requires_grad_()):
        response_log_probs(z, tokens, PROMPTS, RESPONSES).sum().backward()
        gradients.append(z.grad)
    assert torch.equal(gradients[0], gradients[1].bfloat16())


def test_an_end_token_that_is_also_the_padding_still_counts():
    logits, tokens = batch()
    tokens[0, 6] = 0  # the last response token of row 0 has the id that pads the other rows
    log_probs = response_log_probs(logits, tokens, PROMPTS, RESPONSES)
    assert log_probs[0, 2].item() == pytest.approx(logits[0, 5].log_softmax(-1)[0].item(), abs=1e-5)
    assert log_probs[0, 2] < 0


def test_every_next_token_has_probabilities_that_add_up_to_one():
    logits, tokens = batch()
    total = torch.zeros(4)
    for token in range(VOCABULARY):
        tokens[torch.arange(4), PROMPTS] = token
        total += response_log_probs(logits, tokens, PROMPTS, RESPONSES, 0.7)[:, 0].exp()
    assert torch.allclose(total[:3], torch.ones(3), atol=1e-5)


def test_entropy_is_that_of_known_distributions():
    _, tokens = batch()
    uniform = torch.zeros(4, 8, VOCABULARY)
    certain = uniform.clone()
    certain[..., 1:] = -torch.inf  # forbidden tokens must not make it NaN
    for logits, expected in ((uniform, math.log(VOCABULARY)), (certain, 0.0)):
        _, entropy = response_log_probs_and_entropy(logits, tokens, PROMPTS, RESPONSES)
        assert torch.allclose(entropy[1], torch.full((6,), expected), atol=1e-6)
        assert not entropy[3].any()


def test_entropy_is_the_expected_surprise():
    logits, tokens = batch()
    log_probs, entropy = response_log_probs_and_entropy(logits, tokens, PROMPTS, RESPONSES, 0.7)
    assert torch.equal(log_probs, response_log_probs(logits, tokens, PROMPTS, RESPONSES, 0.7))
    expected = torch.distributions.Categorical(logits=logits[1, 0:6] / 0.7).entropy()
    assert torch.allclose(entropy[1], expected, atol=1e-5)


def test_no_response_at_all_still_has_a_gradient():
    logits, tokens = batch()
    logits.requires_grad_()
    response_log_probs(logits, tokens, PROMPTS, torch.zeros(4, dtype=torch.long)).sum().backward()
    assert not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_next_token_loss_on_responses_is_the_negative_sum_of_their_log_probs(dtype):
    logits, tokens = batch(dtype)
    positions = torch.arange(8)
    loss_mask = (positions >= PROMPTS[:, None]) & (positions < (PROMPTS + RESPONSES)[:, None])
    loss, count = next_token_loss_sum(logits, tokens, loss_mask)
    log_probs = response_log_probs(logits, tokens, PROMPTS, RESPONSES)
    assert loss.item() == pytest.approx(-log_probs.sum().item(), rel=1e-5)
    assert count == RESPONSES.sum() and loss.dtype == torch.float32


def test_next_token_loss_adds_up_over_rows_and_skips_the_first_token():
    logits, tokens = batch()
    everything = torch.ones(4, 8, dtype=torch.bool)
    whole, count = next_token_loss_sum(logits, tokens, everything)
    parts = [next_token_loss_sum(logits[[r]], tokens[[r]], everything[[r]]) for r in range(4)]
    assert whole.item() == pytest.approx(sum(loss.item() for loss, _ in parts), rel=1e-5)
    assert count == sum(n for _, n in parts) == 4 * 7


def test_next_token_loss_ignores_unmarked_tokens_whatever_their_logits():
    logits, tokens = batch()
    loss_mask = torch.zeros(4, 8, dtype=torch.bool)
    loss_mask[1, 3] = True
    spoilt = torch.full_like(logits, torch.nan)
    spoilt[1, 2] = logits[1, 2]
    spoilt.requires_grad_()
    loss, count = next_token_loss_sum(spoilt, tokens, loss_mask)
    loss.backward()
    assert count == 1 and loss.isfinite()
    assert spoilt.grad[1, 2].any() and spoilt.grad.isfinite().all()
    assert not spoilt.grad[[0, 2, 3]].any()
