"""An erasure once made: apply it, take it off, save it, load it where it belongs."""

from __future__ import annotations

import abc
import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from erasure.artifact import files, hub
from erasure.artifact.card import card, html_card, one_line
from erasure.artifact.config import Config
from erasure.artifact.kinds import kind_class
from erasure.artifact.provenance import already, names_in
from erasure.artifact.record import base_name, component_prints
from erasure.artifact.stack import Handle, Layer, check_scale, stack_of
from erasure.backbone import Backbone, backbone_of
from erasure.backbone.fingerprint import difference, matches
from erasure.backbone.names import parameters_by_name, split
from erasure.concept import WORLD
from erasure.io import beside, named, shown
from erasure.pictures import check_seed, drawn, png, sheet, usual_settings
from erasure.wording import listed

Allow = Literal["same-text-encoder"]


@dataclasses.dataclass(eq=False, repr=False)
class Erasure(abc.ABC):
    """A small, named, reversible change to a diffusion model.

    Attributes:
        name: short name, unique among the erasures on one pipeline.
        config: everything needed to repeat and to judge it: method, preset, settings, concepts, keep list, base model.
            Frozen; a mapping is taken too.
        tensors: its numbers.
        system: the regression they solve, for closed forms that can be solved again with others
            (:func:`erasure.resolve`); empty otherwise.

    Subclasses say what the numbers mean. A kind of another package is declared in the entry-point group
    ``erasure.kinds``.
    """

    name: str
    config: Config
    tensors: dict[str, Tensor]
    system: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    kind: ClassVar[str]
    intervention: ClassVar[Literal["weights", "adapter"]] = "weights"  # what it does to the parameters

    def __post_init__(self) -> None:
        self.config = Config.of(self.config)
        self.tensors, self.system = ordinary(self.tensors), ordinary(self.system)

    @property
    @abc.abstractmethod
    def parameter_names(self) -> tuple[str, ...]:
        """Qualified names of the parameters the erasure changes: bare ones of the denoiser, ``part:name`` of others."""

    def edit(self, name: str, weight: Tensor, scale: float) -> Tensor:
        """``weight`` with the erasure applied to the given degree, in the dtype of ``weight``."""
        raise ValueError(f"{self.name!r} is of kind {self.kind}, which changes no weight; apply it instead")

    def install(self, pipe: Any, scale: float) -> Handle | None:
        """Hook it into a pipeline; None for changes that are all in the weights."""
        return None

    def misfits(self, backbone: Backbone) -> list[str]:
        """What keeps it from this model: parameters that are not there, or have another shape."""
        return []

    # --- on a pipeline ----------------------------------------------------------------------------------------------

    def apply(self, pipe: Any, scale: float = 1.0, *, allow: Allow | None = None) -> Erasure:
        """Apply to a pipeline, in place. Erasures already there stay; this one goes on top, or gets a new scale.

        Args:
            pipe: the diffusers pipeline the erasure was made for, or another one with the same UNet.
            scale: 0 is the unmodified model, 1 (default) the published edit. In between the weights are interpolated;
                above 1 they are extrapolated, which breaks pictures before long.
            allow: "same-text-encoder" lets an operator erasure, or one of text encoders alone, onto a fine-tune of its
                base: the edit is a map of the text embeddings, which are the same there. What it does to that model's
                pictures is for you to look at.

        Raises:
            ValueError: the pipeline is not the erasure's base model, or is in a state in which edits get lost.
        """
        scale = check_scale(scale)
        stack = stack_of(pipe)
        with stack.locked():
            owner = stack.layers.get(self.name)
            if owner is None or not same_edit(self, owner.erasure):  # its scale may change under a LoRA loaded since
                if owner is not None:
                    raise ValueError(
                        f"another erasure called {self.name!r} is on this pipeline; remove it, or rename this one"
                    )
                backbone = backbone_of(pipe)
                self.check_base(backbone, allow=allow)
                self.warn_unreached(backbone)
            stack.change(self.name, Layer(self, scale))
        return self

    def remove(self, pipe: Any) -> None:
        """Take the erasure off again. With no other erasure left, every bit of the model is as it was.

        Raises:
            ValueError: the erasure is not on this pipeline, or was fused.
        """
        stack = stack_of(pipe)
        with stack.locked():
            layer = stack.layers.get(self.name)
            if layer is None or not same_edit(self, layer.erasure):
                other = "" if layer is None else f"; the {self.name!r} on it is another one"
                raise ValueError(
                    f"this {self.name!r} is not on the pipeline (or was fused); on it are {list(stack.layers)}{other}"
                )
            stack.change(self.name, None)

    def fuse(
        self, pipe: Any, scale: float | None = None, *, low_memory: bool = False, allow: Allow | None = None
    ) -> None:
        """Make the change, and any other erasure on the pipeline, permanent; the originals are freed.

        Args:
            scale: None (default) keeps the scale it is applied at, or 1 if it is not applied yet.
            low_memory: never copy the originals, so that it takes the memory of one layer beside the model. If that is
                interrupted the model is half edited and has to be loaded again; by default nothing is lost.
            allow: as in :meth:`apply`; not needed where it is applied already.
        """
        scale = None if scale is None else check_scale(scale)
        stack = stack_of(pipe)
        with stack.locked():
            layer = stack.layers.get(self.name)
            if low_memory:
                self.check_base(backbone_of(pipe), allow=allow)
                self.warn_unreached(backbone_of(pipe))
                stack.burn(Layer(self, 1.0 if scale is None else scale))
            elif layer is None or not same_edit(self, layer.erasure):
                self.apply(pipe, 1.0 if scale is None else scale, allow=allow)
            elif scale is not None:
                stack.change(self.name, Layer(self, scale))
            stack.forget()

    def compose(self, other: Erasure) -> Erasure:
        """One erasure that does what this one and then ``other`` do. Both must be of one kind and one base model.

        Raises:
            ValueError: they are not, or this kind cannot be composed.
        """
        raise ValueError(
            f"a {self.kind} cannot be composed; apply {self.name!r} and {other.name!r} one after the other"
        )

    def check_same_base(self, other: Erasure) -> None:
        """Raise unless both are of one kind and one base model."""
        if not isinstance(other, Erasure):
            raise ValueError(f"an erasure is needed; got {shown(other)}; load one with Erasure.from_pretrained")
        mine, theirs = (edit.prints for edit in (self, other))
        same_base = mine.keys() == theirs.keys() and all(matches(mine[part], theirs[part]) for part in mine)
        if other.kind != self.kind or not same_base:
            raise ValueError(
                f"{self.name!r} and {other.name!r} cannot be composed: they differ in kind or base model; "
                "apply them one after the other instead"
            )

    @property
    def prints(self) -> dict[str, dict[str, Any]]:
        """Fingerprints of the base's components."""
        return {part: print_.model_dump() for part, print_ in self.config.base.components.items()}

    def _composed_config(self, other: Erasure) -> dict[str, Any]:
        if same_edit(self, other):
            raise ValueError(f"{self.name!r} and {other.name!r} are one edit, which would be made twice; give another")
        both = {key: [*self.config[key], *other.config[key]] for key in ("concepts", "keep")}
        parts = [self.config, other.config]
        facts = {
            key: value for key, value in self.config.plain().items() if key not in ("system", "report", "evaluation")
        }
        each = {
            key: [one for c in parts if c.get(key) for one in (c[key] if isinstance(c[key], list) else [c[key]])]
            for key in ("settings", "preset")
        }
        return {**facts, **both, **each, "method": "+".join(c["method"] for c in parts)}

    def check_base(self, backbone: Backbone, *, allow: Allow | None = None) -> None:
        """Raise unless the pipeline holds the model this erasure was made for: denoiser and text encoders."""
        if allow is not None and allow not in get_args(Allow):
            raise ValueError(f"unknown exception; got allow={allow!r}; choose one of {list(get_args(Allow))}")
        self.check_unerased(backbone)
        found, expected = component_prints(backbone), self.prints
        wrong = [p for p in {**expected, **found} if not matches(expected.get(p, {}), found.get(p, {"layout": ""}))]
        transferable = set(wrong) <= set(backbone.denoisers) and self.transfers(backbone) and not self.misfits(backbone)
        if wrong and not (transferable and allow):
            if done := names_in(stack_of(backbone).fused):
                raise ValueError(
                    f"{already(done, 'this pipeline')}; {self.name!r} was made for {self.config['base']['name']}: load "
                    "that and apply all of them, or make a new erasure on this pipeline"
                )
            made_for, part = self.config["base"]["name"], wrong[0]
            other = ", or, as the text encoder is the same, pass allow='same-text-encoder'" if transferable else ""
            raise ValueError(
                f"wrong base model; {self.name!r} was made for {made_for} "
                f"{difference(part, expected.get(part), found.get(part))}; use the model it was made for, or make a "
                f"new erasure{other}"
            )
        if wrong:
            warnings.warn(
                f"{self.name!r} was made for another denoiser ({self.config['base']['name']}); nothing was evaluated "
                "on this one; look at its pictures before you rely on it",
                stacklevel=3,
            )
        if bad := self.misfits(backbone):
            raise ValueError(f"the erasure does not fit this model; {bad[0]}; wrong base model, or an altered file")

    def check_unerased(self, backbone: Backbone) -> None:
        """Raise if the pipeline has this erasure, or one that does the same: on it, or in its weights for good."""
        stack = stack_of(backbone)
        on_it = {name: layer.erasure for name, layer in stack.layers.items() if layer.erasure is not self}
        attached = {name: edit for handle in stack.attached for name, edit in handle.edits.items()}
        for name, other in [*on_it.items(), *attached.items()]:
            if same_edit(self, other):
                where = "attached to" if name in attached else "on"
                raise ValueError(
                    f"{self.name!r} is {where} this pipeline already, as {name!r}, and the edit would be made twice; "
                    "give that one another scale, or take it off first"
                )
        made_on = (self.config.base.model_extra or {}).get("erased") or []
        concepts = [concept["name"] for concept in self.config["concepts"]]
        for entry in (entry for entries in stack.fused.values() for entry in entries):
            same = entry.get("method") == self.config["method"] and entry.get("concepts") == concepts
            if (same or entry["name"] == self.name) and entry["name"] not in made_on:
                alike = "" if entry["name"] == self.name else ", of the same method and concepts,"
                raise ValueError(
                    f"{already([entry['name']], 'this pipeline')}; {self.name!r}{alike} would make the edit twice; "
                    f"leave it as it is, or load {self.config['base']['name']}"
                )

    def warn_unreached(self, backbone: Backbone) -> None:
        """Say, when it is put on a pipeline, which other modules read the text past it. Text encoders serve all."""
        if self.parameter_names and all(name.startswith("text_encoder") for name in self.parameter_names):
            return
        for part, count in backbone.other_readers().items():
            warnings.warn(
                f"the {part} reads the text by {count} layers of its own, which stay as they are and can bring some of "
                "the concept back; evaluate the erasure with it, or erase in the text encoder, which both read "
                "(adv-unlearn)",
                stacklevel=3,
            )

    def transfers(self, backbone: Backbone) -> bool:
        """Whether the edit means the same on another denoiser with the same text encoders."""
        return False

    # --- on disk ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike[str], *, system: bool = False) -> Path:
        """Write ``erasure_config.json``, ``erasure.safetensors`` and a model card; all of them or none.

        Args:
            system: also write ``system.safetensors``, the regression a closed form solved: a ``(d, d)`` matrix and the
                rows, in float64. Ask for it when concepts will be added or dropped later with :func:`erasure.resolve`.

        Raises:
            ValueError: there is no system to write, the name could be read as a path out of a folder, or the folder
                holds a whole model, or a README that is not a card.
        """
        folder = named(folder)
        files.write(folder, self._blobs(system=system))
        return folder

    def _blobs(self, *, system: bool, pictures: Mapping[str, str] | None = None) -> dict[str, bytes]:
        """The files of its folder."""
        if system and not self.system:
            raise ValueError(f"{self.name!r} has no system to save; only closed forms of one plain regression do")
        files.check_name(self.name)
        config = {**self.config.plain(), "name": self.name, "kind": self.kind}
        if not system:
            config.pop("system", None)
        blobs = files.pack(config, self.tensors, self.system if system else {})
        return {**blobs, files.CARD: self.card(pictures).encode()}

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
    ) -> Erasure:
        """Load an erasure from a folder or from the Hugging Face Hub (``"org/name"``).

        Raises:
            FileNotFoundError: no such folder, or no such repository on the hub, or it is private.
            ConnectionError: the hub cannot be reached, asks to wait, or is at fault.
            ValueError: a file is truncated, altered, from a newer version of the format, of wrong types, or holds NaN.
        """
        path = named(folder)
        if not os.path.exists(path) and str(folder).count("/") == 1 and not str(folder).startswith((".", "/", "~")):
            path = hub.download(str(folder), revision=revision, token=token)
        if os.path.isfile(path):
            raise ValueError(f"{folder} is a file; an erasure is a folder that holds {files.CONFIG}")
        if not os.path.isdir(path):
            raise FileNotFoundError(
                f"no erasure at {folder}{beside(folder)}; give a folder that holds {files.CONFIG}, or a hub id "
                "'org/name'"
            )
        config, tensors, system = files.unpack(path)
        name, kind = config.pop("name"), config.pop("kind")
        edit = kind_class(kind)(name, Config.of(config), tensors, system)
        edit.check_tensors()
        return edit

    @abc.abstractmethod
    def check_tensors(self) -> None:
        """Raise ValueError unless names and shapes of the tensors fit the config."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        commit_message: str = "Add erasure",
        token: str | None = None,
        system: bool = False,
        pictures: Mapping[str, Image.Image] | None = None,
    ) -> str:
        """Put the folder on the Hugging Face Hub, in one commit or not at all, and return its address.

        Args:
            pictures: shown in the card, by what is said under each: ``{"before and after": edit.preview(pipe, ...)}``.

        Raises:
            ValueError: no such name of a repository, or what :meth:`save_pretrained` refuses.
            PermissionError: not logged in, or not allowed to.
            ConnectionError: the hub cannot be reached, asks to wait, or is at fault.
        """
        shown = {f"{hub.IMAGES}/{i}.png": (said, image) for i, (said, image) in enumerate((pictures or {}).items())}
        blobs = self._blobs(system=system, pictures={file: said for file, (said, _) in shown.items()})
        blobs |= {file: png(image) for file, (_, image) in shown.items()}
        return hub.push(blobs, repo_id, private=private, commit_message=commit_message, token=token)

    # --- for people -------------------------------------------------------------------------------------------------

    def card(self, pictures: Mapping[str, str] | None = None) -> str:
        """The model card: what was done to which model, and what that does not show.

        Args:
            pictures: files beside the card that it shows, with what is said under each.
        """
        return card(self, pictures or {})

    def __repr__(self) -> str:
        return one_line(self)

    def _repr_html_(self) -> str:
        return html_card(self)

    def preview(
        self, pipe: Any, prompts: str | Sequence[str], *, seed: int = 0, scale: float = 1.0, **call: Any
    ) -> Image.Image:
        """Draw prompts without and with the erasure from the same noise: one sheet, before above after.

        The pipeline is left as it was found, with whatever erasures are on it; they stay on for both rows.

        Args:
            pipe: its base model.
            prompts: one or several; one call of the pipeline for each row and prompt.
            seed: of the noise.
            scale: how strongly.
            **call: arguments of the pipeline's call. By default 8 steps and guidance 3 on Emoji World, and what the
                pipeline itself has elsewhere.

        Raises:
            ValueError: no prompt, a seed or scale that is none, or another base model.
        """
        wanted, seed, scale = listed(prompts), check_seed(seed), check_scale(scale)
        if not wanted:
            raise ValueError(f"a preview draws prompts; got {prompts!r}; give one, or several")
        if self.config["base"]["name"] == WORLD:
            call = {**usual_settings(WORLD), **call}
        stack = stack_of(pipe)
        with stack.locked():
            found = stack.layers
            try:
                stack.set({name: layer for name, layer in found.items() if not same_edit(self, layer.erasure)})
                before = drawn(pipe, wanted, seed, **call)
                self.apply(pipe, scale)
                after = drawn(pipe, wanted, seed, **call)
            finally:
                stack.set(found)
        return sheet({"before": before, "after": after}, wanted)


class WeightErasure(Erasure):
    """A change of weights: of any part of a pipeline, the text encoders included."""

    @abc.abstractmethod
    def edit(self, name: str, weight: Tensor, scale: float) -> Tensor:
        """``weight`` with the erasure applied to the given degree, in the dtype of ``weight``."""

    @abc.abstractmethod
    def fits(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a parameter of this shape can take the erasure."""

    def transfers(self, backbone: Backbone) -> bool:
        """It is a text encoder, so yes, if it changes no denoiser."""
        parts = {split(name, first=backbone.denoiser_name)[0] for name in self.parameter_names}
        return parts.isdisjoint(backbone.denoisers)

    def misfits(self, backbone: Backbone) -> list[str]:
        parameters = parameters_by_name(backbone.components, first=backbone.denoiser_name)
        absent = [f"{name} is missing" for name in self.parameter_names if name not in parameters]
        shapes = {name: tuple(parameters[name].shape) for name in self.parameter_names if name in parameters}
        return absent or [f"{name} has shape {shape}" for name, shape in shapes.items() if not self.fits(name, shape)]


class HookErasure(Erasure):
    """A change of what happens while pictures are drawn. No weight changes, and its card says so."""

    intervention = "adapter"

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return ()

    @abc.abstractmethod
    def install(self, pipe: Any, scale: float) -> Handle:
        """Hook it into a pipeline at a scale; the handle's ``remove`` leaves no trace."""


def same_edit(one: Any, other: Any) -> bool:
    """Whether two erasures are of one kind and have the same numbers, whatever they are called."""
    if one is other:
        return True
    mine, theirs = (getattr(each, "tensors", None) for each in (one, other))
    if not mine or not theirs or type(one) is not type(other) or mine.keys() != theirs.keys():
        return False
    return all(mine[name] is theirs[name] or torch.equal(mine[name], theirs[name]) for name in mine)


def ordinary(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without those that inference mode made: nothing could be trained through them later."""
    if not any(tensor.is_inference() for tensor in tensors.values()):
        return tensors
    with torch.inference_mode(False):
        return {name: tensor.clone() for name, tensor in tensors.items()}


def exact(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU where the device has no float64 (Apple silicon)."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


__all__ = [
    "Allow",
    "Erasure",
    "HookErasure",
    "WeightErasure",
    "base_name",
    "component_prints",
    "exact",
]
