"""Probes: one question, asked of every model of an assessment in the same way.

A probe *runs* on one model at a time and leaves observations: plain rows. It *weighs* the rows of all models into
evidence, by a pure function: the same rows always give the same evidence. What may be said because of it is decided in
:mod:`erasure.eval.judge`.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from PIL import Image
from torch import nn

from erasure.concept import Suite
from erasure.eval.core.hashes import WeightHashes
from erasure.eval.core.lengths import too_long
from erasure.eval.core.material import Example, Material
from erasure.eval.core.models import IN_WEIGHTS, Model, Role, Swapped, Wraps, check_beside, check_unchanged
from erasure.eval.core.observations import Control, Evidence, Gate, Observation, Roles, Rows
from erasure.eval.core.pictures import generate, image_hash
from erasure.eval.core.prompt_files import PromptFile
from erasure.eval.core.records import Evaluation
from erasure.eval.core.surroundings import added, code_of, exchanged
from erasure.eval.core.verdicts import verdicts_of
from erasure.eval.detectors.base import Detector
from erasure.eval.probes.weigh import KNOWN, contrasts, families
from erasure.eval.stats import Estimate

Section = Literal["suppression", "removal", "utility", "guardrails"]
Level = Literal["outputs", "behaviour", "weights", "system"]
Access = Literal["black_box", "embedding", "white_box", "fine_tune"]
Need = Literal["evaluation", "base", "control", "gold", "selector", "material", "members", "prompts"]

PRESETS = ("smoke", "no-draw", "quick", "standard", "full")
FAILED, DIVERGED = "it failed", "diverged"  # how the reasons begin why a probe that applies has no number

# What a report says where a need is not met, and what to give.
LACKING: Mapping[Need, str] = {
    "evaluation": "there is no evaluation to read from; draw the paired pictures of the suite first",
    "base": "there is no base model to compare with; give it first",
    "control": "no model that never saw the target is there to compare with; give one retrained without it, or a null",
    "gold": "no retrained model is there, trained without the target from the start; give one or more as controls",
    "selector": "there is no second detector to choose among tries, so that the judge only judges; give two detectors",
    "material": "there are no real pictures; give a folder of them with captions as material",
    "members": "the material does not say which pictures of the target the base was trained on; set `member` in it",
    "prompts": "there is no file of prompts; give one or more (--prompts)",
}


class Missing(Exception):
    """Raised by a probe that lacks an input. The report then has the reason, and no number."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What every probe of one assessment shares.

    Attributes:
        pipe: the unmodified base pipeline, on which models are put one at a time.
        models: every model by name, the base first.
        suite: prompts, names and sampler settings.
        judge: the detector that scores. It never selects.
        selector: another detector, with which attacks choose among tries; None where there is only one.
        evaluation: the paired pictures of the suite.
        material: real pictures with captions.
        attacks: attack to the prompts with which it brought the target back, on the base or on an erasure; filters of
            prompts are tested with them.
        prompt_files: files of prompts to ask with, by name.
        batch_size, autocast, cache_dir, progress: as in :func:`erasure.eval.core.pictures.generate`.
        hash_weights: the hash of an opened pipeline's weights, one object for the whole assessment.
        memory: what probes keep from one model to the next, by their keys.
        autoencoder: a copy of the base's. Erased models are opened with it for a probe of removal, because a filter
            that is hidden in an autoencoder says nothing about the denoiser. None opens models as they are; a whole
            model that brings an autoencoder keeps it.
    """

    pipe: Any
    models: Mapping[str, Model]
    suite: Suite
    judge: Detector
    selector: Detector | None = None
    evaluation: Evaluation | None = None
    material: Material | None = None
    attacks: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    prompt_files: Mapping[str, PromptFile] = dataclasses.field(default_factory=dict)
    batch_size: int = 16
    autocast: bool = False
    cache_dir: Path | None = None
    progress: bool = True
    hash_weights: Callable[[Any], str] = dataclasses.field(default_factory=WeightHashes)
    memory: dict[str, dict[Any, Any]] = dataclasses.field(default_factory=dict)
    autoencoder: nn.Module | None = None

    @property
    def base(self) -> Model:
        return next(iter(self.models.values()))

    def of_role(self, role: Role) -> list[Model]:
        return [model for model in self.models.values() if model.role == role]

    def lacks(self, need: Need) -> bool:
        """Whether an input that probes can declare to need is not there."""
        if need == "members":
            try:
                return not self.real("target", 1, member=True)
            except Missing:
                return True
        return {
            "evaluation": self.evaluation is None,
            "base": not self.of_role("base"),
            "control": not (self.of_role("gold") or self.of_role("null")),
            "gold": not self.of_role("gold"),
            "selector": self.selector is None or self.selector.name == self.judge.name,
            "material": self.material is None,
            "prompts": not self.prompt_files,
        }[need]

    @property
    def paired(self) -> Evaluation:
        """The evaluation, for probes that need it."""
        if self.evaluation is None:
            raise Missing(LACKING["evaluation"])
        return self.evaluation

    @property
    def chooser(self) -> Detector:
        """The selector, for probes that need it."""
        if self.selector is None:
            raise Missing(LACKING["selector"])
        return self.selector

    def real(
        self,
        what: Literal["target", "kept"],
        count: int,
        *,
        seed: int = 0,
        member: bool | None = False,
        labels: Sequence[str] | None = None,
    ) -> list[Example]:
        """Real pictures of the target, or of what is kept; see :class:`~erasure.eval.core.material.Material`.

        Args:
            member: False for pictures that the base was not trained on, True for those that it was.
            labels: of what is kept, only these.
        """
        if self.material is None:
            raise Missing(LACKING["material"])
        try:
            if what == "target":
                return self.material.target(count, seed=seed, member=member)
            return self.material.kept(count, seed=seed, member=member, labels=labels)
        except ValueError as error:
            raise Missing(str(error)) from None

    @contextlib.contextmanager
    def open(self, model: Model) -> Iterator[Any]:
        """The pipeline as a model, inside the block. Two models are never open at once."""
        code = code_of(self.pipe) if model.kind in IN_WEIGHTS else None
        arms = {} if self.evaluation is None else {arm.name: arm for arm in self.evaluation.arms}
        with model.on(self.pipe) as drawn:
            opened = None if code is None else code_of(self.pipe)
            beside = [] if code is None or opened is None else added(code, opened)
            if arm := arms.get(model.name):
                when = "than when its pictures were drawn"
                check_unchanged(self.pipe, arm.weights, model.name, when, hash_weights=self.hash_weights)
                check_beside(beside[: len(arm.beside) or None], arm.beside, model.name, when)
            with self._decoding(model):
                yield drawn
            if opened is not None:
                check_beside(exchanged(opened, code_of(self.pipe)), (), model.name, "after a probe than before")

    def decoded_by_base(self, model: Model) -> bool:
        """Whether a model is opened with the base's autoencoder in the place of its own."""
        brings = isinstance(model.change, Swapped) and "vae" in model.change.modules  # its latents may be others
        return self.autoencoder is not None and model.role == "erased" and not brings

    @contextlib.contextmanager
    def _decoding(self, model: Model) -> Iterator[None]:
        if not self.decoded_by_base(model):
            yield
            return
        own = self.pipe.vae
        self.pipe.vae = self.autoencoder
        try:
            yield
        finally:
            self.pipe.vae = own

    def draw(
        self,
        pipe: Any,
        model: Model,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int] = (0,),
        cut: bool = False,
        **sampler: Any,
    ) -> list[list[Image.Image]]:
        """Pictures of prompts from an opened pipeline, one list per prompt; the same noise for every model.

        Args:
            pipe: what :meth:`open` gave for ``model``.
            cut: draw prompts that the text encoder cuts, too; for those of an attack.
            **sampler: in place of the suite's ``num_inference_steps`` and ``guidance_scale``; ``description``.
        """
        if not cut and "prompt_embeds" not in sampler and (found := self.too_long(prompts)):
            raise Missing(next(iter(found.values())))
        settings = {
            "num_inference_steps": self.suite.num_inference_steps,
            "guidance_scale": self.suite.guidance_scale,
            "batch_size": self.batch_size,
            "autocast": self.autocast,
            "progress": self.progress,
            "cache_dir": self.cache_dir if self._in_weights(model) else None,
            "description": model.name,
            "hash_weights": self.hash_weights,
        }
        return generate(pipe, prompts, seeds=seeds, **{**settings, **sampler})

    def too_long(self, prompts: Sequence[str]) -> dict[str, str]:
        """The prompts that the base's text encoder would cut, each with the reason; empty where that is unknown."""
        try:
            return too_long(self.pipe, prompts)
        except ValueError:
            return {}

    def _in_weights(self, model: Model) -> bool:
        """Whether the hash of the weights identifies a model, so that its pictures can be cached by it."""
        if model.role == "base":
            return True
        arms = {} if self.evaluation is None else {arm.name: arm for arm in self.evaluation.arms}
        if model.name in arms and arms[model.name].beside:
            return False
        hashes = {name: arm.weights for name, arm in arms.items()}
        other = hashes.get(model.name) != hashes.get(self.base.name)
        return other and model.kind in IN_WEIGHTS and not isinstance(model.change, Wraps)

    def see(
        self,
        images: Sequence[Image.Image],
        label: str | Sequence[str] | None = None,
        *,
        detector: Detector | None = None,
    ) -> list[dict[str, Any]]:
        """What a detector (the judge) says of pictures: ``hit`` (the label is on top), ``score``, ``top``, ``nothing``.

        The label is the suite's target by default, or one for each picture; a detector without it says nothing, and
        ``Missing`` is raised.
        """
        wanted = self.suite.concept.name if label is None else label
        labels = [wanted] * len(images) if isinstance(wanted, str) else wanted
        found = verdicts_of(detector or self.judge, images, labels, self.suite.attribute)
        if reason := next((verdict.reason for verdict in found if verdict.hit is None), None):
            raise Missing(reason)
        return [{"hit": v.hit, "score": v.score, "top": v.top, "nothing": v.nothing} for v in found]

    def pictures(
        self, pipe: Any, model: Model, prompts: Sequence[str], *, seeds: Sequence[int] = (0,), **sampler: Any
    ) -> list[tuple[str, int, Image.Image]]:
        """Every prompt with every seed and its picture, prompt by prompt; arguments are those of :meth:`draw`."""
        drawn = self.draw(pipe, model, prompts, seeds=seeds, **sampler)
        flat = [image for row in drawn for image in row]
        return [(p, s, image) for (p, s), image in zip(itertools.product(prompts, seeds), flat, strict=True)]

    def ask(
        self,
        model: Model,
        prompts: Sequence[str],
        *,
        family: str,
        seeds: Sequence[int] = (0,),
        clusters: Sequence[str] | None = None,
        facts: Mapping[str, Any] | None = None,
        pipe: Any = None,
        **sampler: Any,
    ) -> list[Observation]:
        """Draw every prompt with every seed, and let the judge look for the target: one observation per picture.

        Args:
            clusters: one per prompt; the prompts themselves by default.
            facts: of every row, beside its ``prompt``.
            pipe: what :meth:`open` gave, where the model is open already.
            **sampler: as in :meth:`draw`; ``prompt_embeds`` for conditioning that is not from a prompt.
        """
        with contextlib.nullcontext(pipe) if pipe is not None else self.open(model) as opened:
            drawn = self.pictures(opened, model, prompts, seeds=seeds, **sampler)
        return self.observe(
            model,
            [image for _, _, image in drawn],
            family=family,
            clusters=[cluster for cluster in clusters or prompts for _ in seeds],
            seeds=[seed for _, seed, _ in drawn],
            facts=[{"prompt": prompt, **(facts or {})} for prompt, _, _ in drawn],
        )

    def observe(
        self,
        model: Model,
        images: Sequence[Image.Image],
        *,
        family: str | Sequence[str],
        clusters: Sequence[str],
        seeds: Sequence[int],
        label: str | Sequence[str] | None = None,
        facts: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Observation]:
        """One observation per picture: whether the judge sees the target (or ``label``, as in :meth:`see`) in it.

        ``family`` is one for all pictures, or one each; ``clusters``, ``seeds`` and ``facts`` are one each.
        """
        named = [family] * len(images) if isinstance(family, str) else family
        rows = zip(images, self.see(images, label), named, clusters, seeds, facts or [{}] * len(images), strict=True)
        return [
            Observation(
                model.name, one, cluster, seed, float(seen.pop("hit")), None,
                {**more, **seen, "image_hash": image_hash(image)},
            )
            for image, seen, one, cluster, seed, more in rows
        ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Probe(abc.ABC):
    """One question. A probe is a frozen dataclass of settings, as a method is.

    Class attributes:
        key: its name in files and on the command line. code: its place in the taxonomy ("S1"). title: in tables.
        section: of the report. level: what it is evidence about. access: what one must have to run it.
        needs: inputs that it requires; the runner checks them with :func:`lacking`.
        version: raised when the same settings would give other numbers; part of every stored result.
        reads: earlier versions whose stored rows can still be weighed; they are never mixed with new ones.
        presets: name of the preset to settings. A preset that is not listed leaves the probe out.
        measures: what the report calls its own measures; "rate" is what the rate is of.
        licences: what its evidence allows one to say. not_licensed: what it does not.
        known: share of pictures in which the base must show the target (lower limit), or its absence means nothing.
        descriptive: its numbers are shown, and no claim rests on them.
        own_autoencoder: a probe of removal that also looks at the model's autoencoder. The others decode with the
            base's.
        controls: on how many of the retrained models it is run, the first ones, or of the nulls where there are none;
            and on as many twins. None for all. One is enough for what a model that never saw the target draws; the
            spread between retrained models needs all.
        reference: paper, year.

    Settings have one name in all probes, and a docstring says only what differs:
        prompts: at most so many of the suite's, spread evenly; limit: the same for each family or group, None for all.
        images_per_prompt: seeds of each. More prompts narrow intervals better than more seeds.
        pictures: real ones, which the base was not trained on.
        steps, lr, batch_size: of AdamW. parameters: which weights of the denoiser are trained, a name of
            :meth:`Backbone.select`. runs: repeated trainings with other batches and noise, which intervals resample as
            a whole.
        seed: of whatever is chosen at random.
    """

    key: ClassVar[str]
    code: ClassVar[str]
    title: ClassVar[str]
    section: ClassVar[Section]
    level: ClassVar[Level]
    access: ClassVar[Access]
    needs: ClassVar[tuple[Need, ...]] = ()
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[int, ...]] = ()
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]
    measures: ClassVar[Mapping[str, str]] = {}
    licences: ClassVar[str]
    not_licensed: ClassVar[str]
    known: ClassVar[float] = KNOWN
    descriptive: ClassVar[bool] = False
    own_autoencoder: ClassVar[bool] = False
    controls: ClassVar[int | None] = None
    reference: ClassVar[str] = ""

    @classmethod
    def preset(cls, name: str) -> Self | None:
        """The probe with the settings of a preset; None where the preset leaves it out."""
        return cls(**cls.presets[name]) if name in cls.presets else None

    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def budget(self) -> str:
        """What an attack may spend, in words; "" for other probes."""
        return ""

    def concerns(self, model: Model) -> bool:
        """Whether the probe is run on a model at all; on every one by default."""
        return True

    @abc.abstractmethod
    def run(self, model: Model, context: Context) -> list[Observation]:
        """Put the question to one model; ``Missing`` says in the report which input is not there."""

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        """Evidence from the observations of every model, a pure function; by default the contrasts of each family.

        Args:
            rows: model name to its observations; models without any are left out.
            models: name to role, the base first.
        """
        asked = families(next(iter(rows.values()), ()))
        return [e for family in asked for e in contrasts(self.key, rows, models, family, known=self.known)]


def lacking(probe: Probe, context: Context) -> str | None:
    """What a probe needs and the assessment lacks, in a sentence that says what to give; None if nothing."""
    return next((LACKING[need] for need in probe.needs if context.lacks(need)), None)


__all__ = [
    "LACKING", "PRESETS", "Access", "Context", "Control", "Estimate", "Evidence", "Gate", "Level", "Missing", "Model",
    "Need", "Observation", "Probe", "Role", "Roles", "Rows", "Section", "lacking",
]  # fmt: skip
