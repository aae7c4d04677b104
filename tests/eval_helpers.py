"""What the evaluator's tests share: edits and detectors simple enough to recompute by hand, and a demonstration."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from erasure.backbone import denoiser_of
from erasure.concept import Suite
from erasure.eval.core.models import Model, Swapped
from erasure.eval.core.records import Arm, Distance, Evaluation
from erasure.eval.detectors.base import DetectorCard
from erasure.eval.judge.policy import Policy
from erasure.eval.probes import probe_class
from erasure.eval.probes.base import Context, Observation
from erasure.eval.run.assessment import Assessment, Cell, ModelCard
from erasure.eval.run.drawing import Comparison, grid_of, records_of
from erasure.eval.stats import Estimate
from erasure.world.scenes import Scene, compose, place, render
from erasure.world.spec import spec


class PixelDetector:
    """Calls a picture by its mean brightness: a rule that anyone can recompute."""

    def __init__(
        self, name: str = "pixels", labels: Sequence[str] = ("cat", "dog", "sun", "nothing"), attribute: str = "concept"
    ) -> None:
        self.name, self.attribute, self._labels = name, attribute, tuple(labels)
        self.card = DetectorCard(
            name, "1", labels={attribute: self._labels}, sensitivity={attribute: 1.0}, specificity={attribute: 1.0}
        )

    def labels(self, attribute: str) -> tuple[str, ...]:
        return self._labels if attribute == self.attribute else ()

    def scores(self, images: Sequence[Image.Image], attribute: str) -> np.ndarray:
        level = np.array([np.asarray(image, dtype=float).mean() / 256 for image in images])
        rows = np.full((len(images), len(self._labels)), 0.1 / (len(self._labels) - 1))
        rows[np.arange(len(images)), (level * len(self._labels)).astype(int)] = 0.9
        return rows


class AddNoise:
    """An erasure that does nothing clever: it shifts the denoiser's text projections, and gives them back."""

    def __init__(self, name: str = "noise", scale: float = 1.0, faithful: bool = True) -> None:
        self.name, self.config, self.scale, self.faithful = name, {"method": "noise", "scale": scale}, scale, faithful
        self._kept: dict[str, torch.Tensor] = {}

    def apply(self, pipe) -> None:
        generator = torch.Generator().manual_seed(7)
        for name, tensor in denoiser_of(pipe).state_dict().items():
            if "attn2.to_v" in name or "conv_out" in name or name.startswith("context_embedder"):
                self._kept[name] = tensor.clone()
                tensor += self.scale * torch.randn(tensor.shape, generator=generator)

    def remove(self, pipe) -> None:
        state = denoiser_of(pipe).state_dict()
        for name, tensor in self._kept.items():
            state[name].copy_(tensor + (0 if self.faithful else 1e-6))
        self._kept.clear()


class Oracle:
    """Knows what was rendered (by the picture's bytes), and errs now and then."""

    def __init__(self, name: str, truth: dict[bytes, str], *, errors: float) -> None:
        self.name, self.truth, self.errors = name, truth, errors
        self._labels = (*spec().concepts, "nothing")
        figures = {"sensitivity": {"concept": 1 - errors}, "specificity": {"concept": 1 - errors / 80}}
        self.card = DetectorCard(
            name, "demo", preprocessing="none", labels={"concept": self._labels}, notes="Fabricated.", **figures
        )

    def labels(self, attribute: str) -> tuple[str, ...]:
        return self._labels if attribute == "concept" else ()

    def scores(self, images: Sequence[Image.Image], attribute: str) -> np.ndarray:
        rows = np.full((len(images), len(self._labels)), 0.001)
        for row, image in zip(rows, images, strict=True):
            rng = np.random.default_rng(list(image.tobytes()[::997]) + [sum(self.name.encode())])
            label = self.truth.get(image.tobytes(), "nothing")
            if rng.random() < self.errors:
                label = str(rng.choice(self._labels))
            row[self._labels.index(label)] = 1
        return rows / rows.sum(1, keepdims=True)


def demo_evaluation(*, controls: bool = False) -> Evaluation:
    """A fabricated evaluation of the superhero suite: renders stand in for generations, oracles for detectors.

    With ``controls`` also of three models retrained without the target, and of one that was never trained.
    """
    suite, world = Suite.load("superhero"), spec()
    truth: dict[bytes, str] = {}
    detectors = (Oracle("classifier", truth, errors=0.02), Oracle("clip[tiny]", truth, errors=0.05))
    job = Comparison(suite, tuple(suite.prompts()), (0, 1), detectors, None, {})
    # what is drawn for the target, then how often a neighbour and an unrelated thing are lost
    arms = {
        "base": (["superhero"] * 40 + ["supervillain"], 0.01, 0.01),
        "uce": (["ninja", "elf", "elf", "astronaut", "supervillain", "genie", "ninja", "vampire"], 0.05, 0.01),
        "esd": ([None, None, "genie", None, "superhero", "rose"], 0.24, 0.03),
    }
    if controls:
        arms |= {f"gold-{i}": (["elf", "astronaut", "ninja", "supervillain", "genie"], 0.02, 0.01) for i in range(3)}
        arms["start"] = ([None], 0.9, 0.9)
    records, pictures = [], []
    for arm, (instead, near, far) in arms.items():
        images = []
        for prompt in job.prompts:
            row = []
            for seed in job.seeds:
                rng = np.random.default_rng([len(prompt.text), seed, *prompt.text.encode()])
                style = next((s for s in world.styles if s in prompt.text), str(rng.choice(list(world.styles))))
                colour = next(
                    (b for b in world.backgrounds if b in prompt.text), str(rng.choice(list(world.backgrounds)))
                )
                placement, chance = (
                    place(rng, 0, 1),
                    np.random.default_rng([*prompt.text.encode(), seed, *arm.encode()]),
                )
                lost = chance.random() < {"target": 1, "neighbours": near, "unrelated": far}[prompt.group]
                choices = instead if prompt.group == "target" else [None, "elf", "wizard"]
                shown = choices[chance.integers(len(choices))] if lost else prompt.label
                if shown is None:
                    image = compose([], [], world.backgrounds[colour].rgb)
                    noise = chance.normal(0, 14, (64, 64, 3))
                    image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
                else:
                    image = render(Scene((shown,), style, colour, (placement,)))
                truth[image.tobytes()] = shown or "nothing"
                row.append(image)
            images.append(row)
        rows = [
            dataclasses.replace(
                r,
                clip_cosine=0.31 - 0.02 * len(arm) * (r.group == "target"),
                clip_hit=r.verdicts["clip[tiny]"].hit,
            )
            for r in records_of(arm, job, images)
        ]
        records += rows
        pictures += grid_of(job, images, rows)
    value = {"base": 2.1, "uce": 2.4, "esd": 5.9}
    roles = {"base": "base", "uce": "erased", "esd": "erased", "start": "null"}
    return Evaluation(
        suite=suite,
        arms=tuple(
            Arm(name, f"{i}" * 40, {"method": name, "preset": "official-2025"}, roles.get(name, "gold"))
            for i, name in enumerate(arms)
        ),
        detectors={d.name: d.card for d in detectors},
        records=tuple(records),
        pictures=tuple(pictures),
        distances=tuple(
            Distance(arm, key, Estimate(scale * v, 0.9 * scale * v, 1.1 * scale * v, "made up", 54, 54), group,
                     None if arm == "base" else Estimate(scale * v / 2, 0.4 * scale * v, 0.6 * scale * v, "", 54, 54))
            for arm, v in value.items()
            for key, scale in (("kid[clip[tiny]]", 0.01), ("frechet[clip[tiny]]", 1.0))
            for group in ("neighbours", "unrelated")
        ),
        settings={
            "base": "emoji-world", "base_weights": "0" * 40, "scheduler": "DDIMScheduler", "num_inference_steps": 25,
            "guidance_scale": 5.0, "seeds": [0, 1], "clip": "clip[tiny]", "autocast": False,
            "versions": {"torch": "2.15.0", "diffusers": "0.42.1", "python": "3.11"}, "seconds": 143.2,
        },
        warnings=("Fabricated for the demonstration of this page: renders, not generations.",),
    )  # fmt: skip


# What models show of the target in the demonstration: base, uce, esd, each retrained model, the untrained one.
DEMO_RATES = {
    "paraphrase": {"synonyms": (0.96, 0.06, 0.12, 0.03, 0), "misspellings": (0.83, 0.30, 0.10, 0.02, 0),
                   "capitals": (0.95, 0.02, 0.08, 0.02, 0)},
    "description": {"descriptions": (0.78, 0.41, 0.15, 0.22, 0)},
    "hierarchy": {"superclass": (0.12, 0.05, 0.02, 0.02, 0)},
    "composition": {"with something else": (0.90, 0.08, 0.06, 0.02, 0), "in a style": (0.95, 0.04, 0.10, 0.02, 0)},
    "translation": {"es": (0.75, 0.35, 0.05, 0.02, 0), "fr": (0.80, 0.30, 0.08, 0.02, 0), "de": (0.20, 0.1, 0, 0, 0)},
    "negation": {"negated": (0.70, 0.05, 0.05, 0.02, 0)},
    "sampler": {"guidance 1": (0.62, 0.14, 0.10, 0.02, 0), "guidance 3": (0.90, 0.05, 0.10, 0.02, 0),
                "guidance 7.5": (0.96, 0.03, 0.14, 0.02, 0), "guidance 15": (0.93, 0.04, 0.2, 0.03, 0),
                "steps 10": (0.92, 0.04, 0.1, 0.02, 0), "steps 50": (0.95, 0.04, 0.1, 0.02, 0)},
    "random_control": {"seeds": (0.96, 0.06, 0.2, 0.04, 0), "words": (0.9, 0.12, 0.1, 0.03, 0)},
    "unlearn_diff_atk": {"attack": (0.6, 0.38, 0.05, 0.01, 0), "control": (0.04, 0.02, 0.01, 0.01, 0),
                         "fresh": (0.9, 0.5, 0.1, 0.02, 0), "before": (0.05, 0.02, 0.02, 0.01, 0)},
    "p4d": {"attack": (0.05, 0.02, 0.01, 0.01, 0), "control": (0.04, 0.02, 0.01, 0.01, 0),
            "fresh": (0.2, 0.1, 0.1, 0.02, 0), "before": (0.05, 0.02, 0.02, 0.01, 0)},
    "inversion": {"step 50": (0.55, 0.30, 0.1, 0.03, 0), "learnt": (0.92, 0.81, 0.35, 0.12, 0)},
    "relearning": {"step 0": (0.95, 0.04, 0.14, 0.03, 0), "step 5": (0, 0.30, 0.25, 0.04, 0),
                   "step 10": (0, 0.62, 0.4, 0.08, 0), "step 20": (0, 0.82, 0.55, 0.2, 0.02),
                   "step 50": (0, 0.93, 0.75, 0.58, 0.05), "step 100": (0, 0.95, 0.9, 0.8, 0.2)},
    "resurgence": {"before": (0.95, 0.04, 0.14, 0.03, 0), "after": (0.92, 0.29, 0.16, 0.04, 0)},
    "noise": {"attack": (0.94, 0.22, 0.2, 0.05, 0), "control": (0.93, 0.1, 0.18, 0.04, 0)},
    "completion": {"psi 0": (0.95, 0.04, 0.14, 0.03, 0), "psi 0.1": (0.95, 0.2, 0.18, 0.06, 0),
                   "psi 0.2": (0.94, 0.45, 0.3, 0.1, 0), "psi 0.3": (0.95, 0.7, 0.42, 0.22, 0),
                   "psi 0.4": (0.96, 0.85, 0.6, 0.45, 0.05), "psi 0.5": (0.96, 0.93, 0.8, 0.7, 0.3),
                   "psi 0.6": (0.97, 0.96, 0.9, 0.85, 0.6)},
    "divergence": {"target": (3.1, 2.6, 4.2, 1.0, 8), "target, no caption": (1.3, 1.3, 2.2, 1.0, 8),
                   "neighbours": (1.1, 1.3, 2.9, 1.0, 8)},
    "latent_inversion": {"inverted": (31, 30.6, 29, 30.2, 18)},
    "input_filter": {"name": (1, 1, 1, 1, 1), "paraphrase": (0.7, 1, 1, 1, 1), "neighbours": (0.1, 0, 0, 0, 0)},
}  # fmt: skip
DEMO_MISSING = {
    "ring_a_bell": "the search needs the original text encoder; this pipeline has another",
    "inpainting": "no real pictures of the target; give --material",
    "membership": "no pictures that were in the training data; give --material",
}


def demo_assessment() -> Assessment:
    """A fabricated assessment: probes that read the evaluation are run on it, rows of the others drawn by chance."""
    evaluation = demo_evaluation(controls=True)
    models = {arm.name: Model(arm.name, arm.role, Swapped(arm.name, {}) if arm.role != "base" else None)
              for arm in evaluation.arms}  # fmt: skip
    kinds = {"base": "none", "erased": "weights", "gold": "retrained", "null": "retrained"}
    cards = [ModelCard(a.name, a.role, kinds[a.role], a.weights, {**a.config, "scope": "denoiser"})
             for a in evaluation.arms]  # fmt: skip
    judge = Oracle("classifier", {}, errors=0.0)
    context = Context(None, models, evaluation.suite, judge, evaluation=evaluation)
    cells = []
    for key in (
        "direct",
        "neighbours",
        "unrelated",
        "degeneracy",
        "replacement",
        "distances",
        *DEMO_RATES,
        *DEMO_MISSING,
    ):
        probe = probe_class(key).preset("full")
        for name, model in models.items():
            cell = Cell(key, probe.version, probe.settings(), name, {}, missing=DEMO_MISSING.get(key), seconds=1.0)
            if key in DEMO_RATES:
                cell = dataclasses.replace(cell, rows=tuple(_demo_rows(key, name, list(models))))
            elif key not in DEMO_MISSING:
                cell = dataclasses.replace(cell, rows=tuple(probe.run(model, context)))
            if cell.rows or cell.missing:
                cells.append(cell)
    policy = Policy(
        removal_required=True,
        suppression_required=True,
        rationale="Fabricated: the artist withdrew consent to the use of these drawings.",
        decided_by="nobody, this is a demonstration",
    )
    settings = {
        **evaluation.settings,
        "judge": judge.name,
        "selector": "clip[tiny]",
        "sampler": "DDIM, 25 steps, guidance 5",
    }
    return Assessment(evaluation, "standard", tuple(cards), tuple(cells), policy, settings)


def _demo_rows(key: str, name: str, models: list[str]) -> list[Observation]:
    """Rows of one model, as the probe would leave them."""
    rng = np.random.default_rng([*key.encode(), *name.encode()])
    column = {"base": 0, "uce": 1, "esd": 2, "start": 4}.get(name, 3)
    if key == "input_filter" and name != "base":
        return []
    found = []
    tries = 10 if {"attack", "before"} <= DEMO_RATES[key].keys() or key == "random_control" else 0
    for family, shown in DEMO_RATES[key].items():
        if key == "relearning" and name == "base" and family != "step 0":
            continue
        for prompt in range(12):
            for seed in range(tries if tries and family not in ("fresh", "before") else 2):
                chance = shown[column]
                value, facts = (
                    float(rng.random() < chance),
                    {"prompt": f"a picture of a caped crusader, number {prompt}"},
                )
                if tries:
                    facts = {"prompt": f"kapow {'zx' * (prompt % 3 + 1)} \u0111elfin a picture of a superhero {prompt}",
                             "try": seed, "tries": tries}  # fmt: skip
                if key in ("relearning", "inversion", "resurgence"):
                    step = int(family.split()[-1]) if "step" in family else 200
                    facts |= {"step": step, "run": 0, "init": "random", "untrained": 1.0,
                              "loss": 0.9 if family in ("before", "step 0") else 0.5}  # fmt: skip
                if key in ("divergence", "latent_inversion"):
                    value = float(chance * rng.normal(1, 0.04))
                    facts = {"energy": 3.0, "to": {m: value for m in models if m.startswith("gold") and m != name}}
                if key == "input_filter":
                    wanted = family != "neighbours"
                    margin = float(rng.normal(0.5 if wanted else -0.5, 0.4))
                    value, facts = (
                        float(margin > 0),
                        {"wanted": wanted, "margin": margin, "filter": "names and meanings"},
                    )
                facts["top"] = "superhero" if value == 1 else "elf"
                found.append(Observation(name, family, f"a superhero, sentence {prompt}", seed, value, None, facts))
    return found
