"""The detectors for a suite: the world's classifiers, or open_clip and vision-language models for every other one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from erasure.concept import WORLD, Suite
from erasure.eval.detectors.base import Detector
from erasure.eval.detectors.clip import ClipDetector, labels_of
from erasure.eval.detectors.nudenet import COUNTINGS, NudeNet, nudenet_package
from erasure.eval.detectors.vlm import VlmDetector
from erasure.io import meant

CLIP = ("ViT-B-32/openai",)


def detectors_for(
    suite: Suite,
    *,
    clip: Sequence[str] = CLIP,
    vlm: Sequence[str] = (),
    nudenet: Sequence[str] = (),
    device: str = "cpu",
) -> tuple[list[Detector], ClipDetector]:
    """Detectors and the judge of image-text agreement for a suite. The first scores; a second one selects, for attacks.

    Args:
        clip: ``model/weights`` for open_clip, used for suites about real checkpoints.
        vlm: hub ids (``org/name`` or ``org/name@revision``) or folders of vision-language models. They stand before the
            others.
        nudenet: countings of NudeNet (:data:`~erasure.eval.detectors.nudenet.COUNTINGS`), for suites of kind nsfw. They
            stand first.

    Raises:
        FileNotFoundError: weights are neither cached nor available.
        ImportError: NudeNet is not installed.
        ValueError: a vision-language model cannot be asked, an unknown counting, or NudeNet for another suite.
    """
    check_nudenet(suite, nudenet)
    asked: list[Detector] = [NudeNet(counting, label=suite.concept.name) for counting in nudenet]
    asked += [_asked(name, suite, device) for name in vlm]
    if suite.base == WORLD:
        from erasure.eval.worldkit import detectors

        return [*asked, *detectors.detectors()], detectors.clip()
    judges = [_opened(name, suite, device) for name in clip]
    return [*asked, *judges], judges[0]


def check_nudenet(suite: Suite, countings: Sequence[str]) -> None:
    """Refuse NudeNet where it cannot judge, before any model is opened.

    Raises:
        ValueError: an unknown counting, one given twice, or a suite about something else than nudity.
        ImportError: the package is not installed.
    """
    for counting in countings:
        if counting not in COUNTINGS:
            raise ValueError(
                f"unknown counting {counting!r} of NudeNet{meant(counting, COUNTINGS)}; choose one of {list(COUNTINGS)}"
            )
    if len({*countings}) < len(countings):
        raise ValueError(f"a counting of NudeNet is named twice; got {list(countings)}; name each once")
    if countings and any(concept.kind != "nsfw" for concept in suite.concepts):
        raise ValueError(
            f"NudeNet sees nudity alone; the suite {suite.name!r} is about {suite.target!r} of kind "
            f"{suite.concept.kind}; leave --nudenet out, or give the concept kind: nsfw"
        )
    if countings:
        nudenet_package()


class Judges:
    """The detectors of one suite after another, as of :func:`detectors_for`; networks are loaded once."""

    def __init__(self, *, clip: Sequence[str] = CLIP, device: str = "cpu") -> None:
        self._clip, self._device = tuple(clip), device
        self._opened: dict[bool, tuple[list[Detector], ClipDetector]] = {}

    def __call__(self, suite: Suite) -> tuple[list[Detector], ClipDetector]:
        world = suite.base == WORLD
        if world not in self._opened:
            self._opened[world] = detectors_for(suite, clip=self._clip, device=self._device)
        found, agreement = self._opened[world]
        if world:  # they name everything there is
            return list(found), agreement
        judges = [one.with_labels(labels_of(suite)) for one in found if isinstance(one, ClipDetector)]
        return [*judges], judges[0]


def _asked(name: str, suite: Suite, device: str) -> VlmDetector:
    model, _, revision = (name, "", "") if Path(name).exists() else name.partition("@")
    try:
        return VlmDetector.load(model, revision=revision or None, labels=labels_of(suite), device=device)
    except OSError as error:
        raise FileNotFoundError(
            f"transformers could not load {name!r} ({type(error).__name__}); give the hub id or the folder of an "
            "image-text-to-text model"
        ) from None


def _opened(name: str, suite: Suite, device: str) -> ClipDetector:
    model, _, weights = name.partition("/")
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # open_clip logs what it raises
    try:
        return ClipDetector.load(model, weights or None, labels=labels_of(suite), device=device)
    except (OSError, RuntimeError) as error:
        if "download" in str(error):
            raise FileNotFoundError(
                f"the judge {name!r} (open_clip) is not on this machine and could not be downloaded; connect once, or "
                "give the folder of one: --clip FOLDER"
            ) from None
        raise FileNotFoundError(
            f"open_clip could not load {name!r} ({type(error).__name__}); "
            "name a model/weights pair from open_clip.list_pretrained()"
        ) from None
    finally:
        logging.disable(disabled)
