"""Options from defaults, recipes and the command line, on real files."""

from __future__ import annotations

import pytest

from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig
from tests.command_lines import COMMAND_LINES, MODELS, message, read, recipe

# Every flag of DeepSpeed-Chat's three programs, with a value, where it belongs.
COMMON_FLAGS = (
    "--data_path a b --data_split 2,4,4 --data_output_path out/data --num_train_epochs 2 --dtype fp16 "
    "--offload --lr_scheduler_type linear --num_warmup_steps 5 --gradient_accumulation_steps 2 --seed 7 "
    "--local_rank 0 "
    "--only_optimize_lora --compute_fp32_loss --add_eot_token --eot_token <|end|> --deepspeed "
    "--num_padding_at_beginning 1 --enable_tensorboard --tensorboard_path out/board --enable_test_mode "
    "--test_stop_step 3 --output_dir out/model "
)
SUPERVISED_FLAGS = COMMON_FLAGS + (
    "--model_name_or_path m --per_device_train_batch_size 2 --per_device_eval_batch_size 2 --max_seq_len 512 "
    "--learning_rate 1e-5 --weight_decay 0.1 --zero_stage 2 --gradient_checkpointing --dropout 0.0 "
    "--disable_dropout --lora_dim 8 --lora_module_name decoder.layers. --lora_learning_rate 3e-4 "
    "--eval_interval 5 --eval_iters 10 --print_loss "
)
PPO_FLAGS = (
    COMMON_FLAGS
    + MODELS
    + (
        "--max_prompt_seq_len 256 --max_answer_seq_len 256 --actor_learning_rate 9.65e-6 "
        "--critic_learning_rate 5e-6 --offload_reference_model --offload_reward_model --actor_zero_stage 3 "
        "--critic_zero_stage 3 --enable_ema --unsupervised_dataset_name wiki "
        "--unsupervised_dataset_config_name en --unsup_coef 20 "
        "--ppo_epochs 2 --actor_weight_decay 0.1 --critic_weight_decay 0.1 --actor_lora_dim 8 "
        "--critic_lora_dim 8 --actor_lora_module_name layers --critic_lora_module_name layers "
        "--actor_lora_learning_rate 1e-4 --critic_lora_learning_rate 1e-4 "
        "--actor_gradient_checkpointing --critic_gradient_checkpointing "
        "--actor_dropout 0.1 --critic_dropout 0.1 --disable_actor_dropout --disable_critic_dropout "
        "--per_device_generation_batch_size 4 --per_device_training_batch_size 4 --generation_batches 2 "
        "--align_overflow --enable_mixed_precision_lora --print_answers --print_answers_interval 5 "
        "--enable_hybrid_engine --inference_tp_size 2 --unpin_actor_parameters --release_inference_cache "
        "--tp_gather_partition_size 4 "
    )
)


@pytest.mark.parametrize("cls, line", COMMAND_LINES)
def test_published_command_lines_parse(cls, line):
    config = read(cls, line)
    words = line.split()
    assert config.output_dir == words[words.index("--output_dir") + 1]
    assert config.gradient_accumulation_steps == int(words[words.index("--gradient_accumulation_steps") + 1])


def test_old_names_mean_the_new_options():
    config = read(
        PPOConfig,
        MODELS + "--per_device_train_batch_size 3 --per_device_mini_train_batch_size 5 --generation_batch_numbers 7",
    )
    assert (
        config.per_device_generation_batch_size,
        config.per_device_training_batch_size,
        config.generation_batches,
    ) == (3, 5, 7)


@pytest.mark.parametrize(
    "cls, line",
    [
        (SFTConfig, SUPERVISED_FLAGS + "--sft_only_data_path c:0.5"),
        (RewardConfig, SUPERVISED_FLAGS),
        (PPOConfig, PPO_FLAGS),
    ],
)
def test_every_old_flag_is_accepted(cls, line):
    config = read(cls, line)
    assert config.data_path == ("a", "b") and config.seed == 7 and config.dtype == "fp16"


def test_later_layers_win(tmp_path):
    first = recipe(tmp_path / "a.yaml", "seed: 1\nmax_seq_len: 64\nlearning_rate: 1e-3\n")
    second = recipe(tmp_path / "b.yaml", "seed: 2\nmax_seq_len: 128\n")
    config = read(SFTConfig, first + second + "--seed 3")
    assert (config.seed, config.max_seq_len, config.learning_rate, config.zero_stage) == (3, 128, 1e-3, 0)
    assert read(SFTConfig, "--seed 3 " + first).seed == 3


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("data_path: a.jsonl", ("a.jsonl",)),
        ("data_path: [a, 'b:0.3']", ("a", "b:0.3")),
        ("learning_rate: 1e-5", 1e-5),
        ("learning_rate: 1", 1.0),
        ("columns: {prompt: question}", {"prompt": "question"}),
        ("dropout: none", None),
        ("dropout: null", None),
        ("dropout: 0", 0.0),
        ("offload: false", False),
        ("data_split: 2,4,4", "2,4,4"),
    ],
)
def test_values_in_recipes(tmp_path, text, wanted):
    value = getattr(read(SFTConfig, recipe(tmp_path / "r.yaml", text)), text.partition(":")[0])
    assert value == wanted and type(value) is type(wanted)


@pytest.mark.parametrize(
    "line, name, wanted",
    [
        ("--print_loss", "print_loss", True),
        ("--print_loss false", "print_loss", False),
        ("--no_enable_tensorboard", "enable_tensorboard", False),
        ("--enable_tensorboard=True", "enable_tensorboard", True),
        ("--print_loss --no_print_loss", "print_loss", False),
        ("--max-seq-len 64", "max_seq_len", 64),
        ("--max-seq-len=64", "max_seq_len", 64),
        ("--output-dir my-dir", "output_dir", "my-dir"),
        ("--columns prompt=q chosen=a=b", "columns", {"prompt": "q", "chosen": "a=b"}),
        ("--columns prompt=q --columns chosen=a", "columns", {"prompt": "q", "chosen": "a"}),
        ("--learning_rate 1e-3 --learning_rate 1e-4", "learning_rate", 1e-4),
        ("--max_rows none", "max_rows", None),
        ("--data_path a --data_path b c", "data_path", ("a", "b", "c")),
    ],
)
def test_values_on_the_command_line(line, name, wanted):
    assert getattr(read(SFTConfig, line), name) == wanted


@pytest.mark.parametrize(
    "word, wanted",
    [("-1e-3", -1e-3), ("-.5", -0.5), ("-1.", -1.0), ("-2", -2.0), ("-1E+2", -100.0), ("-.5e1", -5.0), ("-1_0", -10.0)],
)
def test_a_number_below_zero_follows_its_flag_as_any_other(word, wanted):
    for line in (f"--min_reward {word}", f"--min_reward={word}", f"--min-reward {word} --seed 3"):
        assert read(PPOConfig, MODELS + line).min_reward == wanted
    assert read(SFTConfig, f"--data_path a {word} --seed 3").data_path == ("a", word)


def test_a_flag_that_is_given_twice_is_told(tmp_path):
    config = read(PPOConfig, MODELS + "--seed 1 --seed 2 --gamma 1 --gamma 1.0 --data_path a --data_path b")
    assert config.notes == ("--seed 2 takes the place of --seed 1",)
    assert read(SFTConfig, recipe(tmp_path / "r.yaml", "seed: 1\n") + "--seed 2").notes == ()
    # What takes several values takes those of each time; a recipe's as a whole give way to the command line's.
    both = recipe(tmp_path / "r.yaml", "data_path: [x, y]\n") + "--data_path a --data-path=b"
    assert read(SFTConfig, both).data_path == ("a", "b")


@pytest.mark.parametrize(
    "cls, line, parts",
    [
        (
            PPOConfig,
            "--actor_learnin_rate 1",
            ["unknown flag --actor_learnin_rate: did you mean --actor_learning_rate?"],
        ),
        (PPOConfig, "--generation_batch_number=1", ["did you mean --generation_batch_numbers?"]),
        (SFTConfig, "--no_enable_tensorbord", ["did you mean --no_enable_tensorboard?"]),
        (SFTConfig, "--zzzzzz", ["unknown flag --zzzzzz", "--help"]),
        (SFTConfig, "--learning 1e-4", ["unknown flag --learning:"]),  # no abbreviations
        (SFTConfig, "stray", ["unexpected argument stray"]),
        (SFTConfig, "--seed 1 2", ["unexpected argument 2"]),
        (SFTConfig, "--seed", ["--seed", "expected one argument"]),
        (SFTConfig, "--seed many", ["--seed", "whole number", "'many'"]),
        (SFTConfig, "--seed 1.5", ["--seed", "whole number"]),
        (SFTConfig, "--learning_rate nan", ["--learning_rate", "a number at least 0"]),
        (SFTConfig, "--eval_fraction 1", ["--eval_fraction", "at least 0 and below 1"]),
        (SFTConfig, "--max_rows 0", ["--max_rows", "at least 1, or none"]),
        (SFTConfig, "--dtype int8", ["--dtype", "auto, bf16, fp16, fp32"]),
        (SFTConfig, "--zero_stage 4", ["--zero_stage", "0, 1, 2, 3"]),
        (SFTConfig, "--print_loss maybe", ["--print_loss", "true or false"]),
        (SFTConfig, "--columns prompt", ["--columns", "name=value"]),
        (SFTConfig, "--columns a=x --columns b=y a=z", ["--columns", "given twice", "keep one"]),
        (SFTConfig, "--columns a=x a=z", ["--columns", "different values for one name", "keep one"]),
        (SFTConfig, "--columns prompt=q,chosen=a", ["--columns 'prompt=q,chosen=a'", "--columns prompt=q chosen=a"]),
        (PPOConfig, "--min_reward -inf", ["--min_reward: expected a number, or none, got '-inf'"]),
        (PPOConfig, "--min_reward -1e", ["--min_reward: expected a number, or none, got '-1e'"]),
        (SFTConfig, "--seed -3", ["--seed: expected a whole number at least 0", "'-3'"]),
        (
            SFTConfig,
            "--data_path a,b:0.5",
            ["--data_path 'a,b:0.5': there is no such path", "words of their own, a b:0.5,", "[a, b:0.5]"],
        ),
        (SFTConfig, "--sft_only_data_path 'a, b'", ["--sft_only_data_path 'a, b'", "words of their own, a b,"]),
        (SFTConfig, "--output_dir ''", ["--output_dir", "text"]),
        (SFTConfig, "--config", ["--config", "expected at least one argument"]),
        (SFTConfig, "--config nowhere.yaml", ["--config nowhere.yaml", "No such file"]),
        (
            PPOConfig,
            "--per_device_train_batch_size 2 --per_device_generation_batch_size 3",
            ["--per_device_train_batch_size", "--per_device_generation_batch_size"],
        ),
    ],
)
def test_bad_command_lines_get_one_clear_line(cls, line, parts):
    assert all(part in message(cls, line) for part in parts)


def test_two_names_with_the_same_value_or_on_two_levels_are_no_conflict(tmp_path):
    both = "--generation_batches 2 --generation_batch_numbers 2 "
    assert read(PPOConfig, MODELS + both).generation_batches == 2
    old = recipe(tmp_path / "r.yaml", "generation_batch_numbers: 3\n")
    assert read(PPOConfig, MODELS + old).generation_batches == 3
    assert read(PPOConfig, MODELS + old + "--generation_batches 4").generation_batches == 4


@pytest.mark.parametrize(
    "text, parts",
    [
        ("seed: 1\nlearnin_rate: 1\n", [":2:", "unknown key learnin_rate", "did you mean learning_rate?"]),
        ("# comment\nseed: many\n", [":2: seed", "whole number"]),
        ("seed: true", [":1: seed", "whole number"]),
        ("offload: 1", ["offload", "true or false"]),
        ("output_dir: 2024", ["output_dir", "text"]),
        ("seed:", ["seed", "got nothing"]),
        ("data_path: {a: 1}", ["data_path", "one or more values"]),
        ("columns: [a]", ["columns", "name=value"]),
        ("seed: 2\ncolumns: {a: x, a: z}", [":2: columns", "given twice"]),
        ("seed: 1\nseed: 1\n", [":2:", "seed is given twice"]),
        ("- a\n", ["option: value"]),
        ("seed: [1\n", ["not valid YAML"]),
        ("seed: !!python/name:os.system ''", ["seed", "whole number"]),
    ],
)
def test_bad_recipes_get_one_clear_line(tmp_path, text, parts):
    said = message(SFTConfig, recipe(tmp_path / "r.yaml", text))
    assert str(tmp_path / "r.yaml") in said and all(part in said for part in parts)


def test_several_sources_in_one_text_of_a_recipe(tmp_path):
    assert "[a, b]" in message(SFTConfig, recipe(tmp_path / "r.yaml", "data_path: a b"))


def test_conflicting_names_in_a_recipe(tmp_path):
    text = "generation_batches: 1\ngeneration_batch_numbers: 2\n"
    said = message(PPOConfig, recipe(tmp_path / "r.yaml", text))
    assert "r.yaml:1: generation_batches" in said and "r.yaml:2: generation_batch_numbers" in said


def test_recipes_that_are_no_text_or_empty(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"seed: \xff\xfe")
    assert "UTF-8" in message(SFTConfig, f"--config {tmp_path / 'r.yaml'}")
    assert read(SFTConfig, recipe(tmp_path / "e.yaml", "# nothing\n")) == SFTConfig()
