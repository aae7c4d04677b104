"""S17: requests one after another: does what was erased first stay out, and what does each further request cost?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from erasure.artifact import OperatorErasure
from erasure.eval.core.models import Applied
from erasure.eval.core.pictures import evenly
from erasure.eval.core.stacked import Stacked
from erasure.eval.core.verdicts import among
from erasure.eval.probes.asking import Sentence, spelled
from erasure.eval.probes.base import Context, Estimate, Evidence, Gate, Missing, Model, Observation, Probe, Roles, Rows
from erasure.eval.probes.weigh import KNOWN, POWER, at_least, units
from erasure.eval.stats import difference, rate
from erasure.methods.resolve import resolve

Asked = tuple[str, int, Sentence]  # label, request (0 is what is kept), and prompt


class Series(NamedTuple):
    """Requests in their order, and the model after any number of them.

    Attributes:
        names: of the concepts of each request.
        after: the change that the first so many requests make, 1 to all.
    """

    names: tuple[tuple[str, ...], ...]
    after: Callable[[int], Applied]


@dataclasses.dataclass(frozen=True)
class Sequential(Probe):
    """Ask for every erased concept, and for what is kept, after k of the N requests that a model is made of.

    A model has requests where its change is a :class:`~erasure.eval.core.stacked.Stacked` (erasures put on one after
    another; after k requests the first k of them) or one closed form of several concepts that holds its regression
    (then the first k are solved jointly, as :func:`erasure.resolve` does). After 0 is the base itself. Prompts and
    noise are the same after every request.

        returned = r_j(after N) - r_j(after j)

    with r_j the share of pictures of request j's concepts in which they are seen: above 0 they come back.

    Families: "requests k" is the first request's concepts, a curve; "erased, after k" all whose request was met by
    then; "kept, after k" the suite's neighbours and unrelated things that no request names, with the change against
    the base. "returned" stands for all requests but the last together, and for each by its concepts' names. Its gates:
    ``known``, that the base draws them, and ``power``, that their own request kept them out of a fifth of the pictures
    at least: what never left cannot return.

    Attributes:
        looks: at most so many k beside 0, spread evenly, the first and the last among them. Those requests' concepts
            are asked for.
        prompts: sentences for each concept. kept: prompts for what is kept.
    """

    key, code, title = "sequential", "S17", "request after request"
    section, level, access = "suppression", "outputs", "black_box"
    presets = {
        "smoke": {"looks": 2, "prompts": 1, "kept": 2, "images_per_prompt": 1},
        "standard": {"looks": 4, "images_per_prompt": 1},
        "full": {"looks": 8, "kept": 60},
    }
    measures = {"rate": "seen", "returned": "more than right after their own request"}
    licences = "whether these concepts stay out under these later requests, and what those cost what is kept"
    not_licensed = "another order, further requests, prompts beyond the suite's templates"
    reference = "after Distill, Forget, Repeat, 2025, arXiv 2512.02657, and CUIG, ICLR 2026, arXiv 2511.07970"

    looks: int = 4
    prompts: int = 6
    kept: int = 24
    images_per_prompt: int = 2

    def __post_init__(self) -> None:
        if min(self.looks, self.prompts, self.kept, self.images_per_prompt) < 1 or self.looks < 2:
            raise ValueError(
                f"a series needs two looks or more, and one prompt and picture at least; got {self.settings()}"
            )

    def concerns(self, model: Model) -> bool:
        return model.role == "erased"

    def run(self, model: Model, context: Context) -> list[Observation]:
        series = series_of(model)
        count = len(series.names)
        marks = evenly(range(1, count + 1), self.looks)
        asked, found = self.asks(series, marks, context), []
        known = context.judge.labels(context.suite.attribute)
        unknown = [label for label in dict.fromkeys(label for label, _, _ in asked) if not among(label, known)]
        for label in unknown:
            reason = f"{context.judge.name} has no label {label!r}"
            found.append(Observation(model.name, "", label, 0, None, reason))
        asked = [one for one in asked if one[0] not in unknown]
        if not any(request for _, request, _ in asked):
            raise Missing(f"{context.judge.name} has a label for none of what {model.name} erases")
        for k in (0, *marks):
            found += self.look(model, at(model, series, k, context), context, asked, {"after": k, "of": count})
        return found

    def asks(self, series: Series, marks: Sequence[int], context: Context) -> list[Asked]:
        found: list[Asked] = []
        for request in marks:
            for name in series.names[request - 1]:
                found += [(name, request, one) for one in evenly(spelled(context, [name]), self.prompts)]
        gone = [*context.suite.phrases, *(name for names in series.names for name in names)]
        kept = [
            (p.label, 0, Sentence(p.text, p.template, p.phrase))
            for p in context.suite.prompts()
            if p.group != "target" and not among(p.label, gone)
        ]
        return found + evenly(kept, self.kept)

    def look(
        self, model: Model, drawn: Model, context: Context, asked: Sequence[Asked], facts: Mapping[str, int]
    ) -> list[Observation]:
        """Every prompt with every seed, from the model after some requests; each judged by its own label."""
        seeds, found = tuple(range(self.images_per_prompt)), []
        with context.open(drawn) as pipe:
            pictures = context.draw(pipe, drawn, [one.text for _, _, one in asked], seeds=seeds)
        for (label, request, one), images in zip(asked, pictures, strict=True):
            about = {"prompt": one.text, "template": one.template, "phrase": one.phrase, "label": label}
            found += context.observe(
                model, images, family=f"after {facts['after']}", clusters=[one.text] * len(seeds), seeds=seeds,
                label=label, facts=[{**about, "request": request, **facts}] * len(seeds),
            )  # fmt: skip
        return found

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        return [evidence for name, own in rows.items() for evidence in self.of_one(name, own)]

    def of_one(self, name: str, rows: Sequence[Observation]) -> list[Evidence]:
        rows = [row for row in rows if row.value is not None]
        marks = sorted({row.facts["after"] for row in rows})
        requests = sorted({row.facts["request"] for row in rows} - {0})
        found = []
        for k in marks:
            here = [row for row in rows if row.facts["after"] == k]
            for family, chosen in (
                (f"requests {k}", of(here, requests[:1])),
                (f"erased, after {k}", of(here, [j for j in requests if j <= k])),
                (f"kept, after {k}", of(here, [0])),
            ):
                if chosen:
                    seen = rate([r.value for r in chosen], units(chosen, kept=family.startswith("kept")))
                    found.append(Evidence(self.key, name, "rate", seen, family))
            if k and of(here, [0]):
                change, gates = moved(rows, [(0, 0, k)])
                found.append(Evidence(self.key, name, "change", change, f"kept, after {k}", gates=gates))
        earlier = [j for j in requests if j < marks[-1]]
        groups = [("", earlier), *((", ".join(labels(rows, j)), [j]) for j in earlier)]
        for family, chosen_requests in groups if earlier else []:
            back, known_gate = moved(rows, [(j, j, marks[-1]) for j in chosen_requests])
            left, _ = moved(rows, [(j, 0, j) for j in chosen_requests])
            power: Gate = "pass" if left.high is not None and left.high <= -POWER else "fail"
            gates = {**known_gate, "power": power}
            found.append(Evidence(self.key, name, "returned", back, family, gates=gates))
        return found


def series_of(model: Model) -> Series:
    """The requests of a model, two or more."""
    change = model.change
    if isinstance(change, Stacked):
        names = tuple(tuple(one["name"] for one in edit.config.concepts) for edit in change.erasures)
        series = Series(names, change.first)
    elif isinstance(change, OperatorErasure) and change.system:
        names = tuple((one["name"],) for one in change.config.concepts)
        flat, edit = [name for (name,) in names], change
        series = Series(names, lambda k: resolve([edit], without=flat[k:], name=f"the first {k} of {edit.name}"))
    else:
        series = Series(((),), lambda _: change)  # type: ignore[arg-type, return-value]
    if len(series.names) < 2:
        raise Missing(
            f"{model.name} is a single request; requests one after another need several erasures as one `Stacked`, or "
            "a closed form of several concepts that holds its system"
        )
    return series


def at(model: Model, series: Series, k: int, context: Context) -> Model:
    """The model after ``k`` requests, for drawing: the base after none."""
    if k in (0, len(series.names)):
        return model if k else context.base
    return Model(f"{model.name}, {k} of {len(series.names)}", "erased", series.after(k))


def of(rows: Iterable[Observation], requests: Sequence[int]) -> list[Observation]:
    return [row for row in rows if row.facts["request"] in requests]


def labels(rows: Sequence[Observation], request: int) -> list[str]:
    """The concepts of a request that were asked for."""
    return list(dict.fromkeys(row.facts["label"] for row in of(rows, [request])))


def moved(rows: Sequence[Observation], spans: Sequence[tuple[int, int, int]]) -> tuple[Estimate, dict[str, Gate]]:
    """The change of some requests' rates, paired by prompt and noise; and the gate ``known``, that the base draws them.

    Args:
        spans: ``(request, first, last)``: from after ``first`` requests to after ``last``. Request 0 is what is kept.
    """
    before: list[Observation] = []
    after: list[Observation] = []
    base: list[Observation] = []
    for request, first, last in spans:
        own = of(rows, [request])
        start, end, none = ([row for row in own if row.facts["after"] == k] for k in (first, last, 0))
        before, after, base = before + start, after + end, base + none
    kept = all(request == 0 for request, _, _ in spans)
    low = rate([row.value for row in base], units(base, kept=kept)).low
    change = difference([row.value for row in before], [row.value for row in after], units(before, kept=kept))
    return change, {"known": at_least(low, KNOWN)}
