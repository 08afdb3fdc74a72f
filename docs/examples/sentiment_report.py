"""What docs/examples/sentiment.sh reached, on prompts that were not trained on: a table, and samples.

    python docs/examples/sentiment_report.py DIRECTORY

DIRECTORY holds model/ (before training) and ppo/ (the run of step 3).
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from statistics import mean
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])  # the repository, where it is not installed

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from docs.examples.sentiment import sentiment

N = 4  # of best-of-n, whose KL to the model itself is at most log n - (n - 1) / n (arXiv:2401.01879)
LONGEST = 16  # tokens of an answer, as in sentiment.sh
SHOWN = 6  # samples


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Of samples: rows of prompt, response, reward, kl, finished. Of metrics: one row for each iteration."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> float:
    """exp of the mean of -log p under the model over all tokens of responses, each after its prompt."""
    total, tokens = 0.0, 0
    for prompt, response in pairs:
        before, own = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, response))
        if not own:
            continue
        logits = model(torch.tensor([before + own])).logits[0, len(before) - 1 : -1]
        total -= float(logits.log_softmax(-1).gather(1, torch.tensor(own)[:, None]).sum())
        tokens += len(own)
    return math.exp(total / tokens)


@torch.no_grad()
def best_of(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """The most positive of N responses to each prompt."""
    tokenizer.padding_side = "left"
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    torch.manual_seed(0)
    written = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=LONGEST, num_return_sequences=N)
    texts = tokenizer.batch_decode(written[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    groups = [texts[start : start + N] for start in range(0, len(texts), N)]
    return [max(group, key=lambda text: sentiment([text])[0]) for group in groups]


def reward_at(kl: float, iterations: list[dict[str, Any]]) -> float | None:
    """The mean reward in training when its KL first came to `kl`, on a line between the iterations before and after."""
    for earlier, later in zip(iterations, iterations[1:]):
        if earlier["kl"] < kl <= later["kl"]:
            share = (kl - earlier["kl"]) / (later["kl"] - earlier["kl"])
            return float(earlier["reward"] + share * (later["reward"] - earlier["reward"]))
    return None


def main(directory: Path) -> None:
    """Print the report."""
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    model = AutoModelForCausalLM.from_pretrained(directory / "model").eval()
    samples = {name: read_lines(directory / "ppo/samples" / f"{name}.jsonl") for name in ("before", "after")}
    answers = {name: [(row["prompt"], row["response"]) for row in rows] for name, rows in samples.items()}
    kl = {name: f"{mean(row['kl'] for row in rows):.2f}" for name, rows in samples.items()}
    prompts = list(dict.fromkeys(prompt for prompt, _ in answers["before"]))  # each has several answers
    best = f"best of {N} before"
    answers[best] = list(zip(prompts, best_of(model, tokenizer, prompts)))
    kl_of_best = math.log(N) - (N - 1) / N
    kl[best] = f"{kl_of_best:.2f}"
    print(f"{len(prompts)} prompts that were not trained on:\n")
    print("| answers | mean sentiment | KL per answer, nats | perplexity under the model before |\n|---|---|---|---|")
    for name, pairs in answers.items():
        feeling = mean(sentiment([response for _, response in pairs]))
        print(f"| {name} | {feeling:.3f} | {kl[name]} | {perplexity(model, tokenizer, pairs):.1f} |", flush=True)
    trained = [row for row in read_lines(directory / "ppo/logs/metrics.jsonl") if row["phase"] == "train"]
    if (reward := reward_at(kl_of_best, trained)) is not None:
        print(f"| in training, at that KL | {reward:.3f} | {kl_of_best:.2f} | |")
    for prompt in prompts[:: math.ceil(len(prompts) / SHOWN)]:
        print(f"\n{prompt} ...")
        for name, pairs in answers.items():
            print(f"  {name}: {' '.join(dict(pairs)[prompt].split())}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
