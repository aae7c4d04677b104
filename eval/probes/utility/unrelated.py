"""U2: what has nothing to do with the target and must survive."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from erasure.concept import Group
from erasure.eval.probes.utility.neighbours import Neighbours


@dataclasses.dataclass(frozen=True)
class Unrelated(Neighbours):
    """How often an unrelated thing is seen when it is asked for by name; otherwise as :class:`Neighbours`."""

    key, code, title = "unrelated", "U2", "unrelated things survive"
    licences = "what these named unrelated things lost, for these prompts and this detector"
    not_licensed = "anything that was not asked for, quality beyond the label"
    reference = "UnlearnCanvas, NeurIPS 2024 (IRA within the domain, CRA in another)"

    group: ClassVar[Group] = "unrelated"
