"""Erasures on diffusers pipelines, with the verbs of diffusers' LoRA loading; filters around pipelines; retrieval."""

from erasure.pipelines.attach import Attached, attach_erasures
from erasure.pipelines.embedders import Embedder, OpenClipEmbedder
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
from erasure.pipelines.per_call import Drawing, erasures
from erasure.pipelines.retrieval import Lookup, Retrieval, RetrievalPipeline, Used
from erasure.pipelines.stable_diffusion_erased import ErasedStableDiffusionPipeline
from erasure.pipelines.store import Entry, Event, Found, Store, Withdrawn

__all__ = [
    "AnyOf",
    "Attached",
    "Decision",
    "Drawing",
    "Embedder",
    "EmbeddingFilter",
    "Entry",
    "ErasedStableDiffusionPipeline",
    "Event",
    "Found",
    "Guard",
    "GuardedPipeline",
    "InputFilter",
    "Lookup",
    "Match",
    "OpenClipEmbedder",
    "OutputFilter",
    "Retrieval",
    "RetrievalPipeline",
    "Stopped",
    "Store",
    "Used",
    "Withdrawn",
    "WordFilter",
    "active_erasures",
    "attach_erasures",
    "calibrated",
    "erasures",
    "fuse_erasures",
    "load_erasure",
    "set_erasures",
    "text_embeddings",
    "unload_erasures",
]
