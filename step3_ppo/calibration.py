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
from common.models.configuration import gives_scores
from common.runtime.distributed import say
from step3_ppo.config import PPOConfig


class ScoreScale:
    """The mean and standard deviation by which scores and values are normalised.

    The critic has the same object, so its values are on the same scale once that is measured.

    Args:
        calibration: the scale, where it is known from the start (`RAW` leaves scores as they are); None: it is measured
            on the scores of the first iteration and of the evaluation before it. Until then scores are raw.
        name: of the reward, for messages, where there may be several.
    """

    fixed = True  # once it is known

    def __init__(self, calibration: Calibration | None, name: str = ""):
        self.calibration, self._of = calibration, f" of {name}" if name else ""
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
                f"the {len(scores)} scores{self._of} of the first rollouts have the mean {measured.mean:g} and the "
                f"standard deviation {measured.std:g}, which nothing can be measured in: give an iteration "
                "more answers, or add --score_calibration none"
            )
        self.calibration = measured
        say(
            f"the {len(scores)} scores{self._of} of the first rollouts have the mean {measured.mean:.4g} and the "
            f"spread {measured.std:.4g}: from here on "
            f"{'scores and values' if with_critic else 'scores'} are measured in these"
        )

    def state_dict(self) -> list[float] | None:
        return None if self.calibration is None else [self.calibration.mean, self.calibration.std]

    def load_state_dict(self, state: list[float] | None) -> None:
        if state is not None:
            self.calibration = Calibration(*state)


class RunningScale(ScoreScale):
    """The mean and standard deviation of all responses so far, those of the iteration itself included.

    They are merged in fp64, batch by batch. Source: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise
    algorithm for computing sample variances", eq. 2.1. Until scores vary, the standard deviation is taken as 1.

    Attributes:
        count, mean, squares: the number of scores so far, their mean, and the sum of squared differences from it.
    """

    fixed = False

    def __init__(self) -> None:
        super().__init__(None)
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def observe(self, scores: Tensor) -> None:
        """Responses of an evaluation do not count, so that training does not depend on evaluations."""

    def measure(self, scores: Tensor, with_critic: bool) -> None:
        """Include the raw scores (B,) of an iteration, the same on every rank."""
        if not len(scores):
            return
        scores = scores.double()
        count, mean = len(scores), float(scores.mean())
        total, apart = self.count + count, mean - self.mean
        self.squares += float((scores - mean).square().sum()) + apart**2 * self.count * count / total
        self.mean += apart * count / total
        self.count = total
        self._set()

    def state_dict(self) -> list[float] | None:
        return [self.count, self.mean, self.squares] if self.count else None

    def load_state_dict(self, state: list[float] | None) -> None:
        if state is not None:
            self.count, self.mean, self.squares = int(state[0]), state[1], state[2]
            self._set()

    def _set(self) -> None:
        measured = Calibration(self.mean, (self.squares / self.count) ** 0.5)
        self.calibration = measured if measured.usable else Calibration(self.mean, 1.0)


def scale_of(calibration: Calibration | None, config: PPOConfig, name: str = "") -> ScoreScale:
    """The scale of a reward that is calibrated so at the start, or measured while the run goes on."""
    running = config.normalize_scores and config.score_calibration == "running"
    return RunningScale() if running else ScoreScale(calibration, name)


def read_calibration(config: PPOConfig, codec: Codec, source: str | None) -> Calibration | None:
    """The mean and standard deviation that scores are measured in, where --reward does not say what gives them.

    `RAW` if scores are used as they are, None if they are measured on the way.

    Args:
        source: the reward model, or, with a reward of the program's own, what the critic starts from; None: neither.

    Raises:
        UserError: `source` is no reward model where that gives the scores, or was trained on other token ids, another
            template or another split of the data than the actor.
    """
    flag = f"--critic_model_name_or_path {config.critic_model_name_or_path}"
    provenance = None if source is None else check_critic(config, codec, source)
    if config.own_reward:
        return _calibration(config, flag, None, "rollout")
    return _calibration(config, flag, provenance, "rollout")


def calibration_of(provenance: Provenance | None) -> Calibration:
    """The mean and standard deviation of a reward model's own scores, in which its values begin near 0; `RAW` where
    they are not known."""
    mean, std = (provenance.score_mean, provenance.score_std) if provenance is not None else (None, None)
    if mean is None or std is None or not Calibration(mean, std).usable:
        return RAW
    return Calibration(mean, std)


def check_critic(config: PPOConfig, codec: Codec, source: str) -> Provenance | None:
    """How the model of --critic_model_name_or_path was trained. Raises as `read_calibration`."""
    name = str(config.critic_model_name_or_path)
    with named_by("--critic_model_name_or_path", {source: name}):
        has_head = gives_scores(source, config.trust_remote_code)
    if not has_head:
        if not config.scored_otherwise:
            raise UserError(
                f"--critic_model_name_or_path {name} is no reward model: it has no trained score head; make one with "
                "step2_reward/main.py"
            )
        say(f"the critic starts from the language model {name}, with a new score head")
    return checked_provenance(config, codec, source, "--critic_model_name_or_path", name)


def checked_provenance(config: PPOConfig, codec: Codec, source: str, option: str, name: str) -> Provenance | None:
    """How a model was trained that reads the actor's ids; raises UserError if it reads other tokens or text than the
    actor writes, or if its data was split by another rule.

    Args:
        option, name: the flag that names the model, and the name there.
    """
    flag = f"{option} {name}"
    actor = f"--actor_model_name_or_path {config.actor_model_name_or_path}"
    provenance = read_provenance(source)
    with named_by(option, {source: name}):
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
    with named_by(option, {source: name}):
        check_text(provenance, codec, source, actor)
        check_split_rule(provenance, config, source)
    return provenance


def reward_calibration(
    config: PPOConfig, name: str, provenance: Provenance | None, is_model: bool
) -> Calibration | None:
    """As `read_calibration`, for one of --reward.

    Args:
        provenance: of a reward model that has one.
    """
    return _calibration(config, f"--reward {name}", provenance, "rollout" if is_model else "none", f" of {name}")


def _calibration(
    config: PPOConfig, flag: str, provenance: Provenance | None, without_provenance: str, of: str = ""
) -> Calibration | None:
    """The scale that the options ask for; None if it is to be measured.

    Args:
        flag: the option and the name there that give the scores.
        without_provenance: what --score_calibration auto means where there is no provenance.
        of: names the reward in what is said, where there may be several.
    """
    wanted = config.score_calibration if config.normalize_scores else "none"
    mean, std = (provenance.score_mean, provenance.score_std) if provenance is not None else (None, None)
    auto = wanted == "auto"
    if auto:
        wanted = without_provenance if std is None else "provenance"
    if wanted == "provenance" and std is None:
        raise UserError(
            f"{flag} has no {PROVENANCE_FILE} with the mean and spread of its scores: measure them with "
            "--score_calibration rollout"
        )
    if wanted == "none":
        say(f"scores{of} are used as they are, clipped to plus or minus {config.score_clip:g} (--score_clip)")
        return RAW
    if wanted == "running":
        say(f"scores{of} are measured in the mean and spread of all answers so far")
        return None
    if wanted == "rollout":
        said = auto and not config.own_reward
        say(
            f"scores{of} are measured in the mean and spread of those of the first rollouts"
            + (f": {flag} does not say its own" if said else "")
        )
        return None
    if mean is None:
        raise UserError(
            f"{flag}: its {PROVENANCE_FILE} is damaged: score_mean and score_std are to be numbers, not "
            f"{str(mean)[:40]!r} and {str(std)[:40]!r}: train the model again, or add --score_calibration "
            "rollout"
        )
    assert std is not None  # else it is not wanted
    if not Calibration(mean, std).usable:
        raise UserError(
            f"{flag} has scores with the mean {mean:g} and the standard deviation {std:g}, which nothing "
            "can be measured in: train the reward model again, or add --score_calibration rollout"
        )
    own = "its own" if of else "the reward model's own"
    say(f"scores{of} are measured in {own} mean {mean:.4g} and spread {std:.4g}")
    return Calibration(mean, std)
