"""What no evaluation measures, whichever probes ran, the most important first."""

from __future__ import annotations

from erasure.eval.core.records import Evaluation
from erasure.eval.core.tables import label_count
from erasure.eval.judge.licences import LICENCES


def limits(evaluation: Evaluation) -> list[str]:
    """Sentences about these pictures, this suite and these detectors."""
    suite = evaluation.suite
    named = []
    if len(evaluation.detectors) < 2:
        named.append("A second opinion: only one detector judged the pictures, so its errors are in every number.")
    if not suite.unrelated:
        named.append("Unrelated prompts: the suite has none, so damage far from the target was not looked for.")
    if suite.attribute == "style":
        named.append("Content: whether the thing that is drawn stays the same when its style changes.")
    named += [
        "Other prompts, attacks, budgets and training data than those of the settings; other samplers, step counts, "
        "guidance scales, resolutions and seeds, or another base than "
        f"{evaluation.settings.get('base') or suite.base}.",
        "Counts, layout, legibility, bias and image quality beyond what the detectors name.",
    ]
    if closed := [f"{d} from {n}" for d in evaluation.detectors if (n := label_count(evaluation, d))]:
        named.append(f"Anything without a name: a detector answers only from its list of labels ({', '.join(closed)}).")
    if not evaluation.distances:
        named.append("Distances between sets of pictures: no feature extractor was given.")
    named.append(
        f"People and downstream use: no evidence of any kind here speaks of {LICENCES['anything'].not_licensed}."
    )
    return named
