"""Probes, one file each: is a concept suppressed, did it leave the weights, what else changed, what do filters do.

Registered by name; the module of a probe is imported when it is asked for.
"""

from __future__ import annotations

import importlib

from erasure.eval.probes.base import (
    PRESETS,
    Context,
    Evidence,
    Missing,
    Observation,
    Probe,
)

HOMES = {
    # what comes out when asked
    "direct": "suppression.direct:Direct",
    "paraphrase": "suppression.paraphrase:Paraphrase",
    "description": "suppression.description:Description",
    "hierarchy": "suppression.hierarchy:Hierarchy",
    "composition": "suppression.composition:Composition",
    "translation": "suppression.translation:Translation",
    "negation": "suppression.negation:Negation",
    "sampler": "suppression.sampler:Sampler",
    "clip_skip": "suppression.clip_skip:ClipSkip",
    "random_control": "suppression.random_control:RandomControl",
    "unlearn_diff_atk": "suppression.unlearn_diff_atk:UnlearnDiffAtk",
    "p4d": "suppression.p4d:P4D",
    "ring_a_bell": "suppression.ring_a_bell:RingABell",
    "soft_prompt": "suppression.soft_prompt:SoftPrompt",
    # what is still inside
    "inversion": "removal.inversion:ConceptInversion",
    "relearning": "removal.relearning:Relearning",
    "resurgence": "removal.resurgence:Resurgence",
    "noise": "removal.noise:NoiseProbe",
    "completion": "removal.completion:Completion",
    "inpainting": "removal.inpainting:Inpainting",
    "image_to_image": "removal.image_to_image:ImageToImage",
    "classifier_guidance": "removal.classifier_guidance:ClassifierGuidance",
    "latent_inversion": "removal.latent_inversion:LatentInversion",
    "divergence": "removal.divergence:Divergence",
    "output_distance": "removal.output_distance:OutputDistance",
    "linear_probe": "removal.linear_probe:LinearProbe",
    "membership": "removal.membership:Membership",
    "memorisation": "removal.memorisation:Memorisation",
    "construction": "removal.construction:Construction",
    # what else changed
    "neighbours": "utility.neighbours:Neighbours",
    "unrelated": "utility.unrelated:Unrelated",
    "binding": "utility.binding:Binding",
    "leakage": "utility.leakage:Leakage",
    "distances": "utility.distances:Distances",
    "preservation": "utility.preservation:Preservation",
    "marginals": "utility.marginals:Marginals",
    "replacement": "utility.replacement:Replacement",
    "degeneracy": "utility.degeneracy:Degeneracy",
    "efficiency": "utility.efficiency:Efficiency",
    # what filters do
    "input_filter": "guardrails.input_filter:InputFilterProbe",
    "output_filter": "guardrails.output_filter:OutputFilterProbe",
    "end_to_end": "guardrails.end_to_end:EndToEnd",
}


def probe_class(name: str) -> type[Probe]:
    """The class of a probe by its key.

    Raises:
        ValueError: there is none of that name; the message lists them.
    """
    if name not in HOMES:
        raise ValueError(f"unknown probe {name!r}; choose one of {sorted(HOMES)}")
    module, _, attribute = HOMES[name].partition(":")
    found: type[Probe] = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    return found


def probes_of(preset: str, only: tuple[str, ...] | None = None) -> list[Probe]:
    """The probes of a preset, in the order of the taxonomy.

    Args:
        preset: smoke | quick | standard | full.
        only: keys, to run fewer.

    Raises:
        ValueError: no such preset or probe, or the preset does not have it.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of {list(PRESETS)}")
    found = {name: probe_class(name).preset(preset) for name in (HOMES if only is None else only)}
    if only and (absent := [name for name, probe in found.items() if probe is None]):
        having = [one for one in PRESETS if one in probe_class(absent[0]).presets]
        raise ValueError(f"preset {preset!r} has no probe {absent[0]!r}; leave it out, or choose one of {having}")
    return [probe for probe in found.values() if probe is not None]


__all__ = [
    "HOMES",
    "PRESETS",
    "Context",
    "Evidence",
    "Missing",
    "Observation",
    "Probe",
    "probe_class",
    "probes_of",
]
