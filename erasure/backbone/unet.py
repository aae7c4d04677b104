"""Stable Diffusion 1.x, 2.x and XL: CLIP text encoders, cross-attention in a UNet."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from erasure.backbone.base import Backbone, Site, Space
from erasure.backbone.text import Conditioning, Segment, Text, encode_clip, encode_with, some, tokenise

Selector = Literal["cross_attention", "cross_attention_kv", "not_cross_attention", "all"]


class UNetBackbone(Backbone):
    """Stable Diffusion 1.x / 2.x: ``unet``, ``text_encoder``, ``tokenizer`` and ``scheduler``."""

    architecture = "sd-unet"
    pipelines = "Stable Diffusion 1.x / 2.x"

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

    @classmethod
    def sites_of(cls, denoiser: nn.Module, space: Space) -> dict[str, Site]:
        """Keys and values of every cross-attention."""
        return {
            name: Site(module)
            for name, module in denoiser.named_modules()
            if ".attn2." in name and name.endswith((".to_k", ".to_v")) and isinstance(module, nn.Linear)
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

    def encode(self, prompts: Sequence[str], *, padded: bool = True) -> Conditioning:
        """Text conditioning of prompts, ``hidden`` of shape ``(n, 77, d)`` on Stable Diffusion."""
        return encode_clip(self.pipe.text_encoder, self.pipe.tokenizer, prompts, padded=padded)

    def predict(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        """The denoiser's output for scaled latents ``x (n, 4, h, w)`` at timesteps ``t (n,)``."""
        return self.unet(x, t, encoder_hidden_states=text.hidden).sample

    @torch.no_grad()
    def trajectory(
        self,
        text: Text,
        empty: Text,
        noise: Tensor,
        *,
        generator: torch.Generator | None = None,
        num_inference_steps: int,
        guidance_scale: float,
        stop: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Sample with classifier-free guidance, yielding what each step computed on the way.

        Args:
            text, empty: ``n`` rows of the prompts, and ``n`` of the empty prompt.
            noise: ``(n, 4, h, w)`` standard normal.
            generator: of schedulers that add noise at every step.
            stop: yield only the first ``stop`` steps.

        Yields:
            ``(x, t, conditional, unconditional)``: the denoiser's input, its timestep and both predictions.
        """
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(num_inference_steps, device=noise.device)
        random = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        latents, told = noise * scheduler.init_noise_sigma, text + empty
        for t in scheduler.timesteps[:stop]:
            x = scheduler.scale_model_input(latents, t)
            both = self.predict(torch.cat([x, x]), t.expand(2 * len(x)), told)
            conditional, unconditional = both.chunk(2)
            yield x, t, conditional.float(), unconditional.float()
            guided = unconditional + guidance_scale * (conditional - unconditional)
            latents = scheduler.step(guided, t, latents, return_dict=False, **random)[0]


class SDXLBackbone(UNetBackbone):
    """Stable Diffusion XL: two CLIP encoders side by side, and a pooled embedding beside the timestep."""

    architecture = "sdxl"
    pipelines = "Stable Diffusion XL"
    requires = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    spaces = ("hidden", "pooled")

    @classmethod
    def sites_of(cls, denoiser: Any, space: Space) -> dict[str, Site]:
        """Keys and values of every cross-attention; of the layer the pooled embedding enters, the columns it enters by.

        The other columns of that layer see six embedded numbers: the sizes of the picture and where it was cropped.
        """
        if space == "hidden":
            return super().sites_of(denoiser, space)
        if getattr(denoiser, "add_embedding", None) is None:
            return {}
        numbers = 6 * denoiser.config.addition_time_embed_dim
        width = denoiser.config.projection_class_embeddings_input_dim - numbers
        return {"add_embedding.linear_1": Site(denoiser.add_embedding.linear_1, columns=(0, width))}

    def encode(self, prompts: Sequence[str], *, padded: bool = True) -> Conditioning:
        """Last but one layers of both side by side, ``hidden (n, 77, 2048)``; ``pooled (n, 1280)`` of the second.

        Token positions are the first tokenizer's, as in the official codes. The second splits a run of "!" otherwise.
        """
        prompts = some(prompts)
        ids, counts = tokenise(self.pipe.tokenizer, prompts)
        ids_2, counts_2 = tokenise(self.pipe.tokenizer_2, prompts, name="tokenizer_2")
        if padded:
            hidden, pooled = encode_with(self.pipe, prompts, do_classifier_free_guidance=False)
        else:
            length = max(*counts, *counts_2)
            hidden, pooled = self._encode(ids[:, :length], ids_2[:, :length])
        return Conditioning(hidden, (Segment(hidden, ids, counts),), pooled)

    @torch.no_grad()
    def _encode(self, ids: Tensor, ids_2: Tensor, *, batch_size: int = 16) -> tuple[Tensor, Tensor]:
        """What the pipeline's ``encode_prompt`` makes of token ids, whatever their number."""
        encoders = self.pipe.text_encoder, self.pipe.text_encoder_2
        hidden, pooled = [], []
        for batch in zip(ids.split(batch_size), ids_2.split(batch_size), strict=True):
            both = [e(b.to(e.device), output_hidden_states=True) for e, b in zip(encoders, batch, strict=True)]
            hidden.append(torch.cat([one.hidden_states[-2] for one in both], dim=-1))
            pooled.append(both[1].text_embeds)
        return torch.cat(hidden), torch.cat(pooled)

    def parameters(self, selector: Selector) -> dict[str, nn.Parameter]:
        """As on Stable Diffusion 1.x; ``not_cross_attention`` leaves out what embeds timestep, sizes, pooled text."""
        chosen = super().parameters(selector)
        if selector == "not_cross_attention":  # the official code's choice on this architecture
            chosen = {name: weight for name, weight in chosen.items() if "block" in name and "emb" not in name}
        return chosen

    def predict(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        """As on Stable Diffusion 1.x, for a whole picture: original size and target size its own, nothing cropped."""
        height, width = (side * self.pipe.vae_scale_factor for side in x.shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=x.dtype, device=x.device).expand(len(x), -1)
        told = {"text_embeds": text.pooled, "time_ids": sizes}
        return self.unet(x, t, encoder_hidden_states=text.hidden, added_cond_kwargs=told).sample
