"""Stable Diffusion 1.x, 2.x and XL: CLIP text encoders, cross-attention in a UNet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from erasure.backbone.base import Backbone, Role, Site, Space
from erasure.backbone.noise import NoiseModel, diffusion_of
from erasure.backbone.text import Conditioning, Segment, Text, converted, in_batches, tokenise

ClipSkip = int | Literal["both"] | None
READERS: tuple[tuple[str, Role], ...] = (("to_k", "key"), ("to_v", "value"))


class UNetBackbone(Backbone):
    """Stable Diffusion 1.x / 2.x: ``unet``, ``text_encoder``, ``tokenizer`` and ``scheduler``.

    Args:
        clip_skip: the layer of the text encoder that pictures are drawn with, as in the pipeline's call: None (default)
            the last, 1 the one before it. An erasure made at one layer leaves much of the concept at another (10 of 24
            pictures on Emoji World), so give what you draw with; ``"both"`` erases at the last layer and at the one
            before it, for a file whose users draw with either.
    """

    architecture = "sd-unet"
    pipelines = "Stable Diffusion 1.x / 2.x"
    denoisers = ("unet",)
    latent_argument = "sample"
    batch_size = 64

    def __init__(self, pipe: Any, *, clip_skip: ClipSkip = None, **options: Any) -> None:
        if clip_skip not in (None, "both") and (type(clip_skip) is not int or not 0 <= clip_skip < 12):
            raise ValueError(
                f"clip_skip is a number of layers, or 'both'; got {clip_skip!r}; give 1 for the last but one"
            )
        self.clip_skip: ClipSkip = clip_skip or None
        super().__init__(pipe, **options)

    def check_sites(self) -> None:
        config = getattr(self.unet, "config", None)
        if getattr(config, "dual_cross_attention", False):
            raise ValueError(
                "this UNet splits its text between two attentions (dual_cross_attention); it is not supported"
            )
        if getattr(config, "addition_embed_type", None) == "text":
            raise ValueError(
                "this UNet reads the text a second time, beside the timestep (addition_embed_type='text', DeepFloyd "
                "IF), where an edit would not reach it; it is not supported"
            )
        if any(getattr(module, "norm_cross", None) is not None for module in self.unet.modules()):
            raise ValueError(
                "in this UNet every attention has a norm of its own in front of the text (cross_attention_norm, the "
                "latent upscaler); it is not supported"
            )
        super().check_sites()

    def other_readers(self) -> dict[str, int]:
        """Also GLIGEN's reading of the phrases that it is given places for."""
        grounding = getattr(self.unet, "position_net", None)
        layers = 0 if grounding is None else sum(isinstance(module, nn.Linear) for module in grounding.modules())
        return super().other_readers() | ({"position_net": layers} if layers else {})

    @property
    def unet(self) -> Any:
        return self.pipe.unet

    @property
    def guidance(self) -> Literal["cfg", "embedded"]:  # type: ignore[override]
        """Embedded in LCM U-Nets, which take the number as an input."""
        return "embedded" if getattr(self.unet.config, "time_cond_proj_dim", None) else "cfg"

    @property
    def noise(self) -> NoiseModel:
        """Epsilon or v, as the scheduler declares."""
        if not hasattr(self.pipe.scheduler, "alphas_cumprod"):
            raise ValueError(f"{type(self.pipe.scheduler).__name__} keeps no cumulative alphas; use DDIMScheduler")
        return diffusion_of(self.pipe.scheduler, device=self.device)

    def skipping(self) -> list[nn.Module]:
        """The blocks that hand features across the U; each returns ``(hidden state, features)``."""
        return list(self.unet.down_blocks)

    def text_inputs(self, text: Text) -> dict[str, Any]:
        """With a row for every frame where a motion adapter made the U-Net read them one by one."""
        inputs = super().text_inputs(text)
        if "motion_max_seq_length" not in self.unet.config:
            return inputs
        frames = self.latent_shape[1]
        return {name: value.repeat_interleave(frames, dim=0) for name, value in inputs.items()}

    # --- where text enters ------------------------------------------------------------------------------------------

    def sites_of(self, denoiser: nn.Module, space: Space) -> dict[str, Site]:
        """Keys and values of every attention that was built to read another width than its own: the text's.

        Temporal attentions, whatever they are called, were not. Where the text is projected first (Kolors), that
        projection is the only layer that receives it.
        """
        if projection := projection_site(denoiser):
            return projection
        if getattr(getattr(denoiser, "config", None), "encoder_hid_dim_type", None) not in (
            None,
            "text_proj",
            "ip_image_proj",
        ):
            return {}
        return {
            f"{name}.{layer}": Site(getattr(module, layer), role)
            for name, module in denoiser.named_modules()
            if isinstance(module, Attention) and module.is_cross_attention and module.to_k is not None
            for layer, role in READERS
        }

    # --- encoding ---------------------------------------------------------------------------------------------------

    def encoder_widths(self) -> dict[str, int]:
        encoder = self.pipe.text_encoder
        return {} if encoder is None else {"hidden": encoder.config.hidden_size}

    @property
    def encoding(self) -> dict[str, Any]:
        return {} if self.clip_skip is None else {"clip_skip": self.clip_skip}

    @property
    def layers(self) -> tuple[int, ...]:
        """How many of the encoder's last layers are left out, for each layer that is read."""
        return (0, 1) if self.clip_skip == "both" else (self.clip_skip or 0,)  # type: ignore[return-value]

    def _encode(self, prompts: list[str], *, padded: bool) -> Conditioning:
        """``hidden (n, 77, d)``: last hidden state, or the one ``clip_skip`` names, behind the final norm.

        With ``padded=False`` nothing behind the longest prompt is read. The encoder is causal: the tokens before that
        are the same, and where prompts are names it is several times faster.
        """
        ids, counts = tokenise(self.pipe.tokenizer, converted(self.pipe, self.pipe.tokenizer, prompts))
        ids = ids if padded else ids[:, : max(counts)]
        parts = [self.hidden_of(batch, self.layers[0]) for batch in ids.to(self.device).split(self.batch_size)]
        hidden = torch.cat(parts)
        return Conditioning(hidden, (Segment.of(hidden, ids, counts),))

    def hidden_of(self, ids: Tensor, skip: int = 0) -> Tensor:
        """``(n, length, d)`` of token ids ``(n, length)``; differentiable in the text encoder's weights."""
        encoder = self.pipe.text_encoder
        ids = ids.to(encoder.device)
        if not skip:
            return encoder(ids).last_hidden_state
        return final_norm(encoder)(layer_of(encoder(ids, output_hidden_states=True).hidden_states, skip, skip + 1))

    def other_layers(self) -> Iterator[UNetBackbone]:
        for skip in self.layers[1:]:
            yield type(self)(self.pipe, clip_skip=skip)


def layer_of(states: Sequence[Tensor], skip: int, back: int) -> Tensor:
    """The hidden state so many from the end.

    Raises:
        ValueError: ``clip_skip`` leaves out more layers than there are.
    """
    if back > len(states):
        raise ValueError(f"clip_skip={skip} is more than this text encoder's {len(states) - 1} layers leave; give less")
    return states[-back]


def final_norm(encoder: Any) -> nn.Module:
    """The norm behind a CLIP text encoder's last layer."""
    return getattr(encoder, "text_model", encoder).final_layer_norm


class SDXLBackbone(UNetBackbone):
    """Stable Diffusion XL: two CLIP encoders side by side, and a pooled embedding beside the timestep."""

    architecture = "sdxl"
    pipelines = "Stable Diffusion XL"
    requires = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    spaces = ("hidden", "pooled")
    prompt_arguments = {"prompt_embeds": "hidden", "pooled_prompt_embeds": "pooled"}
    numbers = 6  # of the picture's size and crop, embedded beside the pooled text
    batch_size = 16

    def sites_of(self, denoiser: Any, space: Space) -> dict[str, Site]:
        """As on 1.x; of the layer the pooled embedding enters, the columns it enters by.

        The other columns of that layer see embedded numbers: the sizes of the picture and where it was cropped.
        """
        if space == "hidden":
            return super().sites_of(denoiser, space)
        return pooled_site(denoiser, numbers=self.numbers)

    def encoder_widths(self) -> dict[str, int]:
        present = [
            e.config for e in (self.pipe.text_encoder, getattr(self.pipe, "text_encoder_2", None)) if e is not None
        ]
        second = getattr(self.pipe, "text_encoder_2", None)
        pooled = {} if second is None else {"pooled": second.config.projection_dim}
        return {"hidden": sum(config.hidden_size for config in present)} | pooled

    def check_sites(self) -> None:
        first, second = (getattr(self.pipe, name, None) for name in ("text_encoder", "text_encoder_2"))
        config = self.unet.config
        numbers = 5 * config.addition_time_embed_dim
        if first is None and second is not None:
            if config.projection_class_embeddings_input_dim == second.config.projection_dim + numbers:
                raise ValueError(
                    f"{type(self.pipe).__name__} is SDXL's refiner: it reads text_encoder_2 alone, and an aesthetic "
                    "score; refiners are not supported; erase from the base model, whose pictures it refines"
                )
        super().check_sites()

    def _encode(self, prompts: list[str], *, padded: bool) -> Conditioning:
        """Last but one layers of both side by side, ``hidden (n, 77, 2048)``; ``pooled (n, 1280)`` of the second.

        Token positions are the first tokenizer's, as in the official codes. The second splits a run of "!" otherwise.
        """
        if not padded:
            ids, counts, ids_2, counts_2 = self._tokens(prompts)
            length = max(*counts, *counts_2)
            return self._of_ids(ids[:, :length], ids_2[:, :length], counts)
        return in_batches(self._whole, prompts, self.batch_size)

    def tokenizers(self) -> dict[str, tuple[Any, int]]:
        both = ((name, getattr(self.pipe, name)) for name in ("tokenizer", "tokenizer_2"))
        return {name: (tokenizer, tokenizer.model_max_length) for name, tokenizer in both}

    def _tokens(self, prompts: list[str]) -> tuple[Tensor, tuple[int, ...], Tensor, tuple[int, ...]]:
        one, two = self.pipe.tokenizer, self.pipe.tokenizer_2
        first = tokenise(one, converted(self.pipe, one, prompts))
        return (*first, *tokenise(two, converted(self.pipe, two, prompts), name="tokenizer_2"))

    def _whole(self, prompts: list[str]) -> Conditioning:
        ids, counts, ids_2, _ = self._tokens(prompts)
        return self._of_ids(ids, ids_2, counts)

    def _of_ids(self, ids: Tensor, ids_2: Tensor, counts: tuple[int, ...]) -> Conditioning:
        """What the pipeline's ``encode_prompt`` makes of token ids, whatever their number."""
        encoders = self.pipe.text_encoder, self.pipe.text_encoder_2
        hidden, pooled = [], []
        for batch in zip(ids.split(self.batch_size), ids_2.split(self.batch_size), strict=True):
            both = [e(b.to(e.device), output_hidden_states=True) for e, b in zip(encoders, batch, strict=True)]
            skip = self.layers[0]
            hidden.append(torch.cat([layer_of(one.hidden_states, skip, skip + 2) for one in both], dim=-1))
            pooled.append(both[1].text_embeds)
        whole = torch.cat(hidden)
        return Conditioning(whole, (Segment.of(whole, ids, counts),), torch.cat(pooled))

    def select(self, selector: str) -> dict[str, nn.Parameter]:
        """As on 1.x; ``not_cross_attention`` and ``all`` are the layers of the blocks, without timestep projections.

        What stands outside of the blocks (the first and the last convolution, the embeddings of timestep, sizes and
        pooled text) is left out: the official code's choice on this architecture (``esd_sdxl.py``).
        """
        chosen = super().select(selector)
        if selector in ("not_cross_attention", "all"):
            chosen = {name: weight for name, weight in chosen.items() if "block" in name and "emb" not in name}
        return chosen

    def with_text(self, inputs: Mapping[str, Any], text: Text) -> dict[str, Any]:
        """The pooled embedding stands beside the sizes, among ``added_cond_kwargs``."""
        return with_pooled(super().with_text(inputs, text), text)

    def text_part(self, inputs: Mapping[str, Any], part: str) -> Any:
        return pooled_of(inputs) if part == "pooled" else super().text_part(inputs, part)


def projection_site(denoiser: Any) -> dict[str, Site]:
    """The layer that projects the text in front of a U-Net's attentions; empty where none does."""
    for name in ("text_encoder_hid_proj", "encoder_hid_proj"):  # an IP-Adapter moves it to the first name
        if isinstance(projection := getattr(denoiser, name, None), nn.Linear):
            return {name: Site(projection, "entry")}
    return {}


def with_pooled(inputs: Mapping[str, Any], text: Text) -> dict[str, Any]:
    """A U-Net's inputs with the pooled text in its place among ``added_cond_kwargs``, beside the picture's sizes."""
    return {**inputs, "added_cond_kwargs": {**(inputs.get("added_cond_kwargs") or {}), "text_embeds": text.pooled}}


def pooled_of(inputs: Mapping[str, Any]) -> Tensor:
    """The inverse of :func:`with_pooled`."""
    return inputs["added_cond_kwargs"]["text_embeds"]


def pooled_site(denoiser: Any, *, numbers: int) -> dict[str, Site]:
    """The columns by which the pooled text enters a U-Net beside so many embedded numbers; empty where it does not."""
    if getattr(denoiser, "add_embedding", None) is None:
        return {}
    others = numbers * denoiser.config.addition_time_embed_dim
    width = denoiser.config.projection_class_embeddings_input_dim - others
    return {"add_embedding.linear_1": Site(denoiser.add_embedding.linear_1, "pooled", columns=(0, width))}
