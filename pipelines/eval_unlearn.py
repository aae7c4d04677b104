"""A technique for Eval-Unlearn (``pip install eval-unlearn``): any method of this library, or an erasure that is made.

Declared as the entry point ``erasure`` in the group ``eval_unlearn.techniques``, so that it is there where both
packages are installed. Nothing of Eval-Unlearn is imported here. In its configuration:

    technique:
      name: erasure
      config: {method: uce, erase_concept: superhero, keep: [ninja, wizard], model_id: emoji-world}
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from PIL import Image

from erasure.api import erase
from erasure.artifact import Erasure
from erasure.io import shown
from erasure.opening import load_base
from erasure.pictures import called, check_seed, pictures_of, usual_settings


@dataclass(frozen=True)
class Settings:
    """What a configuration of Eval-Unlearn may say.

    Attributes:
        model_id: the base model: "emoji-world", a folder, a single file or a hub id.
        erase_concept: what to erase; needed without ``erasure``. Some of its metrics read it too.
        method: one of :func:`erasure.methods.available`, "uce" by default.
        preset: of the method.
        keep: prompts that must not change.
        anchor: what is drawn instead, for methods that need it.
        settings: further settings of the method.
        erasure: folder or hub id of a finished erasure, instead of making one.
        scale: how strongly it is applied.
        device, dtype: as in :func:`erasure.load_base`.
        num_inference_steps, guidance_scale: of pictures; 25 and the pipeline's own by default (Emoji World: 8 and 3).
        batch_size: prompts drawn at once. It does not change the pictures but for rounding.
    """

    model_id: str = "CompVis/stable-diffusion-v1-4"
    erase_concept: str | None = None
    method: str = "uce"
    preset: str | None = None
    keep: Sequence[str] = ()
    anchor: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    erasure: str | None = None
    scale: float = 1.0
    device: str | None = None
    dtype: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 8

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """Settings from a configuration.

        Raises:
            ValueError: it has a key that is none, or says neither what to erase nor which erasure to take.
        """
        known = [one.name for one in fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"choose among {known}"
                raise ValueError(f"unknown setting of the technique 'erasure'; got {shown(name)}; {hint}")
        made = cls(**given)
        if made.erasure is None and made.erase_concept is None:
            raise ValueError("nothing to erase; got neither erase_concept nor erasure; give one of them")
        return made


class Technique:
    """What Eval-Unlearn asks of a technique: made from its configuration, and ``generate``."""

    def __init__(self, **config: Any) -> None:
        self.config = Settings.of(config)
        self.pipe = load_base(self.config.model_id, device=self.config.device, dtype=self.config.dtype)
        self.edit = self._erasure()
        self.edit.apply(self.pipe, self.config.scale)

    def _erasure(self) -> Erasure:
        """The one that is named, or a new one."""
        from erasure.concept import Concept

        if self.config.erasure is not None:
            return Erasure.from_pretrained(self.config.erasure)
        return erase(
            self.pipe,
            Concept(str(self.config.erase_concept), anchor=self.config.anchor or ""),
            self.config.method,
            preset=self.config.preset,
            keep=list(self.config.keep),
            apply=False,
            progress=False,
            **self.config.settings,
        )

    def generate(self, prompts: list[str], seed: int | None = None, **call: Any) -> list[Image.Image]:
        """One picture for each prompt.

        Args:
            seed: of the first picture's noise, the next ones count up; None for other noise each time.
            **call: arguments of the pipeline's call.
        """
        usual = usual_settings(self.config.model_id, self.pipe)
        chosen = {key: getattr(self.config, key) for key in ("num_inference_steps", "guidance_scale")}
        sampler = {**usual, **{key: value for key, value in chosen.items() if value is not None}}
        sampler |= {key: call.pop(key) for key in usual.keys() & call.keys()}
        images: list[Image.Image] = []
        for start in range(0, len(prompts), self.config.batch_size):
            some = prompts[start : start + self.config.batch_size]
            if seed is not None:
                first = check_seed(seed) + start
                call["generator"] = [torch.Generator().manual_seed(first + i) for i in range(len(some))]
            images += pictures_of(called(self.pipe, list(some), {"output_type": "pil", **call}, **sampler))
        return images


__all__ = ["Settings", "Technique"]
