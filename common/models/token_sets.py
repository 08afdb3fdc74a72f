"""Keeps sets of tokens compactly, for instance the tokens that a sampler could draw at each position.

Each set has the smallest of three forms: the ids of its tokens, the ids of all other tokens, or one bit for every
token of the vocabulary. So a set of k tokens takes at most 4 k bytes, a set of all but k tokens as many, and none takes
more than one bit per token of the vocabulary; form and size take 5 bytes more.

Shapes: N sets, V tokens in the vocabulary, W words of 32 bits in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

IDS, OTHERS, BITS = range(3)  # the forms
WORD = 32  # bits


@dataclass(frozen=True)
class TokenSets:
    """N sets of tokens.

    Attributes:
        forms: (N,) uint8, `IDS`, `OTHERS` or `BITS`.
        sizes: (N,) int32, words of each set.
        words: (W,) int32, those of the first set, then those of the second, and so on.
        vocabulary: V; 0 if there are no sets.
    """

    forms: Tensor
    sizes: Tensor
    words: Tensor
    vocabulary: int

    def __len__(self) -> int:
        return len(self.forms)

    @staticmethod
    def pack(members: Tensor) -> TokenSets:
        """The sets that members (N, V) bool says: true where a token is in the set."""
        inside = members.sum(1)
        outside = members.shape[1] - inside
        bits = torch.full_like(inside, _words_of(members.shape[1]))
        sizes, forms = torch.stack([inside, outside, bits]).min(0)
        words = torch.empty(int(sizes.sum()), dtype=torch.int32, device=members.device)
        in_bits = (forms == BITS).repeat_interleave(sizes)
        words[in_bits] = _to_words(members[forms == BITS]).flatten()
        listed = (members ^ (forms == OTHERS)[:, None]) & (forms != BITS)[:, None]
        words[~in_bits] = listed.nonzero()[:, 1].int()
        return TokenSets(forms.byte(), sizes.int(), words, members.shape[1])

    @staticmethod
    def largest(count: int, vocabulary: int) -> TokenSets:
        """`count` sets of all tokens that take as much memory as any set may."""
        size = _words_of(vocabulary)
        return TokenSets(
            torch.full((count,), BITS, dtype=torch.uint8),
            torch.full((count,), size, dtype=torch.int32),
            torch.full((count * size,), -1, dtype=torch.int32),
            vocabulary,
        )

    def members(self) -> Tensor:
        """(N, V) bool: true where a token is in the set."""
        members = (self.forms == OTHERS)[:, None].repeat(1, self.vocabulary)
        forms = self.forms.repeat_interleave(self.sizes)
        listed = forms != BITS
        rows = torch.arange(len(self), device=self.forms.device).repeat_interleave(self.sizes)
        members[rows[listed], self.words[listed].long()] = forms[listed] == IDS
        members[self.forms == BITS] = _from_words(self.words[~listed], self.vocabulary)
        return members

    def select(self, sets: Tensor) -> TokenSets:
        """The sets of these numbers, in this order; sets (M,) long."""
        return TokenSets(
            self.forms[sets], self.sizes[sets], self.words[places_within(self.sizes, sets)], self.vocabulary
        )

    def split(self, count: int) -> list[TokenSets]:
        """Parts of `count` sets each; the last may have fewer."""
        sizes = self.sizes.split(count)
        words = self.words.split([int(part.sum()) for part in sizes])
        return [TokenSets(*part, self.vocabulary) for part in zip(self.forms.split(count), sizes, words)]

    @staticmethod
    def concat(parts: Sequence[TokenSets]) -> TokenSets:
        """The sets of all parts, one part after the other."""
        return TokenSets(
            torch.cat([part.forms for part in parts]),
            torch.cat([part.sizes for part in parts]),
            torch.cat([part.words for part in parts]),
            max(part.vocabulary for part in parts),
        )

    def to(self, device: torch.device | str) -> TokenSets:
        return TokenSets(self.forms.to(device), self.sizes.to(device), self.words.to(device), self.vocabulary)


def places_within(sizes: Tensor, items: Tensor) -> Tensor:
    """Where the entries of some items lie in a stream in which item i has sizes[i] entries, one item after the other.

    Args:
        sizes: (N,) of all items.
        items: (M,) long, the numbers of those that are wanted.

    Returns:
        Long indices of their entries, in the order of `items`.
    """
    sizes = sizes.long()
    starts, wanted = sizes.cumsum(0) - sizes, sizes[items]
    shift = starts[items] - (wanted.cumsum(0) - wanted)
    return torch.arange(int(wanted.sum()), device=sizes.device) + shift.repeat_interleave(wanted)


def _words_of(vocabulary: int) -> int:
    return -(-vocabulary // WORD)


def _to_words(members: Tensor) -> Tensor:
    """(n, V) bool -> (n, words of V) int32."""
    count, size = len(members), _words_of(members.shape[1])
    bits = F.pad(members, (0, size * WORD - members.shape[1])).view(count, size, WORD).long()
    return (bits << torch.arange(WORD, device=members.device)).sum(-1).int()  # the highest bit becomes the sign


def _from_words(words: Tensor, vocabulary: int) -> Tensor:
    """The words of n sets one after the other -> (n, V) bool."""
    size = _words_of(vocabulary)
    bits = (words.view(-1, max(size, 1), 1) >> torch.arange(WORD, device=words.device)) & 1
    return bits.bool().flatten(1)[:, :vocabulary]
