"""What lies close to a concept for a model, as a first draft of a keep list: no picture is drawn."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from erasure.artifact.record import base_name
from erasure.backbone import Backbone, backbone_of
from erasure.concept import WORLD, Concept, Suite
from erasure.methods.closed_form import EVERYDAY, rows
from erasure.wording import folded, naming, same, with_article

ARTICLE = re.compile(r"^an? ")


@torch.no_grad()
def suggest_neighbours(
    pipe: Any, concept: str | Concept, *, n: int = 8, among: Iterable[str] | None = None
) -> list[str]:
    """Names that an erasure of a concept is likely to damage, the nearest first: a draft of the keep list.

    Where a shipped suite has the concept as its target or as a neighbour, what stands beside it there comes first. The
    others are ranked by what this model's text encoder makes of them: the cosine between mean embeddings of "a
    superhero" and "a wizard", each minus the mean of all candidates. Near to the encoder is what an edit of the text
    reaches first, and not always what a person would call alike. Look through the list, and take out what means the
    concept itself.

    Args:
        pipe: a diffusers pipeline.
        concept: a name or a :class:`Concept`; its own neighbours come first.
        n: how many at most.
        among: names to choose from. By default those in the shipped suites (Emoji World: in its own suites) and ninety
            everyday nouns. Give your own where the concept is of another sort: other cars for a car.

    Raises:
        ValueError: n is below 1, the concept has no name, or the text encoder cannot read it.
    """
    if n < 1:
        raise ValueError(f"n is how many names are wanted; got {n}; give 1 or more")
    backbone, concept = backbone_of(pipe), Concept.of(concept)
    own, plans = base_name(pipe) == WORLD, [*map(Suite.load, Suite.shipped())]
    first = [*concept.neighbours, *_of_suites(plans, concept, world=own)]
    names = candidate_names(plans, world=own, style=not own or concept.kind == "style") if among is None else among
    candidates = backbone.fitting(_others(names, concept))
    return list(dict.fromkeys([*first, *_nearest(backbone, concept, candidates)]))[:n]


def candidate_names(suites: Iterable[Suite], *, world: bool, style: bool = True) -> list[str]:
    """Every name in suites that a base may know, and everyday nouns; on Emoji World its own alone.

    Args:
        style: whether Emoji World's styles and backgrounds are among them.
    """
    found: list[str] = [] if world else list(EVERYDAY)
    for suite in suites:
        theirs = suite.base == WORLD
        if (theirs or not world) and (style or not theirs or suite.attribute == "concept"):
            found += [*(c.name for c in suite.concepts if c.kind != "nsfw"), *suite.neighbours, *suite.unrelated]
            found += suite.keep if theirs == world else ()  # "noto style" means something on Emoji World alone
    kept = (name for name in found if style or not name.endswith((" style", " background")))
    return list({ARTICLE.sub("", folded(name)): name for name in kept}.values())


def _of_suites(suites: Iterable[Suite], concept: Concept, *, world: bool) -> list[str]:
    """Shipped neighbours of the concept; behind them, what stands beside it among another one's neighbours."""
    known = [one for suite in suites if (suite.base == WORLD) == world for one in suite.concepts]
    own = [one.neighbours for one in known if _meet(one.phrases, concept.phrases)]
    beside = [
        (one.name, *one.neighbours) for one in known if one.kind != "nsfw" and _meet(one.neighbours, concept.phrases)
    ]
    return _others((name for group in (*own, *beside) for name in group), concept)


def _meet(names: Iterable[str], others: Sequence[str]) -> bool:
    return any(same(name, other) for name in names for other in others)


def _others(names: Iterable[str], concept: Concept) -> list[str]:
    """Those of the names that do not name the concept, and that it does not name: "engine" of "fire engine"."""
    phrases = [*map(folded, concept.phrases)]
    return [name for name in names if not naming([folded(name)], phrases) and not naming(phrases, [folded(name)])]


def _nearest(backbone: Backbone, concept: Concept, candidates: Sequence[str]) -> list[str]:
    """Candidates by the cosine of their centred embeddings with the concept's, the highest first."""
    if not candidates:
        return []
    backbone.check_lengths([concept.name])
    x = _means(backbone, [*candidates, concept.name])
    x = F.normalize(x - x[:-1].mean(dim=0), dim=1)
    return [candidates[i] for i in (x[:-1] @ x[-1]).argsort(descending=True, stable=True).tolist()]


def _means(backbone: Backbone, names: Sequence[str]) -> Tensor:
    """The mean embedding of each name's tokens, ``(n, d)``."""
    phrases = [with_article(name) for name in names]
    fitting = {*backbone.fitting(phrases)}  # no room for the article
    said = [phrase if phrase in fitting else name for phrase, name in zip(phrases, names, strict=True)]
    return torch.stack([one.float().mean(dim=0).cpu() for one in rows(backbone, said, "content")])


__all__ = ["candidate_names", "suggest_neighbours"]
