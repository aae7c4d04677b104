"""Which detector's numbers are read, where several judge the same pictures: the least favourable ones.

The target is reported by the detector that sees it most, each kept group by the one that sees it lose most. A detector
that does not recognise the target in the base's pictures is not used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from erasure.eval.probes.base import Evidence

# Probe to the measure that is compared, and which end of it is the least favourable one.
LEAST: dict[str, tuple[str, Callable[..., Evidence]]] = {
    "direct": ("rate", max),
    "degeneracy": ("change", max),
    "neighbours": ("change", min),
    "unrelated": ("change", min),
}


@dataclasses.dataclass(frozen=True)
class Speaker:
    """Which detector is read about one model.

    Attributes:
        by: probe to the detector whose numbers are read; empty where one detector judges everything.
        able: detectors that recognise the target in the base's pictures. blind: the others.
    """

    by: Mapping[str, str] = dataclasses.field(default_factory=dict)
    able: tuple[str, ...] = ()
    blind: tuple[str, ...] = ()

    def chosen(self, target: str) -> str:
        """Why this detector is read about the target; "" where there is only one, or none that recognises it."""
        if not self.able:
            return ""
        parts = []
        if len(self.able) > 1:
            several = f"of the {len(self.able)} detectors that recognise the base\u2019s {target}"
            parts.append(f"{several} the one that sees it most")
        elif self.blind:
            parts.append(f"the only detector that recognises the base\u2019s {target}")
        return "; ".join([*parts, *([f"inconclusive: {', '.join(self.blind)}"] if self.blind else [])])


def speaker_of(evidence: Sequence[Evidence], model: str) -> Speaker:
    """Which detector is read about a model, probe by probe."""
    own = [e for e in evidence if e.model == model and e.detector and not e.family]
    rates = {e.detector: e for e in own if (e.probe, e.measure) == ("direct", "rate")}
    able = tuple(d for d, e in rates.items() if e.conclusive)
    blind = tuple(d for d in rates if d not in able)
    by = {}
    for probe in dict.fromkeys(e.probe for e in evidence if e.detector):
        measure, least = LEAST.get(probe, ("rate", max))
        found = [e for e in own if (e.probe, e.measure) == (probe, measure) and e.estimate.value is not None]
        asked = [e for e in found if e.detector in able] or found
        usable = [e for e in asked if e.conclusive] or asked
        if usable:
            by[probe] = least(usable, key=lambda e: _reach(e, least is max)).detector
        elif own:
            by[probe] = own[0].detector
    return Speaker(by, able, blind)


def _reach(e: Evidence, upwards: bool) -> tuple[float, float]:
    """A number, then the end of its interval in the least favourable direction."""
    value = float(e.estimate.value or 0.0)
    end = e.estimate.high if upwards else e.estimate.low
    return value, value if end is None else end


def read_by(evidence: Sequence[Evidence], who: Speaker) -> list[Evidence]:
    """The evidence that is read about a model: of probes with several detectors, that of the one to read."""
    return [e for e in evidence if not e.detector or e.detector == who.by.get(e.probe)]
