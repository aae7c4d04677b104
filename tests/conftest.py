"""What every test needs."""

from importlib.util import find_spec

import pytest

if find_spec("erasure") is None or find_spec("erasure.eval") is None:
    # The folders eval/ and pipelines/ become erasure.eval and erasure.pipelines by being installed (setup.cfg).
    pytest.exit("erasure.eval cannot be imported: run `pip install -e .` in the repository root first", returncode=4)
