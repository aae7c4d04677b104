"""Erasures on diffusers pipelines, with the verbs of diffusers' LoRA loading."""

from erasure.pipelines.attach import Attached, attach_erasures
from erasure.pipelines.loading import active_erasures, fuse_erasures, load_erasure, set_erasures, unload_erasures
from erasure.pipelines.stable_diffusion_erased import ErasedStableDiffusionPipeline

__all__ = [
    "Attached",
    "ErasedStableDiffusionPipeline",
    "active_erasures",
    "attach_erasures",
    "fuse_erasures",
    "load_erasure",
    "set_erasures",
    "unload_erasures",
]
