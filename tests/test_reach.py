"""What can be reached at all.

A model that never shows the target stays within every limit, in every shipped suite, and one that differs from a
retrained one in nothing gets as far as a preset promises.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types

import pytest
from diffusers import PNDMScheduler

from erasure import Suite
from erasure.eval.judge import findings
from erasure.eval.judge.findings import ATTACKS, VARIATIONS
from erasure.eval.judge.view import Facts, Margins, View
from erasure.eval.probes import probe_class
from erasure.eval.probes.asking import MOST, Ask, PromptProbe, facts_of
from erasure.eval.probes.attacking import Attack, goals_of
from erasure.eval.probes.base import Missing, Observation
from erasure.eval.probes.removal.relearning import STEPS, Relearning
from erasure.eval.probes.sampling import target_prompts
from erasure.eval.probes.success import ATTACK, CONTROL, excess
from erasure.eval.probes.suppression.paraphrase import Paraphrase
from erasure.eval.probes.utility.neighbours import Neighbours
from erasure.eval.probes.utility.unrelated import Unrelated
from erasure.eval.probes.weigh import units, within
from erasure.eval.run.assess import PICTURES
from erasure.eval.stats import rate
from tests.slow import first

ROLES = {"base": "base", "copy": "erased", "gold 0": "gold", "gold 1": "gold", "gold 2": "gold"}
SUPERHERO = Suite.load("superhero")
# Of a suite with several targets C2 and C3 are never claimed: probes look at one of them (rules.c2).
NAMES = [name for name in Suite.shipped() if not Suite.load(name).also]


class StandIn:
    """What probes ask of a pipeline before they draw."""

    scheduler = PNDMScheduler()
    text_encoder = types.SimpleNamespace(config=types.SimpleNamespace(num_hidden_layers=12))

    def __call__(self, clip_skip=None):
        raise AssertionError("nothing is drawn here")


def context_of(name):
    return types.SimpleNamespace(pipe=StandIn(), suite=Suite.load(name))


def empty(asks, images):
    """The rows of a model without a hit, by family."""
    rows = {family: [] for family in images}
    for ask in asks:
        for seed in range(images[ask.family]):
            rows[ask.family].append(Observation("copy", ask.family, ask.text, seed, 0.0, None, facts_of(ask)))
    return rows


def limits(name, preset):
    """Probe, family, pictures of a prompt, and the upper limit of no hit at all."""
    context = context_of(name)
    for probe in (probe_class(key).preset(preset) for key in VARIATIONS if key != "prompt_file"):
        try:
            asks = probe.limited(probe.asks(context))
        except Missing:  # a suite without words for it
            continue
        images = probe.images(asks)
        assert isinstance(probe, PromptProbe) and min(images.values()) >= probe.images_per_prompt
        for family, rows in empty(asks, images).items():
            yield probe.key, family, images[family], rate([row.value for row in rows], units(rows)).high


@pytest.mark.parametrize("preset", ["standard", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_no_hit_at_all_is_kept_out_in_every_variation(name, preset):
    found = list(limits(name, preset))
    assert len({key for key, *_ in found}) >= 5
    assert [one for one in found if one[-1] > Margins.of(preset).ceiling] == []


def test_families_of_few_sentences_are_drawn_more_often_and_no_others():
    few = [Ask(f"{i}", "few", template=f"{{}} {i}", phrase="a") for i in range(12)]
    many = [Ask(f"m{i}", "many", template=f"m{{}} {i}", phrase="a") for i in range(24)]
    asks = [*few, *many]
    assert Paraphrase(images_per_prompt=1, resolve=0.2).images(asks) == {"few": 2, "many": 1}
    assert Paraphrase(images_per_prompt=3, resolve=0.2).images(asks) == {"few": 3, "many": 3}
    assert Paraphrase(images_per_prompt=1).images(asks) == {"few": 1, "many": 1}
    assert Paraphrase(images_per_prompt=1, resolve=0.2).images(few[:2]) == {"few": MOST}  # two sentences never do
    assert Paraphrase(images_per_prompt=MOST + 2, resolve=0.2).images(few[:2]) == {"few": MOST + 2}


@pytest.mark.parametrize("key", ["paraphrase", "translation", "sampler", "clip_skip"])
def test_a_run_draws_as_often_and_the_first_pictures_are_the_same(key):
    def observe(model, images, *, family, clusters, seeds, facts):
        each = zip(family, clusters, seeds, facts, strict=True)
        return [Observation(model.name, f, cluster, seed, 0.0, None, fact) for f, cluster, seed, fact in each]

    context = context_of("rose")
    context.too_long = lambda texts: {texts[0]: "too long"}
    context.open = lambda model: contextlib.nullcontext(context.pipe)
    context.pictures = lambda pipe, model, prompts, *, seeds, **more: [(p, s, None) for p in prompts for s in seeds]
    context.observe = observe
    probe, model = probe_class(key).preset("standard"), types.SimpleNamespace(name="copy")
    plain = dataclasses.replace(probe, resolve=None)
    more, least = ({(r.family, r.cluster, r.seed) for r in one.run(model, context)} for one in (probe, plain))
    assert least <= more
    asks = probe.limited(probe.asks(context))
    expected = probe.images([ask for ask in asks if ask.text != asks[0].text])
    assert more == {(ask.family, ask.text, seed) for ask in asks for seed in range(expected[ask.family])}


@pytest.mark.parametrize("preset", ["standard", "full"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ATTACKS)
def test_an_attack_that_gets_nowhere_is_within_the_tolerance_of_c3(key, name, preset):
    probe, context = probe_class(key).preset(preset), context_of(name)
    if isinstance(probe, Attack):
        tried = [goal.named for goal in goals_of(context, "name", probe.prompts)]
    elif key == "noise":
        tried = target_prompts(context, probe.prompts)
    else:
        tried = [f"picture {i}" for i in range(probe.pictures)]  # the user's own
    assert len(set(tried)) == len(tried)
    rows = [Observation("copy", f, one, 0, 0.0, None, {"try": 0}) for one in tried for f in (ATTACK, CONTROL)]
    found = within(rows, CONTROL, ATTACK) if key == "noise" else excess(rows)
    assert found.high <= Margins.of(preset).excess


@pytest.mark.parametrize("preset", ["standard", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_come_back_after_other_training_is_within_that_of_c4(name, preset):
    probe = probe_class("resurgence").preset(preset)
    rows = [
        Observation(
            "copy", family, prompt, run * probe.images_per_prompt + seed, 0.0, None,
            {"step": step, "loss": 1.0 - step, "run": run, "prompt": prompt},
        )
        for step, family in enumerate(("before", "after"))
        for prompt in target_prompts(context_of(name), probe.prompts)
        for run in range(probe.runs)
        for seed in range(probe.images_per_prompt)
    ]  # fmt: skip
    models = {m: [dataclasses.replace(row, model=m, value=float(m == "base")) for row in rows] for m in ROLES}
    (found,) = (e for e in probe.weigh(models, ROLES) if (e.model, e.measure) == ("copy", "above_control"))
    assert found.conclusive and found.estimate.high <= Margins.of(preset).increase


def alike(rows):
    """The same rows of every model."""
    return {name: [dataclasses.replace(row, model=name) for row in rows] for name in ROLES}


def number(evidence, measure):
    (found,) = (e for e in evidence if (e.model, e.measure, e.family) == ("copy", measure, ""))
    return found.estimate


@pytest.mark.parametrize("preset", first(["standard", "full"], "standard"))
def test_a_model_that_learns_as_fast_as_a_retrained_one_is_within_twice(preset):
    probe = Relearning.preset(preset)
    prompts = target_prompts(types.SimpleNamespace(suite=SUPERHERO), probe.prompts)

    def curve(arrived):
        return [
            Observation(
                "copy",
                f"step {s}",
                p,
                seed,
                float(s >= arrived),
                None,
                {
                    "step": s,
                    "run": seed // probe.images_per_prompt,
                    "prompt": p,
                    "loss": 1.0,
                },
            )  # fmt: skip
            for s in probe.steps
            for p in prompts
            for seed in range(probe.runs * probe.images_per_prompt)
        ]

    known = [row for row in curve(0) if row.facts["step"] == 0]
    for arrived in probe.steps[2:]:
        rows = {**alike(curve(arrived)), "base": known}
        assert number(probe.weigh(rows, ROLES), "advantage").high <= Margins.of("full").advantage + 1e-9, arrived
    assert all(later <= 1.45 * step for step, later in zip(STEPS[5:], STEPS[6:], strict=False))
    assert all(later <= 2 * step for step, later in zip(probe.steps[1:], probe.steps[2:], strict=False))


@pytest.mark.parametrize(
    ("kind", "preset"), [(Neighbours, "standard"), (Neighbours, "full"), (Unrelated, "full")], ids=str
)
def test_nothing_lost_is_called_non_inferior(kind, preset):
    spread = {"wide": PICTURES[preset]["wide"], "images": PICTURES[preset]["images_per_prompt"]}
    asked = [prompt for prompt in SUPERHERO.prompts(**spread) if prompt.group == kind.group]
    rows = [
        Observation("copy", p.label, p.text, seed, 1.0, None, {"template": p.template, "phrase": p.phrase})
        for p in asked
        for seed in range(SUPERHERO.pictures(**spread))
    ]
    evidence = kind.preset(preset).weigh(alike(rows), ROLES)
    view = View("copy", evidence, ROLES, Facts(preset, {"copy": "weights"}))
    assert findings.utility(view, kind.key) == "non-inferior"
