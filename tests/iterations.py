"""Random iterations of several responses to a prompt, for tests of what compares them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from common.models.logprobs import length_mask


@st.composite
def iterations(draw):
    """Token rewards, mask and groups of an iteration; the groups in any order, of two responses or more."""
    sizes = draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    groups = draw(st.permutations([group for group, size in enumerate(sizes) for _ in range(size)]))
    width = draw(st.integers(1, 6))
    lengths = torch.tensor(draw(st.lists(st.integers(1, width), min_size=len(groups), max_size=len(groups))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rewards = torch.randn(len(groups), width, generator=generator, dtype=torch.float64)
    return rewards, length_mask(lengths, width), torch.tensor(groups)
