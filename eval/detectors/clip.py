"""Zero-shot detection, and image-text agreement, with any open_clip model.

Its text encoder must be *unmodified*: an erased one would not recognise the target.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from erasure.concept import Suite
from erasure.eval.detectors.base import NOTHING, DetectorCard
from erasure.io import sha256, tensor_bytes
from erasure.wording import with_article

TEMPERATURE = 100.0  # the logit scale of every published CLIP (Radford et al. 2021)
NOTHING_PHRASES = ("nothing", "an empty background")

Labels = Mapping[str, Sequence[str] | Mapping[str, Sequence[str]]]


def labels_of(suite: Suite) -> dict[str, dict[str, tuple[str, ...]]]:
    """Zero-shot labels for everything a suite names: its target (with synonyms), neighbours, unrelated, and nothing.

    A suite about a style has labels for its styles, and for its subjects and nothing. The detector chooses among these
    labels only, so fewer labels are an easier task.

    >>> ClipDetector.load("ViT-B-32", "openai", labels=labels_of(suite))  # doctest: +SKIP
    """
    style = suite.attribute == "style"
    others = {name: (name,) for name in (*suite.neighbours, *suite.unrelated)}
    phrases = {**{concept.name: concept.phrases for concept in suite.concepts}, **others}
    if style:
        shown = {**{subject: (with_article(subject),) for subject in suite.subjects}, NOTHING: NOTHING_PHRASES}
        styles = {name: tuple(f"a painting by {word}" for word in words) for name, words in phrases.items()}
        return {"style": styles, "concept": shown}
    named = {name: tuple(with_article(word) for word in words) for name, words in phrases.items()}
    return {"concept": {**named, NOTHING: NOTHING_PHRASES}}


class ClipDetector:
    """An open_clip model as a detector and as a judge of image-text agreement.

    Args:
        model: an open_clip model (``encode_image``, ``encode_text``).
        preprocess: picture -> tensor (3, H, W), as open_clip returns it.
        tokenizer: texts -> ids, as open_clip returns it.
        name: in reports; put the backbone in it ("clip[vit-b-32/openai]").
        labels: attribute -> labels, or attribute -> {label: phrases}. Phrases are put into the templates ("a cat");
            without them a label gets its article, and "nothing" gets phrases for an empty picture.
        templates: sentences with ``{}``; their text features are averaged per label (prompt ensembling, as in CLIP).
        card: by default one without sensitivity and specificity.
        temperature: factor on the cosines before the softmax. Change it only for a CLIP trained with another.
        batch_size: pictures per forward pass.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        preprocess: Callable[[Image.Image], torch.Tensor],
        *,
        tokenizer: Callable[[list[str]], torch.Tensor],
        name: str = "clip",
        labels: Labels | None = None,
        templates: Sequence[str] = ("{}", "a picture of {}"),
        card: DetectorCard | None = None,
        temperature: float = TEMPERATURE,
        batch_size: int = 64,
    ) -> None:
        self.model: Any = model.eval()  # encode_image and encode_text are open_clip's, not Module's
        self.preprocess, self.tokenizer = preprocess, tokenizer
        self.name, self.templates = name, tuple(templates)
        self.temperature, self.batch_size = temperature, batch_size
        self.phrases = {attribute: phrases_of(given) for attribute, given in (labels or {}).items()}
        self.card = card or DetectorCard(
            name,
            "zero-shot",
            weights_sha256=fingerprint(model),
            preprocessing=" ".join(str(preprocess).split()),
            labels={attribute: tuple(given) for attribute, given in self.phrases.items()},
            notes="Sensitivity and specificity were not measured.",
        )
        self._text_features: dict[str, torch.Tensor] = {}

    def with_labels(self, labels: Labels) -> ClipDetector:
        """A detector of other labels around the same network: loading and hashing it takes longer than the pictures."""
        other = copy.copy(self)
        other.phrases, other._text_features = {attribute: phrases_of(own) for attribute, own in labels.items()}, {}
        named = {attribute: tuple(own) for attribute, own in other.phrases.items()}
        other.card = dataclasses.replace(self.card, labels=named)
        return other

    @classmethod
    def load(
        cls,
        model: str | Path,
        pretrained: str | None = None,
        *,
        device: str = "cpu",
        name: str | None = None,
        **settings: Any,
    ) -> ClipDetector:
        """Load any open_clip model: a name with its weights' tag, ``hf-hub:org/name``, or a local folder.

        >>> ClipDetector.load("ViT-B-32", "openai", labels={"concept": ("cat", "dog", "nothing")})  # doctest: +SKIP
        """
        import open_clip

        folder = Path(model)
        source = f"local-dir:{folder}" if folder.is_dir() else str(model)
        if not pretrained and ":" not in source:
            raise ValueError(
                f"an open_clip model needs weights; got {str(model)!r} alone; "
                "name their tag too ('openai'), or give a folder"
            )
        network, _, preprocess = open_clip.create_model_and_transforms(source, pretrained=pretrained, device=device)
        label = folder.name if folder.is_dir() else "/".join(filter(None, (str(model), pretrained))).lower()
        return cls(
            network, preprocess, tokenizer=open_clip.get_tokenizer(source), name=name or f"clip[{label}]", **settings
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def labels(self, attribute: str) -> tuple[str, ...]:
        """The labels of an attribute; empty when this detector was given none."""
        return tuple(self.phrases.get(attribute, ()))

    def scores(self, images: Sequence[Image.Image], attribute: str) -> np.ndarray:
        """Zero-shot probabilities (images, labels): softmax of 100 times the cosines."""
        if not (phrases := self.phrases.get(attribute)):
            raise ValueError(
                f"{self.name} has no labels for {attribute!r}; it knows {sorted(self.phrases)}; pass them as `labels`"
            )
        if attribute not in self._text_features:
            self._text_features[attribute] = torch.cat([self._class_feature(words) for words in phrases.values()])
        logits = self.temperature * self.image_features(images) @ self._text_features[attribute].T
        return logits.softmax(-1).numpy()

    def cosines(self, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        """Cosine of each picture with its own text, (n,) in [-1, 1]. Negative values stay negative."""
        if len(images) != len(texts):
            raise ValueError(f"one text per picture; got {len(images)} pictures and {len(texts)} texts")
        distinct = list(dict.fromkeys(texts))
        features = self.text_features(distinct) if distinct else torch.zeros(0, 1)
        own = features[[distinct.index(text) for text in texts]]
        return (self.image_features(images) * own).sum(-1).numpy() if distinct else np.zeros(0)

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Unit vectors (n, d) float32 on the CPU."""
        batches = []
        for start in range(0, len(images), self.batch_size):
            pixels = torch.stack(
                [self.preprocess(image.convert("RGB")) for image in images[start : start + self.batch_size]]
            )
            batches.append(_unit(self.model.encode_image(pixels.to(self.device))))
        return torch.cat(batches) if batches else torch.zeros(0, 1)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors (n, d) float32 on the CPU."""
        batches = [list(texts[i : i + self.batch_size]) for i in range(0, len(texts), self.batch_size)]
        return torch.cat([_unit(self.model.encode_text(self.tokenizer(batch).to(self.device))) for batch in batches])

    def _class_feature(self, phrases: Sequence[str]) -> torch.Tensor:
        sentences = [template.replace("{}", phrase) for phrase in phrases for template in self.templates]
        return _unit(self.text_features(sentences).mean(0, keepdim=True))


def phrases_of(labels: Sequence[str] | Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Labels with what they are called: each with its article, where nothing else is given."""
    if isinstance(labels, Mapping):
        return {label: tuple(words) for label, words in labels.items()}
    return {label: NOTHING_PHRASES if label == NOTHING else (with_article(label),) for label in labels}


def _unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of a model's tensors and their names."""
    state = sorted(model.state_dict().items())
    return sha256(piece for name, tensor in state for piece in tensor_bytes(name, tensor, described=False))
