"""The published methods, one file each, found by name.

Third parties add theirs through the entry-point group ``erasure.methods``: name to ``module:Class``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from erasure.registry import Registry

if TYPE_CHECKING:
    from erasure.methods.base import Method

METHODS = Registry(
    "method",
    "erasure.methods",
    {
        "uce": "erasure.methods.uce:UCE",
        "rece": "erasure.methods.rece:RECE",
        "time": "erasure.methods.time:TIME",
        "speed": "erasure.methods.speed:SPEED",
        "mace": "erasure.methods.mace:MACE",
        "mace-cfr": "erasure.methods.mace_cfr:MACECFR",
        "double-projections": "erasure.methods.double_projections:DoubleProjections",
        "cure": "erasure.methods.cure:CURE",
        "esd": "erasure.methods.esd:ESD",
        "leco": "erasure.methods.leco:LECO",
        "concept-ablation": "erasure.methods.concept_ablation:ConceptAblation",
        "age": "erasure.methods.age:AGE",
        "eap": "erasure.methods.eap:EAP",
        "cogfd": "erasure.methods.cogfd:CoGFD",
        "salun": "erasure.methods.salun:SalUn",
        "forget-me-not": "erasure.methods.forget_me_not:ForgetMeNot",
        "erasediff": "erasure.methods.erasediff:EraseDiff",
        "random-label": "erasure.methods.random_label:RandomLabel",
        "gradient-ascent": "erasure.methods.gradient_ascent:GradientAscent",
        "eraseflow": "erasure.methods.eraseflow:EraseFlow",
        "stereo": "erasure.methods.stereo:STEREO",
        "receler": "erasure.methods.receler:Receler",
        "gloce": "erasure.methods.gloce:GLoCE",
        "spm": "erasure.methods.spm:SPM",
        "z-erase": "erasure.methods.z_erase:ZErase",
        "adv-unlearn": "erasure.methods.adv_unlearn:AdvUnlearn",
        "undo": "erasure.methods.undo:UNDO",
        "sld": "erasure.pipelines.sld:SLD",
        "negative-prompt": "erasure.pipelines.negative_prompt:NegativePrompt",
        "safree": "erasure.pipelines.safree:SAFREE",
        "adavd": "erasure.pipelines.adavd:AdaVD",
    },
)
BUILT_IN = METHODS.built_in


def available() -> dict[str, str]:
    """Every known method: name to ``module:Class``. Nothing is imported."""
    return METHODS.available()


def method_class(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    return METHODS.load(name)
