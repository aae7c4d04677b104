"""What every test needs."""

from importlib.util import find_spec

import pytest

if find_spec("erasure") is None or find_spec("erasure.eval") is None:
    # The folders eval/ and pipelines/ become erasure.eval and erasure.pipelines by being installed (setup.cfg).
    pytest.exit("erasure.eval cannot be imported: run `pip install -e .` in the repository root first", returncode=4)


@pytest.fixture(autouse=True, scope="session")
def cache_of_our_own(tmp_path_factory):
    """No test reads or writes the user's cache. What is in it changes no result, only how long the tests take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERASURE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
