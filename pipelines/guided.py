"""What methods that act while pictures are drawn share: guided calls, further predictions, steps, stored text."""

from __future__ import annotations

import threading
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from erasure.artifact import HookErasure
from erasure.artifact.hooks import Installed
from erasure.artifact.stack import stack_of
from erasure.backbone import Backbone, Space
from erasure.backbone.listen import half, says_guided, times_of_call
from erasure.backbone.text import Text

# where both predictions of guidance are made by one call of the denoiser, and guidance is off at 1
GUIDED = ("sd-unet", "sdxl", "sd3", "pixart", "sana", "auraflow", "ltx", "cogvideox", "kolors")
UNCONDITIONAL, PROMPTS = 0, 1  # the halves of such a call


class TextErasure(HookErasure):
    """A hook erasure whose tensors are encoded text.

    Tensors: ``hidden (rows, length, d)``; ``pooled (rows, d)`` and ``mask (rows, length)`` where there are such.

    Class attributes:
        rows: how many texts.
        numbers: settings that the hook reads.
        title: what an error calls it.
    """

    rows: ClassVar[int]
    numbers: ClassVar[tuple[str, ...]] = ()
    title: ClassVar[str]

    @property
    def text(self) -> Text:
        """Its tensors as the denoiser receives text."""
        return Text(self.tensors["hidden"], self.tensors.get("pooled"), self.tensors.get("mask"))

    def misfits(self, backbone: Backbone) -> list[str]:
        spaces: dict[str, Space] = {"hidden": "hidden", "pooled": "pooled"}
        widths = {name: t.shape[-1] for name, t in self.tensors.items() if spaces.get(name) in backbone.spaces}
        return [
            f"its {name} text is {found} wide, the model's {wanted}"
            for name, found in widths.items()
            if found != (wanted := backbone.width(spaces[name]))
        ]

    def check_tensors(self) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        dims = {"hidden": 3, "pooled": 2, "mask": 2}
        whole = all(len(s) == dims.get(name) and s[0] == self.rows and 0 not in s for name, s in shapes.items())
        masked = shapes.get("mask", (self.rows,))[1:] in ((), shapes.get("hidden", ())[1:2])
        if "hidden" not in shapes or not whole or not masked or not has_numbers(self) or self.system:
            raise ValueError(f"{self.title} holds encoded text and its settings; got others; get it again")


def has_numbers(edit: Any) -> bool:
    """Whether the settings that an erasure's hook reads are there, each a number."""
    settings = edit.config.settings
    return isinstance(settings, dict) and all(isinstance(settings.get(name), int | float) for name in edit.numbers)


def stored(text: Text) -> dict[str, Tensor]:
    """The tensors of a :class:`TextErasure`."""
    parts = {"hidden": text.hidden, "pooled": text.pooled, "mask": text.mask}
    return {name: t.float().cpu().contiguous().clone() for name, t in parts.items() if t is not None}


class State(threading.local):
    """Where a thread that draws is: each has its own step count.

    A new picture begins with another call of the pipeline, or with a larger time.
    """

    def __init__(self) -> None:
        self.t, self.step, self.shape = 0.0, 0, torch.Size()
        self.times: Tensor | None = None  # of the call, which has an object of its own


class DenoiserHook(Installed):
    """Base of hooks on a denoiser's calls.

    Args:
        scale: how strongly the erasure acts.
    """

    def __init__(self, backbone: Backbone, scale: float) -> None:
        self.backbone, self.scale = backbone, scale
        self.state, self.raw = State(), stack_of(backbone).raw

    def latents(self, inputs: dict[str, Any]) -> Tensor:
        """The latents of a call as one tensor."""
        return self.backbone.unpacked(inputs[self.backbone.latent_argument])

    def guided(self, inputs: dict[str, Any]) -> bool:
        """Whether a call makes both predictions: its halves then hold the same latents, the prompts' the second.

        Two prompts drawn from the same noise without guidance look alike: the pipeline that calls knows better.
        """
        x = self.latents(inputs)
        return torch.equal(x[: len(x) // 2], x[len(x) // 2 :]) and says_guided() is not False

    def warn_unguided(self, what: str) -> None:
        """Say that a call without guidance is the base's."""
        warnings.warn(
            f"{what} acts on guidance, and this call of the denoiser has none: the concept is not suppressed; draw "
            "with a guidance scale above 1",
            stacklevel=3,
        )

    def index(self, inputs: dict[str, Any]) -> int:
        """The step of the picture that a call belongs to, from 0; every call is counted once."""
        state, shape = self.state, self.latents(inputs).shape
        t = float(torch.as_tensor(inputs[self.backbone.time_argument]).reshape(-1)[0])
        # second-order schedulers come to every time but the first twice
        again = state.step and state.shape == shape and (t < state.t or (t == state.t and state.step > 1))
        if (times := times_of_call()) is not state.times:
            again, state.times = False, times
        index = state.step if again else 0
        state.t, state.step, state.shape = t, index + 1, shape
        return index

    def steps(self) -> int:
        """How many steps the picture of the last call that :meth:`index` counted has."""
        return len(self.backbone.pipe.scheduler.timesteps if self.state.times is None else self.state.times)

    def rows(self, inputs: dict[str, Any], text: Text) -> Text:
        """Stored text of one row for each picture of a guided call, in its precision and at its place."""
        x, mask = self.latents(inputs), self.backbone.text_part(inputs, "mask")
        placed = Text(
            text.hidden.to(x),
            None if text.pooled is None else text.pooled.to(x),
            None if text.mask is None else text.mask.to(x.device if mask is None else mask),
        )
        return placed.repeat(len(x) // 2)

    def hidden(self, inputs: dict[str, Any]) -> Tensor:
        """``(n, length, d)``: the token embeddings of a call, a row for each of its latents (not for each frame)."""
        hidden: Any = self.backbone.text_of(inputs)
        return hidden[:: max(len(hidden) // len(self.latents(inputs)), 1)]

    def predict(self, module: nn.Module, inputs: dict[str, Any], text: Text, which: int | None) -> Tensor:
        """The prediction for other text, by the same denoiser with every other input as in one half of a call.

        No hook of an erasure acts on it, neither this one nor those of others.

        Args:
            which: the half; None for all of an unguided call.
        """
        others = inputs if which is None else half(inputs, len(self.latents(inputs)), which)
        self.raw.on = True
        try:
            return self.backbone.output(module(**self.backbone.with_text(others, text))[0])
        finally:
            self.raw.on = False

    def replaced(self, output: Any, prediction: Tensor, which: int) -> Any:
        """A denoiser's output with one half of it replaced; channels of a variance stay."""
        raw = output[0]
        n = len(raw) // 2
        raw = torch.cat([raw[:n], raw[n:]])
        raw[which * n :][:n, : prediction.shape[1]] = prediction
        if isinstance(output, tuple):
            return raw, *output[1:]
        output[0 if isinstance(output, list) else "sample"] = raw
        return output


__all__ = ["GUIDED", "PROMPTS", "UNCONDITIONAL", "DenoiserHook", "TextErasure", "has_numbers", "stored"]
