"""The moving average of weights: its closed form, and weights that come back exactly."""

import pytest
import torch
from torch import nn

from step3_ppo.ema import EMA


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_average_is_the_weighted_sum_of_all_weights(dtype):
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(3, 2).to(dtype)
    history = [module.weight.detach().double().clone()]
    ema = EMA(module, decay=0.9)
    for _ in range(20):
        with torch.no_grad():
            module.weight.copy_(torch.randn(2, 3, generator=generator))
        history.append(module.weight.detach().double().clone())
        ema.update()
    shares = [0.9**20] + [0.1 * 0.9 ** (20 - step) for step in range(1, 21)]
    assert sum(shares) == pytest.approx(1)
    expected = sum(share * weight for share, weight in zip(shares, history))
    before = module.weight.detach().clone()
    with ema.swapped_in():
        torch.testing.assert_close(
            module.weight.detach().double(), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2
        )
        assert not torch.equal(module.weight, before)
    assert torch.equal(module.weight, before)


def test_weights_come_back_when_the_export_fails():
    module = nn.Linear(3, 2)
    ema = EMA(module, decay=0.5)
    with torch.no_grad():
        module.weight.add_(1)
    before = module.weight.detach().clone()
    with pytest.raises(OSError), ema.swapped_in():
        raise OSError("disk full")
    assert torch.equal(module.weight, before)


def test_frozen_weights_have_no_average():
    module = nn.Linear(3, 2)
    module.weight.requires_grad_(False)
    ema = EMA(module, decay=0.5)
    with torch.no_grad():
        module.weight.add_(1), module.bias.add_(1)
    weight, bias = module.weight.clone(), module.bias.clone()
    with ema.swapped_in():
        assert torch.equal(module.weight, weight) and not torch.equal(module.bias, bias)


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (4, 3), (3, 8)])
def test_shards_are_cut_anew_for_another_number_of_ranks(monkeypatch, before, after):
    weights = [torch.arange(1.0, 1 + size) for size in (1, 2, 7, 24)]

    def averages(ranks: int, filled: bool) -> list[EMA]:
        """As ZeRO-3 has the weights, or zeros in their place, on each rank."""
        made = []
        for rank in range(ranks):
            monkeypatch.setenv("RANK", str(rank))
            module = nn.ParameterList(nn.Parameter(torch.empty(0)) for _ in weights)
            for parameter, weight in zip(module, weights):
                length = -(-len(weight) // ranks)
                shard = torch.full((length,), 99.0)
                mine = weight[rank * length :][:length]
                shard[: len(mine)] = mine
                parameter.ds_tensor = shard if filled else torch.zeros(length)
            made.append(EMA(module, decay=0.5))
            if not filled:
                made[-1].reshape(lambda name: [average.tensors()[name] for average in old])
        return made

    old = averages(before, filled=True)
    new = averages(after, filled=False)
    for number, weight in enumerate(weights):
        whole = torch.cat([average.tensors()[f"ema.{number}"] for average in new])
        assert torch.equal(whole[: len(weight)], weight)
