"""What every program does around its training: open the output, prepare text and data, say what was made."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from common.artifacts.lock import lock_output
from common.artifacts.obstacles import check_nothing_in_the_way
from common.artifacts.provenance import FILE as PROVENANCE_FILE
from common.artifacts.provenance import RAW, Calibration, Provenance, read_provenance
from common.artifacts.split_rule import check_split_rule, known_openings, openings_of, split_rule_of
from common.artifacts.tracking import Tracker, quiet_libraries
from common.batching.collate import unmasked
from common.batching.sampler import StepSampler
from common.config.parser import save_config
from common.data.options import DataOptions
from common.data.prepare import PreparedData
from common.data.request import DataRequest
from common.data.tokenization import Codec, load_tokenizer, make_codec, published_ends, tokenizer_fingerprint
from common.errors import DIVERGED, Diverged, TrainingFailure, UserError
from common.models.completeness import problem
from common.models.loading import gives_scores
from common.runtime.distributed import barrier, device, is_main, on_every_rank, rank, say, world_size
from common.runtime.heartbeat import set_phase

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
        raise UserError(
            f"--output_dir {output}: {error.filename or output} cannot be written: {error.strerror}: make "
            "it writable, or choose another directory"
        ) from error
    for note in config.notes:
        say(f"note: {note}")
    return Tracker(output, config.enable_tensorboard, config.tensorboard_path)


def open_codec(config: DataOptions, source: str, flag: str) -> Codec:
    """The codec for a model; one that this project made must be used with the text it was trained on.

    Raises:
        UserError: the model was trained with another template, end token or tokenizer.
    """
    tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
    with config.naming_flags():
        codec = make_codec(
            tokenizer,
            config.template,
            add_eot_token=config.add_eot_token,
            eot_token=config.eot_token,
            date=config.template_date,
        )
    codec.end_at(published_ends(source))
    if codec.date:
        say(
            f"note: the chat template of {source} writes the date: prompts of all steps say {codec.date}, whenever "
            "they are made (--template_date)"
        )
    provenance = read_provenance(source)
    if provenance is not None:
        _check_text(provenance, codec, f"{flag} {source}", "this run")
        check_split_rule(provenance, config, f"{flag} {source}")
    return codec


def read_calibration(config, codec: Codec, source: str) -> Calibration | None:
    """The scale of a reward model's scores; `RAW` if none is wanted, None if the first rollout is to give it.

    Raises:
        UserError: it is no reward model, or it reads other ids than the actor writes.
    """
    flag = f"--critic_model_name_or_path {source}"
    if not gives_scores(source, "--critic_model_name_or_path", config.trust_remote_code):
        raise UserError(f"{flag} is no reward model: it has no trained score head; make one with step2_reward/main.py")
    provenance = read_provenance(source)
    actor = f"--actor_model_name_or_path {config.actor_model_name_or_path}"
    own = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
    same_ids, same_text = (
        tokenizer_fingerprint(own, chat_template=text) == tokenizer_fingerprint(codec.tokenizer, chat_template=text)
        for text in (False, True)
    )
    if provenance is None:
        if not same_ids:
            raise UserError(f"{flag} has another tokenizer than the actor: train a reward model on the actor's tokens")
        if not same_text and codec.template.name == "chat":
            say(f"note: {flag} has another chat template than {actor}: it reads what the actor's writes")
    else:
        if same_ids and not same_text and provenance.tokenizer == tokenizer_fingerprint(own):
            if provenance.template == codec.template.name == "chat":
                raise UserError(
                    f"{flag} was trained with another chat template than that of {actor}, of the same "
                    "tokens: train both with one"
                )
            provenance = replace(provenance, tokenizer=text_of(codec)["tokenizer"])  # what it has read is the same
        _check_text(provenance, codec, flag, actor)
        check_split_rule(provenance, config, flag)
    return _calibration(config, provenance, flag)


def _calibration(config, provenance: Provenance | None, flag: str) -> Calibration | None:
    wanted = config.score_calibration if config.normalize_scores else "none"
    known = provenance is not None and provenance.score_std is not None
    if wanted == "provenance" and not known:
        raise UserError(
            f"{flag} has no {PROVENANCE_FILE} with the mean and spread of its scores: measure them with "
            "--score_calibration rollout"
        )
    if wanted == "none":
        say("scores are used as they are")
        return RAW
    if wanted == "rollout" or not known:
        say(
            "scores are measured in the mean and spread of those of the first rollouts"
            + (f": {flag} does not say its own" if wanted == "auto" else "")
        )
        return None
    mean, std = provenance.score_mean, provenance.score_std
    if not all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in (mean, std)):
        raise UserError(
            f"{flag}: its {PROVENANCE_FILE} is damaged: score_mean and score_std are to be numbers, not "
            f"{str(mean)[:40]!r} and {str(std)[:40]!r}: train the model again, or add --score_calibration "
            "rollout"
        )
    if not Calibration(mean, std).usable:
        raise UserError(
            f"{flag} has scores with the mean {mean:g} and the standard deviation {std:g}, which nothing "
            "can be measured in: train the reward model again, or add --score_calibration rollout"
        )
    say(f"scores are measured in the reward model's own mean {mean:.4g} and spread {std:.4g}")
    return Calibration(mean, std)


def _check_text(provenance: Provenance, codec: Codec, made: str, used: str) -> None:
    now = text_of(codec)
    for what in ("template", "template_date", "end_token", "tokenizer"):
        was = getattr(provenance, what)
        if was != now[what]:
            raise UserError(
                f"{made} was trained with {what.replace('_', ' ')} {was[:24]!r}, but {used} has "
                f"{now[what][:24]!r}: use the same in every step"
            )


def text_of(codec: Codec) -> dict[str, str]:
    """The part of a provenance that says how text becomes ids."""
    return {
        "tokenizer": tokenizer_fingerprint(codec.tokenizer),
        "template": codec.template.name,
        "template_date": codec.date,
        "end_token": codec.end_token,
        "pad_token": codec.pad_token,
    }


def data_request(config: DataOptions, kind: str, max_tokens: int) -> DataRequest:
    """This step's part of `--data_path`, to be prepared as records of `kind`."""
    return DataRequest(
        data_path=config.sources(),
        kind=kind,
        phase=config.phase,
        data_split=config.data_split,
        eval_fraction=config.eval_fraction,
        split_by=config.split_by,
        shared=known_openings(config),
        columns=config.columns or None,
        max_tokens=max_tokens,
        max_rows=config.max_rows,
        max_bad_fraction=config.max_bad_rows,
        cache_dir=config.data_output_path,
    )


def say_data(data: PreparedData) -> None:
    """Tell what was read, what was unusable, and what is left to train on."""
    for line in data.report.lines():
        say(line)


@contextlib.contextmanager
def publishing(
    config: DataOptions,
    codec: Codec,
    engines: dict[str, object],
    step: str,
    base: str,
    data: PreparedData | None = None,
    parts: Sequence[str] = (),
    **calibration: float,
):
    """Export within this context: provenance.json is gone while it lasts, and written when it ends well.

    So an output directory that has one is whole, also when it is used again. The resolved configuration goes with it;
    what an earlier run left that this one may not write (adapters, a moving average) is removed.

    Args:
        engines: what is to be exported, by names for the user.
        data: what it was trained on.
        parts: model directories inside the output directory; each gets the provenance too, so that it can be moved.

    Raises:
        Diverged: an engine gives no finite numbers any more, before anything is touched.
        TrainingFailure: the disk refuses, or what was exported is not a whole model that can be loaded.
    """
    set_phase("saving the result")
    for name, engine in engines.items():
        _check_usable(engine, name, codec)
        if engine.untrained.still():
            say(
                f"warning: training has left every weight of the {name} as it was: its learning rate is 0 or too small "
                "for --dtype, or every optimizer step was skipped"
            )
    output = Path(config.output_dir)
    try:
        if is_main():
            (output / PROVENANCE_FILE).unlink(missing_ok=True)
            for old in (output / "adapter", output / "ema"):
                shutil.rmtree(old, ignore_errors=True)
        yield
        if is_main():
            for directory in [output / part for part in parts] or [output]:
                if found := problem(directory, config.trust_remote_code):
                    raise TrainingFailure(
                        f"the result in {directory} is not whole: {found}: run the same command "
                        "again, which goes on from the newest checkpoint"
                    )
            save_config(config, output / CONFIG_FILE)
            openings = openings_of(data) if data is not None else {}
            provenance = Provenance(
                step=step, base=base, shared_openings=openings, **split_rule_of(config), **text_of(codec), **calibration
            )
            for directory in (*(output / part for part in parts), output):
                provenance.write(directory)
    except (OSError, SafetensorError) as error:
        named = isinstance(error, OSError) and error.errno in _IN_THE_WAY
        cure = "move away what is there" if named else "free space there or make it writable"
        raise TrainingFailure(
            f"the result cannot be written to {output}: {error}: {cure}, and run the same command "
            "again, which goes on from the newest checkpoint"
        ) from error
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
    return StepSampler(
        [sequences * length for length in train["length"]],
        rows_per_micro_batch=config.per_device_train_batch_size,
        micro_batches_per_step=config.gradient_accumulation_steps,
        world_size=world_size(),
        rank=rank(),
        seed=config.seed,
        max_tokens=config.max_tokens_per_micro_batch,
        pack_to=pack_to,
        group_by_length=config.group_by_length,
    )


def report_done(tracker: Tracker, steps: int, metrics: dict[str, float], output_dir: str) -> None:
    """Record the final metrics, close the tracker, and say where the result lies."""
    tracker.log("done", steps, metrics)
    tracker.close()
    say(f"saved to {output_dir}")
