"""The questions every architecture answers: where text enters, how prompts are encoded, what the denoiser predicts."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from erasure.backbone.checks import parameters_of, refuse_unsafe
from erasure.backbone.listen import Call, Enough, listening, separate
from erasure.backbone.noise import NoiseModel
from erasure.backbone.text import Conditioning, Text, evaluating, nonempty, precise

Space = Literal["hidden", "pooled"]
Role = Literal["key", "value", "entry", "pooled"]
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


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a trajectory, as the denoiser saw it.

    Attributes:
        index: number of the step, from 0.
        x: ``(n, ...)`` input of the denoiser, scaled as its scheduler wants it.
        t: ``(n,)`` the time it was given.
        conditional: ``(n, ...)`` prediction with the prompt.
        unconditional: ``(n, ...)`` prediction that guidance used beside it; None where there is no such guidance.
    """

    index: int
    x: Tensor
    t: Tensor
    conditional: Tensor
    unconditional: Tensor | None


class Backbone(abc.ABC):
    """The names and conventions of one architecture, around a diffusers pipeline.

    Args:
        pipe: the pipeline. It is never changed here.

    Raises:
        ValueError: the pipeline is in a state in which an edit would be lost or wrong (fused, quantised, offloaded,
            compiled, adapters loaded, components of different dtypes), or lacks a part. The message says what to do.

    Class attributes:
        architecture: its name in files and tables.
        pipelines: the diffusers pipelines it is for, as people know them.
        denoisers: the pipeline's attributes that hold a denoiser; the first names parameters without a prefix.
        requires: what else a pipeline must have.
        spaces: the embedding spaces that can be edited: ``hidden``, one vector a token, and ``pooled``, one a prompt.
        latent_argument, time_argument: of the denoiser's ``forward``.
        text_arguments: denoiser argument to the part of :class:`Text` it receives.
        prompt_arguments: argument of the pipeline's call to the part of :class:`Text` it takes.
        guidance: ``cfg`` two predictions; ``embedded`` a number given to the denoiser; ``none`` a distilled model.
        guidance_argument, no_guidance: the pipeline's argument for it, and its value that switches it off.
        call: further arguments of the pipeline's call.
        templated: whether a chat template stands around the prompt, so that the default span is words and tail.
    """

    architecture: ClassVar[str]
    pipelines: ClassVar[str]
    denoisers: ClassVar[tuple[str, ...]] = ("transformer",)
    requires: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer", "scheduler")
    spaces: ClassVar[tuple[Space, ...]] = ("hidden",)
    latent_argument: ClassVar[str] = "hidden_states"
    time_argument: ClassVar[str] = "timestep"
    text_arguments: ClassVar[dict[str, str]] = {"encoder_hidden_states": "hidden"}
    prompt_arguments: ClassVar[dict[str, str]] = {"prompt_embeds": "hidden"}
    guidance: ClassVar[Literal["cfg", "embedded", "none"]] = "cfg"
    guidance_argument: ClassVar[str] = "guidance_scale"
    no_guidance: ClassVar[float] = 1.0
    call: ClassVar[dict[str, Any]] = {}
    templated: ClassVar[bool] = False
    batch_size: ClassVar[int] = 16

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        names = (self.denoisers[0], *self.requires)
        missing = [name for name in names if getattr(pipe, name, None) is None]
        if self.denoisers[0] not in missing:
            refuse_unsafe(self.components)
            self.check_sites()
            self.check_widths()
        if missing:
            raise ValueError(
                f"not a {self.pipelines} pipeline; {type(pipe).__name__} has no {', '.join(missing)}; "
                "load all of it with DiffusionPipeline.from_pretrained"
            )

    def check_sites(self) -> None:
        """Raise unless text enters the denoiser where the architecture's does."""
        if any(not self.text_sites(space) for space in self.spaces):
            raise ValueError(
                f"not a {self.pipelines} pipeline; the {self.denoiser_name} of {type(self.pipe).__name__} does not "
                "read text where theirs do; this model is not supported"
            )

    def check_widths(self) -> None:
        """Raise unless the text encoders' embeddings have the width that the denoiser reads."""
        made = self.encoder_widths()
        for space in self.spaces:
            read = next(iter(self.text_sites(space).values())).width
            if space in made and made[space] != read:
                encoders = [name for name in self.components if name not in self.denoisers]
                raise ValueError(
                    f"the text encoders do not fit the {self.denoiser_name}; {' and '.join(encoders)} make {space} "
                    f"embeddings of width {made[space]}, the {self.denoiser_name} reads {read}; load the model's own "
                    "encoders"
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
        return {name: module for name in PARTS if (module := getattr(self.pipe, name, None)) is not None}

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

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

    @functools.cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one picture's latents as the denoiser reads them, at the pipeline's own size."""
        return tuple(self._latents(self.encode([""]).text).shape[1:])

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

    def width(self, space: Space = "hidden") -> int:
        """``d``, the width of the embeddings of a space where the denoiser reads them."""
        return next(iter(self.text_sites(space).values())).width

    def qualified(self, part: str, name: str) -> str:
        """The name of a parameter or module of a part: bare for the first denoiser, ``part:name`` for all others."""
        return name if part == self.denoiser_name else f"{part}:{name}"

    def select(self, selector: str) -> dict[str, nn.Parameter]:
        """Weights and biases of layers chosen by what they do, by qualified name.

        ``cross_attention`` every layer of the attentions that read the text; ``cross_attention_kv`` the layers that
        receive it; ``not_cross_attention`` the rest; ``attention`` every attention; ``all`` every linear and
        convolution of the denoisers; ``text_encoder`` those of the text encoders. Norms are never chosen.

        Raises:
            ValueError: unknown selector, or nothing to train under it.
        """
        if selector == "text_encoder":
            chosen = self._layers({n: m for n, m in self.components.items() if n not in self.denoisers})
        else:
            wanted = self._selectors()
            if selector not in wanted:
                known = [*wanted, "text_encoder"]
                raise ValueError(f"unknown parameter selector; got {selector!r}; choose one of {known}")
            chosen = {n: m for n, m in self._layers(self.denoiser_parts).items() if wanted[selector](n)}
        return {f"{n}.{key}": p for n, m in chosen.items() for key, p in m.named_parameters(recurse=False)}

    def _layers(self, parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        return {
            self.qualified(part, name): layer
            for part, module in parts.items()
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d)
        }

    def _selectors(self) -> dict[str, Callable[[str], bool]]:
        """Which layers each selector takes, by qualified name."""
        sites = self.text_sites()
        reading = {name.rpartition(".")[0] for name, site in sites.items() if site.role in ("key", "value")}
        attentions = {
            self.qualified(part, name)
            for part, module in self.denoiser_parts.items()
            for name, child in module.named_modules()
            if "Attention" in type(child).__name__ and any(isinstance(c, nn.Linear) for c in child.children())
        }
        reading = reading or attentions

        def within(name: str, roots: set[str]) -> bool:
            return any(name.startswith(f"{root}.") for root in roots)

        return {
            "cross_attention": lambda name: within(name, reading),
            "cross_attention_kv": lambda name: name in sites if reading is not attentions else _is_kv(name, attentions),
            "not_cross_attention": lambda name: not within(name, reading),
            "attention": lambda name: within(name, attentions),
            "all": lambda name: True,
        }

    # --- encoding ---------------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str], *, padded: bool = True, in_float32: bool = False) -> Conditioning:
        """Text conditioning of prompts, as the denoiser receives it.

        The text encoders run in evaluation mode, whatever mode they are in, and are put back.

        Args:
            padded: False lets an encoder that can leave out the padding (the causal ones) do so, for whoever looks at
                no token behind the first end token.
            in_float32: run half-precision encoders in float32: closed forms solve for what the prompt is, not for its
                rounding.
        """
        encoders = [module for name, module in self.components.items() if name not in self.denoisers]
        with torch.no_grad(), evaluating(*encoders):
            if not in_float32:
                return self._encode(nonempty(prompts), padded=padded)
            with precise(*encoders):
                return self._encode(nonempty(prompts), padded=padded)

    @abc.abstractmethod
    def _encode(self, prompts: list[str], *, padded: bool) -> Conditioning:
        """The architecture's part of :meth:`encode`."""

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

    # --- the denoiser -----------------------------------------------------------------------------------------------

    def predict(self, x: Tensor, t: Tensor, text: Text, *, guidance: float | None = None) -> Tensor:
        """The denoiser's output for inputs ``x (n, ...)`` at times ``t (n,)``; differentiable in all but ``t``.

        Args:
            guidance: of models with embedded guidance, and of LCM U-Nets; the pipeline's default otherwise. It is no
                classifier-free guidance.
        """
        parts = [self.part_at(float(one)) for one in t] if len(self.denoiser_parts) > 1 else [self.denoiser_name]
        if len(set(parts)) == 1:
            return self._predict(parts[0], x, t, text, guidance)
        out: list[Tensor | None] = [None] * len(x)
        for part in dict.fromkeys(parts):
            rows = [i for i, name in enumerate(parts) if name == part]
            for i, row in zip(rows, self._predict(part, x[rows], t[rows], text[rows], guidance), strict=True):
                out[i] = row
        return torch.stack(out)  # type: ignore[arg-type]

    def _predict(self, part: str, x: Tensor, t: Tensor, text: Text, guidance: float | None) -> Tensor:
        inputs = {**self.template(text, guidance=guidance), **self.text_inputs(text)}
        inputs |= {self.latent_argument: self.packed(x), self.time_argument: t}
        output = getattr(self.pipe, part)(**inputs, return_dict=False)
        return self.output(output[0])

    def part_at(self, t: float) -> str:
        """The denoiser that a pipeline with two of them uses at a time."""
        return self.denoiser_name

    def text_inputs(self, text: Text) -> dict[str, Any]:
        """The denoiser's arguments that hold the text."""
        return {name: getattr(text, part) for name, part in self.text_arguments.items()}

    def text_of(self, inputs: Mapping[str, Any]) -> Tensor | list[Tensor]:
        """The token embeddings in the arguments of a denoiser's call."""
        return inputs[next(name for name, part in self.text_arguments.items() if part == "hidden")]

    def packed(self, x: Tensor) -> Any:
        """Latents in the form the denoiser takes them."""
        return x

    def unpacked(self, x: Any) -> Tensor:
        """Latents of a denoiser's call as one tensor."""
        return x

    def output(self, raw: Any) -> Tensor:
        """A prediction as one tensor, without channels that hold a variance."""
        return raw

    def template(self, text: Text, *, guidance: float | None = None) -> dict[str, Any]:
        """The denoiser's other arguments (sizes, position ids, guidance embedding), from the pipeline's own call.

        Raises:
            ValueError: the pipeline cannot be called with text alone, so that inputs would be missing.
        """
        key = (len(text), text.hidden.shape[1], guidance, self.dtype)
        if key not in self._templates:
            call = self._first_call(text, guidance)
            taken = {self.latent_argument, self.time_argument, "return_dict", *self.text_inputs(text)}
            self._templates[key] = {name: value for name, value in call.inputs.items() if name not in taken}
        return self._templates[key]

    @functools.cached_property
    def _templates(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        return {}

    def _latents(self, text: Text) -> Tensor:
        return self.unpacked(self._first_call(text, None).inputs[self.latent_argument])

    def _first_call(self, text: Text, guidance: float | None) -> Call:
        """The first call of the denoiser when the pipeline draws ``text`` without classifier-free guidance."""
        heard: list[Call] = []

        def stop(call: Call) -> None:
            heard.append(call)
            raise Enough

        scale = self.no_guidance if self.guidance == "cfg" and guidance is None else guidance
        with listening(self.denoiser_parts, before=stop):
            self.draw(text, num_inference_steps=1, guidance_scale=scale, generator=torch.Generator().manual_seed(0))
        return heard[0]

    @torch.no_grad()
    def draw(
        self,
        text: Text,
        *,
        num_inference_steps: int,
        guidance_scale: float | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Call the pipeline itself on encoded prompts; returns latents. Its scheduler is left as it was."""
        pipe = separate(self.pipe)
        arguments = self.prompt_inputs(text) | self.call
        if guidance_scale is not None:
            arguments[self.guidance_argument] = guidance_scale
        if noise is not None:
            arguments["latents"] = noise
        try:
            return pipe(
                **arguments, num_inference_steps=num_inference_steps, generator=generator, output_type="latent"
            )[0]
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise ValueError(
                f"{type(self.pipe).__name__} cannot be called with text alone ({first_line(error)}); this needs a pipeline "
                "that draws from a prompt: unload what wants more (an IP-Adapter), or use the text-to-image pipeline"
            ) from error

    def prompt_inputs(self, text: Text) -> dict[str, Any]:
        """Arguments of the pipeline's call that hold encoded prompts."""
        return {name: getattr(text, part) for name, part in self.prompt_arguments.items()}

    def trajectory(
        self,
        text: Text,
        noise: Tensor,
        *,
        num_inference_steps: int,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        stop: int | None = None,
    ) -> Iterator[Step]:
        """The steps the pipeline itself takes for some prompts.

        Args:
            text: ``n`` rows. The unconditional text is the pipeline's own (zeros on SDXL, say).
            noise: ``(n, *latent_shape)`` standard normal.
            guidance_scale: the pipeline's default where None; ``no_guidance`` leaves the unconditional prediction out.
            generator: of schedulers that add noise at every step.
            stop: yield only the first ``stop`` steps.
        """
        heard: list[Step] = []

        def begins(call: Call) -> bool:
            x, t = self._moment(call, len(text))
            return not heard or not (torch.equal(heard[-1].x, x) and torch.equal(heard[-1].t, t))

        def before(call: Call) -> None:
            if stop is not None and len(heard) >= stop and begins(call):
                raise Enough

        def after(call: Call) -> None:
            conditional, *unconditional = self._predictions(call, text)
            if begins(call):
                heard.append(Step(len(heard), *self._moment(call, len(text)), conditional, *unconditional or (None,)))
            else:  # guidance by a second call, which comes after the prompt's own in every pipeline
                heard[-1] = dataclasses.replace(heard[-1], unconditional=conditional)

        with evaluating(*self.denoiser_parts.values()), listening(self.denoiser_parts, before=before, after=after):
            self.draw(
                text,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                noise=noise,
                generator=generator,
            )
        yield from heard

    def steps_of(self, num_inference_steps: int) -> int:
        """How often the denoiser is called in a trajectory: second-order schedulers take more steps than asked for."""
        scheduler = separate(self.pipe).scheduler
        shifted = getattr(scheduler.config, "use_dynamic_shifting", False)
        scheduler.set_timesteps(num_inference_steps, **({"mu": 1.0} if shifted else {}))
        return len(scheduler.timesteps)

    def _moment(self, call: Call, n: int) -> tuple[Tensor, Tensor]:
        """``x (n, ...)`` and ``t (n,)`` of a call; with guidance in one batch, its two halves hold the same."""
        t = torch.as_tensor(call.inputs[self.time_argument])
        x = self.unpacked(call.inputs[self.latent_argument])[:n]
        return x.detach().clone(), t.reshape(-1).expand(n).clone() if t.numel() == 1 else t[:n].clone()

    def _predictions(self, call: Call, text: Text) -> list[Tensor]:
        """The prediction with the prompts; behind it the other one, where guidance makes both in one batch."""
        out, n = self.output(call.output).detach(), len(text)
        if len(out) == n:
            return [out.clone()]
        first, second = out[:n].clone(), out[n:].clone()
        return [first, second] if self._prompts_first(call, text) else [second, first]

    def _prompts_first(self, call: Call, text: Text) -> bool:
        """Whether the first half of a batch is that of the prompts; where both are the same, the second counts."""
        rows, (mine,) = self.text_of(call.inputs), self.text_list(text[:1])
        first, second = (
            row.shape == mine.shape and torch.equal(row, mine.to(row)) for row in (rows[0], rows[len(rows) // 2])
        )
        return first and not second

    def text_list(self, text: Text) -> list[Tensor]:
        """The rows of a text as the elements of :meth:`text_of`."""
        return list(text.hidden)

    # --- pictures ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def latents(self, images: Sequence[Image.Image], *, batch_size: int = 32) -> Tensor:
        """Clean latents ``(n, *latent_shape)`` float32: means of the autoencoder's posterior, at the model's own size."""
        vae = self.autoencoder
        height, width = (side * self.pipe.vae_scale_factor for side in self.latent_shape[-2:])
        parts = []
        for i in range(0, len(images), batch_size):
            batch = [image.convert("RGB") for image in images[i : i + batch_size]]
            batch = [
                im if im.size == (width, height) else im.resize((width, height), Image.Resampling.LANCZOS)
                for im in batch
            ]
            x = torch.from_numpy(np.stack([np.asarray(im) for im in batch])).permute(0, 3, 1, 2).float() / 127.5 - 1
            encoded = vae.encode(x.to(vae.device, vae.dtype))
            mean = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent  # Sana's has no spread
            shift = getattr(vae.config, "shift_factor", None) or 0.0
            parts.append(((mean - shift) * vae.config.scaling_factor).float())
        return torch.cat(parts)

    @torch.no_grad()
    def pictures(self, latents: Tensor, *, batch_size: int = 32) -> list[Image.Image]:
        """Pictures of clean latents ``(n, *latent_shape)``."""
        vae, out = self.autoencoder, []
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        for part in latents.split(batch_size):
            decoded = vae.decode((part / vae.config.scaling_factor + shift).to(vae.dtype)).sample
            out += self.pipe.image_processor.postprocess(decoded.detach().float().cpu(), output_type="pil")
        return out

    @property
    def autoencoder(self) -> Any:
        """The autoencoder, where its latents are what the denoiser reads.

        Raises:
            ValueError: they are not.
        """
        vae = getattr(self.pipe, "vae", None)
        if vae is None or len(self.latent_shape) != 3 or not hasattr(vae.config, "scaling_factor"):
            raise ValueError(
                f"the latents of {self.pipelines} are packed, or have no plain autoencoder; real pictures are put through "
                "the denoiser on Stable Diffusion 1, 2, XL and 3 alone"
            )
        return vae

    def losses(self, x0: Tensor, t: Tensor, eps: Tensor, text: Text) -> Tensor:
        """Squared error of the prediction for each row, ``(n,)``; differentiable in the model and in ``text``."""
        predicted = self.predict_float(self.noise.mix(x0, eps, t), t, text)
        return (predicted - self.noise.target(x0, eps, t)).square().flatten(1).mean(dim=1)

    def middle(self) -> nn.Module:
        """The module in the middle of the denoiser: the middle one of its longest row of blocks."""
        rows = [child for child in self.denoiser.children() if isinstance(child, nn.ModuleList)]
        if not any(map(len, rows)):
            raise ValueError(f"a {type(self.denoiser).__name__} has no row of blocks, so no middle is known")
        blocks = max(rows, key=len)
        return blocks[len(blocks) // 2]

    def middle_mean(self, output: Any) -> Tensor:
        """``(n, channels)`` float32: what :meth:`middle` returned for the picture, averaged over places.

        Blocks that carry text and picture side by side return both; the picture's has a token for every patch.
        """
        parts = [output] if isinstance(output, Tensor) else [part for part in output if isinstance(part, Tensor)]
        *_, height, width = self.latent_shape
        patches = height * width // getattr(self.denoiser.config, "patch_size", 1) ** 2
        picture = next((part for part in parts if part.shape[1] == patches), parts[-1])
        return picture.float().mean(dim=1)

    def predict_float(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        """:meth:`predict` in and out of float32, whatever the model's precision."""
        return self.predict(x.to(self.dtype), t, text.to(self.dtype)).float()


def first_line(error: BaseException) -> str:
    """A foreign error in one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def parts_of(pipe: Any) -> dict[str, Any]:
    """Denoisers and text encoders of a pipeline by name, without compiled wrappers."""
    found = {name: module for name in PARTS if (module := getattr(pipe, name, None)) is not None}
    return {name: getattr(module, "_orig_mod", module) for name, module in found.items()}


def denoiser_of(pipe: Any) -> Any:
    """The denoiser of a pipeline or backbone, whatever it is called, without its compiled wrapper."""
    if isinstance(pipe, Backbone):
        pipe = pipe.pipe
    module = getattr(pipe, "unet", None)
    module = getattr(pipe, "transformer", None) if module is None else module
    if module is None:
        raise ValueError(f"{type(pipe).__name__} has neither unet nor transformer; give a text-to-image pipeline")
    return getattr(module, "_orig_mod", module)


def parameters_by_name(parts: Mapping[str, nn.Module], denoiser: str) -> dict[str, nn.Parameter]:
    """Every parameter of some parts by qualified name, as they are called without a PEFT adapter around them."""
    return {
        name if part == denoiser else f"{part}:{name}": parameter
        for part, module in parts.items()
        for name, parameter in parameters_of(module).items()
    }


def _is_kv(name: str, attentions: set[str]) -> bool:
    """Keys and values of a joint attention, the text stream's own (``add_``) included."""
    last = name.rpartition(".")[2]
    return last in ("to_k", "to_v", "add_k_proj", "add_v_proj") and name.rpartition(".")[0] in attentions


__all__ = ["PARTS", "Backbone", "Role", "Site", "Space", "Step", "denoiser_of", "parts_of"]
