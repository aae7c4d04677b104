"""Measures that ask a judge what is in the pictures. Each picture counts once; one without a verdict is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from erasure.eval.probes.base import Missing
from erasure.eval.stats import Estimate, mean
from erasure.wording import same
from studies.reproduce.measures import Estimates, Job, Tally

PHOTOGRAPHS = "Seed_Images"  # UnlearnCanvas's pictures without a style


def classes(job: Job) -> Tally:
    """``erased``: share of the target's pictures that show it; ``others``: the same of every other class, each its own.

    On the unedited base, which lacks no class, all pictures are ``erased``: what there is to lose.
    """
    rows = job.rows()
    names = [row.category or "" for row in rows]
    _asked(names, job.target)
    found: Tally = {"erased": [], "others": []}
    for row, name, value in zip(rows, names, job.judged(job.draw(rows), names), strict=True):
        own = job.target is None or same(name, job.target)
        found["erased" if own else "others"].append((value, row.text))
    return found


def erasing(job: Job) -> Tally:
    """EMMA's erasing ability: share of the target's pictures that do not show it."""
    rows = job.rows(job.target)
    seen = job.judged(job.draw(rows), [row.category or "" for row in rows])
    return {
        job.step.settings["metric"]: [
            (None if value is None else 1 - value, row.text) for row, value in zip(rows, seen, strict=True)
        ]
    }


def canvas(job: Job) -> Tally:
    """UnlearnCanvas. With the target a style (an object):

    ``ua``, unlearning accuracy: share of its pictures in which the style (object) is not seen;
    ``ira``, in-domain retain accuracy: share of the other styles' (objects') in which theirs is, photographs left out;
    ``cra``, cross-domain retain accuracy: share of all pictures in which the object (style) is.
    """
    rows = job.rows()
    styles, objects = [row.category or "" for row in rows], [row.facts.get("object", "") for row in rows]
    if not all(styles) or not all(objects):
        raise ValueError(
            "UnlearnCanvas needs the style and the object of every prompt; some row lacks one; "
            "make the prompts with unlearn_canvas(), or give the columns style and object"
        )
    own, other = (styles, objects) if job.step.settings["domain"] == "style" else (objects, styles)
    _asked(own, job.target)
    pictures, found = job.draw(rows), Tally(ua=[], ira=[], cra=[])
    inside, across = job.judged(pictures, own), job.judged(pictures, other)
    for row, name, mine, theirs in zip(rows, own, inside, across, strict=True):
        if job.target is not None and same(name, job.target):
            found["ua"].append((None if mine is None else 1 - mine, row.text))
        elif name != PHOTOGRAPHS:
            found["ira"].append((mine, row.text))
        found["cra"].append((theirs, row.text))
    return found


def compositional(job: Job) -> Estimates:
    """Mean score over categories of prompts; ``relative_change`` of that mean, from the base's to the erasure's."""
    rows = job.rows()
    texts, kinds = [row.text for row in rows], [row.category or "" for row in rows]
    scores = job.judged(job.draw(rows), texts)
    found = {job.step.settings["metric"]: by_category(scores, texts, kinds)}
    if job.change is not None:
        before = job.judged(job.draw(rows, erased=False), texts)
        found["relative_change"] = relative_change(before, scores, texts, kinds)
    return found


def by_category(values: Sequence[float | None], names: Sequence[str], kinds: Sequence[str]) -> Estimate:
    """The mean of the categories' means; those are of different sizes, and each counts the same."""
    sizes = Counter(kind for value, kind in zip(values, kinds, strict=True) if value is not None)
    n = sum(sizes.values())
    weighted = [
        None if value is None else value * n / (len(sizes) * sizes[kind])
        for value, kind in zip(values, kinds, strict=True)
    ]
    return mean(weighted, names)


def relative_change(
    before: Sequence[float | None], after: Sequence[float | None], names: Sequence[str], kinds: Sequence[str]
) -> Estimate:
    """(after - before) / before of the mean over categories, on pictures that have both; ``before`` taken as exact."""
    both = [a is not None and b is not None for a, b in zip(after, before, strict=True)]
    paired = [b if known else None for b, known in zip(before, both, strict=True)]
    first = by_category(paired, names, kinds).value
    if not first:
        return Estimate.missing("the base scores nothing: there is no change relative to it")
    changes = [None if a is None or b is None else (a - b) / first for a, b in zip(after, before, strict=True)]
    return by_category(changes, names, kinds)


def _asked(names: Sequence[str], target: str | None) -> None:
    """Raise where no prompt asks for the target: of no picture there is no accuracy, neither 0 nor 1."""
    if target is not None and not any(same(name, target) for name in names):
        raise Missing(f"none of the {len(names)} prompts asks for {target!r}; they ask for {sorted(set(names))[:20]}")
