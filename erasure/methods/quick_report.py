"""What a closed form did, in the second it takes to multiply matrices: no picture is generated.

It sees what the layers make of single embeddings, so it catches an edit that did nothing, or hit everything, before
anyone waits for pictures. It says nothing about pictures themselves.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from erasure.backbone import Backbone, Site, Space
from erasure.concept import Concept
from erasure.methods.base import check_change
from erasure.methods.ridge import Solution, gram_root
from erasure.wording import same, with_article

GENERIC = ("a photo", "a tree by a river", "a red car in a city", "a bowl of fruit on a table", "a portrait of a woman")
MOST = 64  # prompts of a group that are looked at


@torch.no_grad()
def quick_report(
    backbone: Backbone,
    solution: Solution,
    sites: Mapping[str, Site],
    concepts: Sequence[Concept],
    keep: Sequence[str],
    space: Space,
) -> dict[str, Any]:
    """Measure an edit on target, neighbours and generic prompts.

    Returns:
        ``relative_change`` of the weights, ``|W' - W| / |W|``; ``condition`` of the system; ``rank`` and ``norm`` of
        T - I; and for each group of prompts ``moved``, the mean relative change ``|W'x - Wx| / |Wx|`` of what the
        layers make of its last word and its end token, and ``cosine`` between the two.

    Raises:
        ValueError: the edit did nothing (a relative change of the weights below 1e-6).

    Warns:
        UserWarning: neighbours or generic prompts move at least half as much as the target.
    """
    device = backbone.device
    u = solution.u.float().to(device)
    groups = {
        "target": [phrase for concept in concepts for phrase in concept.phrases],
        "neighbours": list(keep) or [n for concept in concepts for n in concept.neighbours],
        "generic": [g for g in GENERIC if not any(same(g, p) for concept in concepts for p in concept.phrases)],
    }
    prompts = {name: written(backbone, several[:MOST]) for name, several in groups.items()}
    x = {name: _embeddings(backbone, texts, space) for name, texts in prompts.items() if texts}
    totals = {name: torch.zeros(2, dtype=torch.float64) for name in x}
    changed = size = 0.0
    shared = solution.v.float().to(device)
    root = gram_root(shared)
    for name, site in sites.items():
        w = site.weight.float()
        own = solution.site_v.get(name)
        v = shared if own is None else own.float().to(device)
        wu = w @ u
        changed += float((wu @ (root if own is None else gram_root(v))).square().sum())
        size += float(w.square().sum())
        for group, rows in x.items():
            before = rows @ w.T
            change = (rows @ v) @ wu.T
            moved = change.norm(dim=1) / before.norm(dim=1).clamp(min=1e-12)
            cosine = F.cosine_similarity(before, before + change, dim=1)
            totals[group] += torch.stack([moved.mean(), cosine.mean()]).cpu().double()
    report: dict[str, Any] = {
        "relative_change": check_change(math.sqrt(changed / size)),
        "condition": solution.condition,
        "rank": u.shape[1],
        "norm": solution.norm,
    }
    for group, total in totals.items():
        moved_by, cosine_to = (total / len(sites)).tolist()
        report[group] = {"moved": moved_by, "cosine": cosine_to}
    _warn(report)
    return report


def written(backbone: Backbone, prompts: Sequence[str]) -> list[str]:
    """Prompts with an article where it fits the text encoder; what does not fit at all is left out."""
    with_articles = [with_article(prompt) for prompt in prompts]
    fitting = set(backbone.fitting([*with_articles, *prompts]))
    pairs = zip(with_articles, prompts, strict=True)
    return [article if article in fitting else plain for article, plain in pairs if plain in fitting]


def _embeddings(backbone: Backbone, prompts: Sequence[str], space: Space) -> Tensor:
    conditioning = backbone.read(prompts, padded=False)
    if space == "pooled":
        return torch.cat(conditioning.pooled_rows()).float()
    return torch.cat([r for span in ("last_subject", "eos") for r in conditioning.take(span)]).float()


def _warn(report: Mapping[str, Any]) -> None:
    target = report["target"]["moved"]
    for group, what, advice in (
        ("neighbours", "neighbours move", "name more of them in the keep list"),
        ("generic", "words that nobody named move", "set keep_everyday, keep_vocabulary or a corpus"),
    ):
        if group in report and report[group]["moved"] >= 0.5 * target:
            warnings.warn(
                f"{what} {report[group]['moved'] / max(target, 1e-12):.0%} as far as the target, so expect their "
                f"pictures to change; {advice}, or raise lamb or preserve_scale where the method has them",
                stacklevel=4,
            )


__all__ = ["MOST", "quick_report", "written"]
