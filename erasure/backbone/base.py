"""What every architecture answers: where text enters, how prompts are encoded, what the denoiser predicts."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from erasure.backbone.checks import refuse_unsafe
from erasure.backbone.text import Conditioning

Space = Literal["hidden", "pooled"]


@dataclasses.dataclass(frozen=True)
class Site:
    """A linear layer fed by raw text embeddings.

    Attributes:
        linear: the layer; its bias, if it has one, is no part of any closed form.
        columns: start and stop of the input columns that see the embedding; None where all of them do. Only
            SDXL's pooled path shares its layer with other inputs.
    """

    linear: nn.Linear
    columns: tuple[int, int] | None = None

    @property
    def weight(self) -> Tensor:
        """``(out, d)``: the part of the layer's weight that multiplies the embedding."""
        return self.linear.weight.detach()[:, slice(*(self.columns or (None,)))]


class Backbone(abc.ABC):
    """The names and conventions of one architecture, around a diffusers pipeline.

    Args:
        pipe: the pipeline. It is never changed here.

    Raises:
        ValueError: the pipeline is in a state in which an edit would be lost or wrong (fused, quantised, offloaded,
            compiled, adapters loaded, components of different dtypes). The message says what to call first.

    Class attributes:
        architecture: its name in files and tables.
        pipelines: the diffusers pipelines it is for, as people know them.
        denoiser_name: the pipeline's attribute that holds the denoiser.
        requires: what else a pipeline must have.
        spaces: the embedding spaces that can be edited: ``hidden``, one vector a token, and ``pooled``, one a prompt.
    """

    architecture: ClassVar[str]
    pipelines: ClassVar[str]
    denoiser_name: ClassVar[str] = "unet"
    requires: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer", "scheduler")
    spaces: ClassVar[tuple[Space, ...]] = ("hidden",)

    def __init__(self, pipe: Any) -> None:
        names = (self.denoiser_name, *self.requires)
        if missing := [name for name in names if getattr(pipe, name, None) is None]:
            raise ValueError(
                f"not a {self.pipelines} pipeline; {type(pipe).__name__} has no {', '.join(missing)}; "
                "load all of it with DiffusionPipeline.from_pretrained"
            )
        self.pipe = pipe
        refuse_unsafe(self.components)
        if any(not self.sites_of(self.denoiser, space) for space in self.spaces):
            raise ValueError(
                f"not a {self.pipelines} pipeline; the {self.denoiser_name} of {type(pipe).__name__} does not read "
                "text where theirs do; this model is not supported"
            )

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipe, self.denoiser_name)

    @property
    def components(self) -> dict[str, nn.Module]:
        """Denoiser and text encoders by their names on the pipeline: what makes a base model what it is."""
        names = (self.denoiser_name, "text_encoder", "text_encoder_2", "text_encoder_3")
        return {name: module for name in names if (module := getattr(self.pipe, name, None)) is not None}

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    @property
    @abc.abstractmethod
    def prediction_type(self) -> str:
        """What the denoiser predicts: ``epsilon``, ``v_prediction`` or ``velocity``."""

    @classmethod
    @abc.abstractmethod
    def sites_of(cls, denoiser: nn.Module, space: Space) -> dict[str, Site]:
        """The linears of a denoiser that see raw text embeddings of a space, by module name."""

    def text_sites(self, space: Space = "hidden") -> dict[str, Site]:
        """The linears that see raw text embeddings of a space, by module name."""
        if space not in self.spaces:
            raise ValueError(f"{self.architecture} has no {space} text embeddings; it has {list(self.spaces)}")
        return self.sites_of(self.denoiser, space)

    @abc.abstractmethod
    def encode(self, prompts: Sequence[str], *, padded: bool = True) -> Conditioning:
        """Text conditioning of prompts, as the denoiser receives it.

        Args:
            padded: False lets an encoder that can leave out the padding (the causal ones) do so, for whoever looks at
                no token behind the first end token.
        """

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run with the denoiser in evaluation mode (no dropout), and put the mode back."""
        training = self.denoiser.training
        self.denoiser.eval()
        try:
            yield
        finally:
            self.denoiser.train(training)


def denoiser_of(pipe: Any) -> Any:
    """The denoiser of a pipeline or backbone, whatever it is called, without its compiled wrapper."""
    if isinstance(pipe, Backbone):
        pipe = pipe.pipe
    module = getattr(pipe, "unet", None)
    module = getattr(pipe, "transformer", None) if module is None else module
    if module is None:
        raise ValueError(f"{type(pipe).__name__} has neither unet nor transformer; give a text-to-image pipeline")
    return getattr(module, "_orig_mod", module)
