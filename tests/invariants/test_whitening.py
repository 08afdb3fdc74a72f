import threading

import pytest
import torch

from common.models.logprobs import length_mask
from step3_ppo.advantages import whiten


def sample(rows=12, width=9, offset=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    return offset + scale * torch.randn(rows, width, generator=generator), length_mask(lengths, width)


class ThreadRanks:
    """Ranks as threads, with a real sum over them."""

    def __init__(self, count):
        self.barrier = threading.Barrier(count, timeout=30)
        self.contributions = [None] * count

    def global_sum(self, rank):
        def add(tensor):
            self.contributions[rank] = tensor
            self.barrier.wait()
            total = sum(self.contributions)
            self.barrier.wait()  # nobody may go on to the next sum while another still reads this one
            return total

        return add


def whiten_over_ranks(parts):
    ranks, results = ThreadRanks(len(parts)), [None] * len(parts)

    def work(rank):
        results[rank] = whiten(*parts[rank], ranks.global_sum(rank))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("offset, scale", [(0.0, 1.0), (3.0, 0.1), (1000.0, 1.0), (-5.0, 1e4)])
def test_mean_is_zero_and_variance_one_over_the_response_tokens(offset, scale):
    advantages, mask = sample(offset=offset, scale=scale)
    whitened = whiten(advantages, mask)
    assert whitened[mask].double().mean().abs() < 1e-6
    assert whitened[mask].double().var(unbiased=False).item() == pytest.approx(1.0, abs=1e-5)
    assert not whitened[~mask].any()


@pytest.mark.parametrize("cut", [(6,), (1,), (11,), (3, 8)])
def test_any_number_of_ranks_agrees_with_one(cut):
    advantages, mask = sample(offset=2.0)
    parts = list(zip(advantages.tensor_split(cut), mask.tensor_split(cut)))
    assert torch.allclose(torch.cat(whiten_over_ranks(parts)), whiten(advantages, mask), atol=1e-6)


def test_a_rank_of_fillers_alone_counts_for_nothing():
    advantages, mask = sample()
    fillers = (torch.full_like(advantages, 99.0), torch.zeros_like(mask))
    whitened, nothing = whiten_over_ranks([(advantages, mask), fillers])
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
