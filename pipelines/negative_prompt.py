"""A negative prompt: the concept stands where classifier-free guidance has the empty prompt. Nothing is removed."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from erasure.artifact import Erasure
from erasure.artifact.gated import EMPTY
from erasure.artifact.hooks import Handles
from erasure.backbone import Backbone, backbone_of
from erasure.backbone.listen import half, joined, named_arguments
from erasure.methods.base import Method, Reference, Request
from erasure.pipelines.guided import GUIDED, PROMPTS, UNCONDITIONAL, DenoiserHook, TextErasure, stored


@dataclasses.dataclass(frozen=True, kw_only=True)
class NegativePrompt(Method):
    """In guidance ``e(n) + w (e(p) - e(n))``, with p the prompt and n the negative one, the concept c is added to n:

        e(n) + s strength (e(c) - e())   takes the place of   e(n)

    with s the erasure's scale (negation as Liu et al. 2022 compose it). A call without a negative prompt of its own has
    the empty one for n: where s strength = 1 the concept simply takes its place. That costs nothing, as the text is
    exchanged before the denoiser is called; with another factor a call costs half as much again. A negative prompt of
    the user's stays in force beside the concept; a call then costs twice as much.

    Without guidance (a scale of 1) there is nothing to act on: the picture is the base's, and a warning says so.

    Attributes:
        strength: how far away from the concept. It grows with the guidance scale, too: 1 does more at 7.5 than at 3.
        synonyms: name the concept's synonyms as well.
    """

    strength: PositiveFloat = 1.0
    synonyms: bool = True

    # Sana's pipeline encodes a negative prompt without the instruction that stands before every other one
    architectures: ClassVar[tuple[str, ...] | None] = tuple(name for name in GUIDED if name != "sana")
    anchored: ClassVar[bool] = False
    key: ClassVar[str] = "negative-prompt"
    kind: ClassVar[str | None] = "negative-guidance"
    summary: ClassVar[str] = "the concept as the negative prompt of guidance; changes no weight"
    reference: ClassVar[Reference] = Reference(
        "Compositional Visual Generation with Composable Diffusion Models",
        "Liu et al., ECCV 2022",
        "2206.01714",
        "energy-based-model/Compositional-Visual-Generation-with-Composable-Diffusion-Models-PyTorch",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # On Emoji World at its guidance of 3, by its two classifiers: target seen in 25 and 25 % of 72 pictures (base:
        # 92 and 86), neighbours right in 82 and 75 % of 108 (97 and 96), unrelated things in 85 and 91 % of 120 (93 and
        # 92). Screened with 18 pictures of each: strength 1 left the target in 56 and 50 %, neighbours right in 78 and
        # 89; strength 1.5 left it in none, neighbours right in 61 and 61.
        "recommended": {"strength": 1.25},
        "plain": {},
    }

    def validate(self, backbone: Backbone, request: Request) -> None:
        super().validate(backbone, request)
        if backbone.guidance != "cfg":
            raise ValueError(
                "a negative prompt acts on classifier-free guidance, and an LCM U-Net has none; use a closed form"
            )

    def erase(self, backbone: Backbone, request: Request) -> Erasure:
        """Encode the concept and the empty prompt; everything else happens while pictures are drawn."""
        phrases = request.names(synonyms=self.synonyms)
        text = backbone.encode([", ".join(dict.fromkeys(phrases)), ""]).text
        return NegativeGuidance(self.name_for(request), self.record(backbone, request, prompts=phrases), stored(text))


class NegativeGuidance(TextErasure):
    """A concept as the negative prompt of a pipeline; its text is the concept's and the empty prompt's."""

    kind: ClassVar[str] = "negative-guidance"
    title: ClassVar[str] = "a negative prompt"
    rows: ClassVar[int] = 2
    numbers: ClassVar[tuple[str, ...]] = ("strength",)

    def install(self, pipe: Any, scale: float) -> Handles:
        negation = Negation(backbone_of(pipe), self, scale)
        handles = Handles()
        for module in negation.backbone.denoiser_parts.values():
            handles.hooks.append(module.register_forward_pre_hook(negation.before, with_kwargs=True))
            handles.hooks.append(module.register_forward_hook(negation.after, with_kwargs=True))
        return handles


class Negation(DenoiserHook):
    """The hooks: the text is exchanged before a call, or the prediction afterwards."""

    def __init__(self, backbone: Backbone, edit: NegativeGuidance, scale: float) -> None:
        settings: Any = edit.config.settings
        super().__init__(backbone, scale * settings["strength"])
        self.concept, self.empty = edit.text[:1], edit.text[1:]

    @torch.no_grad()
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Exchange the text where that is the whole formula: with a factor of 1, for a call with the empty prompt."""
        state: Any = self.state
        if self.raw.on:
            return None
        inputs = named_arguments(module, args, kwargs)
        x = self.latents(inputs)
        state.empty, state.done = False, not self.guided(inputs)
        if state.done:
            self.warn_unguided("a negative prompt")
            return None
        first, second = (half(inputs, len(x), which) for which in (UNCONDITIONAL, PROMPTS))
        state.empty = self._is_empty(self.hidden(inputs)[: len(x) // 2])
        concept, replaced = self.rows(inputs, self.concept), self.backbone.text_part(first, "hidden")
        if self.scale == 1 and state.empty and concept.hidden.shape == replaced.shape:
            state.done = True
            return (), joined(self.backbone.with_text(first, concept), second, len(x))
        return None

    @torch.no_grad()
    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Change the unconditional prediction, where the text was not exchanged."""
        if self.raw.on or self.state.done:
            return output
        inputs = named_arguments(module, args, kwargs)
        negative, _ = self.backbone.output(output[0]).chunk(2)
        concept = self.predict(module, inputs, self.rows(inputs, self.concept), UNCONDITIONAL)
        empty = negative
        if not self.state.empty:
            empty = self.predict(module, inputs, self.rows(inputs, self.empty), UNCONDITIONAL)
        return self.replaced(output, negative + self.scale * (concept - empty), UNCONDITIONAL)

    def _is_empty(self, rows: Tensor) -> bool:
        """Whether every row is the empty prompt: by rounding, or by SDXL's zeros."""
        concept, empty = (text.hidden.to(rows.device) for text in (self.concept, self.empty))
        if rows.shape[1:] != empty.shape[1:]:
            return False
        near = EMPTY * (concept - empty).norm()
        return all(bool((row - empty[0]).norm() <= near) or not row.any() for row in rows.float())
