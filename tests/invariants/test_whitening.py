"""Whitening of advantages over the response tokens."""

import pytest
import torch

from common.models.logprobs import length_mask
from step3_ppo.whitening import whiten


def sample(rows=12, width=9, offset=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    return offset + scale * torch.randn(rows, width, generator=generator), length_mask(lengths, width)


@pytest.mark.parametrize("offset, scale", [(0.0, 1.0), (3.0, 0.1), (1000.0, 1.0), (-5.0, 1e4)])
def test_mean_is_zero_and_variance_one_over_the_response_tokens(offset, scale):
    advantages, mask = sample(offset=offset, scale=scale)
    whitened = whiten(advantages, mask)
    assert whitened[mask].double().mean().abs() < 1e-6
    assert whitened[mask].double().var(unbiased=False).item() == pytest.approx(1.0, abs=1e-5)
    assert not whitened[~mask].any()


@pytest.mark.parametrize("cut", [(6,), (1,), (3, 8)])
def test_how_rows_are_ordered_and_joined_does_not_matter(cut):
    advantages, mask = sample(offset=2.0)
    order = torch.cat(torch.arange(len(mask)).tensor_split(cut)[::-1])
    assert torch.allclose(whiten(advantages[order], mask[order]), whiten(advantages, mask)[order], atol=1e-6)


def test_fillers_count_for_nothing():
    advantages, mask = sample()
    fillers = torch.full_like(advantages, 99.0)
    whitened, nothing = whiten(torch.cat([advantages, fillers]), torch.cat([mask, torch.zeros_like(mask)])).chunk(2)
    assert torch.allclose(whitened, whiten(advantages, mask), atol=1e-7) and not nothing.any()


def test_order_is_kept_and_shift_and_scale_do_not_matter():
    advantages, mask = sample()
    whitened = whiten(advantages, mask)
    assert torch.equal(advantages[mask].argsort(), whitened[mask].argsort())
    assert torch.allclose(whiten(7 * advantages + 3, mask), whitened, atol=1e-5)


def test_what_lies_outside_the_mask_changes_nothing():
    advantages, mask = sample()
    assert torch.equal(whiten(advantages.masked_fill(~mask, torch.nan), mask), whiten(advantages, mask))


def test_equal_advantages_and_no_tokens_at_all_give_zeros():
    equal, mask = torch.full((2, 3), 4.2), torch.ones(2, 3, dtype=torch.bool)
    assert whiten(equal, mask).abs().max() < 1e-3
    assert not whiten(equal, ~mask).any()
