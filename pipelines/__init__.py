"""Erasures on diffusers pipelines, with the verbs of diffusers' LoRA loading, and filters around pipelines."""

from erasure.pipelines.attach import Attached, attach_erasures
from erasure.pipelines.filters import (
    AnyOf,
    EmbeddingFilter,
    InputFilter,
    Match,
    OutputFilter,
    WordFilter,
    calibrated,
    text_embeddings,
)
from erasure.pipelines.guardrails import Decision, Guard, GuardedPipeline, Stopped
from erasure.pipelines.loading import active_erasures, fuse_erasures, load_erasure, set_erasures, unload_erasures
from erasure.pipelines.stable_diffusion_erased import ErasedStableDiffusionPipeline

__all__ = [
    "AnyOf",
    "Attached",
    "Decision",
    "EmbeddingFilter",
    "ErasedStableDiffusionPipeline",
    "Guard",
    "GuardedPipeline",
    "InputFilter",
    "Match",
    "OutputFilter",
    "Stopped",
    "WordFilter",
    "active_erasures",
    "attach_erasures",
    "calibrated",
    "fuse_erasures",
    "load_erasure",
    "set_erasures",
    "text_embeddings",
    "unload_erasures",
]
