"""What a probe leaves: observations, which are stored, and the evidence that is made from them each time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from erasure.eval.core.models import Role
from erasure.eval.stats import Estimate

Gate = Literal["pass", "fail", "na"]
Control = Literal["gold", "null"]


@dataclasses.dataclass(frozen=True)
class Observation:
    """One thing that a probe saw: a picture and its verdict, or the loss of one sample.

    Attributes:
        model: name of the model.
        family: what the probe varies ("name", "es", "steps 10", "attack", "control"); each gets its own estimate.
        cluster: what intervals resample as a whole: a prompt, or a real picture. Where ``facts`` have ``template`` and
            ``phrase``, or the ``run`` of a training, intervals resample those.
        seed: of the noise.
        value: 1 or 0 for "the target is seen", or a number; None without one.
        reason: why there is no value.
        facts: everything else: ``prompt``, ``top`` (the label seen), ``image_hash``, ``tries`` ... JSON types only.
    """

    model: str
    family: str
    cluster: str
    seed: int
    value: float | None
    reason: str | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.value is not None and math.isnan(self.value):  # every comparison with it is false, a limit's too
            raise ValueError(
                f"{self.model} gave no number (NaN) for {self.cluster!r}; its weights or losses overflowed"
            )


@dataclasses.dataclass(frozen=True)
class Evidence:
    """One number about one model, with its interval and the gates it passed.

    Attributes:
        probe: key of the probe.
        model: which model; the base and the controls have evidence too.
        measure: what the number is. Those that probes share: "rate" (share of pictures with the target, or the mean of
            another value), "change" (minus the base's, paired), "above_control" (minus the control's), "residual"
            ((e - g) / (b - g): 0 as a model that never saw the target, 1 as one that did), "excess" (attack minus a
            random control of the same budget), "worst_stratum" (the rate of the template or phrase that shows the
            target most, named in ``note``; the interval allows for the choice).
        estimate: value and interval.
        family: which of the probe's families; "" for all together.
        control: which kind of model "never saw it": "gold" (retrained), "null", or None without a control.
        gates: name to "pass" | "fail" | "na". A failed gate makes the number inconclusive, never a success.
        unit: "share" prints as per cent, "log2" as a power of two, "number" plainly.
        note: printed with the number.
        detector: which one, where several judge the same pictures; else "".
    """

    probe: str
    model: str
    measure: str
    estimate: Estimate
    family: str = ""
    control: Control | None = None
    gates: Mapping[str, Gate] = dataclasses.field(default_factory=dict)
    unit: Literal["share", "number", "log2"] = "share"
    note: str = ""
    detector: str = ""

    @property
    def conclusive(self) -> bool:
        """Whether there is a value and no gate failed."""
        return self.estimate.value is not None and "fail" not in self.gates.values()


Rows = Mapping[str, Sequence[Observation]]  # model to its observations, the base first
Roles = Mapping[str, Role]  # model to its role
