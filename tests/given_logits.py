"""A causal language model that returns given logits, for tests of functions of logits."""

from types import SimpleNamespace

from torch import Tensor, nn
from transformers import PreTrainedConfig


class GivenLogits(nn.Module):
    """Answers every batch with `logits` (B, L, V)."""

    config = PreTrainedConfig()

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits, self.head = logits, nn.Identity()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.logits))
