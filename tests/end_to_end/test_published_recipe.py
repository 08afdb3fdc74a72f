"""The published command lines of the three-step recipe run as they stand, where the hub names are directories.

Only the programs' paths are this clone's, and `--max_rows` is added.
"""

import json
import shlex
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.architectures import build_model
from tests.launching import ROOT, launch, run

SFT = """--model_name_or_path facebook/opt-1.3b --per_device_train_batch_size 8
  --per_device_eval_batch_size 8 --gradient_accumulation_steps 8 --lora_dim 128 --zero_stage 0
  --data_path Dahoas/rm-static Dahoas/full-hh-rlhf Dahoas/synthetic-instruct-gptj-pairwise
  yitingxie/rlhf-reward-datasets
  --num_train_epochs 5 --deepspeed --output_dir ./output/actor-models/1.3b"""
REWARD = """--model_name_or_path facebook/opt-350m --per_device_train_batch_size 8
  --per_device_eval_batch_size 8 --num_padding_at_beginning 1 --weight_decay 0.1 --disable_dropout
  --gradient_accumulation_steps 4 --zero_stage 0 --deepspeed --output_dir ./output/reward-models/350m"""
PPO = """--actor_model_name_or_path ./output/actor-models/1.3b/
  --critic_model_name_or_path ./output/reward-models/350m/ --actor_zero_stage 0 --critic_zero_stage 0
  --num_padding_at_beginning 1 --gradient_accumulation_steps 2 --deepspeed --actor_lora_dim 128 --enable_hybrid_engine
  --actor_gradient_checkpointing --disable_actor_dropout --per_device_train_batch_size 8
  --per_device_mini_train_batch_size 8 --output_dir ./output/step3-models/1.3b/"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, builtin_cache):
    """A directory in which the recipe's hub names are tiny stand-ins of the same layouts."""
    place = tmp_path_factory.mktemp("recipe")
    build_model("opt", place / "facebook" / "opt-1.3b", builtin_cache, max_position_embeddings=2048)
    build_model("opt-350m", place / "facebook" / "opt-350m", builtin_cache, max_position_embeddings=2048)
    topics = [f"number {number}" for number in range(120)]
    human = [f"\n\nHuman: What is {topic}?\n\nAssistant:" for topic in topics]
    good, bad = [f" It is {topic}, of course." for topic in topics], [f" Who cares about {topic}." for topic in topics]
    dialogue = [
        {"prompt": prompt, "response": yes, "chosen": yes, "rejected": no} for prompt, yes, no in zip(human, good, bad)
    ]
    write(place / "Dahoas" / "rm-static", dialogue)
    write(place / "Dahoas" / "full-hh-rlhf", dialogue)
    write(
        place / "Dahoas" / "synthetic-instruct-gptj-pairwise",
        [
            {"prompt": f"What is {topic}?", "chosen": yes.strip(), "rejected": no.strip()}
            for topic, yes, no in zip(topics, good, bad)
        ],
    )
    write(
        place / "yitingxie" / "rlhf-reward-datasets",
        [
            {"prompt": f"Human: What is {topic}?\n\n", "chosen": f"Assistant:{yes}", "rejected": f"Assistant:{no}"}
            for topic, yes, no in zip(topics, good, bad)
        ],
    )
    return place


def write(directory, rows):
    directory.mkdir(parents=True)
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def logged(directory, phase):
    lines = (directory / "logs" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["phase"] == phase]


def test_the_recipe_runs_as_published(workplace):
    with ThreadPoolExecutor() as pool:
        steps = [
            pool.submit(launch, ROOT / step / "main.py", *shlex.split(line), "--max_rows", "80", cwd=workplace)
            for step, line in (("step1_sft", SFT), ("step2_reward", REWARD))
        ]
        step1, step2 = (step.result() for step in steps)
    actor = workplace / "output" / "actor-models" / "1.3b"
    assert logged(actor, "eval")[-1]["perplexity"] < logged(actor, "eval")[0]["perplexity"]
    assert (actor / "adapter" / "adapter_model.safetensors").is_file()
    assert "yitingxie/rlhf-reward-datasets: 80 rows read, 0 unusable" in step1.stdout

    reward = workplace / "output" / "reward-models" / "350m"
    assert {"accuracy", "chosen_score", "rejected_score"} <= logged(reward, "done")[0].keys()
    assert "--num_padding_at_beginning has no effect" in step2.stdout

    step3 = launch(ROOT / "step3_ppo" / "main.py", *shlex.split(PPO), "--max_rows", "80", cwd=workplace)
    result = workplace / "output" / "step3-models" / "1.3b"
    assert "each iteration makes 2 rollout batches of 8, not 1" in step3.stdout
    assert {"reward", "kl", "seconds_generate", "seconds_other"} <= logged(result, "train")[-1].keys()
    AutoModelForCausalLM.from_pretrained(result / "actor")

    questions = ["What is number 7?", "What is number 90?"]
    chat = run(
        [
            "python",
            str(ROOT / "inference" / "chatbot.py"),
            "--path",
            "output/step3-models/1.3b/actor/",
            "--max_new_tokens",
            "8",
        ],
        cwd=workplace,
        stdin=f"{questions[0]}\n/reset\n{questions[1]}\n",
    )
    assert chat.stdout.splitlines() == [greedy_answer(result / "actor", question) for question in questions]


def greedy_answer(model_directory, question):
    """What plain transformers answers with the template written out; in a pipe the chatbot gives it on one line."""
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype="float32")
    prompt = tokenizer(f"\n\nHuman: {question}\n\nAssistant:", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())


@pytest.mark.long
def test_step_3_runs_on_eight_ranks_with_its_defaults_alone(workplace):
    """Steps 1 and 2 leave their results where step 3 looks for them; before that it names the missing step."""
    place, rows = workplace, ["--max_rows", "40"]
    missing = launch(ROOT / "step3_ppo" / "main.py", ranks=1, cwd=place, check=False)
    assert missing.returncode != 0 and "step1_sft/main.py" in missing.stderr
    launch(ROOT / "step1_sft" / "main.py", "--model_name_or_path", "facebook/opt-1.3b", *rows, cwd=place)
    launch(ROOT / "step2_reward" / "main.py", "--model_name_or_path", "facebook/opt-350m", *rows, cwd=place)
    launch(ROOT / "step3_ppo" / "main.py", *rows, ranks=8, cwd=place, timeout=1500)
    assert logged(place / "output" / "ppo", "done")
