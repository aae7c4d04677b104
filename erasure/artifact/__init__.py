"""Erasures once made: small files that can be applied, scaled, stacked, removed, fused, saved, loaded and exported."""

from erasure.artifact.base import Erasure, HookErasure, WeightErasure
from erasure.artifact.compare import compare_erasures, compare_models
from erasure.artifact.delta import DeltaErasure
from erasure.artifact.denoiser import save_denoiser, save_pipeline
from erasure.artifact.engines import export_for
from erasure.artifact.export import export_lora
from erasure.artifact.lora import LoraErasure
from erasure.artifact.official import export_official, import_official
from erasure.artifact.operator import OperatorErasure
from erasure.artifact.single_file import export_single_file

__all__ = [
    "DeltaErasure",
    "Erasure",
    "HookErasure",
    "LoraErasure",
    "OperatorErasure",
    "WeightErasure",
    "compare_erasures",
    "compare_models",
    "export_for",
    "export_lora",
    "export_official",
    "export_single_file",
    "import_official",
    "save_denoiser",
    "save_pipeline",
]
