"""SAFREE on a pipeline: the text of each call is exchanged, and features that cross the U-Net are attenuated."""

from __future__ import annotations

import collections
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from erasure.artifact import HookErasure
from erasure.artifact.hooks import Handles
from erasure.backbone import Backbone, backbone_of
from erasure.backbone.listen import named_arguments
from erasure.backbone.text import Text
from erasure.pipelines.guided import PROMPTS, DenoiserHook
from erasure.pipelines.heard import REMEMBERED, Heard
from erasure.pipelines.safree import SAFREE, Plan, planned, shortened, span


class FilteredText(HookErasure):
    """SAFREE on a pipeline.

    Tensors: ``concept.0 (k, d)``, ``concept.1`` where a second tokenizer's tokens follow, ``pooled (k, d_pooled)``.
    """

    kind: ClassVar[str] = "filtered-text"

    def install(self, pipe: Any, scale: float) -> Handles:
        backbone = backbone_of(pipe)
        hook = Filtering(backbone, self, scale)
        handles = Handles([hook.heard.listen()])
        for module in backbone.denoiser_parts.values():
            handles.hooks.append(module.register_forward_pre_hook(hook.before, with_kwargs=True))
            handles.hooks.append(module.register_forward_hook(hook.after))
        if hook.settings.reattention < 1:
            handles.hooks += [block.register_forward_hook(hook.cross) for block in backbone.skipping()]
        return handles

    def misfits(self, backbone: Backbone) -> list[str]:
        return [
            f"its {name} text is {tensor.shape[1]} wide, the model's {width}"
            for name, tensor in self.tensors.items()
            if tensor.shape[1] != (width := backbone.width("pooled" if name == "pooled" else "hidden"))
        ]

    def check_tensors(self) -> None:
        try:
            settings = SAFREE.preset("official-2025", **self.config.settings)  # type: ignore[arg-type]
        except (ValueError, TypeError):
            settings = None
        names = {"concept.0", "concept.1", "pooled"}
        shapes = [tuple(tensor.shape) for tensor in self.tensors.values()]
        whole = "concept.0" in self.tensors and all(len(s) == 2 and 0 not in s for s in shapes)
        pooled = settings is not None and settings.pooled == ("pooled" in self.tensors)
        if not set(self.tensors) <= names or not whole or not pooled or self.system:
            raise ValueError(
                "a filter of the text holds embeddings of its concept and SAFREE's settings; got others; get it again"
            )


class Filtering(DenoiserHook):
    """The hooks. Each thread that draws has its own step count and features."""

    def __init__(self, backbone: Backbone, edit: FilteredText, scale: float) -> None:
        super().__init__(backbone, scale)
        self.settings = SAFREE.preset("official-2025", **edit.config.settings)  # type: ignore[arg-type]
        self.heard = Heard(backbone, **edit.config.encoding)
        self.concept = {name: span(rows) for name, rows in edit.tensors.items()}
        self.plans: collections.OrderedDict[str, Plan | None] = collections.OrderedDict()

    @torch.no_grad()
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Project the text of a call's prompts, as far as it is the turn of their steps."""
        state: Any = self.state
        if self.raw.on:
            return None
        state.kept, state.original = None, []
        inputs = named_arguments(module, args, kwargs)
        index, guided = self.index(inputs), self.guided(inputs)
        hidden, pooled = self.hidden(inputs), self.backbone.text_part(inputs, "pooled")
        start = len(hidden) // 2 if guided else 0
        plans = self._plans_of(hidden[start:])
        acts = torch.tensor([plan is not None and index < plan.steps for plan in plans])
        if not acts.any():
            return None
        if self.settings.reattention < 1:
            text = Text(hidden[start:], None if pooled is None else pooled[start:])
            self._keep_original(module, inputs, text, PROMPTS if guided else None)
            state.acts = acts
        hidden, pooled = hidden.clone(), None if pooled is None else pooled.clone()
        for i, plan in enumerate(plans, start):
            if plan is not None and index < plan.steps:
                hidden[i] += self.scale * plan.hidden.to(hidden)
                if pooled is not None and plan.pooled is not None:
                    pooled[i] += self.scale * plan.pooled.to(pooled)
        return (), self.backbone.with_text(inputs, Text(hidden, pooled))

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.raw.on:
            self.state.original = []

    def _plans_of(self, rows: Tensor) -> list[Plan | None]:
        """A plan for each row; the same text comes with every step of a picture."""
        state: Any = self.state
        last = getattr(state, "rows", None)
        if last is None or last.shape != rows.shape or not torch.equal(last, rows):
            found = self.heard.find(rows)
            if None in found:
                warnings.warn(
                    "a text that this pipeline's encoder did not make lately is drawn as it is: SAFREE needs the words "
                    "of a prompt; give prompts, not embeddings",
                    stacklevel=2,
                )
            state.rows, state.plans = rows, [self._plan(prompt) if prompt else None for prompt in found]
        return state.plans

    def _plan(self, prompt: str) -> Plan | None:
        with self.heard.lock:
            if prompt not in self.plans:
                self.plans[prompt] = planned(self.heard.encode(shortened(prompt)), self.concept, self.settings)
                while len(self.plans) > REMEMBERED:
                    self.plans.popitem(last=False)
            return self.plans[prompt]

    # --- re-attention -----------------------------------------------------------------------------------------------

    def _keep_original(self, module: nn.Module, inputs: dict[str, Any], text: Text, which: int | None) -> None:
        """Keep the features that cross the U-Net for the original prompts."""
        state: Any = self.state
        state.kept = []
        self.predict(module, inputs, text, which)
        state.original, state.kept = state.kept, None

    @torch.no_grad()
    def cross(self, block: nn.Module, args: Any, output: Any) -> Any:
        """Keep what a block hands across, or attenuate it."""
        state: Any = self.state
        hidden, features = output
        if self.raw.on:
            if state.kept is not None:
                state.kept.append(features)
            return None
        if not state.original:
            return None
        changed = []
        for safe, original in zip(features, state.original.pop(0), strict=True):
            start, safe = len(safe) - len(original), safe.clone()
            acts = state.acts.repeat_interleave(len(original) // len(state.acts)).to(safe.device)
            low = reattended(safe[start:], original, self.settings.reattention, self.settings.radius)
            safe[start:] = torch.where(acts[:, None, None, None], low, safe[start:])
            changed.append(safe)
        return hidden, tuple(changed)


def reattended(safe: Tensor, original: Tensor, factor: float, radius: int) -> Tensor:
    """Features ``(n, c, h, w)`` of a projected prompt, with low frequencies that exceed the original's attenuated."""
    x, y = (torch.fft.fft2(features.float()) for features in (safe, original))
    near = [torch.fft.fftfreq(side, 1 / side, device=safe.device).abs() <= radius for side in safe.shape[-2:]]
    low = near[0][:, None] & near[1]
    return torch.fft.ifft2(torch.where(low & (x.abs() > y.abs()), factor * x, x)).real.to(safe)
