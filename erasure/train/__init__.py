"""The one training loop: fine-tunes, Emoji World and its detectors, and the probes that learn all go through it.

A caller brings parameters and a loss, and gets the steps one by one:

    with trainable(parameters, modules):
        run = Run(parameters, loss, training=Training(iterations=150, lr=3e-4), modules=modules)
        for step in run:
            ...  # look at the model, log run.loss

Of accelerate it uses the processes (``accelerate launch``) and their collective operations. Its ``Accelerator`` is not
used: it fixes one mixed precision and one accumulation for the whole Python process, and has no float16 on CPUs.
"""

from erasure.train.checkpoint import Checkpoint
from erasure.train.loop import Diverged, Run, train, train_modules
from erasure.train.modules import Precision, check_trainable, trainable
from erasure.train.settings import Draw, Training, step_rng

__all__ = [
    "Checkpoint",
    "Diverged",
    "Draw",
    "Precision",
    "Run",
    "Training",
    "check_trainable",
    "step_rng",
    "train",
    "train_modules",
    "trainable",
]
