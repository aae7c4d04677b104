"""Processes of their own for tests that share work, or are killed."""

import multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")
# What takes seconds to import is imported once, for all of them: there is one list, and the last to set it wins.
PROCESSES.set_forkserver_preload(["tests.fault_worker", "tests.train_worker", "tests.test_batch", "tests.test_store"])
