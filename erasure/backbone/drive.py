"""How a pipeline is driven: its denoiser called as the pipeline itself calls it, and the steps it takes."""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from erasure.backbone.listen import Call, Enough, listening, separate
from erasure.backbone.streams import Streams
from erasure.backbone.text import Conditioning, Text, evaluating
from erasure.io import first_line


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


class Driven(abc.ABC):
    """The half of a backbone that calls the denoiser. Everything but latents, time and text comes from the pipeline.

    Class attributes:
        latent_argument, time_argument: of the denoiser's ``forward``.
        text_arguments: denoiser argument to the part of :class:`Text` it receives.
        prompt_arguments: argument of the pipeline's call to the part of :class:`Text` it takes.
        guidance: ``cfg`` two predictions; ``embedded`` a number given to the denoiser; ``none`` a distilled model.
        guidance_calls: whether classifier-free guidance calls the denoiser twice a step, not with a double batch.
        guidance_argument, no_guidance: the pipeline's argument for it, and its value that switches it off.
        call: further arguments of the pipeline's call.
        null_prompt: what the pipeline's guidance compares with, where it has to be given; None where the pipeline adds
            it by itself.
        latent_dtype: of latents that the pipeline is given; the denoiser's by default.
        cuts: whether a prompt has as many rows of text as tokens, padding masked or cut, and not a fixed number.
        max_sequence_length: tokens a prompt is padded to, and the empty one that guidance adds; 0 where it is fixed.
        streams: how text and picture share an attention; None where they do not, or where the rows of text differ
            between the prompts of a batch.
    """

    pipe: Any
    latent_argument: ClassVar[str] = "hidden_states"
    time_argument: ClassVar[str] = "timestep"
    text_arguments: ClassVar[dict[str, str]] = {"encoder_hidden_states": "hidden"}
    prompt_arguments: ClassVar[dict[str, str]] = {"prompt_embeds": "hidden"}
    guidance: ClassVar[Literal["cfg", "embedded", "none"]] = "cfg"
    guidance_calls: ClassVar[bool] = False
    guidance_argument: ClassVar[str] = "guidance_scale"
    no_guidance: ClassVar[float] = 1.0
    call: dict[str, Any] = {}
    null_prompt: ClassVar[str | None] = None
    latent_dtype: ClassVar[torch.dtype | None] = None
    cuts: ClassVar[bool] = False
    max_sequence_length: int = 0
    streams: ClassVar[Streams | None] = None

    @property
    @abc.abstractmethod
    def denoiser_name(self) -> str: ...

    @property
    @abc.abstractmethod
    def denoiser_parts(self) -> dict[str, nn.Module]: ...

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype: ...

    @abc.abstractmethod
    def encode(
        self, prompts: Any, *, padded: bool = True, in_float32: bool = False, grad: bool = False
    ) -> Conditioning: ...

    @functools.cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one picture's latents as the denoiser reads them, at the pipeline's own size."""
        return tuple(self._latents(self.encode([""]).text).shape[1:])

    # --- the denoiser -----------------------------------------------------------------------------------------------

    def predict(self, x: Tensor, t: Tensor, text: Text, *, guidance: float | None = None) -> Tensor:
        """The denoiser's output for inputs ``x (n, ...)`` at times ``t (n,)``; differentiable in all but ``t``.

        Args:
            guidance: of models with embedded guidance, and of LCM U-Nets; the pipeline's default otherwise. It is no
                classifier-free guidance.
        """
        several = len(self.denoiser_parts) > 1
        parts = [self.part_at(float(one)) for one in t] if several else [self.denoiser_name]
        if len(set(parts)) == 1:
            return self._predict(parts[0], x, t, text, guidance)
        out: list[Tensor | None] = [None] * len(x)
        for part in dict.fromkeys(parts):
            rows = [i for i, name in enumerate(parts) if name == part]
            for i, row in zip(rows, self._predict(part, x[rows], t[rows], text[rows], guidance), strict=True):
                out[i] = row
        return torch.stack(out)  # type: ignore[arg-type]

    def _predict(self, part: str, x: Tensor, t: Tensor, text: Text, guidance: float | None) -> Tensor:
        inputs = self.with_text(self.template(text, guidance=guidance), text)
        inputs |= {self.latent_argument: self.packed(x), self.time_argument: t}
        output = getattr(self.pipe, part)(**inputs, return_dict=False)
        return self.output(output[0])

    def part_at(self, t: float) -> str:
        """The denoiser that a pipeline with two of them uses at a time."""
        return self.denoiser_name

    def text_inputs(self, text: Text) -> dict[str, Any]:
        """The denoiser's arguments that hold the text."""
        return {name: getattr(text, part) for name, part in self.text_arguments.items()}

    def with_text(self, inputs: Mapping[str, Any], text: Text) -> dict[str, Any]:
        """The arguments of a denoiser's call with another text in it."""
        return {**inputs, **self.text_inputs(text)}

    def text_of(self, inputs: Mapping[str, Any]) -> Tensor | list[Tensor]:
        """The token embeddings in the arguments of a denoiser's call."""
        return self.text_part(inputs, "hidden")

    def rows_of(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """The token embeddings of each prompt in a denoiser's call; without padding where that is cut."""
        rows, masks = list(self.text_of(inputs)), self.text_part(inputs, "mask")
        if not self.cuts or masks is None:
            return rows
        return [row[mask.bool()] for row, mask in zip(rows, masks, strict=True)]

    def text_part(self, inputs: Mapping[str, Any], part: str) -> Any:
        """``hidden``, ``pooled`` or ``mask`` of the text in a denoiser's arguments; None where there is no such."""
        name = next((name for name, own in self.text_arguments.items() if own == part), None)
        return None if name is None else inputs[name]

    def text_rows(self, inputs: Mapping[str, Any]) -> slice:
        """The rows of text in the sequence that joint attention reads, for the arguments of a denoiser's call.

        The first token of the text is the first of them, at any size of the picture. Padding of the text counts as
        text. Only for models with ``streams``.
        """
        tokens = self.text_of(inputs).shape[1]  # type: ignore[union-attr]
        return slice(0, tokens) if self.streams is None or self.streams.text_first else slice(-tokens, None)

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

    def sigmas(self, num_inference_steps: int) -> tuple[float, ...]:
        """Shares of noise at which the pipeline of a flow model takes its steps, falling, and 0 behind the last.

        The scheduler's own, shifted as the pipeline does at this size.
        """
        pipe = separate(self.pipe)
        self._first_call(self.encode([""]).text, None, num_inference_steps=num_inference_steps, pipe=pipe)
        shares = [float(share) for share in pipe.scheduler.sigmas]
        falling = [share for i, share in enumerate(shares) if share > 0 and share not in shares[:i]]
        return (*falling, 0.0)

    def _first_call(
        self, text: Text, guidance: float | None, *, num_inference_steps: int = 4, pipe: Any = None
    ) -> Call:
        """The first call of the denoiser when the pipeline draws ``text`` without classifier-free guidance."""
        heard: list[Call] = []

        def stop(call: Call) -> None:
            heard.append(call)
            raise Enough

        scale = self.no_guidance if self.guidance == "cfg" and guidance is None else guidance
        with listening(self.denoiser_parts, before=stop):
            self.draw(
                text,
                num_inference_steps=num_inference_steps,
                guidance_scale=scale,
                generator=torch.Generator().manual_seed(0),
                pipe=pipe,
            )
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
        pipe: Any = None,
    ) -> Tensor:
        """Call the pipeline itself on encoded prompts; returns latents. Its scheduler is left as it was.

        Args:
            pipe: what :func:`separate` made of the pipeline, for whoever looks at its scheduler afterwards.
        """
        pipe = separate(self.pipe) if pipe is None else pipe
        arguments = self.prompt_inputs(text) | self.call
        if self.max_sequence_length and "max_sequence_length" in inspect.signature(pipe.__call__).parameters:
            arguments.setdefault("max_sequence_length", self.max_sequence_length)
        if guidance_scale is not None:
            arguments[self.guidance_argument] = guidance_scale
        if self.null_prompt is not None and guidance_scale != self.no_guidance:
            null = self.encode([self.null_prompt]).text.repeat(len(text))
            arguments |= {f"negative_{name}": value for name, value in self.prompt_inputs(null).items()}
        if noise is not None:
            arguments["latents"] = self.call_latents(noise.to(self.latent_dtype or noise.dtype))
        try:
            return pipe(
                **arguments, num_inference_steps=num_inference_steps, generator=generator, output_type="latent"
            )[0]
        except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"{type(self.pipe).__name__} cannot be called with text alone ({first_line(error, limit=200)}); this "
                "needs a pipeline that draws from a prompt: unload what wants more (an IP-Adapter), or use the "
                "text-to-image pipeline"
            ) from error

    def call_latents(self, noise: Tensor) -> Tensor:
        """Latents in the shape that the pipeline's call takes."""
        return noise

    def from_call(self, latents: Tensor) -> Tensor:
        """Latents that the pipeline's call returns, as the denoiser reads them."""
        return latents

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

        def begins(x: Tensor, t: Tensor) -> bool:
            return not heard or not (torch.equal(heard[-1].x, x) and torch.equal(heard[-1].t, t))

        def before(call: Call) -> None:
            if stop is not None and len(heard) >= stop and begins(*self._moment(call, len(text))):
                raise Enough

        def after(call: Call) -> None:
            conditional, *unconditional = self._predictions(call, text)
            x, t = self._moment(call, len(text))
            if begins(x, t):
                heard.append(Step(len(heard), x.clone(), t.clone(), conditional, *unconditional or (None,)))
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
        predictions = [p for step in heard[:1] for p in (step.conditional, step.unconditional) if p is not None]
        if any(len(prediction) != len(text) for prediction in predictions):
            raise ValueError(
                f"{type(self.pipe).__name__} makes more than two predictions a prompt (perturbed-attention guidance); "
                "this needs one with and one without the prompt: use the plain text-to-image pipeline"
            )
        yield from heard

    def steps_of(self, num_inference_steps: int) -> int:
        """How often the denoiser is called in a trajectory: second-order schedulers take more steps than asked for."""
        scheduler = separate(self.pipe).scheduler
        shifted = getattr(scheduler.config, "use_dynamic_shifting", False)
        scheduler.set_timesteps(num_inference_steps, **({"mu": 1.0} if shifted else {}))
        return len(scheduler.timesteps)

    def _moment(self, call: Call, n: int) -> tuple[Tensor, Tensor]:
        """``x (n, ...)`` and ``t (n,)`` of a call, not copied; with guidance in one batch, its halves hold the same."""
        t = torch.as_tensor(call.inputs[self.time_argument])
        x = self.unpacked(call.inputs[self.latent_argument])[:n]
        return x.detach(), t.reshape(-1).expand(n) if t.numel() == 1 else t[:n]

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


__all__ = ["Driven", "Step"]
