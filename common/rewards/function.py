"""Loads a reward function from a file or a module, and calls it with what its parameters name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from common.errors import did_you_mean
from common.paths import content_digest
from common.rewards.answers import WrongAnswer, read_answer
from common.rewards.batch import RewardBatch, Scores, merged
from common.rewards.errors import Failure, RewardError

# Parameters with a meaning of their own; every other one is named like a column of the data.
OF_RESPONSES = ("prompts", "messages", "responses", "response_ids")


@dataclass(frozen=True)
class Function:
    """A reward function and the parameters that it declares.

    Attributes:
        name: FILE.py:FUNCTION or MODULE:FUNCTION.
        call: the function.
        inputs: those of `OF_RESPONSES` that it takes.
        columns: the columns that it needs.
        optional_columns: those whose parameters have a default; it is left to the function where the data has none.
        takes_rest: whether it takes all other columns too, by **kwargs.
        checksum: of the file that it is in; None where no file of Python is known, as for a compiled module.
    """

    name: str
    call: Callable[..., Any]
    inputs: tuple[str, ...]
    columns: tuple[str, ...]
    optional_columns: tuple[str, ...]
    takes_rest: bool
    checksum: str | None = None

    def arguments(self, batch: RewardBatch) -> dict[str, Any]:
        """What the function gets for a batch."""
        declared = {*self.columns, *self.optional_columns}
        columns = {
            name: values
            for name, values in batch.columns.items()
            if name not in OF_RESPONSES and (self.takes_rest or name in declared)
        }
        return {name: getattr(batch, name) for name in self.inputs} | columns

    def __call__(self, arguments: Mapping[str, Any], responses: int) -> Scores:
        """The scores of so many responses.

        Raises:
            WrongAnswer: the function raised an exception, or what it gave is wrong as a whole.
        """
        try:
            answer = self.call(**arguments)
        except (Exception, SystemExit) as error:  # of the user's code
            raise WrongAnswer(f"it raised {described(error)}") from error
        return read_answer(answer, responses)


def load_function(name: str) -> Function:
    """The function that FILE.py:FUNCTION or MODULE:FUNCTION names.

    Modules are found as if Python ran in the working directory, a file's own imports also beside that file.

    Raises:
        RewardError: there is no such file, module or function, it cannot be imported, or its parameters cannot be
            given by their names.
    """
    place, _, attribute = name.rpartition(":")
    module = _import(name, place)
    if not attribute.isidentifier():
        raise RewardError(name, "name the function behind the colon, as in my_reward.py:correct")
    call = getattr(module, attribute, None)
    if not callable(call):
        found = [own for own, value in vars(module).items() if inspect.isroutine(value) and not own.startswith("_")]
        what = "has no function" if call is None else "has no function, but another value, of the name"
        raise RewardError(
            name, f"{place} {what} {attribute}{did_you_mean(attribute, found)}; it has {', '.join(found) or 'none'}"
        )
    return _with_parameters(name, call, _checksum(module))


def _checksum(module: ModuleType) -> str | None:
    file = Path(getattr(module, "__file__", None) or "")
    return f"sha256 {content_digest([file])[:12]}" if file.suffix == ".py" and file.is_file() else None


def _with_parameters(name: str, call: Callable[..., Any], checksum: str | None) -> Function:
    if inspect.iscoroutinefunction(call):
        raise RewardError(name, "is an async function: give a plain one")
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        raise RewardError(name, "its parameters cannot be read: wrap it in a function of your own") from None
    kinds = inspect.Parameter
    if positional := [one.name for one in parameters if one.kind == kinds.POSITIONAL_ONLY]:
        raise RewardError(name, f"its parameter {positional[0]} has no name to be given by: leave out the / behind it")
    named = [one for one in parameters if one.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    columns = [one for one in named if one.name not in OF_RESPONSES]
    return Function(
        name,
        call,
        tuple(one.name for one in named if one.name in OF_RESPONSES),
        tuple(one.name for one in columns if one.default is kinds.empty),
        tuple(one.name for one in columns if one.default is not kinds.empty),
        any(one.kind == kinds.VAR_KEYWORD for one in parameters),
        checksum,
    )


def _import(name: str, place: str) -> Any:
    file = Path(place).absolute() if place.endswith(".py") else None
    if file is not None and not file.is_file():
        raise RewardError(name, f"there is no file {place}")
    directory = str(Path.cwd() if file is None else file.parent)
    if directory not in sys.path:
        sys.path.append(directory)
    try:
        if file is None:
            return importlib.import_module(place)
        module_name = f"reward_{file.stem}"
        spec = importlib.util.spec_from_file_location(module_name, file)
        if spec is None or spec.loader is None:
            raise RewardError(name, f"{place} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # so that classes of the file can be pickled
        spec.loader.exec_module(module)
        return module
    except RewardError:
        raise
    except ModuleNotFoundError as error:
        if file is None and error.name and (place == error.name or place.startswith(f"{error.name}.")):
            why = f"there is no module {error.name} in {directory} or among those that are installed"
            raise RewardError(name, why) from None
        raise RewardError(name, f"{place} cannot be imported: {described(error)}") from error
    except (Exception, SystemExit) as error:  # of the user's code
        raise RewardError(name, f"{place} cannot be imported: {described(error)}") from error


def described(error: BaseException) -> str:
    """An exception of the user's code in one line: its type, its message, and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        place = f" ({Path(error.filename).name}, line {error.lineno})"
        message = str(error.msg)
    else:
        message = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if message else ''}{message[:200]}{place}"


class FunctionReward:
    """A function that is called in this process, without a limit of time.

    Args:
        every_failure: whether all responses that fail are wanted; else the first is enough.
    """

    def __init__(self, function: Function, every_failure: bool = False):
        self.function, self.every_failure = function, every_failure

    def score(self, batch: RewardBatch) -> Scores:
        return score_singly_if_wrong(batch, self._score, self.every_failure)

    def close(self) -> None:
        """Nothing was started."""

    def _score(self, batch: RewardBatch) -> Scores:
        return self.function(self.function.arguments(batch), len(batch))


def score_singly_if_wrong(
    batch: RewardBatch, score: Callable[[RewardBatch], Scores], every_failure: bool = False
) -> Scores:
    """The scores of a batch. Where its answer is wrong as a whole, each response is scored alone to find which it is.

    Args:
        score: raises WrongAnswer.
        every_failure: do not stop at the first response that fails.
    """
    if not len(batch):
        return Scores([])
    try:
        return score(batch)
    except WrongAnswer as error:
        why = str(error)
    if len(batch) == 1:
        return Scores([0.0], failures=(Failure(0, why),))
    singles = []
    for at in range(len(batch)):
        singles.append(([at], score_singly_if_wrong(batch.select([at]), score)))
        if singles[-1][1].failures and not every_failure:
            break
    scores = merged(len(batch), singles)
    if not scores.failures:
        why = f"{why}; of each response alone that is not so: it must score each by itself"
        return Scores([0.0] * len(batch), {}, tuple(Failure(at, why) for at in range(len(batch))))
    return scores
