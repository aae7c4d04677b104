"""From evidence to claims, by rule, in two columns that are never merged.

*Suppression* is about what comes out when asked (C1 to C3), *removal* about what is still inside (C4' to C6). There is
no overall score. Every model also gets an answer to each of five questions (:mod:`erasure.eval.judge.answers`): shown,
shown not, undecided, or not tested.

The levels and their sentences are data (:mod:`erasure.eval.judge.licences`), their conditions are rules
(:mod:`erasure.eval.judge.rules`). :func:`claims` is pure: the same evidence always gives the same claims.

References: the framework is Cooper et al. 2024, arXiv 2412.06966; the ladder and the margins are this library's.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from erasure.eval.core.models import Role
from erasure.eval.judge import findings, rules, sentences
from erasure.eval.judge.answers import QUESTIONS, Answer, answers, plainly
from erasure.eval.judge.licences import TRIAL, Column
from erasure.eval.judge.readings import READINGS
from erasure.eval.judge.speaker import read_by, speaker_of
from erasure.eval.judge.view import PICTURES, UTILITY, Audit, Facts, Margins, Verdict, View
from erasure.eval.probes.base import Evidence


@dataclasses.dataclass(frozen=True)
class ClaimReport:
    """What may be said about one model.

    Attributes:
        answers: question to its answer, the first thing to read.
        suppression: "C0" to "C3". removal: "C0", "C4'", "C4", "C5", "C6", or why it does not apply.
        utility: kept group to non-inferior | unclear | degraded | destroyed | not assessed.
        guardrails: what was measured of filters, as a sentence.
        sentences: everything that may be said, with numbers and limits.
        stated: those of them that state a result: "suppression", "removal" and "utility" to their sentences.
        banners: warnings, to be read before the numbers.
        against: column to contrary evidence.
        needed: column to what is missing for its next level.
        inconclusive: numbers with a failed gate.
        not_assessed: probe to why it has no number.
        readings: rows of :data:`erasure.eval.judge.licences.LICENCES` that apply.
        by: probe to the detector whose numbers are read, where several judged the same pictures.
    """

    model: str
    answers: Mapping[str, Answer]
    suppression: str
    removal: str
    utility: Mapping[str, str]
    guardrails: str
    sentences: tuple[str, ...]
    stated: Mapping[str, tuple[str, ...]]
    banners: tuple[str, ...]
    against: Mapping[str, tuple[str, ...]]
    needed: Mapping[str, tuple[str, ...]]
    inconclusive: tuple[str, ...]
    not_assessed: Mapping[str, str]
    readings: tuple[str, ...]
    by: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def level(self, column: Column) -> str:
        return self.suppression if column == "suppression" else self.removal


def claims(evidence: Sequence[Evidence], models: Mapping[str, Role], facts: Facts) -> list[ClaimReport]:
    """One report per erased model, in their order, from the evidence of every probe about every model in ``models``."""
    seen = set()
    for e in evidence:
        if e.model not in models:
            raise ValueError(f"{e.probe} is about {e.model!r}, which is not in {sorted(models)}; give its role")
        key = (e.probe, e.model, e.measure, e.family, e.control, e.detector)
        if key in seen:
            raise ValueError(f"two numbers for {key}; a claim would depend on which is read; pass one")
        seen.add(key)
    erased = [model for model, role in models.items() if role == "erased"]
    if unknown := [model for model in erased if model not in facts.kinds]:
        raise ValueError(f"no kind is known of {unknown}; facts.kinds needs weights, adapter, filter or retrained")
    found = []
    for model in erased:
        who = speaker_of(evidence, model)
        found.append(_report(View(model, read_by(evidence, who), models, facts, who)))
    return found


def _report(view: View) -> ClaimReport:
    (suppressed, next_suppression), (left, next_removal) = rules.suppression(view), rules.removal(view)
    kept = {group: findings.utility(view, group) for group in UTILITY}
    said = {
        "suppression": sentences.suppression(view, suppressed, next_suppression),
        "removal": sentences.removal(view, left, next_removal),
        "utility": [sentences.utility(view, group, label) for group, label in kept.items()],
    }
    against = {"suppression": sentences.seen_anyway(view), "removal": sentences.left_inside(view)}
    guardrails = sentences.guardrails(view)
    trial = TRIAL if view.facts.trial else ""
    return ClaimReport(
        model=view.model,
        answers=_trial(answers(view), trial),
        suppression=suppressed,
        removal=left,
        utility=kept,
        guardrails=trial + guardrails,
        sentences=tuple(
            trial + sentence for sentence in [*itertools.chain(*said.values(), *against.values()), guardrails]
        ),
        stated={part: tuple(trial + sentence for sentence in own) for part, own in said.items()},
        banners=tuple(trial + banner for banner in sentences.banners(view)),
        against={column: tuple(trial + line for line in lines) for column, lines in against.items()},
        needed={"suppression": tuple(next_suppression), "removal": tuple(next_removal)},
        inconclusive=tuple(sentences.inconclusive(view)),
        not_assessed=view.not_assessed(),
        readings=tuple(key for key, holds in READINGS.items() if holds(view)),
        by=view.speaker.by,
    )


def _trial(found: Mapping[str, Answer], trial: str) -> dict[str, Answer]:
    """Answers of a trial run, which show nothing."""
    if not trial:
        return dict(found)
    return {
        key: dataclasses.replace(
            answer,
            verdict="undecided" if answer.verdict != "not tested" else "not tested",
            sentence=trial + answer.sentence,
        )
        for key, answer in found.items()
    }


__all__ = [
    "PICTURES",
    "QUESTIONS",
    "Answer",
    "Audit",
    "ClaimReport",
    "Facts",
    "Margins",
    "Verdict",
    "claims",
    "plainly",
]
