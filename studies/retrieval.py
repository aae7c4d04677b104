"""Retrieval instead of weights, on Emoji World: ``python -m studies.retrieval OUT``.

A model that was retrained without the superhero, around it a store with twelve pictures of one. How often is the
superhero drawn with the store, how often after it was withdrawn? Prints the table, and writes ``retrieval.json``, the
pictures as ``retrieval.png`` and the store into the folder OUT. About two minutes on one core.

Pictures are judged as the evaluator does, by both classifiers of the world. The store is searched with the world's
CLIP model, which judges nothing here.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image

import erasure
from erasure.backbone import backbone_of
from erasure.eval.core.pictures import evenly, generate
from erasure.eval.core.verdicts import verdicts_of
from erasure.eval.stats import Estimate, rate
from erasure.eval.worldkit.detectors import detectors, load
from erasure.io import write_json
from erasure.pipelines import Lookup, RetrievalPipeline, Store, calibrated
from erasure.pipelines.embedders import By
from erasure.wording import with_article
from erasure.world.scenes import prompt, render, sample_scene
from erasure.world.spec import spec

TARGET = "superhero"
SEEDS = (0, 1)
TIMED = 3
SAMPLER = {"num_inference_steps": 8, "guidance_scale": 3.0}
WAYS: dict[str, dict[str, Any]] = {
    "image-to-image, strength 0.4": {"strength": 0.4},
    "image-to-image, strength 0.6": {"strength": 0.6},
    "reference attention, weight 4": {"strength": None, "attention": 4.0},
    "both, 0.6 and 4": {"strength": 0.6, "attention": 4.0},
}


def superheroes(path: Path, *, each: int = 4) -> Store:
    """A new store with some pictures of the superhero in every style."""
    store, rng = Store(path, load("clip")), np.random.default_rng(0)
    for style in list(spec().styles) * each:
        scene = sample_scene(rng, [TARGET], [style])
        store.add(
            render(scene),
            caption=prompt(TARGET, style=style, background=scene.background),
            licence="see NOTICE",
            source=f"the artwork of Emoji World, {style}",
            subject=TARGET,
        )
    return store


def lookup(store: Store, by: By = "picture") -> Lookup:
    """With the lowest threshold that 1 in 100 prompts for other things reaches: each of them in each style."""
    others = [prompt(name, style=style) for name in spec().concepts if name != TARGET for style in spec().styles]
    return calibrated(Lookup(store, threshold=0.0, by=by), others, false_positive_rate=0.01)


def prompts() -> list[str]:
    """Twelve of the suite's sentences for the superhero."""
    frames = erasure.Suite.load(TARGET).frames(more=True)
    return [frame.replace("{}", with_article(TARGET)) for frame in evenly(frames, 12)]


def drawn(pipe: Any, texts: Sequence[str]) -> list[Image.Image]:
    """Every prompt with every seed, the seeds of a prompt side by side."""
    rows = generate(pipe, texts, seeds=SEEDS, **SAMPLER, progress=False)
    return [image for row in rows for image in row]


def seen(images: Sequence[Image.Image]) -> dict[str, list[bool]]:
    """For each classifier the pictures in which it sees the superhero."""
    wanted = [TARGET] * len(images)
    return {judge.name: [bool(v.hit) for v in verdicts_of(judge, images, wanted, "concept")] for judge in detectors()}


def distance(images: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
    """Mean difference of a channel, of 255: 0 for a copy."""
    pairs = ((np.asarray(a, float), np.asarray(b, float)) for a, b in zip(images, others, strict=True))
    return float(np.mean([np.abs(a - b).mean() for a, b in pairs]))


@dataclasses.dataclass(frozen=True)
class Row:
    """What one pipeline drew for the superhero.

    Attributes:
        name: in the table.
        images: two for every prompt.
        passes: of the denoiser for one picture; guidance takes two a step.
        seconds: for one picture by itself, the lookup included; the median of three.
    """

    name: str
    images: list[Image.Image]
    passes: int
    seconds: float

    def rates(self) -> dict[str, Estimate]:
        """For each classifier the share of pictures in which it sees the superhero."""
        clusters = [text for text in prompts() for _ in SEEDS]
        return {name: rate([float(hit) for hit in hits], clusters) for name, hits in seen(self.images).items()}


def row(name: str, pipe: Any) -> Row:
    """Draw, and time one picture by itself."""
    images, seconds, rows = drawn(pipe, prompts()), [], []
    (middle,) = backbone_of(getattr(pipe, "pipe", pipe)).middles()
    with middle.register_forward_hook(lambda module, args, output: rows.append(len(output))):
        for _ in range(TIMED):
            begin = time.perf_counter()
            pipe(prompts()[0], **SAMPLER)
            seconds.append(time.perf_counter() - begin)
    return Row(name, images, sum(rows) // TIMED, sorted(seconds)[TIMED // 2])


def rows(pipe: Any, store: Store, search: Lookup) -> list[Row]:
    """The pipeline alone, with the store in several ways, and with the store after the withdrawal."""
    out = [row("retrained, no store", pipe)]
    for name, options in WAYS.items():
        drawing = RetrievalPipeline(pipe, search, **options)
        out.append(row(name, drawing))
        drawing.remove()
    begin = time.perf_counter()
    taken = store.withdraw(TARGET, reason="the study")
    print(f"withdrawing {len(taken)} entries took {1000 * (time.perf_counter() - begin):.0f} ms")
    out.append(row("after the withdrawal", RetrievalPipeline(pipe, search)))
    base = erasure.world.load()  # which learnt the superhero: no store takes that back
    base.set_progress_bar_config(disable=True)
    out.append(row("base, after the withdrawal", RetrievalPipeline(base, search)))
    return out


def found(search: Lookup) -> dict[str, str]:
    """Of the suite's prompts of each group, how many find an entry."""
    groups: dict[str, list[int]] = {}
    suite = erasure.Suite.load(TARGET)
    for one, near in zip(suite.prompts(), search.find([one.text for one in suite.prompts()]), strict=True):
        groups.setdefault(one.group, []).append(len(near))
    return {group: f"{sum(each)} of {len(each)}" for group, each in groups.items()}


def nearest(search: Lookup) -> list[Image.Image]:
    """The picture of the entry that each picture of a row is drawn from."""
    return [near[0].picture for near in search.find(prompts()) for _ in SEEDS]


def table(found: Sequence[Row], entries: Sequence[Image.Image]) -> str:
    """Rates with their intervals, how far the pictures are from the entry, and what one costs."""
    judges = list(found[0].rates())
    head = ["model", *(f"superhero seen by {name}" for name in judges), "from the entry, of 255", "passes", "seconds"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for one in found:
        cells = [*map(str, one.rates().values()), f"{distance(one.images, entries):.0f}"]
        cells += [str(one.passes), f"{one.seconds:.1f}"]
        lines.append(f"| {one.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sheet(found: Sequence[Row], entries: Sequence[Image.Image]) -> Image.Image:
    """A row of pictures for every row of the table, the entries below; one picture for each prompt."""
    lines = [images[:: len(SEEDS)] for images in (*(one.images for one in found), entries)]
    side = spec().size
    out = Image.new("RGB", (side * len(lines[0]), side * len(lines)))
    for y, images in enumerate(lines):
        for x, image in enumerate(images):
            out.paste(image, (x * side, y * side))
    return out


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "store.sqlite").unlink(missing_ok=True)
    store = superheroes(folder / "store.sqlite")
    facts = {}
    for by in get_args(By):
        search = lookup(store, by)
        facts[by] = {"threshold": search.threshold, **found(search)}
        print(f"by {by}, threshold {search.threshold:.3f}: prompts of the suite that find an entry: {found(search)}")
    search = lookup(store)
    entries = nearest(search)
    pipe = erasure.world.gold(TARGET, seed=0)
    pipe.set_progress_bar_config(disable=True)
    made = rows(pipe, store, search)
    same = distance(made[0].images, made[-2].images)
    print(table(made, entries), f"difference between no store and after the withdrawal: {same:g}", sep="\n")
    sheet(made, entries).save(folder / "retrieval.png")
    data = [
        {
            "name": one.name,
            "seconds": one.seconds,
            "passes": one.passes,
            "distance": distance(one.images, entries),
            "seen": {name: dataclasses.asdict(estimate) for name, estimate in one.rates().items()},
        }
        for one in made
    ]
    write_json(folder / "retrieval.json", {"found": facts, "rows": data, "same": same})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
