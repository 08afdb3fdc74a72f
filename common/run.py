"""What every program does around its training: open the output, prepare text and data, say what was made."""
from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError

from common.config import save_config
from common.data.blend import parse_data_path
from common.data.collate import unmasked
from common.data.prepare import DataRequest, PreparedData
from common.data.sampler import StepSampler
from common.data.tokenization import Codec, load_tokenizer, make_codec, tokenizer_fingerprint
from common.distributed import barrier, device, is_main, on_every_rank, rank, say, world_size
from common.errors import DIVERGED, Diverged, TrainingFailure, UserError
from common.options import DataOptions
from common.peers import enter
from common.models.factory import load_config
from common.models.scalar import is_scalar_config
from common.obstacles import check_nothing_in_the_way
from common.output_lock import lock_output
from common.provenance import FILE as PROVENANCE_FILE
from common.provenance import RAW, Calibration, Provenance, read_provenance
from common.split_rule import check_split_rule, split_rule_of
from common.tracking import Tracker, quiet_libraries

CONFIG_FILE = "run_config.yaml"
_IN_THE_WAY = (errno.EISDIR, errno.EEXIST, errno.ENOTDIR)  # what says so is no matter of space


def open_run(config, parts: Sequence[str] = ("",)) -> Tracker:
    """Make the output directory and send libraries' chatter to its logs.

    Not before everything is checked: the libraries' logs of an earlier run there are continued from here on, its
    metrics and samples are replaced when the tracker begins; its models stay until `publishing`.

    Args:
        parts: the directories inside it that will hold models; "" is the output directory itself.

    Raises:
        UserError: another run has the directory, something in it is in the way, or it cannot be written to.
    """
    output = Path(config.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
        check_nothing_in_the_way(output, parts, rank())
        if is_main():
            lock_output(output)
            open(output / "logs" / "metrics.jsonl", "ab").close()
        quiet_libraries(output)
    except OSError as error:
        raise UserError(f"--output_dir {output}: {error.filename or output} cannot be written: {error.strerror}: make "
                        "it writable, or choose another directory") from error
    for note in config.notes:
        say(f"note: {note}")
    return Tracker(output, config.enable_tensorboard, config.tensorboard_path)


def open_codec(config: DataOptions, source: str, flag: str) -> Codec:
    """The codec for a model; one that this project made must be used with the text it was trained on.

    Raises:
        UserError: the model was trained with another template, end token or tokenizer.
    """
    codec = make_codec(load_tokenizer(source, trust_remote_code=config.trust_remote_code), config.template,
                       add_eot_token=config.add_eot_token, eot_token=config.eot_token)
    provenance = read_provenance(source)
    if provenance is not None:
        _check_text(provenance, codec, f"{flag} {source}", "this run")
        check_split_rule(provenance, config, f"{flag} {source}")
    return codec


def read_calibration(config, codec: Codec, source: str) -> Calibration:
    """The scale of a reward model's scores; `RAW` if it is not known or not wanted.

    Raises:
        UserError: it is no reward model, or it reads other ids than the actor writes.
    """
    flag = f"--critic_model_name_or_path {source}"
    if not is_scalar_config(load_config(source, "--critic_model_name_or_path", config.trust_remote_code)):
        raise UserError(f"{flag} is no reward model: it has no trained score head; make one with step2_reward/main.py")
    provenance = read_provenance(source)
    if provenance is None:
        tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
        if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(codec.tokenizer):
            raise UserError(f"{flag} has another tokenizer than the actor: train a reward model on the actor's tokens")
    else:
        _check_text(provenance, codec, flag, f"--actor_model_name_or_path {config.actor_model_name_or_path}")
        check_split_rule(provenance, config, flag)
    if not config.normalize_scores:
        return RAW
    if provenance is not None and provenance.score_std is not None and provenance.score_std <= 0:
        raise UserError(f"{flag} has scores with the standard deviation {provenance.score_std:g}, which nothing can be "
                        "measured in: train the reward model again, or add --no_normalize_scores")
    if provenance is None or provenance.score_std is None:
        say(f"note: {flag} does not say the mean and spread of its scores, so they are used as they are")
        return RAW
    return Calibration(provenance.score_mean, provenance.score_std)


def _check_text(provenance: Provenance, codec: Codec, made: str, used: str) -> None:
    now = text_of(codec)
    for what in ("template", "end_token", "tokenizer"):
        was = getattr(provenance, what)
        if was != now[what]:
            raise UserError(f"{made} was trained with {what.replace('_', ' ')} {was[:24]!r}, but {used} has "
                            f"{now[what][:24]!r}: use the same in every step")


def text_of(codec: Codec) -> dict[str, str]:
    """The part of a provenance that says how text becomes ids."""
    return {"tokenizer": tokenizer_fingerprint(codec.tokenizer), "template": codec.template.name,
            "end_token": codec.end_token, "pad_token": codec.pad_token}


def data_request(config: DataOptions, kind: str, max_tokens: int, length_flag: str) -> DataRequest:
    """This step's part of `--data_path`, to be prepared as records of `kind`; `length_flag` set `max_tokens`."""
    return DataRequest(
        data_path=parse_data_path(config.data_path), kind=kind, phase=config.phase, data_split=config.data_split,
        eval_fraction=config.eval_fraction, columns=config.columns or None, max_tokens=max_tokens,
        length_flag=length_flag, max_rows=config.max_rows, max_bad_fraction=config.max_bad_rows,
        cache_dir=config.data_output_path)


def say_data(data: PreparedData) -> None:
    """Tell what was read, what was unusable, and what is left to train on."""
    for line in data.report.lines():
        say(line)


@contextlib.contextmanager
def publishing(config: DataOptions, codec: Codec, engines: dict[str, object], step: str, base: str,
               parts: Sequence[str] = (), **calibration: float):
    """Export within this context: provenance.json is gone while it lasts, and written when it ends well.

    So an output directory that has one is whole, also when it is used again. The resolved configuration goes with it;
    what an earlier run left that this one may not write (adapters, a moving average) is removed.

    Args:
        engines: what is to be exported, by names for the user.
        parts: model directories inside the output directory; each gets the provenance too, so that it can be moved.

    Raises:
        Diverged: an engine gives no finite numbers any more, before anything is touched.
        TrainingFailure: the disk refuses.
    """
    enter("saving the result")
    for name, engine in engines.items():
        _check_usable(engine, name, codec)
    output = Path(config.output_dir)
    try:
        if is_main():
            (output / PROVENANCE_FILE).unlink(missing_ok=True)
            for old in (output / "adapter", output / "ema"):
                shutil.rmtree(old, ignore_errors=True)
        yield
        if is_main():
            save_config(config, output / CONFIG_FILE)
            provenance = Provenance(step=step, base=base, **split_rule_of(config), **text_of(codec), **calibration)
            for directory in (*(output / part for part in parts), output):
                provenance.write(directory)
    except (OSError, SafetensorError) as error:
        named = isinstance(error, OSError) and error.errno in _IN_THE_WAY
        cure = "move away what is there" if named else "free space there or make it writable"
        raise TrainingFailure(f"the result cannot be written to {output}: {error}: {cure}, and run the same command "
                              "again, which goes on from the newest checkpoint") from error
    barrier()


@torch.no_grad()
def _check_usable(engine, name: str, codec: Codec) -> None:
    """One small forward pass: no loss has been computed since the last update where nothing is held out."""
    tokens = torch.full((1, 2), codec.end_id, device=device())
    engine.eval()
    output = engine(**unmasked(tokens))
    engine.train()
    numbers = output if isinstance(output, torch.Tensor) else output.logits
    if not on_every_rank(bool(numbers.isfinite().all())):
        raise Diverged(f"what the trained {name} computes is not finite: {DIVERGED}")


def step_sampler(config, train, pack_to: int = 0) -> StepSampler:
    """The optimizer steps of step 1 and step 2 over prepared rows; see `StepSampler` on `pack_to`."""
    sequences = 2 if "chosen_ids" in train.column_names else 1  # a pair is padded to its longer one
    return StepSampler([sequences * length for length in train["length"]],
                       rows_per_micro_batch=config.per_device_train_batch_size,
                       micro_batches_per_step=config.gradient_accumulation_steps, world_size=world_size(),
                       rank=rank(), seed=config.seed, max_tokens=config.max_tokens_per_micro_batch,
                       pack_to=pack_to)


def report_done(tracker: Tracker, steps: int, metrics: dict[str, float], output_dir: str) -> None:
    """Record the final metrics, close the tracker, and say where the result lies."""
    tracker.log("done", steps, metrics)
    tracker.close()
    say(f"saved to {output_dir}")
