"""SLD, Safe Latent Diffusion: guidance that steers away from a concept while pictures are drawn. Nothing is removed."""

from __future__ import annotations

import dataclasses
import threading
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from erasure.artifact import Erasure, HookErasure
from erasure.artifact.hooks import Handles
from erasure.backbone import Backbone, Space, backbone_of
from erasure.backbone.listen import named_arguments, second_half
from erasure.backbone.text import Text
from erasure.methods.base import Method, Reference, Request

NonNegative = Annotated[float, Field(ge=0)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SLD(Method):
    """At every step, with e the prediction for the prompt, the unconditional one and that for the concept s:

        g = e(p) - e(),   m = clamp(strength |e(p) - e(s)|, max 1) where e(p) - e(s) < threshold, else 0
        gamma = (e(s) - e()) m + momentum_scale nu,   nu <- momentum nu + (1 - momentum) gamma
        e() + guidance_scale (g - gamma)     after the warm-up

    (Schramowski et al. 2023, equations 3 to 8.) Every denoiser call costs half as much again. The weights stay as they
    are: whoever takes the hook off, or calls the denoiser without guidance, has the base.

    Attributes:
        warmup: steps before it acts. Fewer change the composition as well.
        strength: s_S. How soon the guidance is whole. Tuned for epsilon of Stable Diffusion 1.x.
        threshold: lambda. Where the prompt's prediction exceeds the concept's by more, nothing is done. 0 acts seldom,
            1 nearly always.
        momentum_scale, momentum: how long a direction, once taken, is kept.
        synonyms: steer away from the concept's synonyms as well.
    """

    warmup: Annotated[int, Field(ge=0)] = 10
    strength: NonNegative = 1000.0
    threshold: float = 0.01
    momentum_scale: NonNegative = 0.3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.4
    synonyms: bool = True

    # where both predictions of guidance are made by one call of the denoiser, and guidance is off at 1
    architectures: ClassVar[tuple[str, ...] | None] = (
        "sd-unet", "sdxl", "sd3", "pixart", "sana", "auraflow", "ltx", "cogvideox", "kolors"
    )  # fmt: skip
    key: ClassVar[str] = "sld"
    summary: ClassVar[str] = "guidance away from the concept while drawing; changes no weight"
    reference: ClassVar[Reference] = Reference(
        "Safe Latent Diffusion: Mitigating Inappropriate Degeneration in Diffusion Models",
        "Schramowski et al., CVPR 2023",
        "2211.05105",
        "ml-research/safe-latent-diffusion",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "recommended": {"warmup": 7, "strength": 2000.0, "threshold": 0.025, "momentum_scale": 0.5, "momentum": 0.7},
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
        phrases = [p for c in request.concepts for p in (c.phrases if self.synonyms else (c.name,))]
        text = backbone.encode([", ".join(dict.fromkeys(phrases))]).text
        parts = {"hidden": text.hidden, "pooled": text.pooled, "mask": text.mask}
        tensors = {name: t.float().cpu().contiguous().clone() for name, t in parts.items() if t is not None}
        return SafeGuidance(self.name_for(request), self.record(backbone, request, prompts=phrases), tensors)


class SafeGuidance(HookErasure):
    """SLD on a pipeline.

    Tensors: ``hidden (1, length, d)`` of the concept; ``pooled (1, d)`` and ``mask (1, length)`` where there are such.
    """

    kind: ClassVar[str] = "safe-guidance"

    def install(self, pipe: Any, scale: float) -> Handles:
        backbone = backbone_of(pipe)
        steering = Steering(backbone, self, scale)
        parts = backbone.denoiser_parts.values()
        return Handles([module.register_forward_hook(steering, with_kwargs=True) for module in parts])

    def misfits(self, backbone: Backbone) -> list[str]:
        spaces: dict[str, Space] = {"hidden": "hidden", "pooled": "pooled"}
        widths = {name: t.shape[-1] for name, t in self.tensors.items() if spaces.get(name) in backbone.spaces}
        return [
            f"its {name} text is {found} wide, the model's {wanted}"
            for name, found in widths.items()
            if found != (wanted := backbone.width(spaces[name]))
        ]

    def check_tensors(self) -> None:
        settings = self.config.settings
        numbers = ("warmup", "strength", "threshold", "momentum_scale", "momentum")
        whole = isinstance(settings, dict) and all(isinstance(settings.get(n), int | float) for n in numbers)
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        dims = {"hidden": 3, "pooled": 2, "mask": 2}
        rows = all(len(shape) == dims.get(name) and shape[0] == 1 and 0 not in shape for name, shape in shapes.items())
        masked = shapes.get("mask", (1,))[1:] in ((), shapes.get("hidden", ())[1:2])
        if "hidden" not in shapes or not rows or not masked or not whole or self.system:
            raise ValueError(
                "safe guidance holds the concept's embeddings and SLD's settings; got others; get it again"
            )


class Steering:
    """The hook. Each thread that draws has its own step count and momentum; a new picture begins with a larger time."""

    def __init__(self, backbone: Backbone, edit: SafeGuidance, scale: float) -> None:
        self.backbone, self.scale = backbone, scale
        self.text = Text(edit.tensors["hidden"], edit.tensors.get("pooled"), edit.tensors.get("mask"))
        self.settings: Any = edit.config.settings
        self.state = threading.local()

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        inputs = named_arguments(module, args, kwargs)
        raw = output[0]
        if getattr(self.state, "inside", False) or not self._guided(inputs):
            return output
        null, prompt = self.backbone.output(raw).chunk(2)
        gamma = self._gamma(null, prompt, self._concept(module, inputs), inputs)
        if gamma is None:
            return output
        steered = torch.cat([raw[: len(null)], raw[len(null) :]])
        steered[len(null) :, : prompt.shape[1]] = prompt - self.scale * gamma
        if isinstance(output, tuple):
            return steered, *output[1:]
        output[0 if isinstance(output, list) else "sample"] = steered
        return output

    def _guided(self, inputs: dict[str, Any]) -> bool:
        """Whether a call makes both predictions: its halves then hold the same latents.

        The pipeline is not asked: others may hold the same denoiser.
        """
        x = self.backbone.unpacked(inputs[self.backbone.latent_argument])
        first, second = x[: len(x) // 2], x[len(x) // 2 :]
        return torch.equal(first, second)

    def _concept(self, module: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The prediction for the concept, by the same denoiser with every other input as it is."""
        x = self.backbone.unpacked(inputs[self.backbone.latent_argument])
        n = len(x) // 2
        halves = {name: second_half(value, len(x)) for name, value in inputs.items()}
        text = self.text.repeat(n)
        mask = next((inputs.get(name) for name, part in self.backbone.text_arguments.items() if part == "mask"), None)
        text = Text(
            text.hidden.to(x),
            None if text.pooled is None else text.pooled.to(x),
            None if text.mask is None else text.mask.to(x.device if mask is None else mask),
        )
        self.state.inside = True
        try:
            return self.backbone.output(module(**self.backbone.with_text(halves, text))[0])
        finally:
            self.state.inside = False

    def _gamma(self, null: Tensor, prompt: Tensor, safe: Tensor, inputs: dict[str, Any]) -> Tensor | None:
        """``gamma`` of this step; None during the warm-up."""
        state, s = self.state, self.settings
        t = float(torch.as_tensor(inputs[self.backbone.time_argument]).reshape(-1)[0])
        # second-order schedulers come to every time but the first twice
        again = hasattr(state, "t") and (t < state.t or (t == state.t and state.step > 1))
        if not again or state.nu.shape != null.shape:
            state.step, state.nu = 0, torch.zeros_like(null)
        away = prompt - safe
        m = torch.where(away < s["threshold"], (s["strength"] * away.abs()).clamp(max=1), torch.zeros_like(away))
        gamma = (safe - null) * m + s["momentum_scale"] * state.nu
        state.nu = s["momentum"] * state.nu + (1 - s["momentum"]) * gamma
        state.t, state.step = t, state.step + 1
        return gamma if state.step > s["warmup"] else None
