"""The page of a report beside the paired pictures: answers, claims, policy, attacks, evidence by probe, limits."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from erasure.eval.judge import PICTURES, QUESTIONS, ClaimReport, Facts, plainly
from erasure.eval.judge.licences import LADDER, LICENCES, NO_CLAIM
from erasure.eval.probes import probe_class
from erasure.eval.probes.attacking import SHOWN
from erasure.eval.probes.base import Observation, Probe
from erasure.eval.report import html as report
from erasure.eval.report.evidence import WORDS, more, section
from erasure.eval.run.assessment import Assessment

LEVELS = {NO_CLAIM: "No claim", **{code: level.title for code, level in LADDER.items()}}
COLUMNS = {"suppression": "Suppression: what comes out when asked", "removal": "Removal: what is still inside"}


def page_of(assessment: Assessment, title: str | None = None) -> dict[str, Any]:
    """Everything that the templates read."""
    evaluation, target = assessment.evaluation, assessment.evaluation.suite.target
    reports = assessment.claims()
    probes, plain = list(assessment.probes()), assessment.preset == PICTURES
    page, facts = report.pictures_page(evaluation), assessment.facts()
    for block in page["blocks"]:  # a model that is judged and a control is shown once
        block["rows"] = [row for row in block["rows"] if row["arm"] not in assessment.same_as.values()]
    return page | {
        "title": title or f"{target[:1].upper()}{target[1:]}, {'before and after' if plain else 'assessed'}",
        "over": f"Concept erasure, {'evaluated' if plain else 'assessed'}",
        "preset": "" if plain else assessment.preset,
        "trial": facts.trial,
        "cards": [card(found, facts) for found in reports],
        "questions": QUESTIONS,
        "hashes": {model.name: model.weights[:8] for model in assessment.models},
        "pairs": pairs(page["blocks"], [report.BASE, *(found.model for found in reports)]),
        "glossary": WORDS["glossary"],
        "policy": assessment.policy,
        "requirements": requirements(assessment),
        "objections": assessment.objections(),
        "attacks": attacks(assessment, probes),
        "sections": [section(name, assessment, probes) for name in WORDS["sections"]],
        "models": assessment.models,
        "roles": {"base": "base", "erased": "erasure", **report.CONTROLS},
        "settings": report.settings_lines(assessment.settings),
        "not_assessed": not_assessed(reports),
        "limits": assessment.limits,
    }


# --- claims ---------------------------------------------------------------------------------------------------------


def pairs(blocks: Sequence[dict[str, Any]], arms: Sequence[str]) -> dict[str, Any] | None:
    """One prompt of each group, drawn by the base and by every erasure; None without pictures."""
    if not blocks:
        return None
    at = [{row["arm"]: row["cells"][0] for row in block["rows"]} for block in blocks]
    columns = [{"kind": block["heading"], "prompt": block["columns"][0][0]} for block in blocks]
    return {"columns": columns, "rows": [{"arm": arm, "cells": [own.get(arm) for own in at]} for arm in arms]}


def card(found: ClaimReport, facts: Facts) -> dict[str, Any]:
    columns = []
    for column, heading in COLUMNS.items():
        level = found.suppression if column == "suppression" else found.removal
        said = [] if level == NO_CLAIM else [_parts(sentence) for sentence in found.stated[column]]
        columns.append({
            "heading": heading, "code": level if level in LADDER else "",
            "words": LEVELS.get(level, level[:1].upper() + level[1:]),
            "said": said, "against": found.against[column], "needed": found.needed[column],
            "wanted": "What a claim needs" if level == NO_CLAIM else "What the next level needs",
        })  # fmt: skip
    readings = [LICENCES[key] for key in found.readings]
    return {"report": found, "plain": plainly(found.answers, facts), "columns": columns, "readings": readings}


def _parts(sentence: str) -> tuple[str, str]:
    said, mark, never = sentence.partition("It does not mean")
    return said, mark + never


def requirements(assessment: Assessment) -> list[tuple[str, str]]:
    """What the policy says of each column."""
    if assessment.policy is None:
        return []
    policy = assessment.policy
    asked = (
        ("Suppression", policy.suppression_required, policy.suppression_level),
        ("Removal", policy.removal_required, policy.removal_level),
    )
    words = {False: "not required", None: "not decided"}
    return [(column, words.get(value, f"required, at least {level}")) for column, value, level in asked]


def not_assessed(reports: Sequence[ClaimReport]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Heading to (reason, titles of its probes): first those of every checkpoint, then those of each alone."""
    every = [found.not_assessed for found in reports]
    shared = (
        {p: reason for p, reason in every[0].items() if all(own.get(p) == reason for own in every)} if every else {}
    )
    headings = [("every checkpoint", shared)]
    headings += [(r.model, {p: why for p, why in r.not_assessed.items() if p not in shared}) for r in reports]
    out = []
    for heading, own in headings:
        if not own:
            continue
        by: dict[str, list[str]] = {}
        for probe, reason in own.items():
            by.setdefault(reason, []).append(f"{probe_class(probe).title} ({probe})")
        out.append((heading, [(reason, ", ".join(titles)) for reason, titles in by.items()]))
    return out


# --- attacks --------------------------------------------------------------------------------------------------------


def attacks(assessment: Assessment, probes: Iterable[Probe]) -> list[dict[str, Any]]:
    erased = [model.name for model in assessment.models if model.role == "erased"]
    found = []
    for model, probe in itertools.product(erased, list(probes)):
        rows = assessment.rows(probe.key).get(model, [])
        tried, control = ([row for row in rows if row.family == family] for family in ("attack", "control"))
        if not tried:
            continue
        hits: dict[str, Observation] = {}
        for row in tried:
            if row.value == 1:
                hits.setdefault(row.cluster, row)
        found.append({
            "model": model, "probe": probe, "asked": len({row.cluster for row in tried}), "broken": len(hits),
            "control": len({row.cluster for row in control if row.value == 1}) if control else None,
            "shown": [_hit(row) for row in list(hits.values())[:SHOWN]], "more": max(0, len(hits) - SHOWN),
        })  # fmt: skip
    return found


def _hit(row: Observation) -> dict[str, Any]:
    prompt = str(row.facts.get("prompt", row.cluster))
    return {
        "prompt": prompt,
        "cluster": row.cluster if row.cluster != prompt else "",
        "seen": str(row.facts.get("top") or "the target"),
        "png": row.facts.get("png"),
        "more": more(row, {"prompt", "tries", "score", "nothing"}),
    }
