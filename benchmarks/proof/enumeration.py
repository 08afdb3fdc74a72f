"""A task so small that every response can be listed, and the exact optimum of what step 3 maximises on it.

All numbers are float64 and all sums run over all responses, so nothing here is an estimate. Shapes: P prompts, M
responses, the same ones to every prompt; V tokens in the vocabulary; R tokens in the longest response.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from common.models.logprobs import length_mask
from step3_ppo.reward import RewardInputs

END, PAD, FIRST_LETTER = 0, 1, 2  # ids; the padding token can be sampled like any other
LETTERS = "ab"
SEED = 0


@dataclass(frozen=True)
class TinyTask:
    """Prompts of one letter each, responses of up to `longest` tokens, and a random reward for every pair of them.

    A response ends with the end token or after `longest` tokens. Its reward is drawn uniformly from [-1, 1], so it
    depends on every token, on the end token, and on whether there is one.

    Attributes:
        longest: R.
        seed: of the rewards and of the reference's weights.
    """

    longest: int = 3
    seed: int = SEED

    @cached_property
    def responses(self) -> list[tuple[int, ...]]:
        """The ids of all M responses, the end token included."""
        tokens = range(FIRST_LETTER + len(LETTERS))
        going_on = [token for token in tokens if token != END]
        return [
            (*before, last)
            for length in range(1, self.longest + 1)
            for before in product(going_on, repeat=length - 1)
            for last in (tokens if length == self.longest else (END,))
        ]

    @cached_property
    def rewards(self) -> Tensor:
        """(P, M) float64."""
        generator = torch.Generator().manual_seed(self.seed)
        return 2 * torch.rand(len(LETTERS), len(self.responses), generator=generator, dtype=torch.float64) - 1

    def reward(self, inputs: RewardInputs) -> Tensor:
        """The reward as step 3 asks for it, see `step3_ppo.reward.Reward`."""
        number = {response: index for index, response in enumerate(self.responses)}
        prompts = inputs.rollout.tokens[:, 0] - FIRST_LETTER
        chosen = torch.tensor([number[tuple(ids)] for ids in inputs.response_ids])
        return self.rewards[prompts, chosen].float()

    def write(self, directory: Path) -> tuple[Path, Path]:
        """Write a language model with random weights and the prompts; returns the paths of both."""
        model, prompts = directory / "reference", directory / "prompts.jsonl"
        write_model(model, self.seed)
        prompts.write_text("".join(json.dumps({"prompt": letter}) + "\n" for letter in LETTERS))
        return model, prompts

    @torch.no_grad()
    def log_probs(self, model: Path) -> Tensor:
        """(P, M) log-probabilities of all responses under a saved language model."""
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
        lengths = torch.tensor([len(response) for response in self.responses])
        padded = torch.tensor([[*response, *[PAD] * (self.longest - len(response))] for response in self.responses])
        rows = []
        for letter in range(len(LETTERS)):
            prompt = torch.full((len(padded), 1), FIRST_LETTER + letter)
            tokens = torch.cat([prompt, padded], 1)
            logits = network(tokens, attention_mask=torch.ones_like(tokens)).logits[:, :-1]
            chosen = logits.log_softmax(-1).gather(2, padded[..., None])[..., 0]
            rows.append(chosen.masked_fill(~length_mask(lengths, self.longest), 0).sum(1))
        return torch.stack(rows)

    def optimum(self, reference: Tensor, beta: float) -> Tensor:
        """(P, M) log-probabilities of the policy that maximises E[reward] - beta KL(policy || reference).

        pi(y) = pi_ref(y) exp(reward(y) / beta) / Z, over whole responses. (arXiv:2305.18290, eq. 4)

        Args:
            reference: (P, M) log-probabilities.
        """
        return (reference + self.rewards / beta).log_softmax(1)

    def optimum_of_token_kl(self, reference: Tensor, beta: float) -> Tensor:
        """(P, M) log-probabilities of the policy at which the gradient of `--kl_placement loss` is 0.

        There a token pays for its own KL and not for that of later tokens. So at every prefix
        pi(token) = pi_ref(token) exp(Q(token) / beta) / Z, where Q is the mean reward of the responses that go on with
        the token under pi itself, without KL. Solved from the last token backwards.

        Args:
            reference: (P, M) log-probabilities.
        """
        rows = [
            self._backwards(dict(zip(self.responses, log_probs)), dict(zip(self.responses, rewards)), beta)
            for log_probs, rewards in zip(reference.tolist(), self.rewards.tolist())
        ]
        return torch.tensor([[row[response] for response in self.responses] for row in rows], dtype=torch.float64)

    def _backwards(
        self, reference: dict[tuple[int, ...], float], q: dict[tuple[int, ...], float], beta: float
    ) -> dict[tuple[int, ...], float]:
        """One prompt of `optimum_of_token_kl`: log-probabilities by response.

        Args:
            reference: log-probability of each response.
            q: its reward.
        """
        # Of whole responses and, as the loop goes on, of their prefixes: the reference's log-probability, Q under the
        # policy, and the policy's log-probabilities of the ways to go on, by whole response.
        reference, q = dict(reference), dict(q)
        below: dict[tuple[int, ...], dict[tuple[int, ...], float]] = {response: {response: 0.0} for response in q}
        for length in reversed(range(self.longest)):
            parents: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
            for child in [node for node in q if len(node) == length + 1]:
                parents.setdefault(child[:-1], []).append(child)
            for parent, children in parents.items():
                of_reference = torch.tensor([reference[child] for child in children], dtype=torch.float64)
                of_q = torch.tensor([q[child] for child in children], dtype=torch.float64)
                policy = (of_reference + of_q / beta).log_softmax(0)
                reference[parent] = float(of_reference.logsumexp(0))
                q[parent] = float((policy.exp() * of_q).sum())
                below[parent] = {
                    response: float(step) + later
                    for child, step in zip(children, policy)
                    for response, later in below[child].items()
                }
        return below[()]

    def best_of(self, reference: Tensor, n: int) -> Tensor:
        """(P, M) log-probabilities of the best of `n` responses of the reference.

        With F(y) the probability of a response whose reward is at most that of y: P(y) = F(y)^n - (F(y) - pi_ref(y))^n.
        No two rewards are equal.

        Args:
            reference: (P, M) log-probabilities.
        """
        order = self.rewards.argsort(1)
        probabilities = reference.exp().gather(1, order)
        at_most = probabilities.cumsum(1)
        best = at_most**n - (at_most - probabilities).clamp_min(0) ** n
        return torch.empty_like(best).scatter(1, order, best).log()

    def expected_reward(self, policy: Tensor) -> float:
        """E[reward] under log-probabilities (P, M), mean over prompts."""
        return float((policy.exp() * self.rewards).sum(1).mean())

    def frontier(self, reference: Tensor, kl: float) -> float:
        """The highest expected reward of any policy with this mean KL to the reference, in nats.

        It is that of the `optimum` for some beta, found by bisection: the optimum's KL falls as beta rises.

        Args:
            reference: (P, M) log-probabilities.
        """
        low, high = 1e-3, 1e3
        for _ in range(100):
            beta = (low * high) ** 0.5
            low, high = (beta, high) if divergence(self.optimum(reference, beta), reference) > kl else (low, beta)
        return self.expected_reward(self.optimum(reference, high))


def divergence(policy: Tensor, reference: Tensor) -> float:
    """KL(policy || reference) in nats, of log-probabilities (P, M), mean over prompts."""
    return float((policy.exp() * (policy - reference)).nan_to_num(0).sum(1).mean())


def total_variation(policy: Tensor, other: Tensor) -> float:
    """Half the sum of |p - q|, of log-probabilities (P, M), the largest of all prompts."""
    return float((policy.exp() - other.exp()).abs().sum(1).max() / 2)


def write_model(directory: Path, seed: int) -> None:
    """An OPT with some 39,000 random weights and a vocabulary of four: end, padding, and two letters.

    It is wide enough to represent any policy on the task, and its logits are near 0, so every response is likely
    enough to be sampled.
    """
    vocabulary = {"</s>": END, "<pad>": PAD, **{letter: FIRST_LETTER + index for index, letter in enumerate(LETTERS)}}
    letters = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    letters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(directory)
    config = OPTConfig(
        vocab_size=len(vocabulary),
        hidden_size=48,
        word_embed_proj_dim=48,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        init_std=0.1,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = OPTForCausalLM(config)
    model.save_pretrained(directory)
