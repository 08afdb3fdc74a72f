"""Prepares comparisons, for programs that learn from pairs of responses."""

from __future__ import annotations

from dataclasses import replace

from common.artifacts.split_rule import data_request
from common.data.prepare import PreparedData, prepare
from common.data.tokenization import Codec
from common.supervised.config import ComparisonConfig


def prepare_comparisons(config: ComparisonConfig, codec: Codec, margin_column: str | None = None) -> PreparedData:
    """The program's part of --data_path, as comparisons. Raises as `common.data.prepare.prepare`.

    Args:
        margin_column: of the data, which holds each row's own margin.
    """
    request = data_request(config, "comparison", config.max_seq_len)
    return prepare(replace(request, pairs_per_prompt=config.pairs_per_prompt, margin_column=margin_column), codec)
