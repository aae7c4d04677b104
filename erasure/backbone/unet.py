"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, cross-attention at every level of a UNet."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from erasure.backbone.base import Backbone, Site, Space
from erasure.backbone.text import Conditioning, encode_clip

Selector = Literal["cross_attention", "cross_attention_kv", "not_cross_attention", "all"]


class UNetBackbone(Backbone):
    """Stable Diffusion 1.x / 2.x: ``unet``, ``text_encoder``, ``tokenizer`` and ``scheduler``."""

    architecture = "sd-unet"

    def __init__(self, pipe: Any) -> None:
        refuse_unsafe(pipe)
        super().__init__(pipe)

    # --- what it is -------------------------------------------------------------------------------------------------

    @property
    def unet(self) -> Any:
        return self.pipe.unet

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts, as its scheduler declares: ``epsilon`` or ``v_prediction``."""
        return self.pipe.scheduler.config.prediction_type

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    def text_sites(self, space: Space = "hidden") -> dict[str, Site]:
        """Keys and values of every cross-attention."""
        if space not in self.spaces:
            raise ValueError(f"{self.architecture} has no {space} text embeddings; it has {list(self.spaces)}")
        return {
            name: Site(module)
            for name, module in self.unet.named_modules()
            if ".attn2." in name and name.endswith((".to_k", ".to_v"))
        }

    def parameters(self, selector: Selector) -> dict[str, nn.Parameter]:
        """Weights and biases of linear and convolution layers, chosen by where they stand. Norms are never chosen.

        ``cross_attention`` (ESD-x) queries, keys, values and outputs of cross-attention; ``cross_attention_kv``
        (ESD-x-strict) keys and values alone; ``not_cross_attention`` (ESD-u) everything else; ``all``.
        """
        chosen = {
            "cross_attention": lambda name: ".attn2." in name,
            "cross_attention_kv": lambda name: ".attn2.to_k" in name or ".attn2.to_v" in name,
            "not_cross_attention": lambda name: ".attn2." not in name,
            "all": lambda name: True,
        }
        if selector not in chosen:
            raise ValueError(f"unknown parameter selector; got {selector!r}; choose one of {list(chosen)}")
        return {
            f"{name}.{key}": parameter
            for name, module in self.unet.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and chosen[selector](name)
            for key, parameter in module.named_parameters(recurse=False)
        }

    # --- what it does -----------------------------------------------------------------------------------------------

    def timesteps(self, num_inference_steps: int) -> int:
        """How many steps the scheduler takes (second-order ones take more than they are asked for)."""
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(num_inference_steps)
        return len(scheduler.timesteps)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Text conditioning of prompts, ``hidden`` of shape ``(n, 77, d)`` on Stable Diffusion."""
        return encode_clip(self.pipe.text_encoder, self.pipe.tokenizer, prompts)

    def predict(self, x: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
        """The denoiser's output for scaled latents ``x (n, 4, h, w)`` at timesteps ``t (n,)``."""
        return self.unet(x, t, encoder_hidden_states=hidden).sample

    @torch.no_grad()
    def trajectory(
        self,
        hidden: Tensor,
        empty: Tensor,
        noise: Tensor,
        *,
        generator: torch.Generator | None = None,
        num_inference_steps: int,
        guidance_scale: float,
        stop: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Sample with classifier-free guidance, yielding what each step computed on the way.

        Args:
            hidden, empty: conditioning ``(n, length, d)`` of the prompts and of the empty prompt.
            noise: ``(n, 4, h, w)`` standard normal.
            generator: of schedulers that add noise at every step.
            stop: yield only the first ``stop`` steps.

        Yields:
            ``(x, t, conditional, unconditional)``: the denoiser's input, its timestep and both predictions.
        """
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(num_inference_steps, device=noise.device)
        random = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        latents = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps[:stop]:
            x = scheduler.scale_model_input(latents, t)
            both = self.predict(torch.cat([x, x]), t.expand(2 * len(x)), torch.cat([hidden, empty]))
            conditional, unconditional = both.chunk(2)
            yield x, t, conditional.float(), unconditional.float()
            guided = unconditional + guidance_scale * (conditional - unconditional)
            latents = scheduler.step(guided, t, latents, return_dict=False, **random)[0]


def refuse_unsafe(pipe: Any) -> None:
    """Refuse a pipeline on which an edit would silently do nothing, or something else."""
    missing = [name for name in ("unet", "text_encoder", "tokenizer", "scheduler") if getattr(pipe, name, None) is None]
    if missing:
        raise ValueError(
            f"not a Stable Diffusion 1.x / 2.x pipeline; {type(pipe).__name__} has no {', '.join(missing)}; "
            "load one with DiffusionPipeline.from_pretrained"
        )
    if getattr(pipe, "text_encoder_2", None) is not None:
        raise ValueError(
            f"{type(pipe).__name__} has two text encoders; this version edits Stable Diffusion 1.x / 2.x only"
        )
    for part in ("unet", "text_encoder"):
        _refuse_module(part, getattr(pipe, part))
    if pipe.unet.dtype != pipe.text_encoder.dtype:
        raise ValueError(
            f"the components have different dtypes; unet {pipe.unet.dtype}, text encoder {pipe.text_encoder.dtype}; "
            "bring them together with pipe.to(dtype) before erasing"
        )


def _refuse_module(part: str, module: Any) -> None:
    if hasattr(module, "_orig_mod") or any(getattr(m, "_compiled_call_impl", None) for m in module.modules()):
        raise ValueError(
            f"the {part} is compiled (torch.compile) and may go on using old weights; erase first, compile afterwards"
        )
    if getattr(module, "is_quantized", False) or getattr(module, "hf_quantizer", None) is not None:
        raise ValueError(f"the {part} is quantised; erase the full-precision model first, quantise afterwards")
    for name, child in module.named_modules():
        if getattr(child, "fused_projections", False):
            raise ValueError(
                f"{part}.{name} has fused query-key-value projections, so its own keys and values are not used; "
                "call pipe.unfuse_qkv_projections() first"
            )
        if hasattr(child, "base_layer"):
            raise ValueError(
                f"{part}.{name} carries a LoRA adapter; call fuse_lora() and unload_lora_weights() before erasing"
            )
        if getattr(child, "_hf_hook", None) is not None or getattr(child, "_diffusers_hook", None) is not None:
            raise ValueError(
                f"{part} is offloaded or hooked; erase before enable_model_cpu_offload() and its relatives "
                "(or call pipe.remove_all_hooks() first)"
            )
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{part}.{name} has no data (meta device); erase before offloading, or load without device_map"
            )
        if not parameter.is_floating_point():
            raise ValueError(
                f"{part}.{name} is stored as {parameter.dtype}; erase the full-precision model, quantise afterwards"
            )
