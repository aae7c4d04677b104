"""What fine-tuning erasers share: prompts, a bank of the base's trajectories, a student, one training loop."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from erasure.artifact import Erasure
from erasure.artifact.record import component_prints
from erasure.backbone import Backbone
from erasure.backbone.text import Text
from erasure.methods.adversary import worst_text
from erasure.methods.bank import Bank, DrawnBank, TrajectoryBank
from erasure.methods.base import Method, Request, expanded
from erasure.methods.saliency import salient, training_only
from erasure.methods.students import LowRank, Student, Weights
from erasure.train import Checkpoint, Draw, Precision, Run, Training, trainable
from erasure.train.modules import casting, compute_dtype
from erasure.train.settings import Schedule

Loss = Callable[[Draw], Tensor]
LARGEST_RATE = 1e30  # of float32, beyond which optimisers fail
# What `recommended` presets share: a small bank whose every step is kept, all names, arithmetic that is fast here.
SMALL_BANK: dict[str, Any] = {
    "batch_size": 8,
    "trajectories": 12,
    "keep_steps": None,
    "num_inference_steps": 25,
    "articles": True,
    "synonyms": True,
    "precision": "auto",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTune(Method):
    """Settings and steps that fine-tunes share. A method is its :meth:`objective`.

    Attributes:
        iterations, lr: optimiser steps and their size. More of either erases more and hurts more.
        batch_size: bank rows a step, for the target and for what is kept alike.
        trajectories, keep_steps: size of the bank; see :meth:`TrajectoryBank.sample`. The official codes sample a fresh
            trajectory for every step (``trajectories = iterations``, ``keep_steps = 1``).
        num_inference_steps, guidance_scale: of the bank's sampling.
        articles: also train on "a superhero" beside "superhero", and keep "a ninja" beside "ninja".
        synonyms: train on the concept's synonyms too.
        retain: weight of a second term that holds the student to the base on the keep list; 0 ignores the list.
        retain_hardest: the second term takes the worst one of so many rows: prompts that the erasing damages most are
            held on to most (Bui et al. 2024). 1 takes rows at random; 4 to 16 cost as many more forward passes.
        robust: train under an attack: each step first moves the concept's embedding to where it brings the concept
            back best, see :func:`~erasure.methods.adversary.worst_text`. Take it when soft prompts get the concept
            back. A step costs ``attack_steps`` times as much, and neighbours suffer more.
        attack_steps: gradient steps of the attack.
        epsilon: how far the attack may move each number of the embedding. Raise it when attacks get through.
        saliency: train only this share of the weights: those to which the loss is most sensitive at the start (SalUn).
            None trains all. 0.5 is SalUn's; less hurts other concepts less and erases less.
        adapter: what is trained: ``weights`` of the model, or ``lora``, a low-rank adapter that needs a fraction of the
            memory. ``auto`` is weights on U-Nets and LoRA on transformers, whose float32 copies would not fit.
        rank, alpha: of the adapter; alpha is the rank where None.
        null: what stands for "no prompt": ``sampled``, the unconditional input that guidance itself uses (zeros on
            SDXL), which costs nothing; or ``empty``, the empty prompt, as the official SDXL script has it.
        optimizer, clip, schedule, warmup, restarts, accumulation, gradient_checkpointing: see
            :class:`~erasure.train.Training`.
        precision: what predictions are computed in; ``auto`` is bfloat16 where that is faster. A half-precision model
            runs in its own dtype.
        pure: train the weights in the pipeline's own dtype instead of in float32 copies. It matters for pipelines
            loaded in half precision alone, and is there to repeat scripts that do so: small updates are rounded away.
        seed: of the bank and of the batches.
    """

    iterations: PositiveInt = 200
    lr: float = 5e-5
    batch_size: PositiveInt = 1
    trajectories: PositiveInt = 200
    keep_steps: PositiveInt | None = 1
    num_inference_steps: PositiveInt = 50
    guidance_scale: float = 3.0
    articles: bool = False
    synonyms: bool = False
    retain: NonNegativeFloat = 0.0
    retain_hardest: PositiveInt = 1
    robust: bool = False
    attack_steps: NonNegativeInt = 10
    epsilon: PositiveFloat = 0.1
    saliency: Annotated[float, Field(gt=0, lt=1)] | None = None
    adapter: Literal["auto", "weights", "lora"] = "auto"
    rank: PositiveInt = 8
    alpha: PositiveFloat | None = None
    null: Literal["sampled", "empty"] = "sampled"
    optimizer: Literal["adam", "adamw", "sgd", "adamw8bit"] = "adam"
    clip: float | None = None
    schedule: Schedule = "constant"
    warmup: int = 0
    restarts: PositiveInt = 1
    accumulation: PositiveInt = 1
    gradient_checkpointing: bool = False
    precision: Precision = "float32"
    pure: bool = False
    seed: int = 0

    on_attention: ClassVar[bool] = False  # whether the loss reads attention maps
    only: ClassVar[str] = ""  # of methods that train one kind of thing whatever is asked: what, for the error

    # --- the steps ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        if self.only and (self.adapter != "auto" or self.saliency is not None):
            raise ValueError(f"{self.only}; got adapter {self.adapter!r} and saliency {self.saliency}; leave them out")
        if not 0 < self.lr <= LARGEST_RATE:
            raise ValueError(f"lr is above 0 and at most {LARGEST_RATE:g}; got {self.lr}; give 1e-5, say")
        self.training().build([torch.zeros(1, requires_grad=True)])  # refuses other settings that cannot work
        if self.gradient_checkpointing and self.on_attention:
            raise ValueError(
                f"{self.key} trains on attention maps, which gradient checkpointing does not keep; got "
                "gradient_checkpointing=True; leave it out, and lower batch_size where memory is short"
            )

    def validate(self, backbone: Backbone, request: Request) -> None:
        if backbone.guidance == "none":
            raise ValueError(
                f"{self.key} compares predictions with and without the prompt, and {backbone.pipelines} is distilled "
                "to need only the one; fine-tune its undistilled sibling and apply the erasure here with "
                "allow='same-text-encoder', or use a closed form such as uce"
            )
        super().validate(backbone, request)
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "training needs gradients; got torch.inference_mode; leave it (torch.no_grad is no hindrance)"
            )
        if len(backbone.read_at()) > 1:
            raise ValueError(
                f"clip_skip='both' is for closed forms; {self.key} trains at one layer of the text encoder; give the "
                "one you draw with"
            )
        if self.saliency is not None and (self.lora(backbone) or self.optimizer not in ("adam", "sgd")):
            raise ValueError(
                f"saliency chooses among the model's own weights, and adamw shrinks those it leaves out; got adapter "
                f"{self.adapter!r} and optimizer {self.optimizer!r}; set adapter='weights' and optimizer='adam'"
            )
        if request.keep and not self.uses_keep:
            warnings.warn(f"{self.key} keeps nothing while retain is 0, so the keep list is not used", stacklevel=3)
        backbone.template(backbone.encode([""]).text)  # refuses pipelines that need more than text

    def erase(self, backbone: Backbone, request: Request) -> Erasure:
        """Sample the bank, train, and return the erasure. Resumes from the request's checkpoint, if there is one."""
        if not self.uses_keep:  # what was not used is not recorded
            request = dataclasses.replace(request, keep=())
        checkpoint = self.checkpoint(backbone, request)
        prompts = self.prompts(backbone, request)
        facts = self.record(backbone, request, prompts=prompts)  # of the base, before it is trained
        student = self.student(backbone)
        dtype = compute_dtype(self.precision, backbone.device, student.modules)
        with casting(backbone.device, dtype):
            loss = self.objective(backbone, student, request, checkpoint)
            with contextlib.ExitStack() as stack:
                originals = stack.enter_context(trainable(student.parameters, student.modules, pure=self.pure))
                self.begin(student)
                if self.saliency is not None:
                    masks = salient(student.parameters, loss, share=self.saliency, seed=self.seed)
                    stack.enter_context(training_only(student.parameters, masks))
                run = Run(
                    student.parameters,
                    loss,
                    training=self.training(),
                    modules=student.modules,
                    around=student.active,
                    checkpoint=checkpoint,
                    progress=request.progress,
                )
                for _ in run:
                    pass
                edit = student.erasure(self.name_for(request), facts, run.result(), originals)
        return self.finished(backbone, request, edit)

    def begin(self, student: Student) -> None:
        """Change what is trained before the first step; nothing, unless a method says otherwise."""

    @abc.abstractmethod
    def objective(self, backbone: Backbone, student: Student, request: Request, checkpoint: Checkpoint | None) -> Loss:
        """The loss of one step, on rows that its draw chooses. Sampling from the base happens here, before training."""

    @property
    def selector(self) -> str:
        """Which layers are trained: see :meth:`Backbone.select`."""
        return "cross_attention"

    def student(self, backbone: Backbone) -> Student:
        """What is trained: the layers of :attr:`selector`, or an adapter on them."""
        if self.lora(backbone):
            return LowRank(backbone, self.selector, rank=self.rank, alpha=self.alpha, seed=self.seed)
        return Weights(backbone, self.selector)

    @property
    def uses_keep(self) -> bool:
        """Whether the keep list has a part in these settings."""
        return self.retain > 0

    def leaves(self, denoiser: str) -> str | None:
        return self.kind or ("lora" if self.adapted(denoiser) else "delta")

    def adapted(self, denoiser: str) -> bool:
        """Whether an adapter is trained, and not the weights, on a model with a "unet" or a "transformer"."""
        return self.adapter == "lora" or (self.adapter == "auto" and denoiser != "unet")

    def lora(self, backbone: Backbone) -> bool:
        """Whether an adapter is trained, and not the weights."""
        return self.adapted(backbone.denoiser_name)

    def finished(self, backbone: Backbone, request: Request, edit: Erasure) -> Erasure:
        """What the method makes of the trained erasure: that itself, unless there is something to add."""
        return edit

    def prompts(self, backbone: Backbone, request: Request) -> list[str]:
        """What the concepts are called in training."""
        return expanded(backbone, request.names(synonyms=self.synonyms), articles=self.articles)

    def kept(self, backbone: Backbone, request: Request) -> list[str]:
        """The keep list as it is trained on, expanded as the targets are; empty where it has no weight."""
        return expanded(backbone, request.keep, articles=self.articles) if self.retain else []

    def training(self) -> Training:
        return Training(
            self.iterations,
            self.lr,
            seed=self.seed,
            optimizer=self.optimizer,
            schedule=self.schedule,
            warmup=self.warmup,
            restarts=self.restarts,
            clip=self.clip,
            accumulation=self.accumulation,
            precision=self.precision,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    def checkpoint(self, backbone: Backbone, request: Request) -> Checkpoint | None:
        """The checkpoint in the request's folder, checked before any work."""
        if request.checkpoint is None:
            return None
        run = {
            "method": self.key,
            "settings": self.settings(),
            "prompts": self.prompts(backbone, request),
            "concepts": [dataclasses.asdict(concept) for concept in request.concepts],
            "keep": [list(request.keep), self.kept(backbone, request)],
            "base": component_prints(backbone),
            **self.given(),
        }
        return Checkpoint.open(request.checkpoint, json.dumps(run, default=str))

    def given(self) -> dict[str, Any]:
        """What else a training is made of, such as pictures: a checkpoint belongs to a run with the same."""
        return {}

    # --- parts of objectives ------------------------------------------------------------------------------------------

    def bank(
        self, backbone: Backbone, text: Text, request: Request, checkpoint: Checkpoint | None, name: str
    ) -> TrajectoryBank:
        """A bank of the base's trajectories; sampled once for a checkpoint, however often it is resumed."""
        empty = backbone.encode([""]).text

        def make() -> dict[str, Tensor]:
            return TrajectoryBank.sample(
                backbone,
                text,
                empty,
                keep=self.keep_steps,
                guidance=backbone.plain_guidance,
                sampled_null=self.null == "sampled",
                **self.sampling(request),
            ).tensors()

        return TrajectoryBank.of(make() if checkpoint is None else checkpoint.keep(name, make))

    def pictures(
        self,
        backbone: Backbone,
        text: Text,
        request: Request,
        checkpoint: Checkpoint | None,
        name: str,
        *,
        window: tuple[float, float] = (0.0, 1.0),
    ) -> DrawnBank:
        """A bank of pictures that the base draws, ``keep_steps`` noisy copies of each; made once, as :meth:`bank`."""
        sampling = self.sampling(request)

        def make() -> dict[str, Tensor]:
            return DrawnBank.draw(
                backbone,
                text,
                pictures=sampling.pop("trajectories"),
                mixes=self.keep_steps or self.num_inference_steps,
                window=window,
                **sampling,
            ).tensors()

        return DrawnBank.of(make() if checkpoint is None else checkpoint.keep(name, make))

    def sampling(self, request: Request) -> dict[str, Any]:
        """How the base is sampled."""
        return {
            "trajectories": self.trajectories,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "progress": request.progress,
        }

    def erasing(
        self, backbone: Backbone, bank: Bank, targets: Tensor, text: Text, draw: Draw, *, aim: Tensor | None = None
    ) -> Tensor:
        """The error on what is erased, on rows that the draw chooses; under the attack where ``robust``.

        Args:
            targets: ``(n, ...)`` what the student is to predict at each row of the bank.
            text: what the student is asked, one row for each prompt of the bank.
            aim: ``(n, ...)`` what the attack tries to get back; the base's predictions in the bank by default.
        """
        chosen = bank.pick(self.batch_size, draw.generator)
        return self.erasing_rows(backbone, bank, targets, bank.rows_of(text, chosen), chosen, draw, aim=aim)

    def erasing_rows(
        self,
        backbone: Backbone,
        bank: Bank,
        targets: Tensor,
        text: Text,
        chosen: Tensor,
        draw: Draw,
        *,
        aim: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`erasing`, with one text for each chosen row."""
        if self.attacks(draw.step):
            wanted = bank.conditional if aim is None else aim
            text = worst_text(
                text,
                lambda moved: self.errors(backbone, bank, wanted, moved, chosen).mean(),
                steps=self.attack_steps,
                epsilon=self.epsilon,
                generator=draw.generator,
            )
        return self.errors(backbone, bank, targets, text, chosen).mean()

    def attacks(self, step: int) -> bool:
        """Whether this step is one under attack."""
        return self.robust and self.attack_steps > 0

    def error(self, backbone: Backbone, bank: Bank, targets: Tensor, text: Text, chosen: Tensor) -> Tensor:
        """Mean squared error of the student to the targets on chosen rows of a bank, each with its prompt's text."""
        return self.errors(backbone, bank, targets, bank.rows_of(text, chosen), chosen).mean()

    def errors(self, backbone: Backbone, bank: Bank, targets: Tensor, text: Text, chosen: Tensor) -> Tensor:
        """``(m,)``: the error of each chosen row, with one text for each."""
        x, t = bank.noisy(backbone, chosen)
        predicted = backbone.predict(x, t, text.to(x.dtype), guidance=backbone.plain_guidance)
        wanted = targets[chosen].to(backbone.device).float()
        return (predicted.float() - wanted).square().flatten(1).mean(1)

    def holding(self, backbone: Backbone, request: Request, checkpoint: Checkpoint | None) -> Loss:
        """``retain`` times the error on the keep list, in a bank of its own; 0 where nothing is kept."""
        kept: Sequence[str] = self.kept(backbone, request)
        if not kept:
            return lambda draw: torch.zeros(())
        text = backbone.encode(kept).text
        bank, targets = self.kept_bank(backbone, text, request, checkpoint)
        return lambda draw: self.retain * self.holding_on(backbone, bank, targets, text, draw)

    def kept_bank(
        self, backbone: Backbone, text: Text, request: Request, checkpoint: Checkpoint | None
    ) -> tuple[Bank, Tensor]:
        """The bank of what is kept, and what the student is to predict at each of its rows: what the base predicts."""
        bank = self.bank(backbone, text, request, checkpoint, "kept")
        return bank, bank.conditional

    def holding_on(self, backbone: Backbone, bank: Bank, targets: Tensor, text: Text, draw: Draw) -> Tensor:
        """The error on what is kept, on rows that the draw chooses."""
        return self.error(backbone, bank, targets, text, self.held_rows(backbone, bank, targets, text, draw))

    def held_rows(self, backbone: Backbone, bank: Bank, targets: Tensor, text: Text, draw: Draw) -> Tensor:
        """Rows that the draw chooses of what is kept: the worst of ``retain_hardest`` times as many."""
        chosen = bank.pick(self.batch_size * self.retain_hardest, draw.generator)
        if self.retain_hardest > 1:
            with torch.no_grad():
                errors = self.errors(backbone, bank, targets, bank.rows_of(text, chosen), chosen)
            chosen = chosen[errors.topk(self.batch_size).indices.cpu()]
        return chosen


__all__ = ["SMALL_BANK", "FineTune", "Loss"]
