"""Probes, one file each: is a concept suppressed, did it leave the weights, what else changed, what do filters do.

Registered by name; the module of a probe is imported when it is asked for. Other packages add theirs by an entry point
in the group ``erasure.probes``, ``key = package.module:Probe``: it runs in the presets it names and stands in the
report. Which probes a claim may rest on is decided in :mod:`erasure.eval.judge`.
"""

from __future__ import annotations

import dataclasses

from erasure.eval.probes.base import PRESETS, Context, Evidence, Missing, Model, Observation, Probe, Roles, Rows
from erasure.eval.probes.weigh import contrasts
from erasure.io import meant
from erasure.registry import Registry

BUILT_IN = {
    # what comes out when asked
    "direct": "erasure.eval.probes.suppression.direct:Direct",
    "paraphrase": "erasure.eval.probes.suppression.paraphrase:Paraphrase",
    "description": "erasure.eval.probes.written:description",
    "hierarchy": "erasure.eval.probes.written:hierarchy",
    "composition": "erasure.eval.probes.suppression.composition:Composition",
    "translation": "erasure.eval.probes.written:translation",
    "negation": "erasure.eval.probes.written:negation",
    "sampler": "erasure.eval.probes.suppression.sampler:Sampler",
    "clip_skip": "erasure.eval.probes.suppression.clip_skip:ClipSkip",
    "scene": "erasure.eval.probes.suppression.scene:Scene",
    "quantised": "erasure.eval.probes.suppression.quantised:Quantised",
    "prompt_file": "erasure.eval.probes.suppression.prompt_file:PromptFiles",
    "sequential": "erasure.eval.probes.suppression.sequential:Sequential",
    "random_control": "erasure.eval.probes.suppression.random_control:RandomControl",
    "unlearn_diff_atk": "erasure.eval.probes.suppression.unlearn_diff_atk:UnlearnDiffAtk",
    "p4d": "erasure.eval.probes.suppression.p4d:P4D",
    "ring_a_bell": "erasure.eval.probes.suppression.ring_a_bell:RingABell",
    "soft_prompt": "erasure.eval.probes.suppression.soft_prompt:SoftPrompt",
    # what is still inside
    "inversion": "erasure.eval.probes.removal.inversion:ConceptInversion",
    "relearning": "erasure.eval.probes.removal.relearning:Relearning",
    "resurgence": "erasure.eval.probes.removal.resurgence:Resurgence",
    "plasticity": "erasure.eval.probes.removal.plasticity:Plasticity",
    "gradient_reversal": "erasure.eval.probes.removal.gradient_reversal:GradientReversal",
    "adapter_on_top": "erasure.eval.probes.removal.adapter_on_top:AdapterOnTop",
    "noise": "erasure.eval.probes.removal.noise:NoiseProbe",
    "completion": "erasure.eval.probes.removal.completion:Completion",
    "base_encoder": "erasure.eval.probes.removal.base_encoder:BaseEncoder",
    "inpainting": "erasure.eval.probes.removal.inpainting:Inpainting",
    "image_to_image": "erasure.eval.probes.removal.image_to_image:ImageToImage",
    "classifier_guidance": "erasure.eval.probes.removal.classifier_guidance:ClassifierGuidance",
    "latent_inversion": "erasure.eval.probes.removal.latent_inversion:LatentInversion",
    "divergence": "erasure.eval.probes.removal.divergence:Divergence",
    "output_distance": "erasure.eval.probes.removal.output_distance:OutputDistance",
    "linear_probe": "erasure.eval.probes.removal.linear_probe:LinearProbe",
    "membership": "erasure.eval.probes.removal.membership:Membership",
    "memorisation": "erasure.eval.probes.removal.memorisation:Memorisation",
    "construction": "erasure.eval.probes.removal.construction:Construction",
    "delta_side_channel": "erasure.eval.probes.removal.side_channel:DeltaSideChannel",
    # what else changed
    "neighbours": "erasure.eval.probes.utility.neighbours:Neighbours",
    "unrelated": "erasure.eval.probes.utility.unrelated:Unrelated",
    "binding": "erasure.eval.probes.utility.binding:Binding",
    "selective_alignment": "erasure.eval.probes.utility.selective_alignment:SelectiveAlignment",
    "leakage": "erasure.eval.probes.utility.leakage:Leakage",
    "distances": "erasure.eval.probes.utility.distances:Distances",
    "preservation": "erasure.eval.probes.utility.preservation:Preservation",
    "marginals": "erasure.eval.probes.utility.marginals:Marginals",
    "replacement": "erasure.eval.probes.utility.replacement:Replacement",
    "degeneracy": "erasure.eval.probes.utility.degeneracy:Degeneracy",
    "efficiency": "erasure.eval.probes.utility.efficiency:Efficiency",
    # what filters do
    "input_filter": "erasure.eval.probes.guardrails.input_filter:InputFilterProbe",
    "output_filter": "erasure.eval.probes.guardrails.output_filter:OutputFilterProbe",
    "end_to_end": "erasure.eval.probes.guardrails.end_to_end:EndToEnd",
}
REGISTRY = Registry("probe", "erasure.probes", BUILT_IN)
SAMPLES = ("runs", "prompts", "images_per_prompt")  # the settings that say how much is looked at


def names() -> tuple[str, ...]:
    """The keys of all probes, in the order of the taxonomy, those of other packages last."""
    return tuple(REGISTRY.available())


def probe_class(name: str) -> type[Probe]:
    """The class of a probe by its key."""
    found = REGISTRY.load(name)
    if not (isinstance(found, type) and issubclass(found, Probe) and found.key == name):
        raise ValueError(
            f"the entry point {name!r} names {found!r}; it must be a class of erasure.eval.probes.Probe whose key is "
            f"{name!r}"
        )
    return found


def probes_of(preset: str, only: tuple[str, ...] | None = None) -> list[Probe]:
    """The probes of a preset in the order of the taxonomy; with ``only`` those of these keys, which it must have.

    A key may ask for larger samples than the preset's, which narrow its intervals: ``relearning:runs=5,prompts=18``.
    Its runs, prompts and images_per_prompt can be raised and not lowered, so that no claim rests on less.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}{meant(preset, PRESETS)}; choose one of {list(PRESETS)}")
    asked = [one.partition(":") for one in (names() if only is None else only)]
    found = {name: probe_class(name).preset(preset) for name, *_ in asked}
    if only and (absent := [name for name, probe in found.items() if probe is None]):
        having = [one for one in PRESETS if one in probe_class(absent[0]).presets]
        raise ValueError(f"preset {preset!r} has no probe {absent[0]!r}; leave it out, or choose one of {having}")
    for name, colon, more in asked:
        if colon and (probe := found[name]) is not None:
            found[name] = _larger(probe, more)
    return [probe for probe in found.values() if probe is not None]


def _larger(probe: Probe, more: str) -> Probe:
    """The probe with larger samples, from text such as ``runs=5,prompts=18``."""
    has = {name: value for name in SAMPLES if isinstance(value := getattr(probe, name, None), int)}
    if not has:
        raise ValueError(f"{probe.key!r} has no sample that could be larger; ask for it without {':' + more!r}")
    asked: dict[str, int] = {}
    for part in more.split(","):
        name, _, number = part.strip().partition("=")
        if name not in has:
            raise ValueError(f"of {probe.key!r} {list(has)} can be raised; got {part!r}, for example runs=5")
        if not number.isascii() or not number.isdigit() or int(number) < has[name]:
            raise ValueError(f"{name} of {probe.key!r} must be {has[name]} or more, as the preset has; got {number!r}")
        asked[name] = int(number)
    return dataclasses.replace(probe, **asked)  # type: ignore[type-var]  # every probe is a dataclass


__all__ = [
    "PRESETS", "Context", "Evidence", "Missing", "Model", "Observation", "Probe", "Roles", "Rows", "contrasts", "names",
    "probe_class", "probes_of",
]  # fmt: skip
