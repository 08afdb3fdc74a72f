"""Encoder-decoder models through all steps, on 1 and 2 ranks: the same numbers, and resumed bit for bit."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from datasets import Dataset
from peft import PeftModel
from safetensors import safe_open

from common.data.records import Message, Prompt
from inference.decoding import respond, stream_response
from inference.loading import load_actor
from inference.options import DecodingOptions, LoadOptions
from tests.distributed.variants import ENCODER_DECODERS, ENCODER_DECODERS_AT_LENGTH
from tests.encoder_decoders import build_encoder_decoder
from tests.launching import ROOT, at_length, launch_each
from tests.logs import metrics, same_weights

PROGRAM = ROOT / "tests" / "distributed" / "encoder_decoder_cases.py"
CASES = pytest.mark.parametrize("case", [*ENCODER_DECODERS, *at_length(ENCODER_DECODERS_AT_LENGTH)])
IN_FP32_AT_LENGTH = [name for name, case in ENCODER_DECODERS_AT_LENGTH.items() if "bf16" not in case[-1]]
RANKS = pytest.mark.parametrize("ranks", [2, *at_length([1])])


@pytest.fixture(scope="module")
def output(tmp_path_factory, length) -> Path:
    """RANKS/{whole,broken}/CASE; one launch, at length one for each number of ranks."""
    directory = tmp_path_factory.mktemp("encoder-decoders")
    rows = [
        {"prompt": f"How much is {n} plus {n * 7}?", "chosen": f"the sum is {n * 8}", "rejected": "Paris, of course."}
        for n in range(120)
    ]
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("t5", "flan-t5"):
        build_encoder_decoder(name, directory / "models" / name)
    inputs = str(directory / "pairs.jsonl"), str(directory / "models"), str(directory)
    launch_each(PROGRAM, *length, *inputs, ranks=(1, 2) if length else (2,), timeout=1800)
    return directory


@CASES
@RANKS
def test_a_resumed_run_ends_as_an_undisturbed_one(output, case, ranks):
    whole, resumed = (output / str(ranks) / kind / case for kind in ("whole", "broken"))
    assert metrics(whole) and metrics(resumed) == metrics(whole)
    same_weights(whole, resumed)
    for samples in (whole / "samples").iterdir():
        assert (resumed / "samples" / samples.name).read_text() == samples.read_text()


@pytest.mark.long
@pytest.mark.parametrize("case", [*ENCODER_DECODERS, *IN_FP32_AT_LENGTH])
def test_another_number_of_ranks_gives_the_same_numbers(output, case):
    one, two = (
        [record for record in metrics(output / str(ranks) / "whole" / case) if record["phase"] == "train"]
        for ranks in (1, 2)
    )
    names = ("reward", "value_loss") if case.startswith("ppo") else ("loss",)
    for name in (name for name in names if name in one[0]):
        # Sums in another order drift apart from step to step. With that one sampled token may differ, and then all do.
        compared = 1 if case.startswith("ppo") else 3
        found, expected = ([record[name] for record in records[:compared]] for records in (one, two))
        assert found == pytest.approx(expected, rel=2e-2, abs=2e-3), name


@pytest.mark.parametrize("case", [name for name in ENCODER_DECODERS if name.startswith("sft")])
@torch.no_grad()
def test_step_1_learns_and_saves_what_it_measured(output, case):
    """By transformers' own loss, of the tokens that its own tokenizer makes."""
    directory = output / "2" / "whole" / case
    first, *_, last = [record for record in metrics(directory) if record["phase"] == "eval"]
    assert last["perplexity"] < first["perplexity"]
    model = hf.AutoModelForSeq2SeqLM.from_pretrained(directory).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(directory)
    (prepared,) = (output / "2" / "data").glob("demonstration-*/eval.arrow")
    total = tokens = 0
    for row in Dataset.from_file(str(prepared)):
        labels = torch.tensor([row["response_ids"]])
        assert row["prompt_ids"][-1] == row["response_ids"][-1] == tokenizer.eos_token_id
        total += float(model(input_ids=torch.tensor([row["prompt_ids"]]), labels=labels).loss) * labels.numel()
        tokens += labels.numel()
    assert math.exp(total / tokens) == pytest.approx(last["perplexity"], rel=1e-4)


@pytest.mark.long
@torch.no_grad()
def test_step_2_saves_a_model_that_scores_as_measured(output):
    directory = output / "2" / "whole" / "reward-t5"
    last = [record for record in metrics(directory) if record["phase"] == "eval"][-1]
    plain = hf.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    (prepared,) = (output / "2" / "data").glob("comparison-*/eval.arrow")
    rows = Dataset.from_file(str(prepared))
    for side in ("chosen", "rejected"):
        texts = [torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]]) for row in rows]
        scores = torch.cat([plain(input_ids=text).logits[:, 0] for text in texts])
        assert float(scores.mean()) == pytest.approx(last[f"{side}_score"], abs=1e-4)


@pytest.mark.parametrize("case, tied", [("sft-flan-t5", False), ("ppo-gae/actor", True)])
def test_output_embeddings_are_tied_as_they_were(output, case, tied):
    """Also where they were partitioned as they were loaded."""
    with safe_open(output / "2" / "whole" / case / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" not in file.keys()) == tied


@torch.no_grad()
def test_adapters_on_the_base_are_the_merged_model(output):
    directory = output / "2" / "whole" / "sft-flan-t5"
    base = hf.AutoModelForSeq2SeqLM.from_pretrained(output / "models" / "flan-t5")
    adapted = PeftModel.from_pretrained(base, directory / "adapter").eval()
    merged = hf.AutoModelForSeq2SeqLM.from_pretrained(directory).eval()
    inputs = {"input_ids": torch.tensor([[5, 9, 12, 1]]), "decoder_input_ids": torch.tensor([[0, 7, 8]])}
    assert torch.allclose(adapted(**inputs).logits, merged(**inputs).logits, atol=1e-4)


def test_the_result_of_step_1_is_read_by_the_other_programs(output):
    """What is generated in batches and token by token is what the step's samples say."""
    directory = output / "2" / "whole" / "sft-flan-t5"
    actor, decoding = load_actor(str(directory), LoadOptions()), DecodingOptions(max_new_tokens=64)
    samples = [json.loads(line) for line in (directory / "samples" / "after.jsonl").read_text().splitlines()]
    asked = [sample["prompt"].removeprefix("Human: ").removesuffix(" Assistant:") for sample in samples]
    prompts = [Prompt((Message("user", question),)) for question in asked]
    answers = respond(actor, prompts, decoding, batch_size=3)
    assert samples and [answer.text for answer in answers] == [sample["response"] for sample in samples]
    ids = actor.codec.encode_prompt(prompts[0])
    for way in (decoding, replace(decoding, num_beams=3, repetition_penalty=1.2)):
        (answer,) = respond(actor, prompts[:1], way, batch_size=1)
        assert "".join(actor.codec.stream(stream_response(actor, ids, way))) == answer.text


@pytest.mark.parametrize("case", [name for name in ENCODER_DECODERS if name.startswith("ppo")])
@RANKS
def test_step_3_starts_at_the_reference_and_moves(output, case, ranks):
    directory = output / str(ranks) / "whole" / case
    trained = [record for record in metrics(directory) if record["phase"] == "train"]
    assert abs(trained[0]["kl"]) < 1e-5 and abs(trained[-1]["kl"]) > 1e-6
    assert all(record["sampler_gap_max"] < 1e-3 for record in trained)
    start = directory.parent / ENCODER_DECODERS[case][1]
    start = hf.AutoModelForSeq2SeqLM.from_pretrained(
        start if start.is_dir() else output / "models" / start.name
    ).state_dict()
    actor = hf.AutoModelForSeq2SeqLM.from_pretrained(directory / "actor").state_dict()
    assert any(not torch.equal(actor[name], start[name]) for name in start)
    assert (directory / "critic").is_dir() == (case == "ppo-gae")
    if case == "ppo-gae":
        critic = hf.AutoModelForSequenceClassification.from_pretrained(directory / "critic")
        assert isinstance(critic, hf.T5ForSequenceClassification)
