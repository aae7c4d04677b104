"""The models of a comparison: the base, its erasures, models that never saw the target, filtered pipelines.

Each of them is a change of one pipeline in memory, which is applied and removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from transformers import PreTrainedModel

from erasure.artifact.stack import Stack, fused_in
from erasure.backbone import denoiser_of, parts_of
from erasure.backbone.checks import is_compiled
from erasure.eval.core.hashes import modules_of, weights_hash
from erasure.eval.core.records import BASE
from erasure.eval.core.surroundings import (
    around,
    changes,
    differences,
    reads_otherwise,
    standing,
    standing_around,
    state_of,
)
from erasure.io import printable, shown

Role = Literal["base", "erased", "gold", "twin", "null"]
Kind = Literal["none", "weights", "adapter", "filter", "retrained"]
IN_WEIGHTS: tuple[Kind, ...] = ("weights", "retrained")  # of these, other weights are another model

_COMPARE = "compare models that were made from one base, or name theirs as the base (--base)"
BESIDE = ("safety_checker", "image_encoder", "feature_extractor")  # parts that draw nothing from a prompt


class Applied(Protocol):
    """A change of a pipeline: an :class:`erasure.Erasure`, or anything with the same four names.

    A change may also have ``wrap(pipe)``, which returns the pipeline to draw with (a filter around it), and
    ``intervention``, what it does to the parameters (a :data:`Kind`; "weights" by default).
    """

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> Any:
        """How it was made, a mapping or an :class:`erasure.artifact.config.Config`; it is only read."""
        ...

    def apply(self, pipe: Any) -> Any:
        """Edit the pipeline in place."""
        ...

    def remove(self, pipe: Any) -> Any:
        """Restore every bit."""
        ...


@runtime_checkable
class Wraps(Protocol):
    """A change that wraps a pipeline."""

    def wrap(self, pipe: Any) -> Any:
        """The pipeline to draw with."""
        ...


class Unfaithful(RuntimeError):
    """A change is not the same each time, or leaves a trace: nothing measured with it can be believed."""


class Swapped:
    """Other weights in the place of the base's: a retrained model, a null control, or a fine-tune.

    Args:
        name: in tables.
        modules: part of the pipeline ("unet", "text_encoder" ...) to the module that replaces it; not copied.
        config: where they come from: ``scope``, ``seed``, ``manifest`` ...
        intervention: "retrained" for models that were trained again without the target (the default); "weights" for
            any other model, which is then judged like an erasure.
    """

    intervention: Kind = "retrained"

    def __init__(
        self,
        name: str,
        modules: Mapping[str, nn.Module],
        *,
        config: Mapping[str, Any] | None = None,
        intervention: Kind | None = None,
    ) -> None:
        self.name, self.config = name, dict(config or {})
        if intervention is not None:
            self.intervention = intervention
        self.modules, self._ours = dict(modules), dict[str, nn.Module]()

    def apply(self, pipe: Any) -> None:
        """Put the modules into ``pipe``."""
        ours = modules_of(pipe)
        if absent := sorted(self.modules.keys() - ours.keys()):
            raise ValueError(
                f"{self.name} has {absent}, the base only {sorted(ours)}; compare pipelines of one architecture"
            )
        self._ours = {part: ours[part] for part in self.modules}
        for part, module in self.modules.items():
            setattr(pipe, part, module)

    def remove(self, pipe: Any) -> None:
        """Put the pipeline's own modules back."""
        for part, module in self._ours.items():
            setattr(pipe, part, module)
        self._ours = {}


@contextlib.contextmanager
def opened(pipe: Any, change: Applied | None) -> Iterator[Any]:
    """The pipeline with a change applied, inside the block; yields the pipeline to draw with.

    A change that also replaces what turns latents into pictures, or the pipeline's own calls, is refused.
    """
    if change is None:
        yield pipe
        return
    before, wraps = state_of(pipe), isinstance(change, Wraps)  # and not while it is applied alone
    change.apply(pipe)
    try:
        if not wraps and (other := changes(before["around"], around(pipe))):
            raise ValueError(
                f"{change.name} changes the pipeline's {other[0]}, which is no edit of a model; a change that stands "
                "around a pipeline needs wrap(pipe), and is then judged as the filter it is"
            )
        yield change.wrap(pipe) if wraps and isinstance(change, Wraps) else pipe
    finally:
        change.remove(pipe)
    if left := differences(before, state_of(pipe)):
        raise Unfaithful(
            f"{change.name} did not give the pipeline back: {printable(left[0])} after remove(); nothing that is drawn "
            "afterwards would be the base's; load the pipeline afresh and report a bug of the erasure"
        )


@dataclasses.dataclass(frozen=True)
class Model:
    """One model of an assessment.

    Attributes:
        name: unique; used in tables and files.
        role: "base" | "erased" | "gold" (retrained without the target) | "twin" (retrained on everything) | "null"
            (another model that never saw the target).
        change: of the base pipeline; None for the base.
    """

    name: str
    role: Role
    change: Applied | None = None

    def __post_init__(self) -> None:
        if (self.role == "base") != (self.change is None):
            raise ValueError(f"the base has no change and every other model has one; got {self.name!r}, {self.role}")
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"{self.name!r} has the intervention {shown(self.kind)}; an erasure's is one of {list(get_args(Kind))}"
            )
        if self.change is not None:
            if lacking := [name for name in ("name", "config", "apply", "remove") if not hasattr(self.change, name)]:
                raise ValueError(
                    f"{self.name!r} is no erasure: it has no {lacking[0]}; got {shown(self.change)}; give an Erasure, "
                    "or anything with name, config, apply(pipe) and remove(pipe)"
                )
            check_config(self.name, self.change.config)

    @property
    def kind(self) -> Kind:
        """What the change does to the parameters. What wraps a pipeline is a filter, whatever it says of itself."""
        if isinstance(self.change, Wraps):
            return "filter"
        return "none" if self.change is None else getattr(self.change, "intervention", "weights")

    @property
    def config(self) -> dict[str, Any]:
        if self.change is None:
            return {}
        return {"name": str(self.change.name), **self.change.config}

    @contextlib.contextmanager
    def on(self, pipe: Any) -> Iterator[Any]:
        """The base pipeline as this model, inside the block."""
        with opened(pipe, self.change) as drawn:
            yield drawn


def check_config(name: str, config: Any) -> None:
    """Refuse what an erasure says of itself where it cannot be read."""
    if not (hasattr(config, "keys") and all(isinstance(key, str) for key in config.keys())):
        raise ValueError(
            f"the config of {name!r} must be a mapping from words to values; got {shown(config)}; {{}} says nothing"
        )
    for key in ("keep", "keep_everyday", "prompts"):
        value = config[key] if key in config.keys() else ()
        if isinstance(value, str) or not (isinstance(value, Sequence) and all(isinstance(one, str) for one in value)):
            raise ValueError(f"{key!r} in the config of {name!r} must be a list of prompts; got {shown(value)}")


def models_of(erasures: Mapping[str, Applied], controls: Sequence[Model] = ()) -> list[Model]:
    """Every model of a comparison: the base, its erasures by name, then the controls.

    Raises:
        ValueError: the erasures have no names, or a control is no model.
    """
    if not isinstance(erasures, Mapping):
        raise ValueError(f"erasures are given by name; got {shown(erasures)}; give a dict: {{'UCE': edit}}")
    if not isinstance(controls, Sequence) or not all(isinstance(control, Model) for control in controls):
        raise ValueError(f"controls are a list of Model; got {shown(controls)}; see erasure.eval.run.controls")
    return [Model(BASE, "base"), *(Model(name, "erased", change) for name, change in erasures.items()), *controls]


def check_restored(pipe: Any, before: str, name: str, *, hash_weights: Callable[[Any], str] = weights_hash) -> None:
    """Raise unless the weights have the hash they had."""
    after = hash_weights(pipe)
    if after != before:
        raise Unfaithful(
            f"{name} did not give the weights back: their hash was {before[:12]} and is {after[:12]} after remove(); "
            "pass a pipeline without that erasure on it; if it had none, load it afresh and report a bug of the erasure"
        )


def check_beside(found: Sequence[str], before: Sequence[str], name: str, when: str) -> None:
    """Raise unless what stands beside the weights of an open model is what stood there before."""
    if other := [*(one for one in found if one not in before), *(one for one in before if one not in found)]:
        raise Unfaithful(
            f"{name} is not the same model {when}: {printable(other[0])} at one time and not at the other; what is "
            "judged must be one model: an erasure that makes the same edit each time, and nothing beside it"
        )


def check_unchanged(pipe: Any, before: str, name: str, when: str, *, hash_weights: Callable[[Any], str]) -> None:
    """Raise unless a model that is open has the hash it had before."""
    if (now := hash_weights(pipe)) != before:
        raise Unfaithful(
            f"{name} has other weights {when}: their hash was {before[:12]} and is {now[:12]}; what is judged must be "
            "one model: an erasure that makes the same edit each time, and leaves it alone while pictures are drawn"
        )


def whole_model(
    pipe: Any,
    source: str | Path,
    *,
    name: str | None = None,
    intervention: Kind = "weights",
    config: str | Path | None = None,
) -> Swapped:
    """A whole pipeline as a change of the base: its denoisers, text encoders and autoencoder replace the base's.

    Args:
        pipe: the base, of the same architecture. Its tokenizers and scheduler stay.
        source: folder, hub id or single file, opened on the base's device and in its dtype.
        name: in tables; the folder's name by default.
        intervention: "weights" for a fine-tune or an erased model; "retrained" for one that never saw the target.
        config: for a single file, as :func:`erasure.load_base` takes it.
    """
    from erasure.opening import load_base

    dtype = str(denoiser_of(pipe).dtype).removeprefix("torch.")
    theirs = load_base(source, device=str(pipe.device), dtype=dtype, config=config)
    mine, modules = modules_of(pipe), modules_of(theirs)
    if difference := _difference(pipe, theirs):
        raise ValueError(f"{source} is another architecture than the base ({difference}); {_COMPARE}")
    states = {part: (module.state_dict(), modules[part].state_dict()) for part, module in mine.items()}
    changed = [part for part, (a, b) in states.items() if not all(torch.equal(a[name], b[name]) for name in a)]
    facts = {"scope": "as given", "source": Path(source).name, "changed": changed}
    return Swapped(name or name_of(source), modules, config=facts, intervention=intervention)


def check_alike(base: str | Path, source: str | Path) -> None:
    """Raise where the files of two models already say that they differ, before minutes of opening them.

    Raises:
        ValueError: as :func:`whole_model`, which compares the rest.
    """
    from erasure.opening import declared_parts

    mine, other = declared_parts(base), declared_parts(source)
    if mine and other and mine != other:
        differ = [name for name in {**mine, **other} if mine.get(name) != other.get(name)]
        part = min(differ, key=lambda name: not name.startswith(("unet", "transformer")))  # the denoiser is said first
        it, base_has = (parts.get(part, "nothing") for parts in (other, mine))
        raise ValueError(
            f"{source} is another architecture than the base (its {part} is {it}, the base's {base_has}); {_COMPARE}"
        )


def name_of(source: str | Path) -> str:
    """The name of a model in tables: the last part of its folder, hub id or file."""
    path = Path(source).expanduser().resolve() if Path(source).exists() else Path(source)
    return path.stem if path.suffix == ".safetensors" else path.name


def _difference(pipe: Any, theirs: Any) -> str | None:
    """How the architectures of two pipelines differ; None if they do not."""
    mine, other = modules_of(pipe), modules_of(theirs)
    if mine.keys() != other.keys():
        return f"it has {sorted(other)}, the base {sorted(mine)}"
    for part, module in mine.items():
        a, b = ({n: tuple(t.shape) for n, t in m.state_dict().items()} for m in (module, other[part]))
        if type(module) is not type(other[part]) or a.keys() != b.keys():
            return f"its {part} has other layers"
        if wrong := next((n for n in a if a[n] != b[n]), None):
            return f"its {part}.{wrong} is {b[wrong]}, the base's {a[wrong]}"
    if strange := reads_otherwise(pipe, theirs):
        return f"its {strange} reads words as other numbers"
    for key in ("prediction_type", "rescale_betas_zero_snr"):
        ours, given = (getattr(p.scheduler.config, key, None) for p in (pipe, theirs))
        if ours != given:
            return f"its scheduler has {key} {given!r}, the base's {ours!r}"
    return None


def check_base(pipe: Any) -> None:
    """Raise unless a pipeline can be the base: a plain one, not wrapped, and without an erasure or LoRA on any part."""
    if not isinstance(pipe, DiffusionPipeline):
        raise ValueError(
            f"the base must be a plain diffusers pipeline; got a {type(pipe).__name__}; give the pipeline inside it"
        )
    denoisers_of(pipe)
    for part, module in pipe.components.items():
        if isinstance(module, nn.Module) and part not in BESIDE:
            _check_bare(part, module)
    stack = Stack(pipe)
    there = [f"{name!r}" for name in stack.layers]
    for part, state in stack.parts.items():
        there += [f"an attached {type(handle).__name__}" for handle in state.attached]
        there += [f"a hook of {name!r}" for name in state.handles if name not in stack.layers]
        there += [f"{name!r}, fused into the {part}" for name in fused_in(stack.modules[part])]
    if there:
        raise ValueError(
            f"the base must be unmodified; the pipeline already carries {', '.join(there)}; call remove(pipe) of "
            "what is applied and remove() of what is attached, and load the original model where something was fused"
        )
    if beside := standing_around(pipe):
        raise ValueError(
            f"the base must be unmodified; it carries {beside[0]}, which a change could switch on unseen; load the "
            "pipeline again"
        )
    for part, module in modules_of(pipe).items():
        if beside := standing(module):
            raise ValueError(
                f"the base must be unmodified; its {part} carries {beside[0]}, which a change could switch on unseen; "
                "load the pipeline again"
            )


def _check_bare(part: str, module: nn.Module) -> None:
    """Refuse wrappers, which hide the weights or keep using old ones, and adapters."""
    kind = type(module).__name__
    if is_compiled(module):
        raise ValueError(
            f"the base's {part} is compiled (torch.compile) and may go on using old weights when a model is swapped "
            "in; evaluate the pipeline as it was before compiling"
        )
    if not isinstance(module, ModelMixin | PreTrainedModel):
        inner = " (its .module)" if isinstance(getattr(module, "module", None), nn.Module) else ""
        raise ValueError(
            f"the base's {part} is wrapped in a {kind}; put the model of diffusers or transformers inside it{inner} "
            "back on the pipeline; pictures are drawn on one device"
        )
    if "forward" in vars(module) and getattr(module, "_hf_hook", None) is None:
        raise ValueError(
            f"the base's {part} has another forward than its class ({kind}): it was wrapped in place, as accelerate's "
            "prepare() does; load the pipeline again"
        )
    if adapted := next((name for name, child in module.named_modules() if hasattr(child, "base_layer")), None):
        raise ValueError(
            f"the base must be unmodified; its {part} carries a LoRA adapter ({adapted}); unload it, or make it a part "
            "of the model with fuse_lora() and unload_lora_weights()"
        )


def denoisers_of(pipe: Any) -> dict[str, Any]:
    """The denoisers of a pipeline by name; some have two."""
    found = {part: module for part, module in parts_of(pipe).items() if not part.startswith("text_encoder")}
    if not found:
        raise ValueError(f"{type(pipe).__name__} has neither unet nor transformer; give a text-to-image pipeline")
    return found


def randomised(pipe: Any, *, seed: int = 0) -> Swapped:
    """A null control: the same architecture with a newly initialised denoiser; text encoder and autoencoder stay."""
    fresh: dict[str, nn.Module] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part, denoiser in denoisers_of(pipe).items():
            made = type(denoiser).from_config(denoiser.config).eval().to(denoiser.device)
            fresh[part] = made if denoiser.dtype == torch.float32 else made.to(denoiser.dtype)
    return Swapped("random", fresh, config={"scope": "denoiser with random weights", "seed": seed})
