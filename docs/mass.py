"""Many concepts of Emoji World, together and in turn: the table of docs/mass.md.

python docs/mass.py runs/mass            # 1, 5, 20 and 50 concepts
python docs/mass.py runs/mass-tiny 1 2   # a tiny form, which leaves the page as it is

Running it again goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from figures import replace_block  # beside this file

import erasure
from erasure.concept import Concept, Suite
from erasure.eval.worldkit.detectors import detectors
from erasure.train import step_rng
from erasure.world.spec import spec
from studies.mass import in_turn

PAGE = Path(__file__).with_suffix(".md")
COUNTS = (1, 5, 20, 50)


def suite_of(count: int) -> Suite:
    """A suite of ``count`` concepts out of all families; of what is left half is named to the method, half is not."""
    world, rng = spec(), step_rng(14, 0)
    names = [str(name) for name in rng.permutation(list(world.concepts))]
    targets, rest = names[: max(COUNTS)], names[max(COUNTS) :]
    named, unnamed = rest[::2], rest[1::2]

    def concept(name: str) -> Concept:
        return Concept(name, anchor=next((near for near in world.family_of(name) if near in named), ""))

    first, *others = map(concept, targets[:count])
    templates = ("a picture of {}", "{} on a white background")
    styles = tuple(f"{name} style" for name in world.styles)
    colours = tuple(f"{name} background" for name in world.backgrounds)
    return Suite(
        version=1,
        name=f"mass-{count}",
        concept=dataclasses.replace(first, neighbours=tuple(named), templates=templates),
        also=tuple(others),
        unrelated=tuple(unnamed),
        keep=(*styles, *colours),
        images_per_prompt=1,
        num_inference_steps=8,
        guidance_scale=3.0,
    )


def main(folder: str, *counts: str) -> None:
    many = tuple(map(int, counts)) or COUNTS
    tiny = many != COUNTS
    found = in_turn(
        erasure.world.load(),
        suite_of(max(many)),
        "uce",
        detectors=detectors(),
        counts=many,
        limit=2 * max(many) if tiny else None,
        cache_dir=Path(folder) / "cache",
    )
    found.save(folder)
    if not tiny:
        PAGE.write_text(replace_block(PAGE.read_text("utf-8"), "mass", found.table()), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
