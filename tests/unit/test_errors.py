"""Errors about a subject get the flag that named it exactly once."""

import pytest

from common.errors import ModelError, UserError, named_by


def test_the_program_adds_the_flag_once():
    with pytest.raises(UserError) as caught, named_by("--outer"), named_by("--model_name_or_path"):
        raise ModelError("some/model", "it is a file: name a directory")
    assert str(caught.value) == "--model_name_or_path some/model: it is a file: name a directory"


def test_what_names_its_flag_already_stays_as_it_is():
    with pytest.raises(UserError, match="^--seed 1.5: give a whole number$"), named_by("--model_name_or_path"):
        raise UserError("--seed 1.5: give a whole number")
