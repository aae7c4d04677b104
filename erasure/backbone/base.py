"""The questions every architecture answers: where text enters, how prompts are encoded, what the denoiser predicts."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from erasure.backbone.checks import refuse_shared, refuse_unsafe, unwrapped
from erasure.backbone.drive import Step
from erasure.backbone.latents import Latents
from erasure.backbone.names import qualified, split
from erasure.backbone.noise import NoiseModel
from erasure.backbone.selectors import selected
from erasure.backbone.text import Conditioning, Text, TooLong, converted, evaluating, nonempty, precise, refuse_long

Space = Literal["hidden", "pooled"]
Role = Literal["key", "value", "entry", "pooled"]
SPACE = "▁"  # SentencePiece's
PARTS = (
    "unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Site:
    """A linear layer that receives the text.

    Attributes:
        linear: the layer; its bias, if it has one, is no part of any closed form.
        role: ``key`` or ``value`` of a cross-attention, ``entry`` of the token embeddings, or ``pooled``.
        norm: the norm that stands between the text and the layer, or None. The embeddings that closed forms solve for
            are those behind it: a matrix in front of a norm is not the same edit.
        columns: start and stop of the input columns that see the embedding; None where all of them do. Only
            SDXL's and Kolors' pooled path share their layer with other inputs.
    """

    linear: nn.Linear
    role: Role
    norm: nn.Module | None = None
    columns: tuple[int, int] | None = None

    @property
    def weight(self) -> Tensor:
        """``(out, d)``: the part of the layer's weight that multiplies the embedding."""
        return self.linear.weight.detach()[:, slice(*(self.columns or (None,)))]

    @property
    def width(self) -> int:
        """``d``, the width of the embeddings it reads."""
        start, stop = self.columns or (0, self.linear.in_features)
        return stop - start


class Backbone(Latents):
    """The names and conventions of one architecture, around a diffusers pipeline.

    Args:
        pipe: the pipeline. It is never changed here.
        call: further arguments of the pipeline's call, such as ``height``, ``width`` and ``num_frames``: the size at
            which trajectories are sampled and models trained. The pipeline's own by default.

    Raises:
        ValueError: the pipeline is in a state in which an edit would be lost or wrong (fused, quantised, offloaded,
            compiled, adapters loaded, components of different dtypes), or lacks a part. The message says what to do.

    Class attributes:
        architecture: its name in files and tables.
        pipelines: the diffusers pipelines it is for, as people know them.
        denoisers: the pipeline's attributes that hold a denoiser; the first names parameters without a prefix.
        requires: what else a pipeline must have.
        spaces: the embedding spaces that can be edited: ``hidden``, one vector a token, and ``pooled``, one a prompt.
    """

    architecture: ClassVar[str]
    pipelines: ClassVar[str]
    denoisers: ClassVar[tuple[str, ...]] = ("transformer",)
    requires: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer", "scheduler")
    spaces: ClassVar[tuple[Space, ...]] = ("hidden",)
    batch_size: ClassVar[int] = 16

    def __init__(self, pipe: Any, *, call: Mapping[str, Any] | None = None) -> None:
        self.pipe = pipe
        self.call = {**type(self).call, **(call or {})}
        names = (self.denoisers[0], *self.requires)
        missing = [name for name in names if getattr(pipe, name, None) is None]
        if self.denoisers[0] not in missing:
            refuse_unsafe(self.components)
            self.check_sites()
            self.check_widths(missing)
        if missing:
            raise ValueError(
                f"not a {self.pipelines} pipeline; {type(pipe).__name__} has no {', '.join(missing)}; "
                "load all of it with DiffusionPipeline.from_pretrained"
            )

    def check_sites(self) -> None:
        """Raise unless text enters the denoiser where the architecture's does."""
        found = [self.text_sites(space) for space in self.spaces]
        if not all(found):
            raise ValueError(
                f"not a {self.pipelines} pipeline; the {self.denoiser_name} of {type(self.pipe).__name__} does not "
                "read text where theirs do; this model is not supported"
            )
        for sites in found:
            refuse_shared({name: site.linear for name, site in sites.items()})

    def check_widths(self, missing: Sequence[str] = ()) -> None:
        """Raise unless the text encoders' embeddings have the width that the denoiser reads."""
        made = self.encoder_widths()
        for space in self.spaces:
            read = next(iter(self.text_sites(space).values())).width
            if space in made and made[space] != read:
                encoders = " and ".join(self.encoders)
                lacking = f" ({type(self.pipe).__name__} has no {', '.join(missing)})" if missing else ""
                raise ValueError(
                    f"the text encoders do not fit the {self.denoiser_name}; {space} embeddings of {encoders} have "
                    f"width {made[space]}{lacking}, the {self.denoiser_name} reads {read}; load the model's own "
                    f"encoders with a {self.pipelines} pipeline"
                )

    def encoder_widths(self) -> dict[str, int]:
        """Width of the embeddings of each space, as far as the encoders' configs give it."""
        return {}

    # --- what it is -------------------------------------------------------------------------------------------------

    @property
    def denoiser_name(self) -> str:
        """The pipeline's attribute that holds the denoiser (the first, where there are two)."""
        return self.denoisers[0]

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipe, self.denoiser_name)

    @property
    def denoiser_parts(self) -> dict[str, nn.Module]:
        """Every denoiser by its name on the pipeline."""
        return {name: part for name in self.denoisers if (part := getattr(self.pipe, name, None)) is not None}

    @property
    def components(self) -> dict[str, Any]:
        """Denoisers and text encoders by their names on the pipeline: what makes a base model what it is."""
        return named_parts(self.pipe)

    @property
    def encoders(self) -> dict[str, Any]:
        """Every text encoder by its name on the pipeline."""
        return {name: module for name, module in self.components.items() if name not in self.denoisers}

    @property
    def device(self) -> torch.device:
        """Where the denoiser is: all of it, since what is offloaded is refused."""
        return next(self.denoiser.parameters()).device  # diffusers' own property asks every layer for hooks

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    @property
    @abc.abstractmethod
    def noise(self) -> NoiseModel:
        """How latents are mixed with noise, and what the denoiser predicts."""

    @property
    def prediction_type(self) -> str:
        """``epsilon``, ``v_prediction`` or ``velocity``."""
        return self.noise.prediction_type

    # --- where text enters ------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def sites_of(self, denoiser: nn.Module, space: Space) -> dict[str, Site]:
        """The linears of one denoiser that receive text embeddings of a space, by module name."""

    def text_sites(self, space: Space = "hidden") -> dict[str, Site]:
        """The linears that receive text embeddings of a space, by qualified name, those of every denoiser."""
        if space not in self.spaces:
            raise ValueError(f"{self.architecture} has no {space} text embeddings; it has {list(self.spaces)}")
        return {
            self.qualified(part, name): site
            for part, module in self.denoiser_parts.items()
            for name, site in self.sites_of(module, space).items()
        }

    def other_readers(self) -> dict[str, int]:
        """Other modules of the pipeline that read the text as the denoiser does (ControlNets): how many layers each."""
        others = {n: m for n, m in vars(self.pipe).items() if isinstance(m, nn.Module) and n not in self.components}
        layers = {name: len(self.sites_of(module, "hidden")) for name, module in others.items()}
        return {name: count for name, count in layers.items() if count}

    def width(self, space: Space = "hidden") -> int:
        """``d``, the width of the embeddings of a space where the denoiser reads them."""
        return next(iter(self.text_sites(space).values())).width

    def qualified(self, part: str, name: str) -> str:
        """The name of a parameter or module of a part: bare for the first denoiser, ``part:name`` for all others."""
        return qualified(part, name, first=self.denoiser_name)

    def select(self, selector: str) -> dict[str, nn.Parameter]:
        """Weights and biases of layers chosen by what they do, by qualified name.

        ``cross_attention`` every layer of the attentions that read the text; ``cross_attention_kv`` the layers that
        receive it; ``not_cross_attention`` the rest; ``attention`` every attention; ``blocks`` every layer of the
        transformer blocks; ``all`` every linear and convolution of the denoisers; ``text_encoder`` those of the text
        encoders. Norms are never chosen.

        Raises:
            ValueError: unknown selector, or nothing to train under it.
        """
        chosen = selected(self, selector)
        return {f"{n}.{key}": p for n, m in chosen.items() for key, p in m.named_parameters(recurse=False)}

    # --- encoding ---------------------------------------------------------------------------------------------------

    def encode(
        self, prompts: Sequence[str], *, padded: bool = True, in_float32: bool = False, grad: bool = False
    ) -> Conditioning:
        """Text conditioning of prompts, as the denoiser receives it.

        The text encoders run in evaluation mode, whatever mode they are in, and are put back. They run in their own
        precision: inside ``torch.autocast`` too, as rounded embeddings are not those that the pipeline draws with.

        Args:
            padded: False lets an encoder that can leave out the padding (the causal ones) do so, for whoever looks at
                no token behind the first end token.
            in_float32: run half-precision encoders in float32: closed forms solve for what the prompt is, not for its
                rounding.
            grad: keep the graph, for methods that train the text encoders; ``torch.autocast`` then has its way.
        """
        encoders = self.encoders.values()
        own = contextlib.nullcontext() if grad else torch.autocast(self.device.type, enabled=False)
        with torch.set_grad_enabled(grad), evaluating(*encoders), own:
            with precise(*encoders) if in_float32 else contextlib.nullcontext():
                return self._encode(nonempty(prompts), padded=padded)

    @abc.abstractmethod
    def _encode(self, prompts: list[str], *, padded: bool) -> Conditioning:
        """The architecture's part of :meth:`encode`."""

    def other_layers(self) -> Iterator[Backbone]:
        """A backbone for each further layer of the text encoder that is to be erased at."""
        return iter(())

    def read_at(self, space: Space = "hidden") -> list[Backbone]:
        """Itself and :meth:`other_layers`; pooled embeddings come from one layer, whatever token embeddings do."""
        return [self, *(self.other_layers() if space == "hidden" else ())]

    @property
    def encoding(self) -> dict[str, Any]:
        """How prompts are encoded where that is not the pipeline's default, for configs and cards."""
        return {}

    def read(self, prompts: Sequence[str], *, padded: bool = True) -> Conditioning:
        """Token embeddings at the input of the layers that receive them: behind the norm, where one stands before.

        Encoded in float32. This is what closed forms solve for.
        """
        conditioning = self.encode(prompts, padded=padded, in_float32=True)
        norm = next(iter(self.text_sites().values())).norm
        if norm is None:
            return conditioning
        with torch.no_grad(), precise(norm):
            return conditioning.each(lambda hidden: norm(hidden.float()))

    # --- what the encoders can read -----------------------------------------------------------------------------------

    def tokenizers(self) -> dict[str, tuple[Any, int]]:
        """Tokenizers that read a prompt, by their names on the pipeline, and how many tokens each encoder takes."""
        return {"tokenizer": (self.pipe.tokenizer, self.pipe.tokenizer.model_max_length)}

    def check_lengths(self, prompts: Sequence[str]) -> None:
        """Raise unless the text encoders read every prompt to its end. Nothing is encoded.

        Raises:
            TooLong: they would cut some.
        """
        for name, (tokenizer, length) in self.tokenizers().items() if prompts else ():
            ids = tokenizer(converted(self.pipe, tokenizer, prompts)).input_ids
            refuse_long(prompts, [len(row) for row in ids], length=length, name=name)

    def fitting(self, prompts: Iterable[str]) -> list[str]:
        """Those of the prompts that the text encoders read to their end."""
        left = list(prompts)
        while True:
            try:
                self.check_lengths(left)
                return left
            except TooLong as error:
                cut = set(error.prompts)
                left = [prompt for prompt in left if prompt not in cut]

    def unknown_word(self, text: str) -> tuple[str, str] | None:
        """The first word of which a tokenizer knows no part, and the tokenizer's name; None where there is none.

        All such words are one to the model. Tokenizers that spell (CLIP's, Qwen's) know every word.
        """
        for name, (tokenizer, _) in self.tokenizers().items():
            unknown = tokenizer.unk_token_id
            if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
                continue
            for word in text.split():
                pieces = tokenizer(word, add_special_tokens=False).input_ids
                known = [i for i in pieces if i != unknown and tokenizer.convert_ids_to_tokens(i) != SPACE]
                if unknown in pieces and not known:
                    return word, name
        return None

    # --- training ---------------------------------------------------------------------------------------------------

    def losses(self, x0: Tensor, t: Tensor, eps: Tensor, text: Text) -> Tensor:
        """Squared error of the prediction for each row, ``(n,)``; differentiable in the model and in ``text``."""
        predicted = self.predict_float(self.noise.mix(x0, eps, t), t, text, guidance=self.plain_guidance)
        return (predicted - self.noise.target(x0, eps, t)).square().flatten(1).mean(dim=1)

    def middles(self) -> list[nn.Module]:
        """The module in the middle of every denoiser; each step runs one of them."""
        return [self.middle_of(denoiser) for denoiser in self.denoiser_parts.values()]

    def middle_of(self, denoiser: nn.Module) -> nn.Module:
        """The module in the middle of a denoiser: a U-Net's mid-block, else the middle one of its longest row."""
        if isinstance(middle := getattr(denoiser, "mid_block", None), nn.Module):
            return middle
        rows = [child for child in denoiser.children() if isinstance(child, nn.ModuleList)]
        if not any(map(len, rows)):
            raise ValueError(f"a {type(denoiser).__name__} has no row of blocks, so no middle is known")
        blocks = max(rows, key=len)
        return blocks[len(blocks) // 2]

    def middle_mean(self, output: Any) -> Tensor:
        """``(n, channels)`` float32: what one of :meth:`middles` returned for the picture, averaged over places.

        Blocks that carry text and picture side by side return both; the picture's has a token for every patch.
        """
        if isinstance(output, Tensor) and output.ndim == 4:  # of a U-Net
            return output.float().mean(dim=(2, 3))
        parts = [output] if isinstance(output, Tensor) else [part for part in output if isinstance(part, Tensor)]
        *_, height, width = self.latent_shape
        size = getattr(self.denoiser.config, "patch_size", 1)
        side = size if isinstance(size, int) else size[-1]
        patches = height if self.packs else height * width // side**2
        picture = next((part for part in parts if part.shape[1] == patches), parts[-1])
        return picture.float().mean(dim=1)

    def predict_float(self, x: Tensor, t: Tensor, text: Text, *, guidance: float | None = None) -> Tensor:
        """:meth:`predict` in and out of float32, whatever the model's precision."""
        return self.predict(x.to(self.dtype), t, text.to(self.dtype), guidance=guidance).float()

    @property
    def plain_guidance(self) -> float | None:
        """The number by which a model with embedded guidance predicts what the prompt alone says; None elsewhere."""
        return 1.0 if self.guidance == "embedded" else None


def parts_of(pipe: Any) -> dict[str, Any]:
    """Denoisers and text encoders of a pipeline by name, without wrappers."""
    return {name: unwrapped(module) for name, module in named_parts(pipe).items()}


def named_parts(pipe: Any) -> dict[str, Any]:
    """Denoisers and text encoders by their names on a pipeline, as they stand there."""
    return {name: module for name in PARTS if (module := getattr(pipe, name, None)) is not None}


def denoiser_of(pipe: Any) -> Any:
    """The denoiser of a pipeline or backbone, whatever it is called, without a wrapper."""
    if isinstance(pipe, Backbone):
        pipe = pipe.pipe
    module = getattr(pipe, "unet", None)
    module = getattr(pipe, "transformer", None) if module is None else module
    if module is None:
        raise ValueError(f"{type(pipe).__name__} has neither unet nor transformer; give a text-to-image pipeline")
    return unwrapped(module)


def layer_at(backbone: Backbone, name: str) -> Any:
    """The module of a qualified name.

    Raises:
        AttributeError, KeyError: there is none.
    """
    part, own = split(name, first=backbone.denoiser_name)
    return backbone.components[part].get_submodule(own)


__all__ = ["PARTS", "Backbone", "Role", "Site", "Space", "Step", "denoiser_of", "parts_of"]
