"""The TRL recipe runs by one command, where the hub names are directories with tiny stand-ins."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.architectures import build_encoder, build_model
from tests.launching import ROOT, run
from tests.logs import metrics

pytestmark = pytest.mark.long

QUESTIONS = [f"What is {first} plus {second}?" for first in range(9) for second in range(9)]
FLAGS = {
    "sft": "--max_steps 6 --stream_sample 60 --shuffle_buffer 20 --eval_interval 3 --save_interval 3",
    "reward": "--num_train_epochs 2 --learning_rate 1e-3",
    "ppo": "--max_iterations 2 --eval_prompts 4 --save_interval 1",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, builtin_cache):
    place = tmp_path_factory.mktemp("trl")
    build_model("opt", place / "facebook/opt-1.3b", builtin_cache, max_position_embeddings=2048)
    build_encoder("deberta-v3", place / "microsoft/deberta-v3-base", max_position_embeddings=512)
    good, bad = "The sum of both is the answer.", "I will not tell."
    write(
        place / "Open-Orca/OpenOrca",
        [{"id": q, "system_prompt": "Be kind." * (len(q) % 2), "question": q, "response": good} for q in QUESTIONS],
    )
    dialogue = "\n\nHuman: Good morning.\n\nAssistant: Good morning.\n\nHuman: {}\n\nAssistant: {}"
    write(
        place / "Anthropic/hh-rlhf",
        [{"chosen": dialogue.format(q, good), "rejected": dialogue.format(q, bad)} for q in QUESTIONS],
    )
    write(
        place / "genai360/Alpaca-OrcaChat",
        [{"id": 1, "instruction": "Nothing of this is used.", "input": q, "output": good} for q in QUESTIONS],
    )
    return place


def write(directory, rows):
    directory.mkdir(parents=True)
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_three_steps_run_by_one_command(workplace):
    command = ["bash", str(ROOT / "launch/recipe_trl.sh"), "--output_dir", "made"]
    for step, flags in FLAGS.items():
        command += [f"--{step}_flags", flags]
    done = run(command, cwd=workplace, timeout=1500)
    made = workplace / "made"

    assert [row["step"] for row in metrics(made / "sft") if row["phase"] == "eval"] == [0, 3, 6]
    assert "pass 1 over the streamed data had" in done.stdout
    assert (made / "sft/adapter/adapter_model.safetensors").is_file()
    assert {"accuracy"} <= metrics(made / "reward")[-1].keys()
    encoder = AutoModelForSequenceClassification.from_pretrained(made / "reward")
    assert encoder.config.model_type == "deberta-v2" and encoder.config.num_labels == 1

    updates = [row for row in metrics(made / "ppo") if row["phase"] == "train"]
    assert [row["optimizer_steps"] for row in updates] == [32, 32]
    assert 0.199 < updates[1]["kl_coef"] < updates[0]["kl_coef"] == 0.2  # steered, since the KL is below its target
    assert all(row["eos_fraction"] == 0 and 32 <= row["response_length"] <= 400 for row in updates)
    answers = [json.loads(line) for line in (made / "ppo/samples/after.jsonl").read_text().splitlines()]
    assert answers and all(row["prompt"].endswith("?\n\nAnswer:") for row in answers)
    assert not any("Nothing of this" in row["prompt"] for row in answers)
    tokenizer = AutoTokenizer.from_pretrained(made / "ppo/actor")
    model = AutoModelForCausalLM.from_pretrained(made / "ppo/actor")  # whole: the adapters are merged
    assert model.config.vocab_size >= len(tokenizer) and not list((made / "ppo/actor").glob("adapter*"))
    assert json.loads((made / "summary.json").read_text())["accuracy"]
