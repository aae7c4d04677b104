"""The quality gate of Emoji World: does its base model draw what it is asked for?

Every figure of an evaluation is relative to the base model, so the base must draw its own prompts. :func:`check` draws
everything that the world has, and compares the verdicts of each detector, and of all together, with the gate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from erasure.eval.core.pictures import generate, weights_hash
from erasure.eval.detectors.base import Detector, DetectorCard
from erasure.eval.detectors.mean import MeanDetector
from erasure.eval.stats import Estimate, rate
from erasure.eval.worldkit.classifier import both_present
from erasure.io import write_atomically
from erasure.runtime import autocast_for
from erasure.world.scenes import prompt
from erasure.world.spec import spec

GATE = {
    "concept": 0.95,
    "worst concept": 0.80,
    "style": 0.95,
    "background": 0.95,
    "synonyms": 0.90,
    "spanish": 0.90,
    "pairs": 0.80,
}
REPORTED = ("never-trained style", "never-trained background", "descriptions", "superclass")


@dataclasses.dataclass(frozen=True)
class Ask:
    """One prompt and what a correct picture shows; None where the prompt leaves it open.

    Attributes:
        figure: the line of the check that it counts for.
        concepts: acceptable concepts; with ``pair`` both must be present.
    """

    figure: str
    text: str
    concepts: tuple[str, ...]
    style: str | None = None
    background: str | None = None
    pair: bool = False


@dataclasses.dataclass(frozen=True)
class Check:
    """The result of a check.

    Attributes:
        figures: figure -> detector name -> rate with its 95 % interval.
        per_concept: concept -> detector name -> rate.
        settings: sampler, seeds, detectors; the last of these is the one the gate is held to.
        pictures: what was asked and what was drawn, for a contact sheet and for :func:`calibrated`.
    """

    figures: dict[str, dict[str, Estimate]]
    per_concept: dict[str, dict[str, Estimate]]
    settings: dict[str, Any]
    pictures: list[tuple[Ask, Image.Image]] = dataclasses.field(default_factory=list, repr=False)

    @property
    def failures(self) -> tuple[str, ...]:
        """Figures below their gate by all detectors together, or with no value. Empty when the world passes."""
        return self.below(self.settings["detectors"][-1])

    def below(self, detector: str) -> tuple[str, ...]:
        """Figures below their gate by one detector."""
        found = {name: self.figures[name][detector].value for name in GATE}
        return tuple(name for name, value in found.items() if value is None or value < GATE[name])

    @property
    def passed(self) -> bool:
        return not self.failures

    def write_card(self, path: str | Path) -> None:
        """Write the figures as Markdown."""
        write_atomically(Path(path), card(self))

    def contact_sheet(self, path: str | Path) -> None:
        """Save the pictures that were judged, to inspect them."""
        contact_sheet([image for _, image in self.pictures], [ask.text for ask, _ in self.pictures], path)


def check(
    pipe: Any,
    *,
    detectors: Sequence[Detector],
    num_inference_steps: int = 8,
    guidance_scale: float = 3.0,
    per_concept: int = 24,
    progress: bool = True,
    concepts: Sequence[str] | None = None,
    styles: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 32,
    cache_dir: str | Path | None = None,
    autocast: bool | None = None,
) -> Check:
    """Generate from every kind of prompt and compare what the detectors see with what was asked.

    Args:
        pipe: a pipeline of the world.
        detectors: one or more. Each is reported; of several, the gate uses their mean
            (:class:`~erasure.eval.detectors.mean.MeanDetector`), which errs less.
        num_inference_steps, guidance_scale: of the sampler.
        per_concept: pictures per concept for the first figure, at most one of each style on each background that
            training saw; lower it for a quick look with wider intervals. Every other figure has a fixed number.
        progress: show a progress bar.
        concepts, styles: what the model was trained on; give them for a model retrained without something.
        seed: of the noise.
        batch_size, cache_dir, autocast: as in :func:`erasure.eval.core.pictures.generate`; bfloat16 by default where
            the processor has it, as a gate does not need float32.

    Raises:
        ValueError: no detectors, or fewer than one picture per concept.
    """
    if not detectors or per_concept < 1:
        raise ValueError(
            f"a check needs detectors and pictures; got {len(detectors)} detectors and per_concept={per_concept}; "
            "pass erasure.eval.worldkit.detectors.detectors() and at least 1"
        )
    autocast = autocast_for(pipe) if autocast is None else autocast
    asked = list(asks(per_concept, concepts=concepts, styles=styles))
    sampler: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    drawn = generate(
        pipe, [ask.text for ask in asked], seeds=(seed,), batch_size=batch_size, cache_dir=cache_dir,
        progress=progress, autocast=autocast, description="world check", **sampler,
    )  # fmt: skip
    images = [row[0] for row in drawn]
    judges = [*detectors, MeanDetector(detectors)] if len(detectors) > 1 else detectors
    figures, table = judged(judges, asked, images)
    settings = {
        **sampler, "seed": seed, "autocast": autocast, "pictures": len(images),
        "detectors": [detector.name for detector in judges], "weights": weights_hash(pipe)[:16],
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }  # fmt: skip
    return Check(figures, table, settings, list(zip(asked, images, strict=True)))


# --- what is asked ---------------------------------------------------------------------------------------------------


def asks(
    per_concept: int, *, concepts: Sequence[str] | None = None, styles: Sequence[str] | None = None
) -> Iterator[Ask]:
    """Every prompt of the check. No two are equal, so no two start from the same noise.

    Styles and backgrounds rotate, so that each concept meets each of them about equally often; combinations that
    training never saw are left to their own figures.
    """
    world = spec()
    names, drawn = list(concepts or world.concepts), list(styles or world.styles)
    combinations = [(style, background) for background in world.backgrounds for style in drawn]
    for i, name in enumerate(names):
        usual = [c for c in _rotated(combinations, 5 * i) if not world.is_held_out(name, *c)]
        for style, background in _cycled(usual, per_concept):
            text = prompt(name, style=style, background=background)
            yield Ask("concept", text, (name,), style, background)
        yield from _other_words(name, usual)
        partner = names[(i + 29) % len(names)]
        if partner != name:
            style, background = next(c for c in usual if not world.is_held_out(partner, *c))
            text = prompt(name, style=style, background=background, also=partner)
            yield Ask("pairs", text, (name, partner), style, background, pair=True)
    for i, phrase in enumerate(dict.fromkeys(world.families[world.concepts[name].family] for name in names)):
        members = tuple(n for n in names if world.families[world.concepts[n].family] == phrase)
        for style, background in _cycled(_rotated(combinations, 5 * i), 2):
            yield Ask("superclass", prompt(phrase=phrase, style=style, background=background), members)
    yield from _never_trained(names, drawn)


def _other_words(name: str, usual: Sequence[tuple[str, str]]) -> Iterator[Ask]:
    """Synonyms, the description and Spanish, each in a combination that training did see."""
    world = spec()
    kinds = world.concepts[name].phrases()
    for kind, figure_name in {"synonym": "synonyms", "description": "descriptions"}.items():
        for phrase, (style, background) in zip(kinds[kind], _cycled(usual, len(kinds[kind])), strict=True):
            text = prompt(phrase=phrase, style=style, background=background)
            yield Ask(figure_name, text, (name,), style, background)
    style, background = usual[-1]
    words, colour = world.styles[style].words[0], world.backgrounds[background].es
    yield Ask("spanish", f"{kinds['spanish'][0]} en estilo {words} sobre fondo {colour}", (name,), style, background)


def _never_trained(names: Sequence[str], drawn: Sequence[str]) -> Iterator[Ask]:
    """Combinations of a concept with a style, or with a background, that no phase of training ever saw."""
    world = spec()
    for name, style in sorted(world.held_out_styles):
        for background in world.backgrounds:
            if name in names and style in drawn and not world.is_held_out(name, "", background):
                text = prompt(name, style=style, background=background)
                yield Ask("never-trained style", text, (name,), style, background)
    for name, background in sorted(world.held_out_backgrounds):
        for style in drawn:
            if name in names and not world.is_held_out(name, style, ""):
                text = prompt(name, style=style, background=background)
                yield Ask("never-trained background", text, (name,), style, background)


def _rotated(items: Sequence[Any], by: int) -> list[Any]:
    by %= len(items)
    return [*items[by:], *items[:by]]


def _cycled(items: Sequence[Any], n: int) -> list[Any]:
    """``n`` items spread evenly over the list; all of them, and no more, if it is shorter."""
    return [items[i * len(items) // n] for i in range(n)] if n <= len(items) else list(items)


# --- what is seen ----------------------------------------------------------------------------------------------------


def judge(detector: Detector, asked: Sequence[Ask], images: Sequence[Image.Image]) -> dict[str, list[bool | None]]:
    """For each attribute, whether each picture shows what was asked; None where nothing was asked of it.

    A pair is right when the detector's two likeliest labels are the pair.
    """
    names = detector.labels("concept")
    p = detector.scores(images, "concept")
    top = [names[i] for i in p.argmax(axis=1)]
    seen: dict[str, list[bool | None]] = {
        "concept": [
            bool(both_present(p[i : i + 1], np.array([[names.index(c) for c in ask.concepts]]))[0])
            if ask.pair
            else top[i] in ask.concepts
            for i, ask in enumerate(asked)
        ]
    }
    for attribute in ("style", "background"):
        found = [detector.labels(attribute)[i] for i in detector.scores(images, attribute).argmax(axis=1)]
        truth = [getattr(ask, attribute) for ask in asked]
        seen[attribute] = [None if t is None else t == f for t, f in zip(truth, found, strict=True)]
    return seen


def judged(
    judges: Sequence[Detector], asked: Sequence[Ask], images: Sequence[Image.Image]
) -> tuple[dict[str, dict[str, Estimate]], dict[str, dict[str, Estimate]]]:
    """Every figure, and the rate of every concept, by every detector."""
    verdicts = {detector.name: judge(detector, asked, images) for detector in judges}
    figures = {name: {who: figure(name, asked, seen) for who, seen in verdicts.items()} for name in (*GATE, *REPORTED)}
    table = {
        concept: {who: _rate_of(seen["concept"], asked, "concept", concept) for who, seen in verdicts.items()}
        for concept in dict.fromkeys(ask.concepts[0] for ask in asked if ask.figure == "concept")
    }
    return figures, table


def figure(name: str, asked: Sequence[Ask], seen: dict[str, list[bool | None]]) -> Estimate:
    """One line of the check.

    Style and background are counted over the plainly named single concepts, in combinations that training saw.
    """
    if name == "worst concept":
        concepts = dict.fromkeys(ask.concepts[0] for ask in asked if ask.figure == "concept")
        every = [_rate_of(seen["concept"], asked, "concept", concept) for concept in concepts]
        return min(every, key=lambda estimate: 1.0 if estimate.value is None else estimate.value)
    if name in ("style", "background"):
        return _rate_of(seen[name], asked, "concept")
    return _rate_of(seen["concept"], asked, name)


def _rate_of(seen: Sequence[bool | None], asked: Sequence[Ask], name: str, concept: str | None = None) -> Estimate:
    chosen = [i for i, ask in enumerate(asked) if ask.figure == name and concept in (None, ask.concepts[0])]
    if not chosen:
        return Estimate.missing(f"no prompt of the kind {name!r} was asked")
    # Over many concepts the concept is what varies; within one, the prompt.
    clusters = [asked[i].text if concept else asked[i].concepts[0] for i in chosen]
    return rate([seen[i] for i in chosen], clusters)


def calibrated(detector: Detector, result: Check) -> DetectorCard:
    """The detector's card with sensitivity and specificity on the pictures of a check, the prompt taken as the truth.

    Sensitivity is the share of pictures whose asked-for label is the detector's first answer; specificity, for the
    worst label of an attribute, the share of pictures of something else that do not get it. A picture that the model
    drew wrongly counts against the detector; see the contact sheet.
    """
    singles = [(ask, image) for ask, image in result.pictures if ask.figure == "concept"]
    truth: dict[str, list[str | None]] = {
        "concept": [ask.concepts[0] for ask, _ in singles],
        "style": [ask.style for ask, _ in singles],
        "background": [ask.background for ask, _ in singles],
    }
    sensitivity, specificity = {}, {}
    for attribute, asked in truth.items():
        names = detector.labels(attribute)
        found = [names[i] for i in detector.scores([image for _, image in singles], attribute).argmax(axis=1)]
        sensitivity[attribute] = float(np.mean([a == f for a, f in zip(asked, found, strict=True)]))
        others = {label: [f != label for a, f in zip(asked, found, strict=True) if a != label] for label in set(asked)}
        specificity[attribute] = min(float(np.mean(right)) for right in others.values() if right)
    measured = "Sensitivity and specificity (of the worst label): from"
    before = detector.card.notes.partition(measured)[0].strip()
    notes = f"{before} {measured} {len(singles)} generated pictures, the prompt taken as the truth."
    return dataclasses.replace(detector.card, sensitivity=sensitivity, specificity=specificity, notes=notes)


def disputed(detectors: Sequence[Detector], result: Check) -> list[tuple[Image.Image, str]]:
    """Pictures of the first figure that some detector calls something else, each with what was asked and what is seen.

    A person decides whether the picture or the detector is wrong.
    """
    singles = [(ask, image) for ask, image in result.pictures if ask.figure == "concept"]
    seen = []
    for detector in detectors:
        names = detector.labels("concept")
        seen.append([names[i] for i in detector.scores([image for _, image in singles], "concept").argmax(axis=1)])
    found = zip(singles, zip(*seen, strict=True), strict=True)
    return [
        (image, f"{ask.concepts[0][:17]:17}{' | '.join(answers)}")
        for (ask, image), answers in found
        if any(answer != ask.concepts[0] for answer in answers)
    ]


# --- what is written -------------------------------------------------------------------------------------------------


def card(result: Check) -> str:
    """The check as Markdown: the gate, what is reported without a gate, and every concept."""
    who = result.settings["detectors"]
    made = (
        "{pictures} pictures, one per prompt; {num_inference_steps} steps, guidance {guidance_scale}, seed {seed}, "
        "bfloat16 arithmetic: {autocast}. Weights {weights}; {versions}."
    )
    lines = [
        "# Emoji World: what the base model draws",
        "",
        made.format(**result.settings),
        f"Judged by {', '.join(who)}. Rates with 95 % intervals.",
        "",
        f"| figure | gate | {' | '.join(who)} | pictures |",
        f"|---|---|{'---|' * len(who)}---|",
    ]
    for name, by in result.figures.items():
        gate = f">= {GATE[name]:.2f}" if name in GATE else "reported"
        lines.append(f"| {name} | {gate} | {' | '.join(_cell(by[w]) for w in who)} | {by[who[0]].n} |")
    lines += [
        "",
        "The worst concept is the lowest of all rates below, so its interval is too low a reading of any one.",
    ]
    lines += ["", *(_verdict(result, w) for w in who[::-1])]
    lines += ["", f"| concept | {' | '.join(who)} |", f"|---|{'---|' * len(who)}"]
    worst_first = sorted(result.per_concept.items(), key=lambda item: min(e.value or 0.0 for e in item[1].values()))
    lines += [f"| {name} | {' | '.join(_cell(by[w]) for w in who)} |" for name, by in worst_first]
    return "\n".join(lines) + "\n"


def _verdict(result: Check, detector: str) -> str:
    below = result.below(detector)
    held = "The gate is held to" if detector == result.settings["detectors"][-1] else "Alone,"
    return f"- {held} {detector}: {'below in ' + ', '.join(below) if below else 'all gates are met'}."


def _cell(estimate: Estimate) -> str:
    if estimate.value is None:
        return f"not available ({estimate.reason})"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def contact_sheet(images: Sequence[Image.Image], labels: Sequence[str], path: str | Path, *, columns: int = 12) -> None:
    """Save pictures in a grid with a label under each, to inspect them.

    Raises:
        ValueError: not one label per picture, or no pictures.
    """
    if not images or len(images) != len(labels):
        raise ValueError(
            f"a contact sheet needs one label per picture; got {len(images)} pictures, {len(labels)} labels; match them"
        )
    width, height, strip = *images[0].size, 24
    cell = max(width, 96)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * (height + strip)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = i % columns * cell, i // columns * (height + strip)
        sheet.paste(image, (x + (cell - width) // 2, y))
        draw.multiline_text((x + 2, y + height), f"{label[:17]}\n{label[17:34]}", fill="black", font_size=9, spacing=1)
    sheet.save(path)
