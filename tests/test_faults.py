"""What is left when a run is broken off: at every change of the file system it dies, fails, or finds the disk full.

Batch, register and training, each on its smallest run, which is then run again and must come to the same bytes.
"""

import datetime

import pytest

from erasure.register import Register
from erasure.register.joint import recipe_of
from erasure.register.page import page
from tests import fault_worker
from tests.fault_worker import KINDS
from tests.processes import PROCESSES
from tests.register_helpers import BASE, add, new_register

pytestmark = pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="every run is a fork")


def in_a_process(tmp_path, work, *arguments):
    log = tmp_path / "log"
    process = PROCESSES.Process(target=fault_worker.call, args=(work, str(log), *arguments))
    process.start()
    process.join()
    assert process.exitcode == 0, log.read_text()


@pytest.mark.parametrize(
    ("job", "kinds", "every"),
    [
        ("training", ("kill",), 1),
        pytest.param("training", ("interrupt",), 3, marks=pytest.mark.slow),
        ("closed forms", ("kill", "interrupt"), 12),
        pytest.param("training", KINDS, 1, marks=pytest.mark.slow),
        pytest.param("closed forms", KINDS, 1, marks=pytest.mark.slow),
        pytest.param("batch", KINDS, 1, marks=pytest.mark.slow),
        pytest.param("register", KINDS, 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_broken_off_at_any_change_ends_with_the_same_bytes(tmp_path, job, kinds, every):
    in_a_process(tmp_path, fault_worker.at_every_change, job, tmp_path, kinds, every)


@pytest.mark.slow
@pytest.mark.parametrize(("job", "times"), [("training", 12), ("closed forms", 12), ("batch", 12), ("register", 12)])
def test_ctrl_c_twice_at_any_time_leaves_something_to_go_on_from(tmp_path, job, times):
    in_a_process(tmp_path, fault_worker.interrupted_twice, job, tmp_path, times)


@pytest.mark.parametrize("job", ["training", pytest.param("closed forms", marks=pytest.mark.slow), "register"])
def test_a_folder_that_may_only_be_read_is_one_clear_error_and_stays_as_it_is(tmp_path, job):
    in_a_process(tmp_path, fault_worker.read_only, job, tmp_path)


@pytest.mark.slow
def test_two_trainings_on_one_folder_end_with_the_same_bits_or_say_so(tmp_path):
    in_a_process(tmp_path, fault_worker.both_at_once, tmp_path)


def test_a_register_on_a_machine_whose_clock_is_set_back(tmp_path, monkeypatch):
    register, real = new_register(tmp_path), datetime.datetime.now(datetime.UTC)
    behind = iter(range(0, 1000, 5))

    def back():
        return real - datetime.timedelta(hours=next(behind))

    for module in ("register", "rows"):
        monkeypatch.setattr(f"erasure.register.{module}.now", back)
    first = add(register, "superhero")
    facts = {
        "key": "k",
        "settings": recipe_of(register.settings),
        "overruled": [],
        "hash": "",
        "files": {},
        "folder": "",
    }
    (served,) = register.put_in_force(BASE, [first], facts)
    second = add(register, "wizard")
    assert served.served < served.received and second.received < first.received
    register.withdraw(first.request, reason="a mistake")
    assert not Register(register.path).check() and [e.request for e in register.wanted(BASE)] == [second.request]
    word, sentence = served.clock(real)
    assert word == "late" and "the machine's clock was set back; not counted as in time" in sentence
    assert "clock was set back" in page(register)
