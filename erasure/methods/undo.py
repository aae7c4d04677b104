"""UNDO: erase, mix fresh random weights into the model, and distil the erased model back into it."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from tqdm.auto import tqdm

from erasure.backbone import Backbone
from erasure.backbone.base import layer_at
from erasure.backbone.text import Text
from erasure.captioned import opened, rows_of
from erasure.methods import method_class
from erasure.methods.bank import DrawnBank
from erasure.methods.base import Method, Reference, Request, expanded
from erasure.methods.finetune import FineTune, Loss
from erasure.methods.speed import read_texts, without
from erasure.methods.students import Student, Weights, swapped
from erasure.train import Checkpoint, Draw, Training

FRESH = 0x756E646F  # added to the seed: from 0 or 1 come the very numbers that many a model was started with

AT_ONCE = 32  # pictures and captions that are encoded in one pass
OF_WEIGHTS = (None, "delta", "lora", "operator")  # kinds that a teacher's erasure may be of; None is not known before


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNDO(FineTune):
    """Three steps (Lee et al. 2025, there for language models):

    1. erase: a teacher e, the base under another erasure of weights, a closed form by default;
    2. mix: every weight and bias of the denoiser's linears and convolutions becomes

           w = (1 - share) w_teacher + share z,    z uniform in +-1 / sqrt(fan in),

       which is how PyTorch starts these layers, each in its own scale;
    3. distil, on captions without the target and pictures x of them, the teacher's or real ones, mixed with noise:

           | e_student(x_t, t, caption) - e(x_t, t, caption) |^2

    An edit stops the model from using what it knows; the fresh weights are there to destroy it, and what is distilled
    back is what the erased model shows on the captions. How far that goes is in ``docs/undo.md``. Norms keep the base's
    numbers: they are few (0.2 % of Emoji World), know no concept, and a fresh one would only rescale what the trained
    layers can rescale. Text encoders and embeddings are not touched.

    The teacher's predictions are computed once, for the whole bank. With a share of ``dropout`` of its rows the caption
    is the empty prompt, as guidance needs that prediction too. A step then costs one forward and backward pass. The
    result is as large as the denoiser. The settings it shares with other fine-tunes are those of
    :class:`~erasure.methods.finetune.FineTune`; its bank holds ``trajectories`` pictures with ``keep_steps`` noisy
    copies of each.

    Attributes:
        share: of fresh weights, the paper's alpha. More removes more, and takes longer to distil: on Emoji World 0.5
            changes next to nothing about how fast the target is relearnt, 0.7 little, and 0.9 was far from distilled
            after 80,000 pictures.
        teacher, teacher_preset: the method that erases, and its preset; one that changes weights of the denoiser. It
            has the request's keep list.
        captions: file of captions, one a line or a CSV with a column ``concept``. They stand for everything that the
            model is to draw, so take as many as there are, of all kinds: what no caption asks for is lost. Those that
            name a target are left out. Without a file the keep list is all there is.
        images: folder of real pictures with captions, which take the place of those that the teacher draws: a
            ``metadata.jsonl`` there has a line ``{"file_name": ..., "text": ...}`` for each
            (:func:`~erasure.captioned.rows_of`). Those whose caption names a target are left out; see to it yourself
            that no other shows one. Give them where there are thousands: a bank of few pictures costs quality, and
            drawing many costs more than reading them. All are used, whatever ``trajectories`` is.
        dropout: share of rows with the empty prompt.
        ema: decay of the average of the weights that is the result.
    """

    share: Annotated[float, Field(ge=0, le=1)] = 0.7
    teacher: str = "uce"
    teacher_preset: str = ""
    captions: str = ""
    images: str = ""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.995
    iterations: PositiveInt = 3500
    lr: float = 1e-3
    batch_size: PositiveInt = 16
    trajectories: PositiveInt = 1024
    keep_steps: PositiveInt | None = 16
    num_inference_steps: PositiveInt = 25
    optimizer: Literal["adam", "adamw", "sgd", "adamw8bit"] = "adamw"
    clip: float | None = 1.0
    warmup: int = 50
    adapter: Literal["auto", "weights", "lora"] = "weights"
    articles: bool = True

    files: ClassVar[tuple[str, ...]] = ("captions", "images")
    key: ClassVar[str] = "undo"
    summary: ClassVar[str] = "erase, mix in fresh weights, distil back; hours; not found to remove more than an edit"
    reference: ClassVar[Reference] = Reference(
        "Distillation Robustifies Unlearning",
        "Lee et al., NeurIPS 2025",
        "2506.06278",
        "AddieFoote/distillation-robustify-unlearning",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {"recommended": {"precision": "auto"}}

    def validate(self, backbone: Backbone, request: Request) -> None:
        if self.adapter == "lora" or self.robust or self.saliency is not None:
            raise ValueError(
                "UNDO trains every weight of the denoiser, since every weight is mixed with fresh ones, and has no "
                f"attack; got adapter {self.adapter!r}, robust={self.robust} and saliency={self.saliency}; leave them "
                "out, and set teacher='esd', say, for another erasure to start from"
            )
        super().validate(backbone, request)
        if not self.kept(backbone, request):
            raise ValueError(
                f"{self.key} learns again only what captions ask for; got no keep list, captions {self.captions!r} "
                f"and images {self.images!r}; give captions=FILE, one a line, images=FOLDER, or a keep list"
            )
        self.erasing_method().validate(backbone, self.teacher_request(request))

    @property
    def needs_keep(self) -> bool:
        return not (self.captions or self.images)

    @property
    def uses_keep(self) -> bool:
        return True

    @property
    def selector(self) -> str:
        return "all"

    def lora(self, backbone: Backbone) -> bool:
        return False

    def student(self, backbone: Backbone) -> Student:
        return Mixed(backbone, self.selector)

    def training(self) -> Training:
        # the faster second moment of AdamW is Emoji World's own: gradients fall by orders in the first hundred steps
        options = {"betas": (0.9, 0.99)} if self.optimizer.startswith("adam") else {}
        return dataclasses.replace(super().training(), ema=self.ema, options=options, checkpoint_every=100)

    def kept(self, backbone: Backbone, request: Request) -> list[str]:
        """The captions: those of the pictures or of the file that fit and name no target, or else the keep list."""
        if self.images:
            return [*dict.fromkeys(caption for _, caption in self.examples(backbone, request))]
        texts = backbone.fitting(read_texts(self.captions)) if self.captions else []
        texts = texts or expanded(backbone, request.keep, articles=self.articles)
        return list(dict.fromkeys(without(texts, request.concepts)))

    def examples(self, backbone: Backbone, request: Request) -> list[tuple[Path, str]]:
        """The pictures given, with their captions: those that fit and name no target."""
        rows = rows_of(self.images)
        fit = {*without(backbone.fitting(dict.fromkeys(row["text"] for row in rows)), request.concepts)}
        return [(Path(self.images) / row["file_name"], row["text"]) for row in rows if row["text"] in fit]

    def given(self) -> dict[str, Any]:
        files = [row["file_name"] for row in rows_of(self.images)] if self.images else []
        return {"images": [(name, (Path(self.images) / name).stat().st_size) for name in files]} if files else {}

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), **{name: Path(getattr(self, name)).name for name in self.files}}

    # --- the teacher --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        super().check()
        if self.captions and self.images:
            raise ValueError(
                f"{self.key} takes its captions from the pictures; got captions={self.captions!r} beside "
                f"images={self.images!r}; leave one of them out"
            )
        if self.teacher == self.key:
            raise ValueError(
                f"the teacher of {self.key} is another method; got {self.teacher!r}; set teacher='uce', say"
            )
        made = self.erasing_method()  # refuses what is unknown
        if made.part != "denoiser" or made.leaves("unet") not in OF_WEIGHTS:
            raise ValueError(
                f"{self.key} starts from an erasure of the denoiser's weights, which {self.teacher!r} does not leave; "
                "set teacher='uce' or 'esd', say"
            )

    def erasing_method(self) -> Method:
        """The method that the teacher is made with."""
        return method_class(self.teacher).preset(self.teacher_preset or None)

    def teacher_request(self, request: Request) -> Request:
        folder = None if request.checkpoint is None else request.checkpoint / "teacher"
        return dataclasses.replace(request, name=None, preset=self.teacher_preset, checkpoint=folder)

    def taught(self, backbone: Backbone, student: Student, request: Request) -> dict[str, Tensor]:
        """The weights in which the teacher differs from the base, by name.

        Raises:
            ValueError: the erasure is none of the denoiser's weights.
        """
        edit = self.erasing_method().erase(backbone, self.teacher_request(request))
        names = edit.parameter_names
        if not names or not set(names) <= set(student.parameters):
            raise ValueError(
                f"the teacher's erasure has to change weights of the denoiser's layers and nothing else; "
                f"{self.teacher} made one of kind {edit.kind} on {len(names)} weights; choose another teacher, such as "
                "uce"
            )
        return {name: edit.edit(name, student.parameters[name].detach(), 1.0) for name in names}

    # --- mixing and distilling ----------------------------------------------------------------------------------------

    def objective(self, backbone: Backbone, student: Student, request: Request, checkpoint: Checkpoint | None) -> Loss:
        taught = mixed(student)
        taught.teacher = self.taught(backbone, taught, request)
        captions = self.kept(backbone, request)
        if not self.images:
            order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(self.seed)).tolist()
            captions = [captions[i] for i in order[: self.trajectories]]
        several = [*captions, ""]
        parts = [backbone.encode(several[i : i + AT_ONCE]).text for i in range(0, len(several), AT_ONCE)]
        text = functools.reduce(operator.add, parts)

        def make() -> dict[str, Tensor]:
            with swapped({name: taught.parameters[name] for name in taught.teacher}, taught.teacher):
                if self.images:
                    bank = self.real(backbone, text, captions, request)
                else:
                    bank = self.pictures(backbone, text[:-1], request, None, "bank")
                return self.uncaptioned(backbone, bank, text).tensors()

        bank = DrawnBank.of(make() if checkpoint is None else checkpoint.keep("bank", make))

        def loss(draw: Draw) -> Tensor:
            chosen = bank.pick(self.batch_size, draw.generator)
            with student.active():
                return self.error(backbone, bank, bank.conditional, text, chosen)

        return loss

    def real(self, backbone: Backbone, text: Text, captions: Sequence[str], request: Request) -> DrawnBank:
        """A bank of the pictures given, ``keep_steps`` noisy copies of each."""
        examples, row = self.examples(backbone, request), {caption: i for i, caption in enumerate(captions)}

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            with tqdm(total=len(examples), desc="encode", unit="picture", disable=not request.progress) as bar:
                for i in range(0, len(examples), AT_ONCE):
                    files, texts = zip(*examples[i : i + AT_ONCE], strict=True)
                    latents = backbone.latents([opened(file) for file in files])
                    yield torch.tensor([row[caption] for caption in texts]), latents.cpu()
                    bar.update(len(files))

        mixes, generator = self.keep_steps or self.num_inference_steps, torch.Generator().manual_seed(self.seed)
        return DrawnBank.mixed(backbone, text, batches(), mixes=mixes, generator=generator)

    def uncaptioned(self, backbone: Backbone, bank: DrawnBank, text: Text) -> DrawnBank:
        """The bank with the empty prompt, the last row of the text, in a share of its rows."""
        drawn = torch.rand(len(bank), generator=torch.Generator().manual_seed(self.seed)) < self.dropout
        if not drawn.any():
            return bank
        rows = DrawnBank.of({name: tensor[drawn] for name, tensor in bank.tensors().items()})
        conditional, prompt = bank.conditional.clone(), bank.prompt.clone()
        conditional[drawn] = rows.predicted(backbone, text[-1:].repeat(len(text)))
        prompt[drawn] = len(text) - 1
        return dataclasses.replace(bank, conditional=conditional, prompt=prompt)

    def begin(self, student: Student) -> None:
        teacher = mixed(student).teacher
        generator = torch.Generator().manual_seed(FRESH + self.seed)
        with torch.no_grad():
            for name, parameter in student.parameters.items():
                start = teacher.get(name, parameter).to(parameter.dtype)
                fresh = fresh_like(student.backbone, name, parameter, generator)
                parameter.copy_((1 - self.share) * start + self.share * fresh)


class Mixed(Weights):
    """Weights of the denoiser, beside those of the teacher where it differs from the base."""

    teacher: dict[str, Tensor]


def mixed(student: Student) -> Mixed:
    """The student that :meth:`UNDO.student` made.

    Raises:
        TypeError: it is another one.
    """
    if not isinstance(student, Mixed):
        raise TypeError(f"undo trains the student that it makes; got {type(student).__name__}")
    return student


def fresh_like(backbone: Backbone, name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    """A weight or bias as PyTorch starts linears and convolutions: uniform within ``1 / sqrt(fan in)`` of zero."""
    weight: Tensor = layer_at(backbone, name.rpartition(".")[0]).weight
    bound = 1 / math.sqrt(weight[0].numel())
    values = (2 * torch.rand(parameter.shape, generator=generator) - 1) * bound
    return values.to(parameter.device, parameter.dtype)


__all__ = ["UNDO", "Mixed", "fresh_like"]
