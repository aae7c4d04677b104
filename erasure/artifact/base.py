"""An erasure once made: apply it, take it off, save it, load it where it belongs."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load, save
from torch import Tensor

from erasure.artifact.card import card
from erasure.artifact.stack import Layer, stack_of
from erasure.backbone import Backbone, backbone_of
from erasure.backbone.fingerprint import fingerprint, matches, short
from erasure.concept import Concept

FORMAT = 1
CONFIG, WEIGHTS, CARD = "erasure_config.json", "erasure.safetensors", "README.md"
REQUIRED = {
    "format",
    "kind",
    "name",
    "method",
    "settings",
    "concepts",
    "keep",
    "base",
    "library_version",
    "sha256",
}


@dataclasses.dataclass(eq=False)
class Erasure(abc.ABC):
    """A small, named, reversible change to a diffusion model.

    Attributes:
        name: short name, unique among the erasures on one pipeline.
        config: everything needed to repeat and to judge it: method, preset, settings, concepts, keep list, base model.
        tensors: its numbers.

    Subclasses say what the numbers mean: which parameters they touch and what they make of them.
    """

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    kind: ClassVar[str]

    @property
    @abc.abstractmethod
    def parameter_names(self) -> tuple[str, ...]:
        """UNet parameters the erasure changes."""

    @abc.abstractmethod
    def edit(self, name: str, weight: Tensor, scale: float) -> Tensor:
        """``weight`` with the erasure applied to the given degree, in the dtype of ``weight``."""

    # --- on a pipeline ----------------------------------------------------------------------------------------------

    def apply(self, pipe: Any, scale: float = 1.0) -> Erasure:
        """Apply to a pipeline, in place. Erasures already there stay; this one goes on top, or gets a new scale.

        Args:
            pipe: the diffusers pipeline the erasure was made for, or another one with the same UNet.
            scale: 0 is the unmodified model, 1 (default) the published edit. In between the weights are interpolated;
                above 1 they are extrapolated, which breaks pictures before long.

        Raises:
            ValueError: the pipeline is not the erasure's base model, or is in a state in which edits get lost.
        """
        backbone = backbone_of(pipe)
        stack = stack_of(pipe)
        self.check_base(backbone)
        owner = stack.layers.get(self.name)
        if owner is not None and owner.erasure is not self:
            raise ValueError(f"another erasure called {self.name!r} is on this pipeline; remove it, or rename this one")
        stack.set({**stack.layers, self.name: Layer(self, scale)})
        return self

    def remove(self, pipe: Any) -> None:
        """Take the erasure off again. With no other erasure left, every bit of the model is as it was.

        Raises:
            ValueError: the erasure is not on this pipeline, or was fused.
        """
        stack = stack_of(pipe)
        if self.name not in stack.layers or stack.layers[self.name].erasure is not self:
            raise ValueError(
                f"this {self.name!r} is not on the pipeline (or was fused); on it are {list(stack.layers)}"
            )
        stack.set({name: layer for name, layer in stack.layers.items() if name != self.name})

    def fuse(self, pipe: Any, scale: float | None = None) -> None:
        """Make the change, and any other erasure on the pipeline, permanent; the originals are freed.

        Args:
            scale: None (default) keeps the scale it is applied at, or 1 if it is not applied yet.
        """
        layer = stack_of(pipe).layers.get(self.name)
        self.apply(pipe, scale if scale is not None else layer.scale if layer else 1.0)
        stack_of(pipe).forget()

    @abc.abstractmethod
    def compose(self, other: Erasure) -> Erasure:
        """One erasure that does what this one and then ``other`` do. Both must be of one kind and one base model."""

    def _check_composable(self, other: Erasure) -> None:
        mine, theirs = (edit.config["base"]["components"] for edit in (self, other))
        same_base = mine.keys() == theirs.keys() and all(matches(mine[part], theirs[part]) for part in mine)
        if other.kind != self.kind or not same_base:
            raise ValueError(
                f"{self.name!r} and {other.name!r} cannot be composed: they differ in kind or base model; "
                "apply them one after the other instead"
            )

    def _composed_config(self, other: Erasure) -> dict[str, Any]:
        both = {key: [*self.config[key], *other.config[key]] for key in ("concepts", "keep")}
        parts = [self.config, other.config]
        return {
            **self.config,
            **both,
            "method": "+".join(c["method"] for c in parts),
            "settings": [c["settings"] for c in parts],
        }

    def check_base(self, backbone: Backbone) -> None:
        """Raise unless the pipeline holds the model this erasure was made for: denoiser and text encoders."""
        found = component_prints(backbone)
        for part, expected in self.config["base"]["components"].items():
            here = found.get(part, {})
            if not matches(expected, here):
                raise ValueError(
                    f"wrong base model; {self.name!r} was made for {self.config['base']['name']} "
                    f"({part} {short(expected)}), this pipeline's {part} is {short(here)}; "
                    "use the model it was made for, or make a new erasure"
                )

    # --- on disk ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``erasure_config.json``, ``erasure.safetensors`` and a model card; all of them or none."""
        folder = Path(folder)
        weights = save({name: tensor.contiguous().cpu() for name, tensor in self.tensors.items()})
        config = {**self.config, "name": self.name, "kind": self.kind, "sha256": hashlib.sha256(weights).hexdigest()}
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            (Path(temporary) / WEIGHTS).write_bytes(weights)
            (Path(temporary) / CARD).write_text(self.card(), "utf-8")
            (Path(temporary) / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")
            _move(Path(temporary), folder, last=CONFIG)
        return folder

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
    ) -> Erasure:
        """Load an erasure from a folder or from the Hugging Face Hub (``"org/name"``).

        Raises:
            FileNotFoundError: no such folder.
            ValueError: a file is missing, truncated, altered, from a newer version of the format, or holds NaN.
        """
        path = Path(folder)
        if not path.exists() and str(folder).count("/") == 1 and not str(folder).startswith((".", "/", "~")):
            path = _download(str(folder), revision=revision, token=token)
        if not path.is_dir():
            raise FileNotFoundError(
                f"no erasure at {folder}; give a folder that holds {CONFIG}, or a hub id 'org/name'"
            )
        config = _read_config(path / CONFIG)
        raw = _read(path / WEIGHTS)
        if hashlib.sha256(raw).hexdigest() != config["sha256"]:
            raise ValueError(
                f"{path / WEIGHTS}: does not match the hash in {CONFIG}; it is truncated or was altered; get it again"
            )
        tensors = load(raw)
        if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
            raise ValueError(
                f"{path / WEIGHTS}: {bad[0]!r} holds NaN or infinity; the erasure is broken; make it again"
            )
        erasure = kinds()[config["kind"]](config["name"], {k: v for k, v in config.items() if k != "sha256"}, tensors)
        erasure.check_tensors()
        return erasure

    @abc.abstractmethod
    def check_tensors(self) -> None:
        """Raise ValueError unless names and shapes of the tensors fit the config."""

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, commit_message: str = "Add erasure", token: str | None = None
    ) -> str:
        """Upload the folder to the Hugging Face Hub and return its address."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message))

    def card(self) -> str:
        """The model card: what was done to which model, and what that does not show."""
        return card(self)


def exact(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU where the device has no float64 (Apple silicon)."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def kinds() -> Mapping[str, type[Erasure]]:
    """Artefact kinds by the name that stands in a config."""
    from erasure.artifact.delta import DeltaErasure
    from erasure.artifact.operator import OperatorErasure

    return {kind.kind: kind for kind in (OperatorErasure, DeltaErasure)}


def new_config(
    backbone: Backbone,
    *,
    method: str,
    settings: dict[str, Any],
    concepts: Sequence[Concept],
    keep: Sequence[str],
) -> dict[str, Any]:
    """The config of a freshly made erasure."""
    from erasure import __version__

    pipe = backbone.pipe
    return {
        "format": FORMAT,
        "library_version": __version__,
        "method": method,
        "settings": settings,
        "concepts": [dataclasses.asdict(concept) for concept in concepts],  # type: ignore[call-overload]
        "keep": list(keep),
        "base": {
            "name": base_name(pipe),
            "architecture": backbone.architecture,
            "prediction_type": backbone.prediction_type,
            "components": component_prints(backbone),
        },
    }


def component_prints(backbone: Backbone) -> dict[str, Any]:
    """Fingerprints of denoiser and text encoders as they are without the erasures on them."""
    originals = stack_of(backbone).originals
    return {
        name: fingerprint(module, originals=originals if name == backbone.denoiser_name else None)
        for name, module in backbone.components.items()
    }


def base_name(pipe: Any) -> str:
    """Hub id of the pipeline, or the name of the folder it was loaded from (never the whole path)."""
    source = str(pipe.config.get("_name_or_path") or type(pipe).__name__)
    return Path(source).name if Path(source).exists() else source


def save_unet(pipe: Any, folder: str | os.PathLike[str]) -> Path:
    """Write the whole UNet as it is now, erasures included; ``UNet2DConditionModel.from_pretrained`` opens it.

    Raises:
        ValueError: the folder holds something that is not a model; nothing in it is touched.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise ValueError(f"{folder} is not empty and holds no model; give a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        pipe.unet.save_pretrained(temporary)
        _move(Path(temporary), folder, last="config.json")
    return folder


def _move(source: Path, folder: Path, *, last: str) -> None:
    """Move files into a folder one by one; the one without which the rest is nothing comes last."""
    folder.mkdir(exist_ok=True)
    for file in sorted(source.iterdir(), key=lambda f: f.name == last):
        os.replace(file, folder / file.name)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(_read(path))
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
            raise ValueError(
                f"{path}: not readable as JSON; the file is incomplete or was altered; get it again"
            ) from None
        raise
    missing = REQUIRED - set(config) if isinstance(config, dict) else REQUIRED
    if missing:
        raise ValueError(
            f"{path}: not an erasure's config; {sorted(missing)} missing; give a folder made by save_pretrained"
        )
    if config["format"] != FORMAT:
        raise ValueError(
            f"{path}: format {config['format']!r}; this library reads format {FORMAT}; upgrade diffusion-erasure"
        )
    if config["kind"] not in kinds():
        raise ValueError(
            f"{path}: unknown kind {config['kind']!r}; known are {sorted(kinds())}; upgrade diffusion-erasure"
        )
    return config


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; an erasure's folder holds {CONFIG} and {WEIGHTS}; get it again")
    return path.read_bytes()


def _download(repo_id: str, *, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=[CONFIG, WEIGHTS, CARD]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"no folder {repo_id!r}, and the hub did not give it either ({type(error).__name__}); check the name"
        ) from None


__all__ = ["Erasure", "kinds", "new_config", "save_unet"]
