"""Reward functions that the tests of this directory name with --reward."""

from __future__ import annotations

import sys
import time
import zlib

MADE_UP = "I do not know."  # what rewards are tried with before a run


def length(responses):
    """Characters of each response."""
    return [float(len(text)) for text in responses], {"empty": sum(not text for text in responses) / len(responses)}


def overlap(responses, chosen):
    """Words that a response shares with a column of the data, and a part that only its exact text decides."""
    shared = [len({*text.split()} & {*right.split()}) for text, right in zip(responses, chosen)]
    return [words + zlib.crc32(text.encode()) % 1000 / 1000 for words, text in zip(shared, responses)]


def rest(responses, **columns):
    """How many columns there are, and whether this is the process of a rank, which has imported torch."""
    return [float(len(columns) + 10 * ("torch" in sys.modules)) + len(text) / 100 for text in responses]


def slow(responses):
    time.sleep(0.2)
    return [float(len(text)) for text in responses]


def picky(responses):
    """None for every response but the made-up one, and those of even length."""
    return [None if text != MADE_UP and len(text) % 2 else 1.0 for text in responses]
