"""Determines the scale in which scores and values are measured."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from common.artifacts.compatibility import check_text, text_of
from common.artifacts.provenance import FILE as PROVENANCE_FILE
from common.artifacts.provenance import Provenance, read_provenance
from common.artifacts.split_rule import check_split_rule
from common.data.tokenization import Codec, load_tokenizer, tokenizer_fingerprint
from common.errors import UserError, named_by
from common.models.calibration import RAW, Calibration
from common.models.loading import gives_scores
from common.runtime.distributed import say
from step3_ppo.config import PPOConfig


class ScoreScale:
    """The mean and standard deviation by which scores and values are normalised.

    The critic has the same object, so its values are on the same scale once that is measured.

    Args:
        calibration: the scale, where it is known from the start (`RAW` leaves scores as they are); None: it is measured
            on the scores of the first iteration and of the evaluation before it. Until then scores are raw.
    """

    def __init__(self, calibration: Calibration | None):
        self.calibration = calibration
        self._observed: list[Tensor] = []

    @property
    def known(self) -> bool:
        return self.calibration is not None

    @property
    def current(self) -> Calibration:
        """The calibration, or `RAW` as long as it is not known."""
        return self.calibration or RAW

    def normalise(self, numbers: Tensor) -> Tensor:
        """(numbers - mean) / std, of any shape."""
        return self.current.normalise(numbers)

    def observe(self, scores: Tensor) -> None:
        """Include raw scores (B,) in the measurement of the scale."""
        self._observed.append(scores)

    def measure(self, scores: Tensor, with_critic: bool) -> None:
        """Set the scale from raw scores (B,) and those observed before, the same on every rank.

        Args:
            with_critic: whether there are values, for the message.

        Raises:
            UserError: on all ranks alike, if the scores do not vary.
        """
        scores = torch.cat([*self._observed, scores])
        measured = Calibration.of(scores)
        if not measured.usable:
            raise UserError(
                f"the {len(scores)} scores of the first rollouts have the mean {measured.mean:g} and the "
                f"standard deviation {measured.std:g}, which nothing can be measured in: give an iteration "
                "more answers, or add --score_calibration none"
            )
        self.calibration = measured
        say(
            f"the {len(scores)} scores of the first rollouts have the mean {measured.mean:.4g} and the spread "
            f"{measured.std:.4g}: from here on "
            f"{'scores and values' if with_critic else 'scores'} are measured in these"
        )

    def state_dict(self) -> list[float] | None:
        return None if self.calibration is None else [self.calibration.mean, self.calibration.std]

    def load_state_dict(self, state: list[float] | None) -> None:
        if state is not None:
            self.calibration = Calibration(*state)


def read_calibration(config: PPOConfig, codec: Codec, source: str | None) -> Calibration | None:
    """The mean and standard deviation that scores are measured in.

    `RAW` if scores are used as they are, None if the first rollout is to measure them.

    Args:
        source: the reward model, or, with a reward of the program's own, what the critic starts from; None: neither.

    Raises:
        UserError: `source` is no reward model where that gives the scores, or was trained on other token ids, another
            template or another split of the data than the actor.
    """
    if source is None:
        return _calibration(config, None)
    name = config.critic_model_name_or_path
    with named_by("--critic_model_name_or_path", {source: name}):
        has_head = gives_scores(source, config.trust_remote_code)
    if not has_head:
        if not config.own_reward:
            raise UserError(
                f"--critic_model_name_or_path {name} is no reward model: it has no trained score head; make one with "
                "step2_reward/main.py"
            )
        say(f"the critic starts from the language model {name}, with a new score head")
    provenance = _checked_provenance(config, codec, source)
    return _calibration(config, None if config.own_reward else provenance)


def _checked_provenance(config: PPOConfig, codec: Codec, source: str) -> Provenance | None:
    """How the critic's start was trained; raises UserError if it reads other tokens or text than the actor writes, or
    if its data was split by another rule."""
    flag = f"--critic_model_name_or_path {config.critic_model_name_or_path}"
    actor = f"--actor_model_name_or_path {config.actor_model_name_or_path}"
    provenance = read_provenance(source)
    with named_by("--critic_model_name_or_path", {source: config.critic_model_name_or_path}):
        own = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
    same_ids, same_text = (
        tokenizer_fingerprint(own, chat_template=text) == tokenizer_fingerprint(codec.tokenizer, chat_template=text)
        for text in (False, True)
    )
    if provenance is None:
        if not same_ids:
            raise UserError(f"{flag} has another tokenizer than the actor: train one on the actor's tokens")
        if not same_text and codec.template.name == "chat":
            say(f"note: {flag} has another chat template than {actor}: it reads what the actor's writes")
        return None
    if same_ids and not same_text and provenance.tokenizer == tokenizer_fingerprint(own):
        if provenance.template == codec.template.name == "chat":
            raise UserError(
                f"{flag} was trained with another chat template than that of {actor}, of the same "
                "tokens: train both with one"
            )
        # It was not trained with its own chat template, so the text that it read is the same.
        provenance = replace(provenance, tokenizer=text_of(codec)["tokenizer"])
    with named_by("--critic_model_name_or_path", {source: config.critic_model_name_or_path}):
        check_text(provenance, codec, source, actor)
        check_split_rule(provenance, config, source)
    return provenance


def _calibration(config: PPOConfig, provenance: Provenance | None) -> Calibration | None:
    flag = f"--critic_model_name_or_path {config.critic_model_name_or_path}"
    wanted = config.score_calibration if config.normalize_scores else "none"
    if wanted == "auto" and config.own_reward:
        wanted = "rollout"
    mean, std = (provenance.score_mean, provenance.score_std) if provenance is not None else (None, None)
    if wanted == "provenance" and std is None:
        raise UserError(
            f"{flag} has no {PROVENANCE_FILE} with the mean and spread of its scores: measure them with "
            "--score_calibration rollout"
        )
    if wanted == "none":
        say("scores are used as they are")
        return RAW
    if wanted == "rollout" or std is None:
        say(
            "scores are measured in the mean and spread of those of the first rollouts"
            + (f": {flag} does not say its own" if wanted == "auto" else "")
        )
        return None
    if mean is None:
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
