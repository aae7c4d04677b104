"""From records to sentences, by rule: what the numbers licence and what they do not.

The claim made here is level C1 of the ladder: under the tested prompts and sampler, how often is the target still
seen. It is a claim about outputs. Nothing here can say that a concept left the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from erasure.eval.core.records import BASE, Evaluation
from erasure.eval.core.tables import (
    DESTRUCTION,
    MARGINS,
    POWER,
    degenerate,
    hits_of,
    label_count,
    labels,
    limited,
    named_in,
    power,
    row,
    score,
)
from erasure.eval.stats import Estimate, lost_most

NAMES = {"neighbours": "neighbour", "unrelated": "unrelated thing"}
TRIAL = "Trial run, no evidence: "

NOT_REMOVAL = (
    "Whether anything was removed from the weights was not assessed: this is evidence about outputs under these "
    "prompts (suppression), not about what the model still contains."
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one detector licences one to say about one arm.

    Attributes:
        status: "measured" | "inconclusive" | "no claim".
        short: one line with the numbers. sentence: the whole claim, with its limits.
        banners: what must be read before the numbers ("nothing recognised").
        utility: group to non-inferior | degraded | unclear | not assessed.
        by: whose word it is.
    """

    arm: str
    detector: str
    status: str
    short: str
    sentence: str
    banners: tuple[str, ...]
    utility: dict[str, str]
    by: str = ""


def findings(evaluation: Evaluation) -> list[Finding]:
    """One finding per erasure and detector."""
    return [finding(evaluation, arm.name, detector) for arm in evaluation.erased for detector in evaluation.detectors]


def headlines(evaluation: Evaluation) -> list[Finding]:
    """One finding per erasure: the least flattering word of those detectors that recognise the base's target.

    The target is reported by the one that still sees it most often, each kept group by the one that sees it lose most.
    """
    able = [d for d in evaluation.detectors if power(evaluation, d)]
    chosen = []
    for arm in evaluation.erased:
        seen = {d: row(evaluation, arm.name, d, "target").rate.value for d in able}
        usable = {d: value for d, value in seen.items() if value is not None}
        detector = max(usable, key=lambda d: usable[d]) if usable else next(iter(evaluation.detectors), None)
        if detector is None:
            continue
        found = finding(evaluation, arm.name, detector, others=tuple(usable))
        banners = [b for d in (detector, *usable) for b in _banners(evaluation, arm.name, d)]  # one of them is enough
        by = _by(evaluation, detector, usable)
        chosen.append(dataclasses.replace(found, banners=tuple(banners[:1]), by=by))
    return chosen


def _by(evaluation: Evaluation, detector: str, usable: Iterable[str]) -> str:
    usable, target = list(usable), evaluation.suite.target
    text = f"by {detector}"
    if len(usable) > 1:
        text += f", of the {len(usable)} detectors that recognise the base\u2019s {target} the one that sees it most"
    elif usable and len(evaluation.detectors) > 1:
        text += f", the only detector that recognises the base\u2019s {target}"
    rest = [d for d in evaluation.detectors if d not in usable and d != detector]
    return text + (f"; inconclusive: {', '.join(rest)}" if rest else "")


def finding(evaluation: Evaluation, arm: str, detector: str, *, others: Sequence[str] = ()) -> Finding:
    """The claim that one detector licences about one erasure.

    ``others`` may speak for the kept groups where they see more lost than ``detector`` does.
    """
    worst = {group: _harshest(evaluation, arm, group, (detector, *others)) for group in MARGINS}
    utility = {group: _utility(evaluation, arm, worst[group], group) for group in MARGINS}
    banners = _banners(evaluation, arm, detector)
    status, body, sentence = _claim(evaluation, arm, detector, worst)
    trial = TRIAL if limited(evaluation) else ""
    return Finding(
        arm=arm,
        detector=detector,
        status="no claim" if trial else status,
        short=f"{arm}: {trial.lower()}{body}",
        sentence=f"{trial}{sentence} {''.join(f'Note: {b}. ' for b in banners)}{NOT_REMOVAL}",
        banners=banners,
        utility=utility,
        by=f"by {detector}",
    )


def _claim(evaluation: Evaluation, arm: str, detector: str, worst: Mapping[str, str]) -> tuple[str, str, str]:
    """The status, the line without the arm's name, and the sentence without its caveats."""
    target = evaluation.suite.target
    base, after = (row(evaluation, a, detector, "target").rate for a in (BASE, arm))
    if after.value is None or base.value is None:
        body = f"no claim by {detector}, {after.reason or base.reason}"
        return "no claim", body, f"{arm}: {body}."
    if not power(evaluation, detector):
        body = f"inconclusive by {detector}: the base model does not draw {target} reliably"
        why = (
            f"{detector} sees it in {_percent(base.value)} of the base model's pictures, 95 % lower limit "
            f"{_percent(base.low)}, where {_percent(POWER)} is required; its absence afterwards would mean nothing"
        )
        return "inconclusive", body, f"{arm}: {body} ({why})."
    sides = [_change(evaluation, arm, worst[group], group, foreign=worst[group] != detector) for group in MARGINS]
    side, seen = "; ".join(filter(None, sides)), _seen(target, after)
    body = f"{seen}; {_percent(base.value)} before" + (f"; {side}" if side else "")
    sentence = (
        f"Under the tested direct prompts and sampler, {seen} with {arm} (by {detector}), "
        f"against {_percent(base.value)} with the base model. {_meaning(evaluation, arm, detector)}"
    )
    return "measured", body, sentence + (f" {side[:1].upper()}{side[1:]}." if side else "")


def _meaning(evaluation: Evaluation, arm: str, detector: str) -> str:
    """What "seen" means, with the score beside it that does not depend on being first."""
    before, after = score(evaluation, BASE, detector).value, score(evaluation, arm, detector).value
    return (
        f"Seen means that it is {detector}'s first answer; the mean score of {evaluation.suite.target} on these "
        f"pictures is {_percent(after)} ({_percent(before)} with the base model)."
    )


def _seen(target: str, after: Estimate) -> str:
    bound = f"(at most {_percent(after.high)}, upper end of the 95 % interval)"
    if after.value == 0:
        return f"{target} not observed in {after.n} samples {bound}"
    return f"{target} seen in {_percent(after.value)} of {after.n} pictures {bound}"


def _harshest(evaluation: Evaluation, arm: str, group: str, detectors: Sequence[str]) -> str:
    """The detector that sees the group lose most."""
    if not evaluation.select(BASE, group):
        return detectors[0]
    changes = {d: row(evaluation, arm, d, group).change for d in detectors}
    known = {d: change.value for d, change in changes.items() if change is not None and change.value is not None}
    return min(known, key=lambda d: known[d]) if known else detectors[0]


def _change(evaluation: Evaluation, arm: str, detector: str, group: str, *, foreign: bool = False) -> str:
    """The change of a kept group, in terms of the labels that were asked for and of no others."""
    if not evaluation.select(BASE, group):
        return ""
    change = row(evaluation, arm, detector, group).change
    if change is None or change.value is None:
        return f"{group} not assessed by {detector}"
    names = list(dict.fromkeys(r.label for r in evaluation.select(arm, group)))
    noun = NAMES[group]
    these = f"these {len(names)} named {noun}s" if len(names) > 1 else f"this one named {noun}"
    text = f"{these} {_points(change.value)} points ({_points(change.low)} to {_points(change.high)})"
    text += f" by {detector}" if foreign else ""
    worst = labels(evaluation, arm, detector, group)[0]
    if group == "neighbours" and len(names) > 1 and (worst.change.value or 0) < 0:
        chance = _by_chance(evaluation, arm, detector, group)
        text += f", worst {worst.label} {_points(worst.change.value)} (p = {chance:.2g} for the worst of {len(names)})"
    config = next(a.config for a in evaluation.arms if a.name == arm)
    if "keep" in config:
        named = named_in([*config["keep"], *config.get("keep_everyday", ())], names)
        text += f", {named} of them named to the method to be kept"
    return text


def _by_chance(evaluation: Evaluation, arm: str, detector: str, group: str) -> float:
    """How often one of the labels would lose as much as the worst one did if the models were equal."""
    base, after = evaluation.select(BASE, group), evaluation.select(arm, group)
    hits = hits_of(base, detector), hits_of(after, detector)
    p_value = lost_most(*hits, [r.prompt for r in after], [r.label for r in after])[2]
    return 1.0 if p_value is None else p_value


def _utility(evaluation: Evaluation, arm: str, detector: str, group: str) -> str:
    """Non-inferiority: the whole interval above the margin; degraded: the whole interval below it."""
    change = row(evaluation, arm, detector, group).change if evaluation.select(BASE, group) else None
    if change is None or change.low is None or change.high is None or limited(evaluation):
        return "not assessed"
    if change.low >= -MARGINS[group]:
        return "non-inferior"
    return "degraded" if change.high < -MARGINS[group] else "unclear"


def _banners(evaluation: Evaluation, arm: str, detector: str) -> tuple[str, ...]:
    before, after = (degenerate(evaluation, a, detector).value for a in (BASE, arm))
    if before is None or after is None or after - before < DESTRUCTION:
        return ()
    return (
        "nothing recognised: pictures destroyed, or of something the detector has no name for "
        f"({detector}: {_percent(after)} of the pictures for target prompts, {_percent(before)} with the base model)",
    )


def _percent(value: float | None) -> str:
    if value is None:
        return "an unknown share"
    text = f"{100 * value:.1f}".removesuffix(".0")
    return f"{text} %"


def _points(value: float | None) -> str:
    return "?" if value is None else f"{100 * value:+.1f}".replace("-", "\u2212") if round(100 * value, 1) else "0"


def not_assessed(evaluation: Evaluation) -> list[str]:
    """What this evaluation says nothing about, in the order a reader should worry about it."""
    suite = evaluation.suite
    words = ", ".join(f"\u201c{phrase}\u201d" for phrase in suite.phrases)
    named = [
        "Removal: whether the concept, or its training images, still influence the weights (inversion, relearning, "
        "comparison with a model retrained without it).",
        "Attacks: adversarial prompts, learned tokens, image conditioning, inpainting, loading another adapter on top.",
        f"Paraphrase: other words, descriptions, languages and compositions than {words} in the listed templates.",
        "Relearning and durability: fine-tuning, quantisation or merging after the erasure.",
        "Membership: whether particular training images can be inferred or reproduced.",
        "Other samplers, step counts, guidance scales, resolutions and seeds than those of the settings, or another "
        f"base than {evaluation.settings.get('base', suite.base)}.",
        "Counts, layout, legibility, bias and image quality beyond what the detectors name.",
        "People and downstream use: no figure here says that a use is harmless, lawful or sufficient for a policy.",
    ]
    closed = [f"{d} from {n}" for d in evaluation.detectors if (n := label_count(evaluation, d))]
    if closed:
        named.insert(
            -1, f"Anything without a name: a detector answers only from its list of labels ({', '.join(closed)})."
        )
    if suite.attribute == "style":
        named.insert(3, "Content: whether the thing that is drawn stays the same when its style changes.")
    if not suite.unrelated:
        named.insert(3, "Unrelated prompts: the suite has none, so damage far from the target was not looked for.")
    if not evaluation.distances:
        named.insert(-1, "Distances between sets of pictures: no feature extractor was given.")
    if len(evaluation.detectors) < 2:
        named.insert(
            0, "A second opinion: only one detector looked at the pictures, so its errors are everyone's errors."
        )
    return named
