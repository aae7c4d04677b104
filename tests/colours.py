"""An embedder that anyone can recompute, and what other processes do to a store in the tests."""

from __future__ import annotations

import os
import signal
import sqlite3

import numpy as np
import torch
from PIL import Image

from erasure.pipelines.store import Store

NAMES = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (128, 128, 128)}
FACTS = {"licence": "CC0-1.0", "source": "the tests"}


class Colours:
    """Texts are the colours they name, pictures their mean colour: ``(r, g, b, 0.1)``, from 0 to 1."""

    def __init__(self, name="colours", scale=1.0):
        self.name, self.scale = name, scale

    def text_features(self, texts):
        named = [[NAMES[word] for word in text.split() if word in NAMES] or [(0, 0, 0)] for text in texts]
        return self._rows([np.mean(colours, axis=0) for colours in named])

    def image_features(self, images):
        return self._rows([np.asarray(image).reshape(-1, 3).mean(0) for image in images])

    def _rows(self, colours):
        return torch.tensor(np.array([[*colour / 255 * (1, 1, self.scale), 0.1] for colour in colours]))


def picture(seed, colour="grey", size=(20, 16)):
    """A noisy picture of a colour; another for every seed."""
    noise = np.random.default_rng(seed).integers(-60, 60, (size[1], size[0], 3))
    return Image.fromarray((np.array(NAMES[colour]) + noise).clip(0, 255).astype(np.uint8))


def add(store, seed, colour="grey", **facts):
    return store.add(picture(seed, colour), **{"caption": f"a {colour} thing {seed}", **FACTS, **facts})


# --- in other processes ----------------------------------------------------------------------------------------------


def add_many(path, seeds, start, done):
    """Open a store when all are ready, add to it, and report every number once it is in."""
    start.wait()
    store = Store(path, Colours())
    for seed in seeds:
        done.put((seed, add(store, seed)))


def add_for_ever(path, first, pipe):
    """Add until killed; a number is reported after the store has it."""
    store = Store(path, Colours())
    for seed in range(first, first + 10_000):
        pipe.send((seed, add(store, seed)))


def die_at(path, statement, what):
    """Do one thing, and be killed before the given SQL statement of it."""
    store = Store(path, Colours())
    left = iter(range(statement, -1, -1))

    def count(_):
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def connect(*args, **options):
        connection = real(*args, **options)
        connection.set_trace_callback(count)
        return connection

    real, sqlite3.connect = sqlite3.connect, connect
    add(store, 99, subject="late") if what == "add" else store.withdraw("early")
    os._exit(0)
