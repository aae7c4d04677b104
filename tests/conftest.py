"""What every test needs."""

import functools
import gc
import itertools
import os
from importlib.util import find_spec

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub is first imported: no test asks it, or waits in vain

if find_spec("erasure") is None or find_spec("erasure.eval") is None:
    # The folders eval/ and pipelines/ become erasure.eval and erasure.pipelines by being installed (setup.cfg).
    pytest.exit("erasure.eval cannot be imported: run `pip install -e .` in the repository root first", returncode=4)


def pytest_collection_finish(session):
    """What was imported stays: the collector need not walk through it again and again, a seventh of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True, scope="session")
def commands_made_once():
    """The parser of the command line, which takes a tenth of a second to make, each time."""
    import typer.main
    import typer.testing

    once = functools.cache(typer.main.get_command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", once)
        patch.setattr(typer.testing, "_get_command", once)
        yield


@pytest.fixture(autouse=True, scope="session")
def cache_of_our_own(tmp_path_factory):
    """No test reads or writes the user's cache. What is in it changes no result, only how long the tests take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERASURE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def few_steps(monkeypatch):
    """What the probes sample is sampled to see that it runs."""
    monkeypatch.setattr("erasure.eval.probes.sampling.LEAST_STEPS", 4)


NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def postgres():
    """A running PostgreSQL server of the module's own."""
    from tests.postgres_server import server

    with server() as running:
        yield running


@pytest.fixture
def schema():
    """The name of a new schema on that server."""
    return f"schema_{next(NUMBERS)}"


@pytest.fixture
def address(postgres, schema):
    """The address of that schema, with a password."""
    from tests.postgres_server import PASSWORD

    return postgres.schema(schema, password=PASSWORD)
