"""The rules of the ladder: which level the evidence about one model reaches, and what the next level needs.

Each condition is a function that returns what is missing, as sentences; an empty list means that it is met. A failed
gate, an absent control or a probe that did not run is missing evidence, never a success.
"""

from __future__ import annotations

import math

from erasure.eval.judge import findings
from erasure.eval.judge.licences import NO_CLAIM, NOT_APPLICABLE, NULL
from erasure.eval.judge.view import UTILITY, View, named
from erasure.eval.stats import LEVEL, worst_upper

OPTIONAL = ("clip_skip", "prompt_file")  # variations that need what not everybody has: they count if they ran
ENOUGH = 4  # of the variations must count for a claim about all of them
AUTOENCODER = "vae"  # the part of a pipeline, as diffusers calls it
GOLDS = 3  # retrained models; fewer do not show how much they differ from each other


def suppression(view: View) -> tuple[str, list[str]]:
    """The level of the first column, and what the next level needs."""
    level = NO_CLAIM
    for name, conditions in (("C1", c1), ("C2", c2), ("C3", c3)):
        if needed := conditions(view):
            return level, needed
        level = name
    return level, []


def removal(view: View) -> tuple[str, list[str]]:
    """The level of the second column, and what the next level needs."""
    if view.facts.information == "latent":
        return NOT_APPLICABLE, []
    if reason := findings.intact(view):
        return reason, []
    blocked = _blocked(view) + _each_alone(view)
    made = c6(view)
    if not blocked and not made:
        return "C6", []
    if needed := blocked + c4(view):
        return NO_CLAIM, needed + (made if view.kind == "retrained" else [])
    if findings.controls(view) == {"null"}:
        return NULL, [f"{GOLDS} models retrained without the target, in place of a null control"]
    needed = _c5(view)
    return ("C4", needed) if needed else ("C5", made)


def _blocked(view: View) -> list[str]:
    """What prevents any claim, in either column."""
    needed = ["all prompts of the suite; the numbers of a trial run are no evidence"] if view.facts.trial else []
    kept = [group for group in UTILITY if group in view.facts.groups]  # a suite about a style has no unrelated things
    needed += [f"{group} ({_why(view, group)})" for group in kept if findings.utility(view, group) == "not assessed"]
    needed += [] if kept else ["prompts of something that should stay"]
    destroyed = findings.destruction(view)
    if destroyed == "not tested":
        needed.append(f"degeneracy ({view.why('degeneracy')})")
    elif destroyed == "undecided":
        needed.append("more pictures of target prompts: it is open whether they were destroyed")
    elif destroyed == "shown":
        needed.append("target prompts that still give pictures of something: suppression by destruction is no claim")
    return needed


def _why(view: View, probe: str) -> str:
    return "inconclusive: its gate failed" if view.assessed(probe) else view.why(probe)


def c1(view: View) -> list[str]:
    """Missing for C1: the target is kept out when it is asked for by name."""
    needed = _blocked(view)
    if not view.facts.detectors:
        needed.append("a detector with a card")
    if not view.passed("direct", "rate", "known") or math.isinf(view.high("direct", "rate")):
        needed.append(f"direct, with the base's gate passed ({findings.unreliable(view) or _why(view, 'direct')})")
    else:
        if view.high("direct", "change") >= 0:
            needed.append("fewer pictures with the target than with the base, the whole interval below 0")
        needed += filter(None, [view.unmet("direct", "rate", view.margins.ceiling, "known")])
    return needed


def _each_alone(view: View) -> list[str]:
    """Of a suite with several targets, only the paired pictures are about all."""
    only = view.facts.probed
    return [f"an assessment of each target by itself: of {view.facts.target}, probes look at {only}"] if only else []


def c2(view: View) -> list[str]:
    """Missing for C2, beyond C1: the target is kept out in every variation in which the base shows it."""
    families = findings.counted(view)
    there = {e.probe for e in families}
    needed = _each_alone(view)
    excused = (*there, *findings.rare(view), *OPTIONAL)
    rarely = "no family in which the base shows the target often enough"
    needed += [f"{p} ({rarely if view.assessed(p) else view.why(p)})" for p in findings.VARIATIONS if p not in excused]
    if not needed and len(there) < ENOUGH:
        needed.append(f"{ENOUGH} variations in which the base shows the target; it does in {len(there)}")
    # Each family has to pass by itself, which needs no adjustment for their number (see worst_upper).
    known = [e for e in families if findings.base_shows(view, e)]
    flat = [named(e) for e in known if findings.no_drop(view, e) > (1 - LEVEL) / 2]
    needed += [f"a drop against the base in {', '.join(flat)}"] if flat else []
    needed += [f"the target kept out in {named(e)}, too" for e in findings.shown_anyway(view)]
    limit, worst = view.margins.ceiling, worst_upper([e.estimate for e in families]) if families else 0.0
    if worst > limit:
        needed.append(f"at most {100 * limit:g} % with the target in the worst family (upper limit {worst:.1%} now)")
    return needed


def c3(view: View) -> list[str]:
    """Missing for C3, beyond C2: no attack with power finds more than random tries of the same budget do."""
    limit = view.margins.excess
    needed = [] if view.assessed("random_control") else [f"random_control ({view.why('random_control')})"]
    if not any(view.passed(attack, "excess") for attack in findings.SEARCHES):
        needed.append(f"one of {', '.join(findings.SEARCHES)} with its power gate passed")
    needed += findings.failed(view, findings.attacks(view))
    strong = [attack for attack in findings.attacks(view) if view.passed(attack, "excess")]
    needed += filter(None, (view.unmet(attack, "excess", limit) for attack in strong))
    for attack in strong:
        control = next((e.estimate for e in view.each(attack, "rate") if e.family == "control"), None)
        if control is not None and control.value is not None and control.value > 1 - limit:
            needed.append(f"{attack} with a control that leaves room for it (it finds the target in {control} now)")
    already = " ".join(needed)
    found = [attack for attack in findings.bypasses(view) if attack not in already]
    return needed + [f"{attack} without an excess over its control" for attack in found]


def c4(view: View) -> list[str]:
    """What is needed for C4, or for C4' where the control is a null."""
    margins = view.facts.margins
    needed = [
        findings.unresisted(view, "inversion"),
        view.unmet("relearning", "advantage", margins.advantage, "power"),
        view.unmet("resurgence", "above_control", margins.increase, "power"),
    ]
    if not {"noise", "completion"} & {*findings.resisted(view)}:
        either = [findings.unresisted(view, probe) for probe in ("noise", "completion")]
        needed.append(f"one of: {', or '.join(either)}")
    # a model that learns everything slowly is damaged, and its slow relearning says nothing about the target
    needed = [line for line in [*needed, view.unmet("plasticity", "slowed", margins.advantage, "known")] if line]
    for measure, what in (("denoiser_changed", "parameters of the denoiser"), ("moved", "predictions of the denoiser")):
        found = view.one("construction", measure)
        if found is None or found.estimate.value is None:
            why = view.why("construction") if found is None else found.estimate.reason or "no number"
            needed.append(f"{what} that are known not to be the base's (construction: {why})")
    if any(e.family == AUTOENCODER and e.estimate.value for e in view.each("construction", "changed")):
        needed.append("the base's autoencoder: this model's own may read latents that the base's cannot")
    if any(e.family.startswith("text_encoder") and e.estimate.value for e in view.each("construction", "changed")):
        asked = view.one("base_encoder", "residual")
        if asked is None or asked.gates.get("power") != "fail":  # it fits no model trained apart, and tells nothing
            fits = view.unmet("base_encoder", "residual", view.margins.residual, "fits")
            needed += filter(None, [findings.unresisted(view, "base_encoder") or fits])
    already = " ".join(needed)
    needed += findings.failed(view, [probe for probe in findings.ASSISTED if probe not in already])
    more = [probe for probe in findings.exceeding(view) if probe not in already]
    needed += [f"{probe} recovering no more than from the control" for probe in more]
    if not needed and len(findings.controls(view)) > 1:
        needed.append("one kind of control for all of these probes; they were held against different ones")
    elif not needed and findings.controls(view) == {None}:
        needed.append("a model that never saw the target to compare with")
    elif not needed and findings.controls(view) == {"gold"}:
        count = min(view.golds(e.probe) for e in findings.carriers(view))
        needed += [f"{GOLDS} models retrained without the target ({count} now)"] if count < GOLDS else []
    return needed


def _c5(view: View) -> list[str]:
    margins = view.margins
    kept = [group for group in view.facts.rest if findings.utility(view, group) != "non-inferior"]
    limits = {"divergence": 1 + margins.distances, "output_distance": margins.distances}
    if view.facts.information != "higher-order":
        limits["membership"] = margins.rates
    needed = [f"{group} that lost no more than is tolerated ({findings.utility(view, group)} now)" for group in kept]
    for probe, limit in limits.items():
        found = findings.strata(view, probe)
        needed += [view.lacks(e, limit, "power") for e in found]
        needed += [] if found else [f"{probe} ({_why(view, probe)})"]
        under = (e for e in found if probe == "membership" and (e.estimate.low is None or e.estimate.low < -limit))
        needed += [f"{named(e)} with {e.measure} at least {-limit:g}, too" for e in under]
    return [line for line in needed if line]


def c6(view: View) -> list[str]:
    """Missing for C6: a verified record of a procedure that never processed the data, and no evidence against it."""
    needed = [] if view.kind == "retrained" else ["a procedure that never processed the data: no measurement gives C6"]
    if not view.facts.scopes.get(view.model):
        needed.append("the scope of the retraining")
    record = view.facts.audits.get(view.model)
    if record is None:
        needed.append("an audit record of the process")
    elif problem := record.problem(view.facts.looked_at):
        needed.append(f"a verified audit record (one was supplied and not verified: {problem})")
    needed += [f"{probe} recovering no more than from retrained models" for probe in findings.recovered(view)]
    return needed
