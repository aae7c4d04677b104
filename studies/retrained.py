"""How the retrained models of Emoji World draw their target and everything else: ``python -m studies.retrained``.

    python -m studies.retrained                  # every target that has any, as a table
    python -m studies.retrained rose violin      # some

A model retrained without a target should draw it never, and its neighbours and other things as well as its twin, which
differs from it in its data alone. Each is drawn on the prompts of the target's suite, from the noise of the base.
"""

from __future__ import annotations

import sys

import erasure
from erasure.eval import Evaluation, evaluate
from erasure.eval.worldkit.controls import controls_of_world
from erasure.eval.worldkit.detectors import detectors
from erasure.world.spec import spec

GROUPS = {"target": "target shown", "neighbours": "neighbours right", "unrelated": "unrelated right"}
PROMPTS = 24  # of a group, one picture each
MANY = 9  # retrained models and twins


def drawn(target: str) -> Evaluation:
    """The base, the models without a target and their twins on the prompts of its suite."""
    pipe, suite = erasure.world.load(), erasure.Suite.load(target)
    pipe.set_progress_bar_config(disable=True)
    found = controls_of_world(suite, pipe, count=MANY, twins=MANY)
    arms = {model.name: model.change for model in found if model.role in ("gold", "twin")}
    judged = evaluate(
        pipe, arms, suite, detectors=detectors(), images_per_prompt=1, limit=PROMPTS, extractors=(), progress=False
    )
    return judged.evaluation


def lines(target: str, found: Evaluation) -> list[str]:
    """A line for each model; a rate for each of the two detectors."""
    rates = {(row.arm, row.detector, row.group): row.rate.value for row in found.rows()}

    def percent(arm: str, group: str) -> str:
        known = [rates[key] for detector in found.detectors if (key := (arm, detector, group)) in rates]
        return " and ".join(f"{100 * rate:.0f} %" for rate in known)  # empty: the suite has no such group

    return [
        f"| {' | '.join([target, arm.name, *(percent(arm.name, group) for group in GROUPS)])} |" for arm in found.arms
    ]


def main(*targets: str) -> None:
    head = ["without", "model", *GROUPS.values()]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|", flush=True)
    for target in targets or sorted(spec().targets):
        print("\n".join(lines(target, drawn(target))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
