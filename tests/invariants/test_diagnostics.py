"""The sampler's gap and the spread of the ratio, against their definitions, however the tokens are divided."""

import pytest
import torch

from common.training.metrics import add_sums
from step3_ppo.diagnostics import ratio_metrics, ratio_sums, sampler_gap
from step3_ppo.metrics import update_metrics


def numbers(rows=6, columns=5):
    generator = torch.Generator().manual_seed(1)
    old = torch.randn(rows, columns, generator=generator) - 3
    new = old + 0.5 * torch.randn(rows, columns, generator=generator)
    return new, old, torch.rand(rows, columns, generator=generator) < 0.7


def test_the_spread_of_the_ratio_is_that_of_its_tokens():
    new, old, mask = numbers()
    ratio = (new.double() - old.double())[mask].exp()
    found = ratio_metrics([ratio_sums(new, old, mask)])
    assert found["ratio_mean"] == pytest.approx(ratio.mean().item(), rel=1e-6)
    assert found["ratio_std"] == pytest.approx(ratio.std(correction=0).item(), rel=1e-6)
    assert found["ratio_max"] == pytest.approx(ratio.max().item(), rel=1e-6)
    size = ratio.sum().square() / (len(ratio) * ratio.square().sum())
    assert found["effective_sample_size"] == pytest.approx(size.item(), rel=1e-6)


def test_micro_batches_and_ranks_merge_to_the_same_numbers():
    new, old, mask = numbers()
    other_rank = ratio_sums(new[4:], old[4:], mask[4:])
    names = sorted(other_rank)
    table = torch.stack([other_rank[name] for name in names])
    merged = add_sums(
        [ratio_sums(new[rows], old[rows], mask[rows]) for rows in (slice(0, 1), slice(1, 4))],
        lambda sums: sums + table,
        lambda maxima: torch.maximum(maxima, table),
    )
    assert ratio_metrics([merged]) == pytest.approx(ratio_metrics([ratio_sums(new, old, mask)]), rel=1e-12)


def test_over_several_steps_the_size_is_a_mean_and_the_rest_is_over_all_tokens():
    new, old, mask = numbers()
    steps = [ratio_sums(new[rows], old[rows], mask[rows]) for rows in (slice(0, 2), slice(2, 6))]
    found, whole = ratio_metrics(steps), ratio_metrics([ratio_sums(new, old, mask)])
    for name in ("ratio_mean", "ratio_std", "ratio_max"):
        assert found[name] == pytest.approx(whole[name], rel=1e-12)
    sizes = [ratio_metrics([step])["effective_sample_size"] for step in steps]
    assert found["effective_sample_size"] == pytest.approx(sum(sizes) / 2)
    logged = update_metrics([{"tokens": step["ratio_tokens"], **step} for step in steps])
    assert logged == {**found, "optimizer_steps": 2}
    assert update_metrics([{"tokens": torch.tensor(3.0), "loss": torch.tensor(6.0)}]) == {
        "loss": 2,
        "optimizer_steps": 1,
    }


def test_before_the_first_update_all_tokens_weigh_the_same():
    _, old, mask = numbers()
    assert ratio_metrics([ratio_sums(old, old, mask)]) == {
        "ratio_mean": 1.0,
        "ratio_std": 0.0,
        "ratio_max": 1.0,
        "effective_sample_size": 1.0,
    }


def test_what_lies_outside_of_the_responses_counts_nothing():
    new, old, mask = numbers()
    spoilt = new.masked_fill(~mask, torch.nan), old.masked_fill(~mask, torch.inf)
    assert ratio_metrics([ratio_sums(*spoilt, mask)]) == ratio_metrics([ratio_sums(new, old, mask)])
    assert sampler_gap(*spoilt, mask) == sampler_gap(new, old, mask)


def test_the_gap_is_the_distance_of_the_log_probs():
    new, old, mask = numbers()
    distance = (new - old)[mask].abs()
    assert sampler_gap(new, old, mask) == pytest.approx(
        {"sampler_gap_mean": distance.mean().item(), "sampler_gap_max": distance.max().item()}
    )
    assert sampler_gap(new, old, torch.zeros_like(mask)) == {"sampler_gap_mean": 0.0, "sampler_gap_max": 0.0}
