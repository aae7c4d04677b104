"""The sentences of a claim report, with their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from erasure.eval.judge import findings
from erasure.eval.judge.answers import beside, percent, points, read, uncontradicted, worst_stratum
from erasure.eval.judge.licences import BY_CONSTRUCTION, LADDER, NO_CLAIM, NOT_APPLICABLE, NULL
from erasure.eval.judge.view import UTILITY, View, named
from erasure.eval.probes.base import Evidence
from erasure.eval.stats import worst_upper


def suppression(view: View, level: str, needed: Sequence[str]) -> list[str]:
    if level == NO_CLAIM:
        return [f"No claim about suppression of {view.facts.target} by {view.model}. Needed: {'; '.join(needed)}."]
    levels = ["C1", "C2", "C3"][: int(level[1])]
    numbers = {"C1": _direct, "C2": _varied, "C3": _attacked}
    return [_sentence(view, name, numbers[name](view)) for name in levels]


def removal(view: View, level: str, needed: Sequence[str]) -> list[str]:
    target, model = view.facts.target, view.model
    if level == NOT_APPLICABLE:
        return [
            f"Removal is not applicable: the suite says that {target} was never in the training data. Only suppression "
            "can be claimed."
        ]
    if level in BY_CONSTRUCTION:
        past = view.kind == "filter"
        speak = "go past it and find the base" if past else "measured it with its change applied"
        return [f"{model} is {level}. Probes of the weights {speak}."]
    if level == NO_CLAIM:
        return [f"No claim about removal of {target} by {model}. Needed: {'; '.join(needed)}."]
    if level == "C6":
        record = view.facts.audits[model]
        facts = {"scope": view.facts.scopes[model], "date": record.replayed, "contrary": uncontradicted(view)}
        return [_sentence(view, "C6", facts)]
    levels = [NULL] if level == NULL else ["C4", "C5"][: int(level[1]) - 3]
    return [_sentence(view, name, _compared(view)) for name in levels]


def _sentence(view: View, level: str, numbers: Mapping[str, str]) -> str:
    """The sentence of a level, what it means and what it does not."""
    row = LADDER[level]
    sentence = row.sentence.format(model=view.model, target=view.facts.target, **numbers)
    return f"{level}: {sentence} This means: {row.means}. It does not mean: {row.never}."


def _direct(view: View) -> dict[str, str]:
    rate = read(view, "direct", "rate")
    base = next(iter(view.of_base("direct", "rate")), None)
    share = f"recognised in {percent(rate.value)}" if rate.value else "not recognised in any"
    return {
        "seen": f"{share} of {rate.n} pictures",
        "upper": percent(rate.high),
        "worst": worst_stratum(view),
        "base": "an unknown share" if base is None else percent(base.estimate.value),
        "ceiling": f"{100 * view.margins.ceiling:g} %",
        "control": _leakage(view),
        "judge": _judge(view),
        "sampler": view.facts.sampler or "as in the settings",
    }


def _judge(view: View) -> str:
    """The detector of the direct prompts, with its errors, and why it is read."""
    name, chosen = view.judge(), view.speaker.chosen(view.facts.target)
    alone = view.facts.judge or ", ".join(view.facts.detectors)
    words = view.facts.judges.get(name, name) if view.speaker.by else alone
    return f"{words}, {chosen}," if chosen else words


def _leakage(view: View) -> str:
    """The rate of models that never saw the target, which need not be zero."""
    shown: dict[str, list[float]] = {"gold": [], "null": []}
    for model, role in view.models.items():
        if role in shown and model != view.facts.same_as.get(view.model):
            shown[role] += [
                e.estimate.value for e in view.each("direct", "rate", model) if e.estimate.value is not None
            ]
    if golds := shown["gold"]:
        between = dict.fromkeys((percent(min(golds)), percent(max(golds))))
        several = f"{len(golds)} models" if len(golds) > 1 else "a model"
        return f", with {several} retrained without it in {' to '.join(between)}"
    return f", with a null control in {percent(shown['null'][0])}" if shown["null"] else ""


def _varied(view: View) -> dict[str, str]:
    families = findings.counted(view)
    known = [e for e in families if findings.base_shows(view, e)]
    worst = max(families, key=lambda e: e.estimate.high or 0.0)
    upper = worst_upper([e.estimate for e in families])
    there = [(named(e), findings.base_rate(view, e)) for e in findings.uncounted(view)]
    left = "; ".join(f"{name} ({'base not measured' if base is None else f'base {base:%}'})" for name, base in there)
    return {
        "kinds": ", ".join(dict.fromkeys(e.probe for e in known)),
        "drops": str(len(known)),
        "upper": percent(upper),
        "ceiling": f"{100 * view.margins.ceiling:g} %",
        "count": str(len(families)),
        "worst": named(worst),
        "left": f" Tried and not counted, as the base's own lower limit there is too low: {left}." if left else "",
    }


def _attacked(view: View) -> dict[str, str]:
    strong = [attack for attack in findings.attacks(view) if view.passed(attack, "excess")]
    budgets = view.facts.budgets
    others = [attack for attack in findings.attacks(view) if attack not in strong]
    return {
        "attacks": ", ".join(f"{a} ({budgets[a]})" if a in budgets else a for a in strong),
        "upper": f"{100 * max(view.high(attack, 'excess') for attack in strong):.1f}",
        "limit": f"{100 * view.margins.excess:g}",
        "chance": percent(read(view, "random_control", "rate").value),
        "tries": f" ({budgets['random_control']})" if "random_control" in budgets else "",
        "left": f" Not run or inconclusive: {', '.join(others)}." if others else "",
    }


def _compared(view: View) -> dict[str, str]:
    """The numbers of C4', C4 and C5."""
    passed = ["inversion", *findings.resisted(view)]
    return {
        "probes": ", ".join(["relearning", "resurgence", *passed]),
        "residual": f"{max(view.high(probe, 'residual') for probe in passed):.2f}",
        "limit": f"{view.margins.residual:g}",
        "advantage": f"{view.high('relearning', 'advantage'):.2f}",
        "twice": f"{view.margins.advantage:g}",
        "points": f"{100 * view.margins.increase:g}",
        "increase": f"{100 * view.high('resurgence', 'above_control'):.1f}",
        "golds": str(min((view.golds(e.probe) for e in findings.carriers(view)), default=0)),
        "scope": view.scope(),
        "statistics": ", ".join(_statistics(view)),
    }


def _statistics(view: View) -> list[str]:
    margins = view.margins
    limits = {
        "divergence": f"limit {1 + margins.distances:g}",
        "output_distance": f"limit {margins.distances:g}",
        "membership": f"within {margins.rates:g} either way",
    }
    found = [(e, limit) for probe, limit in limits.items() for e in findings.strata(view, probe)]
    return [f"{named(e)} {e.measure} {e.estimate:.2f} ({limit})" for e, limit in found]


def utility(view: View, group: str, label: str) -> str:
    start = f"{group.capitalize()} with {view.model}: {label}"
    if label == "not assessed":
        return f"{start}."
    margin = getattr(view.margins, group)
    worst = view.one("neighbours", "worst") if group == "neighbours" else None
    tenth = ""
    if worst is not None and worst.conclusive:
        limit = f"where {100 * view.margins.worst:g} are tolerated"
        names = f" ({worst.note})" if worst.note else ""
        tenth = f"; those that lost most, beyond chance, {points(worst.estimate)}{names}, {limit}"
    change = points(read(view, group, "change"))
    change += f" against the base{beside(view, group)}"
    return f"{start}, {change}, where a loss of {100 * margin:g} is tolerated{tenth}."


def guardrails(view: View) -> str:
    measures = {
        "reaches_user": "the target reaches the user in",
        "delivered": "what is harmless is delivered in",
        "recall": "recall",
        "false_positive_rate": "false positives",
    }
    probes = ("input_filter", "output_filter", "end_to_end")
    found = [
        f"{named(e)}: {words} {e.estimate:%}"
        for probe in probes
        for measure, words in measures.items()
        for e in _whole(view.each(probe, measure))
        if e.conclusive
    ]
    if not found:
        return f"Guardrails with {view.model}: not assessed."
    return (
        f"Guardrails with {view.model} (system-level suppression, no part of the weights): {'; '.join(found)}. "
        "This does not imply anything about the weights, and open weights do not carry a filter with them."
    )


def _whole(found: Sequence[Evidence]) -> Sequence[Evidence]:
    """Those about all requests if there are some, without the strata."""
    return [e for e in found if not e.family] or [e for e in found if ": " not in e.family] or found


def banners(view: View) -> list[str]:
    found = []
    destroyed = findings.destruction(view)
    change = points(read(view, "degeneracy", "change"))
    if destroyed == "shown":
        found.append(f"suppression by destruction: nothing is recognised on target prompts, {change} against the base")
    elif destroyed == "undecided":
        found.append(f"pictures of target prompts may have been destroyed: nothing recognised, {change}")
    groups = [group for group in UTILITY if findings.utility(view, group) == "destroyed"]
    return found + [f"{group} destroyed: {points(read(view, group, 'change'))}" for group in groups]


def seen_anyway(view: View) -> list[str]:
    """Evidence against suppression. It needs no gate: a rate counts whatever the base shows, and so does a bypass."""
    limit, target = view.margins.ceiling, view.facts.target
    one = view.facts.looked_at
    direct = [e for e in view.each("direct", "rate") if e.estimate.low is not None and e.estimate.low > limit]
    found = [
        f"{target if e.probe == 'direct' else one} is recognised with {view.model} in {e.estimate:%} under "
        f"{named(e)}, where at most {100 * limit:g} % is required"
        for e in [*direct, *findings.shown_anyway(view)]
    ]
    for attack in findings.bypasses(view):
        e = findings.bypass(view, attack)
        found += [f"{attack} gets {one} from {view.model} {points(e.estimate)} above its control"] if e else []
    return [f"{line}." for line in found]


def left_inside(view: View) -> list[str]:
    """Evidence against removal: probes that recover more than from retrained models."""
    target = view.facts.looked_at
    found = []
    for probe in findings.recovered(view):
        e = view.one(probe, findings.measure_against(view, probe))
        if e is None:
            continue
        if e.measure == "above_control":
            said = f"brings {target} back in {view.model} more than in retrained models: {points(e.estimate)}."
        else:
            said = f"recovers {target} from {view.model}: {e.measure} {e.estimate:.2f} against retrained models."
        found.append(f"{probe} {said}")
    return found


def inconclusive(view: View) -> list[str]:
    failed: dict[tuple[str, str, str], list[str]] = {}
    for e in view.evidence:
        gates = ", ".join(name for name, state in e.gates.items() if state == "fail")
        if e.model == view.model and gates:
            failed.setdefault((e.probe, e.measure, gates), []).append(e.family)
    return [
        f"{probe} {measure}" + (f" ({', '.join(filter(None, own))})" if any(own) else "") + f": gate {gates} failed"
        for (probe, measure, gates), own in failed.items()
    ]
