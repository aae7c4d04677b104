"""A Stable Diffusion pipeline that comes with its erasures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from diffusers import StableDiffusionPipeline

from erasure.artifact import Erasure
from erasure.artifact.provenance import records_of, write_beside
from erasure.artifact.stack import refuse_attached
from erasure.io import check_writable
from erasure.pipelines import loading
from erasure.pipelines.attach import attach_erasures
from erasure.pipelines.per_call import erasures


class ErasedStableDiffusionPipeline(StableDiffusionPipeline):
    """``StableDiffusionPipeline`` with the erasure verbs as methods.

    Everything else is inherited: calls, schedulers, dtypes, offloading (erase first, offload afterwards).
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        erasures: str | os.PathLike[str] | Erasure | Sequence[str | os.PathLike[str] | Erasure] = (),
        **kwargs: Any,
    ) -> Self:
        """Load a base pipeline and put erasures on it.

        Args:
            pretrained_model_name_or_path: folder or hub id of the base model.
            erasures: folder, hub id or :class:`Erasure`, or several of them, applied in order.
            **kwargs: passed through to diffusers.
        """
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        for source in [erasures] if isinstance(erasures, str | os.PathLike | Erasure) else erasures:
            loading.load_erasure(pipe, source)
        return pipe

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write the pipeline with its erasures in the weights. Plain diffusers opens the folder as a stock pipeline.

        Raises:
            ValueError: erasures are attached, which are in no weight and would be left out.
        """
        refuse_attached(self)
        check_writable(save_directory)
        write_beside(Path(save_directory), records_of(self))  # first, as the pipeline may be uploaded at the end
        config = {"requires_safety_checker": self.config.requires_safety_checker}
        StableDiffusionPipeline(**self.components, **config).save_pretrained(save_directory, *args, **kwargs)

    load_erasure = loading.load_erasure
    set_erasures = loading.set_erasures
    active_erasures = property(loading.active_erasures)
    fuse_erasures = loading.fuse_erasures
    unload_erasures = loading.unload_erasures
    attach_erasures = attach_erasures
    erasures = erasures
