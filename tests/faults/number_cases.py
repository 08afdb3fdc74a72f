"""Numbers that are not finite, on one rank, in every kind of engine and in complete runs; writes down the outcome.

Run under the launcher: number_cases.py INPUTS OUTPUT_DIR short|long
"""

from __future__ import annotations

import io
import json
import re
import sys
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from common.checkpoints.saver import Saver
from common.data.tokenization import load_tokenizer, make_codec
from common.errors import TrainingFailure
from common.models.calibration import RAW
from common.models.loading import load_causal_lm, load_scalar_model
from common.runtime.distributed import barrier, gather_objects, is_main, rank
from common.runtime.program import run_program, start
from common.training.engine import EngineSettings, OptimizerSettings, deepspeed_config, training_engine
from step1_sft.main import main as step1
from step2_reward.main import main as step2
from step3_ppo.calibration import ScoreScale
from step3_ppo.config import PPOConfig
from step3_ppo.ema import EMA
from step3_ppo.main import main as step3
from step3_ppo.models import PPOModels
from step3_ppo.reward import TokenRewardModel
from step3_ppo.schedule import text_batches
from step3_ppo.trainer import PPOTrainer
from tests.distributed.gradient_cases import ROWS, experience, one_step, rows, with_lora
from tests.distributed.option_rows import STEPS
from tests.faults.number_rows import AUTO, ENGINES, RUNS, SHORT
from tests.supervised import reward_trainer, sft_trainer

PROGRAMS = {"sft": step1, "reward": step2, "ppo": step3}
BROKEN_RANK = 1


def main() -> None:
    *places, extent = [word for word in sys.argv[1:] if not word.startswith("--")]
    inputs, output = map(Path, places)
    torch.set_num_threads(1)
    start(120, seed=0)
    codec = make_codec(load_tokenizer(str(inputs / "model")), "human_assistant")
    found = {"engines": {}, "runs": {}}
    for name in ENGINES if extent == "long" else SHORT:
        mine = engine_case(str(inputs / "model"), codec, *ENGINES[name])
        found["engines"][name] = {what: all(equal[what] for equal in gather_objects(mine)) for what in mine}
    for name, (step, flags, poison, *_) in RUNS.items():
        words = f"{STEPS[step].flags} --output_dir {output}/{name} --data_output_path {output}/data {flags}"
        found["runs"][name] = whole_run(PROGRAMS[step], [word.format(inputs=inputs) for word in words.split()], poison)
    words = f"{STEPS['sft'].flags} --data_output_path {output}/data {AUTO}".format(inputs=inputs).split()
    found["fitted"] = fitted(words, output)
    if is_main():
        (output / "found.json").write_text(json.dumps(found))


# One engine, or actor and critic: a step that is skipped, and a trainer to which it never happened.


def engine_case(model: str, codec, step: str, where: str, stage: int, dtype: str, lora: bool, offload: bool) -> dict:
    """Whether the state is the same, bit for bit, before and after a skipped step, and as if it had never been."""
    takes = {"sft": sft, "reward": reward, "ppo": ppo, "warmup": partial(ppo, warmup=2)}[step]
    states = {}
    for kind in ("skips", "never"):
        trainer, engines, take = takes(model, codec, stage, dtype, lora, offload)
        take(0)
        states[kind, 0] = state_of(trainer, engines)
        if kind == "skips":
            with poisoned(engines[-1 if where.startswith("critic") else 0].module, where):
                take(1)
        states[kind, 1] = state_of(trainer, engines)
        take(2)
        states[kind, 2] = state_of(trainer, engines)
        for engine in engines:
            engine.destroy()
        skipped = joint_step(trainer).skipped
        assert skipped == (kind == "skips"), f"{skipped} steps were skipped"
    same = lambda left, right: (
        states[left].keys() == states[right].keys()
        and all(torch.equal(states[left][name], states[right][name]) for name in states[left])
    )
    return {
        "unchanged": same(("skips", 0), ("skips", 1)),
        "learns": not same(("skips", 1), ("skips", 2)),
        "alike before": same(("skips", 0), ("never", 0)),
        "as if never": same(("skips", 2), ("never", 2)),
    }


def sft(model: str, codec, *held):
    engine = build(load_causal_lm, model, codec, *held)
    trainer = sft_trainer(engine, rows(["prompt_ids", "response_ids"]), codec.pad_id, 5)
    batches = one_step(trainer.train["length"], 4)
    return trainer, [engine], lambda number: trainer.train_step(turned(batches, number))


def reward(model: str, codec, *held):
    engine = build(load_scalar_model, model, codec, *held)
    pairs = rows(["prompt_ids", "chosen_ids", "rejected_ids"])
    trainer = reward_trainer(engine, pairs, codec.pad_id, 5)
    batches = one_step([2 * length for length in trainer.train["length"]], 4)
    return trainer, [engine], lambda number: trainer.train_step(turned(batches, number))


def ppo(model: str, codec, *held, warmup: int = 0):
    """With the pre-training mix and a moving average; in so many updates the critic learns alone."""
    config = PPOConfig(
        critic_warmup_iterations=warmup,
        per_device_training_batch_size=2,
        unsup_coef=0.5,
        unsupervised_dataset_name="texts",
        gradient_accumulation_steps=2,
    )
    actor, critic = build(load_causal_lm, model, codec, *held), build(load_scalar_model, model, codec, *held)
    models = PPOModels(actor, critic, None, None, EMA(actor.module, 0.5), temperature=0.9)
    texts = next(text_batches(config, rows(["input_ids"]), codec))
    trainer = PPOTrainer(models, TokenRewardModel(models, config), config, codec, None, None, ScoreScale(RAW))

    def take(number: int) -> None:
        trainer.texts = iter([turned(texts, number)])
        trainer.update(experience(), number)

    return trainer, [actor, critic], take


def turned(items: list, number: int) -> list:
    """The first micro-batch alone, or all of them: so that no two steps are alike."""
    return items[: 1 + number % 2]


def build(load, model: str, codec, stage: int, dtype: str, lora: bool, offload: bool):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    settings = EngineSettings(stage, dtype, ROWS, offload, max_grad_norm=1.0)
    more = {"seed": 3} if load is load_scalar_model else {}
    network = load(model, codec, dtype=dtype, dropout=0.0, ds_config=deepspeed_config(settings), **more)
    if lora:
        with_lora(getattr(network, "classifier", network))
    return training_engine(network, settings, OptimizerSettings(1e-2, 1e-2, 0.1, "linear", 0, 10))


def joint_step(trainer):
    return trainer.learner.step if isinstance(trainer, PPOTrainer) else trainer.step


def state_of(trainer, engines) -> dict[str, torch.Tensor]:
    """This rank's share of weights, masters, moments and average, and the place in the schedules."""
    state = {}
    for number, engine in enumerate(engines):
        for name, parameter in engine.module.named_parameters():
            state[f"{number}.{name}"] = getattr(parameter, "ds_tensor", parameter)
        optimizer = engine.basic_optimizer
        for group in optimizer.param_groups:
            for index, parameter in enumerate(group["params"]):
                key = f"{number}.{len(state)}.{index}"
                state[key] = parameter
                for name, value in optimizer.state.get(parameter, {}).items():
                    state[f"{key}.{name}"] = torch.as_tensor(value)
        state[f"{number}.rates"] = torch.tensor([*engine.get_lr(), engine.lr_scheduler.last_epoch])
    if isinstance(trainer, PPOTrainer):
        state |= trainer.models.ema.tensors()
    return {name: value.detach().clone() for name, value in state.items()}


@contextmanager
def poisoned(module: torch.nn.Module, where: str, when=lambda ids: True):
    """Within the context a layer gives NaN, or with "gradient" passes NaN back, on one rank, in training.

    Args:
        when: of the ids that the module is given, whether to.
    """
    seen = {}

    def see(_, arguments, named):
        seen["now"] = module.training and rank() == BROKEN_RANK and when(named["input_ids"])

    def spoil(_, arguments, output):
        if not seen.get("now"):
            return None
        if "gradient" not in where:
            return output * torch.nan
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.nan)
        return None

    layer = [part for part in module.modules() if isinstance(part, torch.nn.Linear)][0]
    handles = [module.register_forward_pre_hook(see, with_kwargs=True), layer.register_forward_hook(spoil)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# Whole runs.


class Broken(Exception):
    """Takes the place of whatever ends a run."""


def whole_run(program, argv: list[str], poison: str) -> dict:
    """What all ranks are told at the end, and the checkpoints that are left."""
    directory = Path(argv[argv.index("--output_dir") + 1])
    said = None
    with poisoning(poison):
        try:
            if poison == "breaks off":
                with breaking_off():
                    program(argv)
            program(argv)
        except TrainingFailure as failure:
            said = str(failure)
    barrier()
    checkpoints = sorted(path.name for path in directory.glob("checkpoints/step-*"))
    return {
        "said": gather_objects(said),
        "checkpoints": checkpoints,
        "published": (directory / "provenance.json").exists(),
    }


def fitted(argv: list[str], output: Path) -> int:
    """Runs with --auto_micro_batch, and with what it has found given as a flag."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        step1([*argv, "--auto_micro_batch", "--output_dir", str(output / "auto")])
    found = re.search(r"--max_tokens_per_micro_batch is (\d+)", gather_objects(printed.getvalue())[0])
    step1([*argv, "--max_tokens_per_micro_batch", found[1], "--output_dir", str(output / "given")])
    return int(found[1])


@contextmanager
def poisoning(poison: str):
    """Within the context engines that are made give NaN for some rows ("rows"), or always after some steps."""
    import deepspeed

    initialize = deepspeed.initialize

    def initialize_poisoned(model, **arguments):
        result = initialize(model=model, **arguments)
        engine, kind = result[0], "critic" if hasattr(model, "classifier") else "actor"
        if arguments.get("optimizer") is not None and (kind in poison or not re.search("actor|critic", poison)):
            when = (
                (lambda ids: int(ids.sum()) % 5 == 0)
                if poison in ("rows", "breaks off")
                else (lambda ids: engine.global_steps >= 3)
            )
            poisons.enter_context(poisoned(model, poison, when))
        return result

    with ExitStack() as poisons:
        deepspeed.initialize = initialize_poisoned if poison else initialize
        try:
            yield
        finally:
            deepspeed.initialize = initialize


@contextmanager
def breaking_off():
    """Within the context a run ends with an exception right after its second checkpoint."""
    saves, save = [], Saver.save

    def save_twice(saver, *arguments):
        save(saver, *arguments)
        saves.append(arguments)
        if len(saves) == 2:
            raise Broken

    Saver.save = save_twice
    try:
        yield
    except Broken:
        barrier()
    else:
        raise AssertionError(f"the run was not broken off, after the checkpoints {saves}")
    finally:
        Saver.save = save


if __name__ == "__main__":
    sys.exit(run_program(main))
