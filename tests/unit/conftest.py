"""Models that several test files share, made once."""
import pytest


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("builtin")


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory, model_cache):
    """Directory of the model that knows `chat_model.ANSWERS`."""
    from chat_model import teach
    return teach(tmp_path_factory.mktemp("chat") / "sft", model_cache)
