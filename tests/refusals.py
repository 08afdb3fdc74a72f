"""How a program refuses what it cannot use."""

from __future__ import annotations

import pytest

from common.errors import UserError


def refusal(program, arguments: dict[str, str]) -> str:
    """The one line with which a program refuses; fails if it starts."""
    with pytest.raises(UserError) as error:
        program([word for pair in arguments.items() for word in pair if word is not None])
    message = str(error.value)
    assert "\n" not in message and len(message) < 1200
    return message
