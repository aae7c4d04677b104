"""What pictures have in common reaches the intervals: from suites and prompts over rows to evidence."""

from __future__ import annotations

import dataclasses
import types

import pytest

from erasure import Suite
from erasure.eval.core import tables
from erasure.eval.probes import probe_class
from erasure.eval.probes.base import Observation
from erasure.eval.probes.removal.inversion import ConceptInversion
from erasure.eval.probes.suppression.direct import Direct
from erasure.eval.probes.utility.neighbours import Neighbours
from erasure.eval.probes.weigh import contrasts
from erasure.eval.run.assess import PICTURES
from erasure.eval.run.drawing import paired_pictures
from erasure.eval.stats import rate
from erasure.wording import with_article
from tests.eval_helpers import AddNoise, PixelDetector
from tests.probe_helpers import ROLES, SUITE, tiny_context
from tests.tiny import tiny_pipeline

WIDE = {
    name: {"wide": size["wide"], "images": size["images_per_prompt"]}
    for name, size in PICTURES.items()
    if "wide" in size
}


def crossed(hit, *, model="base", templates=24, phrases=3, hashes=None) -> list[Observation]:
    """Rows of a prompt probe that know their template and their phrase."""
    return [
        Observation(
            model, "name", f"t{t} p{p}", 0, float(hit(t, p)), None,
            {"template": f"t{t}", "phrase": f"p{p}", **({"image_hash": f"{hashes}{t}{p}"} if hashes else {})},
        )
        for t in range(templates)
        for p in range(phrases)
    ]  # fmt: skip


def plain(rows):
    """As they were written before templates and phrases were kept."""
    return [dataclasses.replace(row, facts={}) for row in rows]


@pytest.mark.parametrize("name", ["superhero", "cat", "spiderman", "van_gogh", "twemoji", "mona_lisa", "nudity"])
@pytest.mark.parametrize("preset", sorted(WIDE))
def test_reports_ask_in_twenty_sentences_or_more(name, preset):
    suite = Suite.load(name)
    asked = suite.prompts(**WIDE[preset])
    of_target = [prompt for prompt in asked if prompt.group == "target"]
    assert len({prompt.template for prompt in of_target}) >= 20
    for prompt in of_target:
        noun = prompt.phrase if suite.attribute == "style" else with_article(prompt.phrase)
        assert prompt.text == prompt.template.replace("{}", noun)
    for group in ("neighbours", "unrelated"):
        kept = [prompt for prompt in asked if prompt.group == group]
        assert len({prompt.template for prompt in kept}) >= 20 or not kept
        own = [prompt for prompt in suite.prompts() if prompt.group == group]
        images = WIDE[preset]["images"] or suite.images_per_prompt
        assert len(kept) * suite.pictures(**WIDE[preset]) <= len(own) * images  # as many pictures as before, or fewer


def test_without_width_a_suite_asks_what_it_always_asked():
    suite = Suite.load("superhero")
    assert [p.text for p in suite.prompts(wide=3)] == [p.text for p in suite.prompts()]
    assert suite.pictures() == suite.pictures(wide=3) == 2 and suite.pictures(wide=24) == 1
    assert {p.template for p in suite.prompts()} == set(suite.concept.templates)
    with pytest.raises(ValueError, match="further sentence"):
        dataclasses.replace(suite, further=("a picture",))


@pytest.mark.parametrize("key", ["paraphrase", "description", "hierarchy", "composition", "translation"])
def test_prompt_probes_of_a_report_know_templates_and_phrases(key):
    suite, settings = Suite.load("superhero"), probe_class(key).preset("standard")
    asks = settings.limited(settings.asks(types.SimpleNamespace(suite=suite)))
    assert all(ask.template.count("{}") == 1 and ask.phrase for ask in asks)
    assert len({ask.template for ask in asks}) >= 20


def test_a_template_that_shows_the_target_widens_the_interval_and_is_named():
    rows = {"base": crossed(lambda t, p: True), "UCE": crossed(lambda t, p: t in (3, 7), model="UCE")}
    found = {(e.model, e.measure): e for e in contrasts("paraphrase", rows, ROLES)}
    before = {(e.model, e.measure): e for e in contrasts("paraphrase", {m: plain(r) for m, r in rows.items()}, ROLES)}
    for measure in ("rate", "change"):
        now, then = found["UCE", measure].estimate, before["UCE", measure].estimate
        assert now.value == then.value and now.high > then.high + 0.02
    worst = found["UCE", "worst_stratum"]
    assert worst.estimate.value == 1 and worst.estimate.n == 3 and "template \u201ct3\u201d" in worst.note
    assert ("UCE", "worst_stratum") not in before


def test_rows_that_do_not_know_weigh_as_they_did():
    rows = plain(crossed(lambda t, p: t % 4 == 0))
    (found,) = (e for e in contrasts("direct", {"base": rows}, ROLES) if e.measure == "rate")
    assert found.estimate == rate([row.value for row in rows], [row.cluster for row in rows])
    assert "by prompt" in found.estimate.method and not found.note


def test_identical_pictures_leave_nothing_to_be_unsure_about():
    rows = {name: crossed(lambda t, p: True, model=name, hashes="h") for name in ("base", "UCE")}
    rows = {name: [dataclasses.replace(row, family=row.facts["phrase"]) for row in own] for name, own in rows.items()}
    found = {(e.model, e.measure, e.family): e.estimate for e in Neighbours().weigh(rows, ROLES)}
    for measure in ("change", "worst"):
        same = found["UCE", measure, ""]
        assert (same.low, same.value, same.high) == (0, 0, 0) and same.method == "identical pictures"
    other = crossed(lambda t, p: True, model="UCE", hashes="h")
    other[5] = dataclasses.replace(other[5], facts={**other[5].facts, "image_hash": "another"})
    rows["UCE"] = [dataclasses.replace(row, family=row.facts["phrase"]) for row in other]
    found = {(e.model, e.measure, e.family): e.estimate for e in Neighbours().weigh(rows, ROLES)}
    assert found["UCE", "change", ""].low < 0


def test_one_training_says_so_and_three_are_drawn():
    def rows(runs):
        return [
            Observation("base", "learnt", f"{run}: p{p}", 0, float(run == 0), None, {
                "run": run, "init": run, "prompt": f"p{p}", "loss": 0.0, "untrained": 1.0,
            })
            for run in range(runs)
            for p in range(12)
        ]  # fmt: skip

    (one,) = ConceptInversion().weigh({"base": rows(1)}, ROLES)
    assert "one training" in one.note
    (three,) = ConceptInversion().weigh({"base": rows(3)}, ROLES)
    assert not three.note and three.estimate.low == 0 and three.estimate.high == 1


def test_the_paired_pictures_know_templates_and_phrases():
    found = paired_pictures(
        tiny_pipeline(), {"same": AddNoise(scale=0.0), "noise": AddNoise(scale=0.5)}, SUITE,
        detectors=[PixelDetector()], progress=False,
    )  # fmt: skip
    assert {(r.template, r.phrase) for r in found.select("base", "target")} == {
        (t, p) for t in SUITE.concept.templates for p in SUITE.concept.phrases
    }
    row = tables.row(found, "same", "pixels", "neighbours")
    assert (row.change.low, row.change.high) == (0, 0)
    context = tiny_context(evaluation=found)
    rows = Direct().run(context.base, context)
    assert all(row.facts["template"] and row.facts["phrase"] for row in rows)
    old = [dataclasses.replace(r, template="", phrase="") for r in found.records]
    method = tables.row(dataclasses.replace(found, records=tuple(old)), "base", "pixels", "target").rate.method
    assert "by prompt" in method and "template" in tables.row(found, "base", "pixels", "target").rate.method
