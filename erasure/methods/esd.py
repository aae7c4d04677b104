"""ESD, Erased Stable Diffusion: fine-tune the denoiser to be guided away from a concept when asked for it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from erasure.artifact import DeltaErasure
from erasure.artifact.base import new_config
from erasure.backbone import Backbone, SDXLBackbone, UNetBackbone
from erasure.backbone.fingerprint import fingerprint
from erasure.backbone.text import Text
from erasure.backbone.unet import Selector
from erasure.concept import Concept, with_article
from erasure.methods.base import Count, Method, Reference, check_moved, check_request, check_supported
from erasure.methods.guidance import TrajectoryBank, batch_of, pick
from erasure.precision import autocast
from erasure.train import Checkpoint, Draw, Precision, Training, check_trainable, train

SELECTORS: dict[str, Selector] = {
    "x": "cross_attention",
    "x-strict": "cross_attention_kv",
    "u": "not_cross_attention",
    "all": "all",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ESD(Method):
    """Train the student on the base's own negative guidance:

        | e_student(x_t, t, c0) - [ e(x_t, t, c0) - eta ( e(x_t, t, c) - e(x_t, t) ) ] |^2

    with c the concept, c0 the prompt it is erased from (the concept itself by default), e the frozen base and x_t a
    step of a trajectory the base samples for c0 with guidance. Works for epsilon- and v-prediction alike: the target is
    linear.

    Attributes:
        variant: what is trained. ``x`` cross-attention (styles, names), ``x-strict`` its keys and values, ``u``
            everything else (concepts that must go whatever the prompt says), ``all``.
        eta: how far to push away. 1 to 2; larger distorts.
        iterations, lr: of plain Adam. More of either erases more and hurts more.
        batch_size: bank rows a step.
        trajectories, keep_steps: size of the bank; see :meth:`TrajectoryBank.sample`. The official code samples a fresh
            trajectory for every step (``trajectories = iterations``, ``keep_steps = 1``).
        num_inference_steps, guidance_scale: of the bank's sampling.
        erase_from: c0, when it is not the concept itself: "santa" to take the "beard" from what "santa" draws, say. The
            concept's own prompt is then not trained.
        articles: also train on "a superhero" beside "superhero".
        synonyms: train on the concept's synonyms too.
        retain: weight of a second term that holds the student to the base on the keep list; 0 ignores the list.
        autocast: run the denoiser in bfloat16 where that is faster.
        seed: of the bank and of the batches.
    """

    variant: Literal["x", "x-strict", "u", "all"] = "x"
    eta: float = 2.0
    iterations: Count = 200
    lr: float = 5e-5
    batch_size: Count = 1
    trajectories: Count = 200
    keep_steps: Count | None = 1
    num_inference_steps: Count = 50
    guidance_scale: float = 3.0
    erase_from: str | None = None
    articles: bool = False
    synonyms: bool = False
    retain: float = 0.0
    autocast: bool = False
    seed: int = 0

    architectures: ClassVar[tuple[str, ...]] = (UNetBackbone.architecture, SDXLBackbone.architecture)
    key: ClassVar[str] = "esd"
    summary: ClassVar[str] = "fine-tune with negative guidance; minutes, the size of the trained layers"
    reference: ClassVar[Reference] = Reference(
        "Erasing Concepts from Diffusion Models", "Gandikota et al., ICCV 2023", "2303.07345", "rohitgandikota/erasing"
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "recommended": {
            "variant": "x-strict",
            "lr": 3e-4,
            "iterations": 150,
            "batch_size": 8,
            "trajectories": 12,
            "keep_steps": None,
            "num_inference_steps": 25,
            "articles": True,
            "synonyms": True,
            "retain": 1.0,
            "autocast": True,
        },
        "official-2025-x": {"variant": "x"},
        "official-2025-x-strict": {"variant": "x-strict"},
        "official-2025-u": {"variant": "u"},
        "official-2025-all": {"variant": "all"},
        # SDXL has a script of its own. Its oversight, inputs that are not scaled under Euler, is not repeated.
        "official-2025-sdxl-x": {"variant": "x", "lr": 2e-4, "eta": 1.0, "guidance_scale": 2.0},
        "official-2025-sdxl-x-strict": {"variant": "x-strict", "lr": 2e-4, "eta": 1.0, "guidance_scale": 2.0},
        "official-2025-sdxl-u": {"variant": "u", "lr": 1e-5, "eta": 1.0, "guidance_scale": 2.0},
    }

    def erase(
        self,
        backbone: Backbone,
        concepts: Sequence[Concept],
        *,
        keep: Sequence[str] = (),
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> DeltaErasure:
        """Sample the bank, train, and return the differences.

        Args:
            keep: prompts whose predictions are held, when ``retain`` is above 0.
            checkpoint: folder for the training state; the same call resumes an interrupted run, bank included.

        Raises:
            ValueError: the request cannot be trained, or ``checkpoint`` holds another run or a damaged one.
            Diverged: the loss stopped being a number.
        """
        check_supported(self, backbone)
        check_request(concepts, keep)
        assert isinstance(backbone, UNetBackbone)
        channels = backbone.unet.config.in_channels, backbone.unet.config.out_channels
        if channels[0] != channels[1]:
            raise ValueError(
                f"ESD draws its own training pictures, which this UNet cannot start from noise alone; it reads "
                f"{channels[0]} channels and predicts {channels[1]} (inpainting?); fine-tune the text-to-image model"
            )
        prompts = [prompt for concept in concepts for prompt in self.prompts(concept)]
        parameters = backbone.parameters(SELECTORS[self.variant])
        check_trainable(parameters, [backbone.denoiser])
        if any(concept.anchor for concept in concepts):
            warnings.warn("ESD has no anchor: it pushes away from the concept and not towards anything", stacklevel=3)
        if keep and not self.retain:
            warnings.warn("ESD keeps nothing while retain is 0, so the keep list is not used", stacklevel=3)
            keep = ()
        run = {
            "settings": self.settings(),
            "prompts": prompts,
            "keep": list(keep),
            "base": fingerprint(backbone.denoiser),
        }
        # opened first: a checkpoint that is of no use says so before anything is sampled
        state = None if checkpoint is None else Checkpoint.open(checkpoint, json.dumps(run))
        with self._precision(backbone), backbone.evaluating():
            deltas = train(
                parameters,
                self.objective(backbone, prompts, keep, checkpoint=state, progress=progress),
                training=self.training,
                modules=[backbone.denoiser],
                checkpoint=state,
                progress=progress,
            )
        config = new_config(
            backbone,
            method=self.key,
            settings=self.settings(),
            concepts=concepts,
            keep=keep,
        )
        config["sites"] = list(deltas)
        config["prompts"] = prompts
        config["report"] = {"relative_change": check_moved(deltas, dict(parameters))}
        return DeltaErasure(self.name_for(concepts), config, deltas)

    @property
    def training(self) -> Training:
        """How the student is trained: by plain Adam at a constant rate."""
        precision: Precision = "auto" if self.autocast else "float32"
        return Training(self.iterations, self.lr, seed=self.seed, batch_size=self.batch_size, precision=precision)

    def objective(
        self,
        backbone: UNetBackbone,
        prompts: Sequence[str],
        keep: Sequence[str],
        *,
        checkpoint: Checkpoint | None = None,
        progress: bool = True,
    ) -> Callable[[Draw], Tensor]:
        """Sample the banks from the base as it stands, or read them; the loss of one step, on rows that it draws."""
        text, empty = backbone.encode(prompts).text, backbone.encode([""]).text
        base = backbone.encode([self.erase_from]).text.repeat(len(text)) if self.erase_from else text
        bank = self._bank("bank", backbone, base, empty, checkpoint, progress)
        targets = self._targets(backbone, bank, text)
        held = backbone.encode(keep).text if keep else None
        held_bank = self._bank("kept", backbone, held, empty, checkpoint, progress) if held is not None else None

        def loss(draw: Draw) -> Tensor:
            value = step_loss(backbone, bank, targets, base, pick(bank, self.batch_size, draw.generator))
            if held is None or held_bank is None:
                return value
            kept = pick(held_bank, self.batch_size, draw.generator)
            return value + self.retain * step_loss(backbone, held_bank, held_bank.conditional, held, kept)

        return loss

    def prompts(self, concept: Concept) -> list[str]:
        """What the concept is called in training."""
        phrases = concept.phrases if self.synonyms else (concept.name,)
        return list(dict.fromkeys([*phrases, *map(with_article, phrases)] if self.articles else phrases))

    def _bank(
        self,
        name: str,
        backbone: UNetBackbone,
        text: Text,
        empty: Text,
        checkpoint: Checkpoint | None,
        progress: bool,
    ) -> TrajectoryBank:
        def sample() -> dict[str, Tensor]:
            bank = TrajectoryBank.sample(
                backbone,
                text,
                empty,
                trajectories=self.trajectories,
                keep=self.keep_steps,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                seed=self.seed,
                progress=progress,
            )
            return bank.tensors()

        return TrajectoryBank(**(sample() if checkpoint is None else checkpoint.keep(name, sample)))

    @torch.no_grad()
    def _targets(self, backbone: UNetBackbone, bank: TrajectoryBank, text: Text) -> Tensor:
        """``(n, 4, h, w)``: e(c0) - eta (e(c) - e()), from the bank's predictions where they suffice."""
        concept = bank.conditional
        if self.erase_from:
            rows = torch.arange(len(bank)).split(32)
            concept = torch.cat([backbone.predict(*_inputs(backbone, bank, text, chosen)).cpu() for chosen in rows])
        return bank.conditional - self.eta * (concept - bank.unconditional)

    def _precision(self, backbone: UNetBackbone) -> contextlib.AbstractContextManager:
        wanted = self.autocast and backbone.dtype == torch.float32
        # without the cache: it would go on using the first step's copy of the weights that are being trained
        return autocast(backbone.device, None if wanted else False, cache_enabled=False)


def step_loss(backbone: UNetBackbone, bank: TrajectoryBank, targets: Tensor, text: Text, chosen: Tensor) -> Tensor:
    """Mean squared error of the student to the targets on some rows of a bank."""
    predicted = backbone.predict(*_inputs(backbone, bank, text, chosen))
    return F.mse_loss(predicted.float(), targets[chosen].to(backbone.device).float())


def _inputs(backbone: UNetBackbone, bank: TrajectoryBank, text: Text, chosen: Tensor) -> tuple[Tensor, Tensor, Text]:
    x, t, prompt = batch_of(bank, chosen, backbone)
    return x, t, text[prompt].to(x.dtype)
