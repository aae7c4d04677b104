"""What each program can read of an erasure: the form that works there is written, or the reason said why none does.

A wrong form is mostly not an error where it is loaded: names that a program does not know are left out without a word,
and pictures are drawn by the base model. So the rules stand here, before the file. docs/travel.md lists them with the
test of each; ``erasure verify --engine`` asks a running server.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from erasure.artifact.base import Erasure
from erasure.artifact.denoiser import save_pipeline
from erasure.artifact.export import named_tensors, write_lora
from erasure.artifact.factors import Pairs, factors, filled
from erasure.artifact.kinds import weightless
from erasure.artifact.single_file import export_single_file
from erasure.artifact.stack import applied, stack_of
from erasure.backbone import Backbone, backbone_of
from erasure.backbone.names import split

Form = Literal["lora", "peft", "kohya", "comfyui", "single-file", "pipeline"]
LORAS: Mapping[Form, Any] = {"lora": "diffusers", "peft": "peft", "kohya": "kohya", "comfyui": "comfyui"}
FILES = ("kohya", "comfyui", "single-file")  # forms that are one file; the others are folders

Reason = str | None
Rule = Callable[[Backbone, Erasure, Form], Reason]
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # buffers have one of these ranks


@dataclass(frozen=True)
class Engine:
    """A program, and what it reads.

    Attributes:
        title: its name in sentences.
        forms: what it reads of what we write, the best first.
        ranks: ranks of a LoRA that it knows; empty for any.
        rules: what keeps a form from it, beside what keeps an erasure from the form.
        load: how each form is given to it; ``{out}`` is the place.
        note: what to know where a LoRA is served.
    """

    title: str
    forms: tuple[Form, ...]
    load: Mapping[Form, str]
    ranks: tuple[int, ...] = ()
    rules: tuple[Rule, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """The form of an erasure for a program.

    Attributes:
        form: what to write.
        passed_over: forms that the program would read too, and why not of this erasure.
        pairs: makes the matrices of a LoRA, and says their relative error.
    """

    engine: Engine
    form: Form
    passed_over: Mapping[Form, str]
    pairs: Callable[[], tuple[Pairs, float]]


# --- rules -----------------------------------------------------------------------------------------------------------


def only(*architectures: str) -> Rule:
    """The program opens these models alone."""

    def rule(backbone: Backbone, edit: Erasure, form: Form) -> Reason:
        known = backbone.architecture in architectures
        return None if known else f"it opens {', '.join(architectures)} and not {backbone.architecture}"

    return rule


def has_loader(backbone: Backbone, edit: Erasure, form: Form) -> Reason:
    """diffusers has a LoRA loader for most pipelines, and none for PixArt."""
    if form == "lora" and not hasattr(backbone.pipe, "load_lora_weights"):
        return f"diffusers has no LoRA loader for {type(backbone.pipe).__name__}"
    return None


def binds(backbone: Backbone, edit: Erasure, form: Form) -> Reason:
    """vLLM-Omni puts LoRAs on its own parallel layers; the layers that text enters a transformer by are plain ones."""
    if form not in LORAS or backbone.denoiser_name == "unet":
        return None
    entries = {site for space in backbone.spaces for site in backbone.text_sites(space)}
    changed = {name.removesuffix(".weight") for name in edit.parameter_names}
    if lost := sorted(changed & entries):
        return (
            f"its LoRA reaches the layers inside the blocks alone; {lost[0]}, by which text enters, is a plain one "
            "there and would be left out without a word"
        )
    return None


def whole_file(*architectures: str) -> Rule:
    """The program opens single files of these models; of others only a copy of a file that it opened before."""

    def rule(backbone: Backbone, edit: Erasure, form: Form) -> Reason:
        if form != "single-file" or backbone.architecture in architectures or _opened_from_file(backbone):
            return None
        return (
            f"it does not open a {backbone.architecture} denoiser under diffusers' names; give the file that it opens "
            "as --base, and a copy of that is written"
        )

    return rule


OWN_FILES = ("sd-unet", "sdxl", "sd3", "flux", "auraflow", "pixart", "z-image", "qwen-image", "ltx")
UNETS = ("sd-unet", "sdxl")
DROPPED = (
    "a LoRA is chosen for each request there, and one without it is drawn by the base model; where the erasure must be "
    "on for everybody, write the whole model: --format pipeline"
)
FOLD = "fold first, quantise afterwards"
FOLDED = "quantise {out}: the erasure is in its weights already, and no LoRA is needed"
AS_LORA = "put it among the LoRAs, and check the log: names that are not found are left out"
AS_CHECKPOINT = "put it among the checkpoints or diffusion models"

ENGINES: dict[str, Engine] = {
    "diffusers": Engine(
        title="diffusers",
        forms=("lora", "pipeline"),
        rules=(has_loader,),
        load={"lora": 'pipe.load_lora_weights("{out}")', "pipeline": 'DiffusionPipeline.from_pretrained("{out}")'},
    ),
    "peft": Engine(
        title="PEFT",
        forms=("peft",),
        load={"peft": 'PeftModel.from_pretrained(pipe.transformer, "{out}"), or pipe.unet'},
    ),
    "comfyui": Engine(
        title="ComfyUI",
        forms=("comfyui", "single-file"),
        rules=(whole_file(*OWN_FILES),),
        load={"comfyui": AS_LORA, "single-file": AS_CHECKPOINT},
    ),
    "forge": Engine(
        title="Forge",
        forms=("kohya", "single-file"),
        rules=(only(*UNETS, "flux"), whole_file(*UNETS, "flux")),
        load={"kohya": AS_LORA, "single-file": AS_CHECKPOINT},
    ),
    "a1111": Engine(
        title="A1111",
        forms=("kohya", "single-file"),
        rules=(only(*UNETS),),
        load={"kohya": AS_LORA, "single-file": AS_CHECKPOINT},
    ),
    "vllm-omni": Engine(
        title="vLLM-Omni",
        forms=("peft", "pipeline"),
        ranks=VLLM_RANKS,
        rules=(binds,),
        load={"peft": "name {out} in the request's lora", "pipeline": "vllm serve {out} --omni"},
        note=DROPPED,
    ),
    "sglang": Engine(
        title="SGLang",
        forms=("lora", "pipeline"),
        rules=(has_loader,),
        load={"lora": "POST /v1/set_lora with {out}", "pipeline": "sglang serve --model-path {out}"},
        note=f"{DROPPED}. On fp8 weights a LoRA cannot be merged (--for fp8)",
    ),
    "nunchaku": Engine(
        title="Nunchaku (SVDQuant)",
        forms=("lora", "pipeline"),
        rules=(
            lambda backbone, edit, form: (
                f"LoRAs reach its quantised layers for FLUX.1 alone, and this is {backbone.architecture}; {FOLD}"
                if form == "lora" and backbone.architecture != "flux"
                else None
            ),
        ),
        load={"lora": 'transformer.update_lora_params("{out}/pytorch_lora_weights.safetensors")', "pipeline": FOLDED},
    ),
    "fp8": Engine(
        title="a model in fp8",
        forms=("pipeline", "single-file"),
        load={"pipeline": FOLDED, "single-file": FOLDED},
    ),
    "gguf": Engine(
        title="a model in GGUF",
        forms=("single-file", "pipeline"),
        load={"single-file": FOLDED, "pipeline": FOLDED},
    ),
}
# Why a form that others read is none for a program; said where somebody asks for it.
NO_LORA: dict[str, str] = {
    "fp8": "a LoRA merged into fp8 weights breaks them: their scales are those of the old weights",
    "gguf": "a LoRA cannot be fused into GGUF's blocks of quantised numbers",
}


# --- the plan --------------------------------------------------------------------------------------------------------


def plan(edit: Erasure, pipe: Any, engine: str, *, form: Form | None = None, rank: int | None = None) -> Plan:
    """The form in which a program can read an erasure.

    Args:
        engine: one of ``ENGINES``.
        form: the one that you want; by default the first that works.
        rank: as in :func:`export_lora`.

    Raises:
        ValueError: none works, or not that one; the message says why, and which one does.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine; got {engine!r}; choose one of {sorted(ENGINES)}")
    reader, backbone = ENGINES[engine], backbone_of(pipe)
    edit.check_base(backbone)
    pairs = functools.cache(lambda: factors(edit, backbone, rank))  # may take minutes for a fine-tune
    reasons: dict[Form, str] = {}
    works: Form | None = None
    for candidate in reader.forms:
        if works is None and (reason := misfit(reader, backbone, edit, candidate, pairs)):
            reasons[candidate] = reason
        elif works is None:
            works = candidate
    if form is not None and form != works:
        reason = reasons.get(form) or (
            misfit(reader, backbone, edit, form, pairs)
            if form in reader.forms
            else (NO_LORA.get(engine) if form in LORAS else None) or f"it reads {' and '.join(reader.forms)} alone"
        )
        if reason:
            raise ValueError(
                f"{reader.title} does not read this as {form}: {reason}; "
                + (f"what works: --format {works}" if works else _elsewhere(edit))
            )
        works = form
    if works is None:
        told = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
        raise ValueError(f"{reader.title} cannot read {edit.name!r} ({told}); {_elsewhere(edit)}")
    return Plan(reader, works, reasons, pairs)


def misfit(
    reader: Engine, backbone: Backbone, edit: Erasure, form: Form, pairs: Callable[[], tuple[Pairs, float]]
) -> Reason:
    """What keeps an erasure from a program in one form; None if it can be read."""
    if not edit.parameter_names:
        return weightless(edit.kind)
    for rule in reader.rules:
        if reason := rule(backbone, edit, form):
            return reason
    try:
        if form in LORAS:
            named_tensors(filled(pairs()[0], reader.ranks), backbone, LORAS[form])
        elif form == "single-file":
            _check_parts(edit, backbone)
    except ValueError as error:
        return str(error).rpartition("; ")[0] or str(error)
    return None


def _opened_from_file(backbone: Backbone) -> bool:
    source = Path(str(backbone.pipe.config.get("_name_or_path") or ""))
    return source.suffix == ".safetensors" and source.is_file()


def _check_parts(edit: Erasure, backbone: Backbone) -> None:
    """Refuse parts that a single file does not hold, or a copy of the opened one could not be changed in."""
    copied, whole = _opened_from_file(backbone), backbone.architecture in UNETS
    written = (backbone.denoiser_name,) if copied else backbone.denoisers
    for name in edit.parameter_names:
        part = split(name, first=backbone.denoiser_name)[0]
        if part not in written and (copied or not whole):
            raise ValueError(f"it changes the {part}, and the file takes the denoiser's alone; write the pipeline")


def _elsewhere(edit: Erasure) -> str:
    if not edit.parameter_names:
        return "what works: erasure serve, or apply it in Python to the pipeline that draws"
    return "what works: --for diffusers --format pipeline, a folder with the erasure in its weights"


def export_for(
    edit: Erasure,
    pipe: Any,
    path: str | os.PathLike[str],
    engine: str,
    *,
    form: Form | None = None,
    rank: int | None = None,
    scale: float = 1.0,
) -> Path:
    """Write an erasure in the form that a program can read; see :func:`plan`.

    Args:
        path: a file for ``kohya``, ``comfyui`` and ``single-file``, a folder for the others.
        scale: how strongly; for ``single-file`` and ``pipeline`` alone, LoRAs get theirs where they are used.
    """
    return write_form(edit, pipe, path, plan(edit, pipe, engine, form=form, rank=rank), scale=scale)


def write_form(edit: Erasure, pipe: Any, path: str | os.PathLike[str], made: Plan, *, scale: float = 1.0) -> Path:
    """Write what a plan says."""
    if made.form in LORAS:
        if scale != 1:
            raise ValueError(f"a LoRA has its scale where it is used; got scale={scale}; leave it out")
        pairs, error = made.pairs()
        filled_up = filled(pairs, made.engine.ranks)
        return write_lora(edit, backbone_of(pipe), path, filled_up, layout=LORAS[made.form], error=error)
    if made.form == "single-file":
        return export_single_file(pipe, path, edit, scale=scale)
    if stack_of(pipe).layers:
        raise ValueError("the pipeline carries erasures already, which would be written too; remove them first")
    with applied(edit, pipe, scale):
        return save_pipeline(pipe, path)


__all__ = ["ENGINES", "FILES", "LORAS", "VLLM_RANKS", "Engine", "Form", "Plan", "export_for", "plan", "write_form"]
