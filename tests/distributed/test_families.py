"""Every family of models through all three steps on 2 ranks, at ZeRO 2 and 3; docs/models.md says what they found."""

from pathlib import Path

import pytest

from tests.architectures import CONFIGS, ENCODERS, FURTHER_CONFIGS
from tests.distributed.family_features import FEATURES
from tests.launching import at_length
from tests.models_docs import COMMAND, MODELS, documented, run

# The others are run with --long; other tests of the default suite launch OPT and LLaMA.
MOST_USED = ("qwen3",)
OTHERS = [name for name in MODELS if name not in MOST_USED]


@pytest.fixture(scope="module")
def results(tmp_path_factory, builtin_cache, hh_data, request) -> Path:
    """ARCHITECTURE/STAGE/RUN; one launch."""
    output = tmp_path_factory.mktemp("families")
    architectures = MODELS if request.config.getoption("--long") else MOST_USED
    run(architectures, hh_data, builtin_cache, output)
    return output


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("architecture", [*MOST_USED, *at_length(OTHERS)])
def test_a_feature_works_as_the_page_says(results, architecture, feature):
    expected = documented()[MODELS[architecture]][feature]
    assert FEATURES[feature](results / architecture) == expected, f"run {COMMAND}"


def test_the_page_names_all_families_and_features():
    assert MODELS.keys() == {*CONFIGS, *FURTHER_CONFIGS, *ENCODERS}
    rows = documented()
    assert [*rows] == [*MODELS.values()]
    assert all([*row] == [*FEATURES] for row in rows.values())
