"""Whether what an earlier step left may be used by this one: text, tokenizer, split rule, scale of the scores."""

from __future__ import annotations

from dataclasses import replace

from common.artifacts.provenance import FILE as PROVENANCE_FILE
from common.artifacts.provenance import Provenance, read_provenance
from common.artifacts.split_rule import check_split_rule
from common.data.options import DataOptions
from common.data.tokenization import Codec, load_tokenizer, make_codec, published_ends, tokenizer_fingerprint
from common.errors import UserError, named_by
from common.models.calibration import RAW, Calibration
from common.models.loading import gives_scores
from common.runtime.distributed import say


def open_codec(config: DataOptions, source: str, flag: str) -> Codec:
    """The tokenizer and template for a model. A model with a provenance must be used with those of its training.

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
    """The mean and standard deviation that a reward model's scores are measured in.

    `RAW` if scores are used as they are, None if the first rollout is to measure them.

    Raises:
        UserError: `source` is no reward model, or was trained on other token ids or another template than the actor.
    """
    flag = f"--critic_model_name_or_path {source}"
    with named_by("--critic_model_name_or_path"):
        has_head = gives_scores(source, config.trust_remote_code)
    if not has_head:
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
            # It was not trained with its own chat template, so the text that it read is the same.
            provenance = replace(provenance, tokenizer=text_of(codec)["tokenizer"])
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
