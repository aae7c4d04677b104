"""Erasures once made: small files that can be applied, scaled, stacked, removed, fused, saved and loaded."""

from erasure.artifact.base import Erasure, save_unet
from erasure.artifact.delta import DeltaErasure
from erasure.artifact.operator import OperatorErasure

__all__ = ["DeltaErasure", "Erasure", "OperatorErasure", "save_unet"]
