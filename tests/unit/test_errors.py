"""Errors about a subject get the flag that named it exactly once."""

import pytest

from common.errors import ModelError, UserError, named_by


def test_the_program_adds_the_flag_once():
    with pytest.raises(UserError) as caught, named_by("--outer"), named_by("--model_name_or_path"):
        raise ModelError("some/model", "it is a file: name a directory")
    assert str(caught.value) == "--model_name_or_path some/model: it is a file: name a directory"


def test_what_the_user_wrote_stands_for_the_path_that_it_led_to():
    names = {"/cache/tiny": "builtin:tiny"}
    with pytest.raises(UserError) as caught, named_by("--model_name_or_path", names):
        raise ModelError("/cache/tiny", "it is damaged: delete it")
    assert str(caught.value) == "--model_name_or_path builtin:tiny: it is damaged: delete it"
    with pytest.raises(UserError, match="^--model_name_or_path some/model: it"):
        with named_by("--model_name_or_path", names):
            raise ModelError("some/model", "it is damaged: delete it")


def test_what_names_its_flag_already_stays_as_it_is():
    with pytest.raises(UserError, match="^--seed 1.5: give a whole number$"), named_by("--model_name_or_path"):
        raise UserError("--seed 1.5: give a whole number")
