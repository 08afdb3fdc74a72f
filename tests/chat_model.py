"""A small language model that has learnt a few dialogues by heart, so that its greedy answers are known."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from common.artifacts.compatibility import text_of
from common.artifacts.provenance import Provenance
from common.data.records import Message, Prompt
from common.data.tokenization import Codec, load_tokenizer, make_codec
from tests.architectures import build_model

CAPITAL, AGAIN, RED, SING = "What is the capital of France?", "And again?", "Paint it red.", "Sing to me."
# What is asked, in turns, and the last answer; the same question means something else in another dialogue.
ANSWERS = {
    (CAPITAL,): "Certainly!\nIt is Paris.",
    (AGAIN,): "What again? Café \u2713",
    (CAPITAL, "Certainly!\nIt is Paris.", AGAIN): "Paris, as I said.",
    (CAPITAL, "Certainly!\nIt is Paris.", CAPITAL): "Certainly!\nIt is Paris.",
    (RED,): "\x1b[31mRed\x07!",
}
SONG = "la " * 40  # learnt without an end


def prompt_of(turns: tuple[str, ...]) -> Prompt:
    roles = ("user", "assistant") * len(turns)
    return Prompt(tuple(Message(role, text) for role, text in zip(roles, turns)))


def one_line(text: str) -> str:
    """An answer as the chatbot prints it into a pipe."""
    return text.replace("\n", " ")


def teach(directory: Path, cache_dir: Path, template: str = "question_answer") -> Path:
    """Write a LLaMA that knows `ANSWERS`, and a song that never ends, as step 1 would have left it."""
    build_model("llama", directory, cache_dir, hidden_size=64, intermediate_size=128, max_position_embeddings=512)
    codec = make_codec(load_tokenizer(str(directory)), template)
    model = AutoModelForCausalLM.from_pretrained(directory)
    rows = [(codec.encode_prompt(prompt_of(turns)), codec.encode_response(text)) for turns, text in ANSWERS.items()]
    rows.append((codec.encode_prompt(prompt_of((SING,))), codec.encode_response(SONG)[:-2]))
    learn(model, rows)
    model.save_pretrained(directory)
    provenance_of(codec, "sft").write(directory)
    return directory


def learn(model, rows: list[tuple[list[int], list[int]]]) -> None:
    """Train until every answer token is the most probable one."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for row, (prompt, answer) in enumerate(rows):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:
            return
    raise AssertionError(f"the dialogues were not learnt: loss {loss:.3f}")


def provenance_of(codec: Codec, step: str) -> Provenance:
    return Provenance(step=step, base="none", data_split="2,4,4", eval_fraction=0.05, **text_of(codec))
