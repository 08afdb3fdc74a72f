"""Options from defaults, recipes and the command line, on real files; and the options of the three steps."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.config.parser import ignored_options, option, options, parse, save_config
from common.errors import UserError
from inference.chatbot import ChatConfig
from inference.evaluate import EvaluateConfig
from inference.generate import GenerateConfig
from inference.merge_lora import MergeConfig
from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig

ROOT = Path(__file__).resolve().parents[2]
STEPS = (SFTConfig, RewardConfig, PPOConfig)
PROGRAMS = (*STEPS, ChatConfig, EvaluateConfig, GenerateConfig, MergeConfig)
MODELS = "--actor_model_name_or_path ./a --critic_model_name_or_path ./c "

# The published command lines of the DeepSpeed recipe, as the launcher passes them on.
COMMAND_LINES = [
    (
        SFTConfig,
        "--local_rank=0 --model_name_or_path facebook/opt-1.3b --per_device_train_batch_size 8 "
        "--per_device_eval_batch_size 8 --gradient_accumulation_steps 8 --lora_dim 128 --zero_stage 0 "
        "--data_path Dahoas/rm-static Dahoas/full-hh-rlhf Dahoas/synthetic-instruct-gptj-pairwise "
        "yitingxie/rlhf-reward-datasets --num_train_epochs 5 --deepspeed "
        "--output_dir ./output/actor-models/1.3b",
    ),
    (
        RewardConfig,
        "--local_rank=0 --model_name_or_path facebook/opt-350m --per_device_train_batch_size 8 "
        "--per_device_eval_batch_size 8 --num_padding_at_beginning 1 --weight_decay 0.1 --disable_dropout "
        "--gradient_accumulation_steps 4 --zero_stage 0 --deepspeed --output_dir ./output/reward-models/350m",
    ),
    (
        PPOConfig,
        "--local_rank=0 --actor_model_name_or_path ./output/actor-models/1.3b/ "
        "--critic_model_name_or_path ./output/reward-models/350m/ --actor_zero_stage 0 --critic_zero_stage 0 "
        "--num_padding_at_beginning 1 --gradient_accumulation_steps 2 --deepspeed --actor_lora_dim 128 "
        "--enable_hybrid_engine --actor_gradient_checkpointing --disable_actor_dropout "
        "--per_device_train_batch_size 8 --per_device_mini_train_batch_size 8 "
        "--output_dir ./output/step3-models/1.3b/",
    ),
]
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


def read(cls, line: str = ""):
    return parse(cls, shlex.split(line), prog="program")


def message(cls, line: str) -> str:
    with pytest.raises(UserError) as caught:
        read(cls, line)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def recipe(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return f"--config {path} "


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


@pytest.mark.parametrize(
    "cls, line, part",
    [
        (SFTConfig, "--data_split 2,4", "--data_split"),
        (SFTConfig, "--data_split 0,5,5", "leaves nothing for step 1"),
        (RewardConfig, "--data_split 10,0,0", "leaves nothing for step 2"),
        (SFTConfig, "--data_path a:0", "--data_path"),
        (SFTConfig, "--sft_only_data_path a:-1", "--sft_only_data_path"),
        (SFTConfig, "--disable_dropout --dropout 0.1", "--disable_dropout"),
        (SFTConfig, "--offload", "--zero_stage"),
        (SFTConfig, "--lora_dropout 0.1", "--lora_dim above 0"),
        (SFTConfig, "--lr_scheduler_type constant --num_warmup_steps 5", "--num_warmup_steps 5"),
        (PPOConfig, MODELS + "--lr_scheduler_type constant --num_warmup_steps 5", "constant_with_warmup"),
        (SFTConfig, "--eot_token x", "--add_eot_token"),
        (SFTConfig, "--enable_test_mode", "--test_stop_step"),
        (SFTConfig, "--test_stop_step 5", "--enable_test_mode"),
        (SFTConfig, "--no_enable_tensorboard --tensorboard_path b", "--enable_tensorboard"),
        (SFTConfig, "--model_name_or_path ./m --output_dir m", "--model_name_or_path"),
        (PPOConfig, MODELS + "--output_dir ./a/", "--actor_model_name_or_path"),
        (PPOConfig, MODELS + "--min_answer_seq_len 300", "--max_answer_seq_len"),
        (PPOConfig, MODELS + "--kl_target 3", "--kl_controller adaptive"),
        (PPOConfig, MODELS + "--kl_controller adaptive --kl_coef 0", "--kl_coef"),
        (PPOConfig, MODELS + "--no_normalize_scores --score_calibration rollout", "contradict"),
        (PPOConfig, MODELS + "--kl_estimator k2", "--kl_placement loss"),
        (PPOConfig, MODELS + "--kl_estimator k3 --kl_placement reward", "--kl_placement loss"),
        (PPOConfig, MODELS + "--missing_eos_score -1 --missing_eos_penalty 2", "--missing_eos_score"),
        (PPOConfig, MODELS + "--missing_eos_score -1 --draw_answer_lengths", "--missing_eos_score"),
        (PPOConfig, MODELS + "--ema_decay 0.9", "--enable_ema"),
        (PPOConfig, MODELS + "--unsup_coef 1", "--unsupervised_dataset_name"),
        (PPOConfig, MODELS + "--critic_lora_alpha 4", "--critic_lora_dim"),
        (PPOConfig, MODELS + "--offload --actor_zero_stage 0 --critic_zero_stage 0", "--actor_zero_stage"),
        (PPOConfig, MODELS + "--print_answers_interval 4", "--print_answers"),
        (PPOConfig, MODELS + "--temperature 0", "above 0"),
    ],
)
def test_values_that_do_not_go_together(cls, line, part):
    assert part in message(cls, line)


@pytest.mark.parametrize(
    "line, coefficient",
    [
        ("", 0.1),
        ("--kl_controller adaptive", 0.2),
        ("--kl_controller adaptive --kl_coef 0.1", 0.1),
        ("--kl_coef 0", 0.0),
    ],
)
def test_the_first_kl_coefficient_depends_on_the_controller(line, coefficient):
    assert read(PPOConfig, MODELS + line).first_kl_coef == coefficient


@pytest.mark.parametrize("line", ["", "--num_warmup_steps 0"])
def test_a_schedule_without_a_warm_up_takes_the_default_and_none(line):
    assert read(PPOConfig, MODELS + "--lr_scheduler_type constant " + line).lr_scheduler_type == "constant"
    assert read(PPOConfig, MODELS).num_warmup_steps == 100 and read(SFTConfig).num_warmup_steps == 0


def test_checks_hold_for_configs_made_in_python():
    with pytest.raises(UserError, match="--seed"):
        SFTConfig(seed=-1).validate()
    SFTConfig(data_split="0,1,1", sft_only_data_path=("a",)).validate()


def test_step_3_names_the_program_that_makes_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "step1_sft/main.py" in message(PPOConfig, "")
    made = [tmp_path / config.output_dir for config in (SFTConfig(), RewardConfig())]
    for directory, missing in zip(made, ("step1_sft/main.py", "step2_reward/main.py")):
        (directory / "checkpoints").mkdir(parents=True)  # of a run that was interrupted
        assert missing in message(PPOConfig, "")
        (directory / "config.json").write_text("{}")
    assert read(PPOConfig) == PPOConfig()


def test_an_output_directory_that_is_a_file(tmp_path):
    path = tmp_path / "result"
    path.write_text("")
    assert "is a file" in message(SFTConfig, f"--output_dir {path}")


@pytest.mark.parametrize("path", ["/proc/result", "n" * 300])
def test_an_output_directory_that_cannot_be_made(path):
    assert "cannot be written to" in message(SFTConfig, f"--output_dir {path}")


def test_options_without_effect_are_told_once_and_change_nothing(tmp_path):
    old = recipe(tmp_path / "r.yaml", "enable_hybrid_engine: true\ninference_tp_size: 2\n")
    config = read(PPOConfig, MODELS + old + "--inference_tp_size 4 --deepspeed --local_rank=1")
    assert len(config.notes) == 2
    assert f"{tmp_path / 'r.yaml'}:1: enable_hybrid_engine has no effect: " in config.notes[0]
    assert config.notes[1].startswith("--inference_tp_size has no effect: ")
    assert config == read(PPOConfig, MODELS)
    assert read(PPOConfig, MODELS).notes == ()


def values_of(meta):
    """Allowed values of an option."""
    text = st.text(
        st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="~$" if meta.path else ""), min_size=1
    ).filter(lambda value: value.strip() and value.lower() != "none")
    numbers = {
        "min_value": meta.low if meta.above is None else meta.above,
        "max_value": meta.high if meta.below is None else meta.below,
    }
    values = (
        st.sampled_from(meta.choices)
        if meta.choices
        else {
            bool: st.booleans(),
            int: st.integers(**numbers),
            str: text,
            float: st.floats(
                **numbers,
                exclude_min=meta.above is not None,
                exclude_max=meta.below is not None,
                allow_nan=False,
                allow_infinity=False,
            ),
            tuple: st.lists(text).map(tuple),
            dict: st.dictionaries(text, text),
        }[meta.kind]
    )
    return st.none() | values if meta.optional else values


class Unchecked:
    """The options of a step without the checks of values against each other."""

    def validate(self):
        pass


@pytest.mark.parametrize("cls", STEPS)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_saved_config_reads_back_equal(cls, data, tmp_path_factory):
    unchecked = type(cls.__name__, (Unchecked, cls), {"__doc__": cls.__doc__})
    config = unchecked(
        **{name: data.draw(values_of(meta)) for name, meta in options(unchecked).items() if not meta.ignored}
    )
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    save_config(config, path)
    again = parse(unchecked, ["--config", str(path)])
    assert again == config and again.notes == ()


@pytest.mark.parametrize("cls, line", COMMAND_LINES)
def test_a_run_repeats_from_its_saved_config(tmp_path, cls, line):
    config = read(cls, line)
    save_config(config, tmp_path / "deep" / "config.yaml")
    assert read(cls, f"--config {tmp_path / 'deep' / 'config.yaml'}") == config
    assert set(yaml.safe_load((tmp_path / "deep" / "config.yaml").read_text())) == (
        set(options(cls)) - set(ignored_options(cls))
    )


@pytest.mark.parametrize("cls", STEPS)
def test_help_explains_every_option(cls, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        read(cls, "--help")
    assert not stop.value.code
    shown = {entry.split()[0]: entry for entry in capsys.readouterr().out.split("\n  --")}
    for name, meta in options(cls).items():
        parts = [meta.ignored] if meta.ignored else [meta.help, "default", meta.unit or "", *meta.aliases]
        assert all(part in shown[name] for part in parts) and parts[0]


@pytest.mark.parametrize("cls", STEPS)
def test_options_are_consistent(cls):
    known = options(cls)
    assert set(known) == {item.name for item in dataclasses.fields(cls)} - {"notes"}
    spellings = [spelling for name, meta in known.items() for spelling in (name, *meta.aliases)]
    assert len(set(spellings)) == len(spellings)


def test_options_shared_by_steps_have_one_meaning():
    for name in set(options(SFTConfig)) & set(options(RewardConfig)):
        first, second = (dataclasses.replace(options(cls)[name], default=None, group="") for cls in STEPS[:2])
        assert first == second


def test_a_group_can_be_declared_in_a_few_lines():
    from common.config.parser import Config

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Speed(Config):
        """Speed"""

        limit: int = option(50, "not faster than this", unit="km/h", aliases=("max_speed",), low=1, high=130)

    assert parse(Speed, ["--max-speed", "80"]).limit == 80
    assert "at least 1 and at most 130" in message(Speed, "--limit 200")


def test_parsing_imports_no_torch():
    code = (
        "import sys; from common.config.parser import parse\n"
        "from step1_sft.config import SFTConfig; from step2_reward.config import RewardConfig\n"
        "from step3_ppo.config import PPOConfig\n"
        f"parse(SFTConfig, []); parse(RewardConfig, []); parse(PPOConfig, {MODELS.split()})\n"
        "print({'torch', 'transformers', 'datasets', 'deepspeed'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
