"""Every architecture as a tiny pipeline, under one name, with what keeps its pictures small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from erasure.backbone import Backbone, backbone_of
from tests.tiny import tiny
from tests.tiny_cross import call, tiny_cross
from tests.tiny_joint import tiny_joint

CALLS: dict[str, dict[str, Any]] = {
    "wan": {"height": 32, "width": 32, "num_frames": 1},
    "wan2.2": {"height": 32, "width": 32, "num_frames": 1},
    "animatediff": {"num_frames": 2},
    "text-to-video": {"num_frames": 2},
    "ltx": call("ltx"),
}
CLASSIC = ("sd1", "sd2", "sdxl", "sd3", "flux")
JOINT = ("flux2", "flux2-klein", "qwen-image", "z-image", "wan", "wan2.2", "chroma")
CROSS = ("pixart-sigma", "sana", "lumina2", "auraflow", "cogview4", "ltx", "cogvideox", "kolors")
EVERY = (*CLASSIC, *JOINT, *CROSS)

BUILDERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(CLASSIC, tiny),
    **dict.fromkeys(JOINT, tiny_joint),
    **dict.fromkeys((*CROSS, "animatediff", "text-to-video", "lcm-sd"), tiny_cross),
}


def build(name: str, *, seed: int = 0) -> Any:
    """A tiny pipeline with random weights."""
    return BUILDERS[name](name, seed=seed)


def backbone(pipe: Any, name: str) -> Backbone:
    """Its backbone, drawing at a size that tests can afford."""
    kind = type(backbone_of(pipe))
    return kind(pipe, call=CALLS.get(name, {}))
