"""The same text has the same ids in all three steps and in the chatbot, whatever the tokenizer does by itself."""

from functools import partial

import pytest
import torch
import transformers as hf
from datasets import concatenate_datasets

from common.artifacts.compatibility import text_of
from common.artifacts.export import write_model
from common.artifacts.provenance import Provenance
from common.config.parser import parse
from common.data.records import Message, Prompt
from common.errors import UserError
from common.models.loading import load_causal_lm, load_scalar_model
from common.supervised.run import read_inputs
from inference.chatbot import ChatConfig
from inference.dialogue import Dialogue
from inference.loading import load_actor
from step1_sft.task import SFTTask
from step2_reward.task import RewardTask
from step3_ppo.config import PPOConfig
from step3_ppo.inputs import read_inputs as read_ppo_inputs
from tests.preparation import write
from tests.tokenizers_built import (
    byte_level_bpe,
    gemma_sentencepiece,
    llama3_bpe,
    llama_prepending,
    llama_sentencepiece,
)

# Each makes a tokenizer in a directory.
TOKENIZERS = {
    "sentencepiece, starts texts, no padding": llama_sentencepiece,
    "sentencepiece, starts texts, no space put before": gemma_sentencepiece,
    "converted sentencepiece, a space put before any text": llama_prepending,
    "tiktoken's pattern, starts texts, no padding": llama3_bpe,
    "byte-level, starts texts with its end token": byte_level_bpe,
    "byte-level, one token for start, end and unknown, no padding": partial(byte_level_bpe, pad=None),
    "byte-level, the end token is the padding": partial(byte_level_bpe, bos=None, unk=None, pad="</s>"),
}
SPLIT = {"data_split": "1,1,1", "eval_fraction": 0.2}


def model_of(directory, rows=None) -> None:
    """Put a small model beside a tokenizer; `rows`: of its embeddings, else as many as there are tokens."""
    tokenizer = hf.AutoTokenizer.from_pretrained(directory)
    config = hf.LlamaConfig(
        vocab_size=rows or len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    hf.LlamaForCausalLM(config).save_pretrained(directory)


def question(number: int) -> str:
    return f"What is {number} + {number * 7}?\n  Na\u00efvely </s> <s>"


def answer(number: int) -> str:
    return f"It's {number * 8}, of course \u6771\u4eac."


def flags(directory, **settings) -> list[str]:
    settings = {**SPLIT, "data_path": directory / "rows.jsonl", "data_output_path": directory / "data", **settings}
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def saved(codec, source, directory, step, load) -> str:
    """The model of `source` as a step leaves it, untrained."""
    model = load(str(source), codec, dtype=torch.float32)
    write_model(model, dict(model.state_dict()), codec, directory)
    scale = {"score_mean": 0.0, "score_std": 1.0} if step == "reward" else {}
    Provenance(step=step, base=str(source), **SPLIT, **text_of(codec), **scale).write(directory)
    return str(directory)


@pytest.mark.parametrize("padded", [False, True], ids=["as-many-rows-as-tokens", "more-rows-than-tokens"])
@pytest.mark.parametrize("build", TOKENIZERS.values(), ids=TOKENIZERS)
def test_every_step_and_the_chatbot_make_the_same_ids(build, padded, tmp_path):
    base = build(tmp_path / "base")
    model_of(base, 512 if padded else None)
    rows = [{"prompt": question(n), "chosen": answer(n), "rejected": "No."} for n in range(60)]
    write(tmp_path / "rows.jsonl", rows)
    found = {}
    for name, task, load in (("sft", SFTTask, load_causal_lm), ("reward", RewardTask, load_scalar_model)):
        config = parse(task.config_class, flags(tmp_path, model_name_or_path=base, output_dir=tmp_path / name))
        inputs = read_inputs(task(config), config)
        found[name] = inputs.data
        saved(inputs.codec, base, tmp_path / name, name, load)
    models = {"actor_model_name_or_path": tmp_path / "sft", "critic_model_name_or_path": tmp_path / "reward"}
    config = parse(PPOConfig, flags(tmp_path, **models, output_dir=tmp_path / "ppo"))
    found["ppo"] = read_ppo_inputs(config).prompts
    path = ["--path", str(tmp_path / "sft"), "--data_output_path", str(tmp_path / "data")]
    chatbot = load_actor(str(tmp_path / "sft"), parse(ChatConfig, path))
    codec = chatbot.codec
    questions = {tuple(Dialogue(codec).ask(question(n))[0]): n for n in range(60)}
    assert len(questions) == 60
    seen = {}
    for name, data in found.items():
        both = concatenate_datasets([data.train, data.eval])
        seen[name] = {questions[tuple(row["prompt_ids"])] for row in both}  # no other ids
        for row in both:
            number = questions[tuple(row["prompt_ids"])]
            for column, text in (
                ("response_ids", answer(number)),
                ("chosen_ids", answer(number)),
                ("rejected_ids", "No."),
            ):
                if column in both.column_names:
                    assert row[column] == codec.encode_response(text, Prompt((Message("user", question(number)),)))
                    assert codec.decode_response(row[column]) == text
                    assert row[column].count(codec.end_id) == 1 and row[column][-1] == codec.end_id != codec.pad_id
    assert set().union(*seen.values()) == set(range(60)) and all(seen.values())
    rows = chatbot.model.get_input_embeddings().num_embeddings
    assert rows == (512 if padded else max(len(codec.tokenizer), rows)) and rows > codec.pad_id
    assert max(token for prompt in questions for token in prompt) < rows


@pytest.mark.parametrize("build", [llama_sentencepiece, llama3_bpe])
def test_a_tokenizer_of_another_model_is_refused_before_anything_is_loaded(build, tmp_path):
    """Its words would be rows of embeddings that nothing has learnt; special tokens are another matter."""
    base = build(tmp_path / "base")
    tokens = len(hf.AutoTokenizer.from_pretrained(base))
    write(tmp_path / "rows.jsonl", [{"prompt": question(n), "chosen": answer(n), "rejected": "No."} for n in range(9)])
    model_of(base, tokens - 30)
    config = parse(SFTTask.config_class, flags(tmp_path, model_name_or_path=base, output_dir=tmp_path / "sft"))
    said = rf"its tokenizer has \d+ tokens more than the model has embeddings \({tokens - 30}\)"
    with pytest.raises(UserError, match=f"^--model_name_or_path {base}: {said}"):
        read_inputs(SFTTask(config), config)
    with pytest.raises(UserError, match="tokens more than the model has embeddings"):
        load_actor(str(base), parse(ChatConfig, ["--path", str(base), "--data_output_path", str(tmp_path / "data")]))
