"""SLD, Safe Latent Diffusion: guidance that steers away from a concept while pictures are drawn. Nothing is removed."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn

from erasure.artifact import Erasure
from erasure.artifact.hooks import Handles
from erasure.backbone import Backbone, backbone_of
from erasure.backbone.listen import named_arguments
from erasure.methods.base import Method, Reference, Request
from erasure.pipelines.guided import GUIDED, PROMPTS, DenoiserHook, TextErasure, stored


@dataclasses.dataclass(frozen=True, kw_only=True)
class SLD(Method):
    """At every step, with e the prediction for the prompt, the unconditional one and that for the concept s:

        g = e(p) - e(),   m = clamp(strength |e(p) - e(s)|, max 1) where e(p) - e(s) < threshold, else 0
        gamma = (e(s) - e()) m + momentum_scale nu,   nu <- momentum nu + (1 - momentum) gamma
        e() + guidance_scale (g - gamma)     after the warm-up

    (Schramowski et al. 2023, equations 3 to 8.) Every denoiser call costs half as much again. The weights stay as they
    are: whoever takes the hook off, or calls the denoiser without guidance, has the base. A warning says the latter.

    Attributes:
        warmup: steps before it acts. Fewer change the composition as well. A number below 1 is a share of the steps:
            0.14 is 7 of 50 and 1 of 8. The published numbers are of 50 steps: with 8 steps 7 leave it one to act in.
        strength: s_S. How soon the guidance is whole. Tuned for epsilon of Stable Diffusion 1.x.
        threshold: lambda. Where the prompt's prediction exceeds the concept's by more, nothing is done. 0 acts seldom,
            1 nearly always.
        momentum_scale, momentum: how long a direction, once taken, is kept.
        synonyms: steer away from the concept's synonyms as well.
    """

    warmup: NonNegativeFloat = 10
    strength: NonNegativeFloat = 1000.0
    threshold: float = 0.01
    momentum_scale: NonNegativeFloat = 0.3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.4
    synonyms: bool = True

    architectures: ClassVar[tuple[str, ...] | None] = GUIDED
    anchored: ClassVar[bool] = False
    key: ClassVar[str] = "sld"
    kind: ClassVar[str | None] = "safe-guidance"
    summary: ClassVar[str] = "guidance away from the concept while drawing; changes no weight"
    reference: ClassVar[Reference] = Reference(
        "Safe Latent Diffusion: Mitigating Inappropriate Degeneration in Diffusion Models",
        "Schramowski et al., CVPR 2023",
        "2211.05105",
        "ml-research/safe-latent-diffusion",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # strong, with its warm-up as a share of the steps: in 8 steps it let 98 % of Emoji World's targets through
        "recommended": {"warmup": 0.14, "strength": 2000.0, "threshold": 0.025, "momentum_scale": 0.5, "momentum": 0.7},
        "weak": {"warmup": 15, "strength": 200.0, "threshold": 0.0, "momentum_scale": 0.0, "momentum": 0.0},
        "medium": {},
        "strong": {"warmup": 7, "strength": 2000.0, "threshold": 0.025, "momentum_scale": 0.5, "momentum": 0.7},
        "max": {"warmup": 0, "strength": 5000.0, "threshold": 1.0, "momentum_scale": 0.5, "momentum": 0.7},
    }

    def validate(self, backbone: Backbone, request: Request) -> None:
        super().validate(backbone, request)
        if backbone.guidance != "cfg":
            raise ValueError("SLD changes classifier-free guidance, and an LCM U-Net has none; use a closed form")

    def erase(self, backbone: Backbone, request: Request) -> Erasure:
        """Encode the concept; everything else happens while pictures are drawn."""
        phrases = request.names(synonyms=self.synonyms)
        text = backbone.encode([", ".join(dict.fromkeys(phrases))]).text
        return SafeGuidance(self.name_for(request), self.record(backbone, request, prompts=phrases), stored(text))


class SafeGuidance(TextErasure):
    """SLD on a pipeline; its text is the concept's, of one row."""

    kind: ClassVar[str] = "safe-guidance"
    title: ClassVar[str] = "safe guidance"
    rows: ClassVar[int] = 1
    numbers: ClassVar[tuple[str, ...]] = ("warmup", "strength", "threshold", "momentum_scale", "momentum")

    def install(self, pipe: Any, scale: float) -> Handles:
        backbone = backbone_of(pipe)
        steering = Steering(backbone, self, scale)
        parts = backbone.denoiser_parts.values()
        return Handles([module.register_forward_hook(steering, with_kwargs=True) for module in parts])


class Steering(DenoiserHook):
    """The hook. Each thread that draws has its own step count and momentum."""

    def __init__(self, backbone: Backbone, edit: SafeGuidance, scale: float) -> None:
        super().__init__(backbone, scale)
        self.text = edit.text
        self.settings: Any = edit.config.settings

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        inputs = named_arguments(module, args, kwargs)
        if self.raw.on:
            return output
        if not self.guided(inputs):
            self.warn_unguided("SLD")
            return output
        null, prompt = self.backbone.output(output[0]).chunk(2)
        safe = self.predict(module, inputs, self.rows(inputs, self.text), PROMPTS)
        index, warmup = self.index(inputs), self.settings["warmup"]
        gamma = self._gamma(null, prompt, safe, first=index == 0)
        if index < (round(warmup * self.steps()) if warmup < 1 else warmup):
            return output
        return self.replaced(output, prompt - self.scale * gamma, PROMPTS)

    def _gamma(self, null: Tensor, prompt: Tensor, safe: Tensor, *, first: bool) -> Tensor:
        """``gamma`` of this step; the momentum is updated."""
        state: Any = self.state
        s = self.settings
        nu = torch.zeros_like(null) if first else state.nu
        away = prompt - safe
        m = torch.where(away < s["threshold"], (s["strength"] * away.abs()).clamp(max=1), torch.zeros_like(away))
        gamma = (safe - null) * m + s["momentum_scale"] * nu
        state.nu = s["momentum"] * nu + (1 - s["momentum"]) * gamma
        return gamma
