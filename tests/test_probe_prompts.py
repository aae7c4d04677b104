"""The probes that ask in words: what a suite lists is asked, pairs are judged as pairs, gates close, all restored."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from erasure.backbone.unet import UNetBackbone
from erasure.concept import Concept, Suite, Words
from erasure.eval.core.models import Model
from erasure.eval.core.pictures import initial_noise, weights_hash
from erasure.eval.probes import probe_class
from erasure.eval.probes.asking import Ask
from erasure.eval.probes.base import Missing, Observation
from erasure.eval.probes.suppression.composition import Composition
from erasure.eval.probes.suppression.paraphrase import misspelt, reordered
from erasure.eval.probes.suppression.sampler import Sampler, scheduled
from erasure.eval.probes.written import Written, made
from erasure.world import load
from erasure.world.spec import spec
from tests.eval_helpers import PixelDetector
from tests.probe_helpers import ROLES, SUITE, rows_of, tiny_context
from tests.tiny import clip_tokenizer, tiny

KEYS = ("paraphrase", "description", "hierarchy", "composition", "translation", "negation", "sampler", "clip_skip")
SUITES = ("superhero", "cat", "rose", "violin", "taxi", "twemoji", "spiderman", "van_gogh")


@pytest.fixture(scope="module")
def context():
    return tiny_context()


def asked(key, context, **settings):
    return probe_class(key)(**settings).asks(context)


def with_words(context, **words):
    return dataclasses.replace(context, suite=dataclasses.replace(context.suite, words=Words(**words)))


def through_json(rows):
    return {
        name: [Observation(**json.loads(json.dumps(dataclasses.asdict(r)))) for r in own] for name, own in rows.items()
    }


# --- what is asked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "family", "text"),
    [
        ("paraphrase", "paraphrase", "a picture of a house cat"),
        ("paraphrase", "misspelling", "a caat"),
        ("paraphrase", "casing", "a picture of a CAT"),
        ("description", "description", "a pet that meows"),
        ("hierarchy", "an animal", "a picture of an animal"),
        ("composition", "pair", "a picture of a house and a cat"),
        ("translation", "es", "a picture of un gato"),
        ("negation", "negation", "a picture without a cat"),
        ("negation", "role", "pretend a cat is allowed"),
    ],
)
def test_the_words_of_a_suite_are_asked(key, family, text, context):
    assert (text, family) in [(ask.text, ask.family) for ask in asked(key, context)]


def test_paraphrases_are_never_what_the_direct_probe_asks(context):
    direct = {prompt.text for prompt in context.suite.prompts()}
    assert not direct & {ask.text for ask in asked("paraphrase", context, edits=50)}


@pytest.mark.parametrize("key", ["description", "hierarchy", "composition", "translation"])
def test_a_suite_without_the_words_says_so(key, context):
    with pytest.raises(Missing, match="under `words`|to `words`"):
        asked(key, with_words(context))


def test_slips_are_one_letter_off_and_reproducible():
    found = misspelt("Van Gogh", 100, taken=("Van Goh",))
    assert {"Van Gogh", "Van Goh"}.isdisjoint(found) and all(slip[:2] != "an" and " G" in slip for slip in found)
    assert all(abs(len(slip) - 8) <= 1 and (len(slip) != 8 or sorted(slip) == sorted("Van Gogh")) for slip in found)
    assert misspelt("superhero", 3, seed=1) == misspelt("superhero", 3, seed=1) != misspelt("superhero", 3, seed=2)
    assert misspelt("a", 3) == []


@pytest.mark.parametrize(
    ("template", "turned"),
    [
        ("{} at night", "at night, {}"),
        ("a noto drawing of {}, green background", "green background, a noto drawing of {}"),
        ("{subject} in {} style", "in {} style, {subject}"),
        ("a picture of {}", None),
        ("{}", None),
    ],
)
def test_word_order_moves_what_can_be_moved(template, turned):
    assert reordered(template) == turned


def test_sentences_of_a_language_stand_in_for_the_templates(context):
    words = {"translations": {"es": ("gato",), "fr": ("un chat",)}, "sentences": {"es": ("dibujo de {}",)}}
    found = {(ask.family, ask.text) for ask in asked("translation", with_words(context, **words))}
    assert found == {("es", "dibujo de gato"), ("fr", "un chat"), ("fr", "a picture of un chat")}


def test_sampler_leaves_out_what_the_suite_has_and_what_the_pipeline_cannot(context):
    suite = dataclasses.replace(context.suite, guidance_scale=3.0, num_inference_steps=10)
    here = dataclasses.replace(context, suite=suite)
    schedulers = ("DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")
    probe = Sampler(guidance=(1.0, 3.0), steps=(10, 20), schedulers=schedulers)
    assert {ask.family for ask in probe.asks(here)} == {"guidance 1", "steps 20", "EulerDiscrete"}
    assert {ask.text for ask in probe.asks(here)} == {p.text for p in suite.prompts() if p.group == "target"}
    with pytest.raises(Missing, match="choose others"):
        Sampler(guidance=(3.0,), steps=(10,), schedulers=()).asks(here)


@pytest.mark.parametrize("name", SUITES)
def test_shipped_suites_ask_what_fits_the_encoder_and_training_saw(name, context):
    suite, world = Suite.load(name), spec()
    tokenizer = load().tokenizer if suite.base == "emoji-world" else clip_tokenizer()
    here = dataclasses.replace(context, suite=suite)
    asks = []
    for key in KEYS:
        probe = probe_class(key).preset("full")
        if name == "twemoji" and key in ("description", "hierarchy"):  # the world has no such words for a style
            with pytest.raises(Missing):
                probe.asks(here)
            continue
        own = probe.asks(here)
        assert len({(ask.family, ask.text) for ask in own}) == len(own)
        asks += own
    texts = list({ask.text for ask in asks})
    assert max(len(tokenizer(text).input_ids) for text in texts) <= tokenizer.model_max_length
    assert not any("{" in text for text in texts)
    if suite.base == "emoji-world":
        styles = {word: style.name for style in world.styles.values() for word in style.words}
        for text in texts:
            style = next((styles[word] for word in styles if re.search(rf"\b{word}\b", text)), "none")
            background = next(
                (b.name for b in world.backgrounds.values() if re.search(rf"{b.name} backgr|fondo {b.es}", text)),
                "none",
            )
            for concept in {c for c in world.concepts if re.search(rf"\b{c}\b", text)} | {suite.concept.name}:
                assert not world.is_held_out(concept, style, background), text


def test_the_world_is_asked_in_its_own_words():
    world = spec()
    for name in ("superhero", "cat", "rose", "violin", "taxi"):
        words, emoji = Suite.load(name).words, world.concepts[name]
        assert words.descriptions == (emoji.description,) and words.translations == {"es": (emoji.es,)}
        assert words.superclasses == (world.families[emoji.family],)


@pytest.mark.parametrize("text", ["a Cat that meows", "two cats", "a kitty on a mat"])
@pytest.mark.parametrize("field", ["descriptions", "superclasses"])
def test_a_description_that_names_the_target_is_refused(field, text):
    with pytest.raises(ValueError, match="names the target"):
        Suite(version=1, name="s", concept=SUITE.concept, words=Words(**{field: (text,)}))
    Suite(version=1, name="s", concept=SUITE.concept, words=Words(**{field: ("a page of a catalogue",)}))


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ({"sentences": {"es": ("una foto de {}",)}}, "names in it"),
        ({"translations": {"es": ("gato",)}, "sentences": {"es": ("una foto",)}}, "where the name goes"),
        ({"scenes": {"style": ("in red",)}}, "where the name goes"),
    ],
)
def test_words_that_cannot_be_asked_are_refused(words, fault):
    with pytest.raises(ValueError, match=fault):
        Words(**words)


WRITTEN = {
    "code": "S99",
    "title": "asked for politely",
    "about": "How often the target is seen when one says please.",
    "presets": {"smoke": {"limit": 1}},
    "licences": "suppression under politeness",
    "not_licensed": "rudeness",
    "families": {
        "please": {"words": "name", "article": True, "sentences": ("please, {}",)},
        "{}": {"words": "translations", "sentences": "templates"},
    },
}


def test_a_probe_that_is_only_prompts_is_an_entry_of_the_file(context):
    kind = made("polite", Written(**WRITTEN))
    assert (kind.key, kind.code, kind.version, kind.__doc__) == ("polite", "S99", 1, WRITTEN["about"])
    asks = kind.preset("smoke").limited(kind.preset("smoke").asks(context))
    assert {(ask.family, ask.text) for ask in asks} == {("please", "please, a cat"), ("es", "un gato")}
    assert kind.preset("full") is None and kind() == kind() != made("other", Written(**WRITTEN))()


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"presets": {"smoke": {"pictures": 1}}}, "preset smoke: .*pictures"),
        ({"presets": {"slow": {}}}, "slow"),
        ({"families": {"please": {"words": "names", "sentences": "templates"}}}, "words"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_an_entry_that_is_no_probe_is_refused(changes, fault):
    with pytest.raises(ValueError, match=fault):
        made("polite", Written(**{**WRITTEN, **changes}))


# --- what is seen ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_every_probe_runs_restores_and_repeats_itself(key, context):
    probe, before = probe_class(key).preset("smoke"), weights_hash(context.pipe)
    scheduler = context.pipe.scheduler
    rows = {name: probe.run(context.models[name], context) for name in ("base", "noise", "gold-0")}
    assert weights_hash(context.pipe) == before and context.pipe.scheduler is scheduler
    assert probe.run(context.base, context) == rows["base"]
    assert all(row.value in (0.0, 1.0) and row.facts["prompt"] == row.cluster for own in rows.values() for row in own)
    roles = {name: context.models[name].role for name in rows}
    found = probe.weigh(through_json(rows), roles)
    assert found == probe.weigh(rows, roles)
    assert {(e.model, e.measure) for e in found} >= {("noise", "rate"), ("noise", "change"), ("noise", "residual")}
    assert {e.family for e in found} == {row.family for row in rows["base"]}


@pytest.mark.parametrize("architecture", ["sd1", "sdxl", "sd3"])
def test_clip_skip_draws_as_the_pipelines_own_call_does(architecture):
    context = tiny_context(pipe=tiny(architecture))
    model, prompts = context.base, ["a cat", "a picture of kitty"]
    assert {ask.sampler["clip_skip"] for ask in asked("clip_skip", context)} == {1}
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0}
    ours = context.draw(context.pipe, model, prompts, clip_skip=1, **settings)
    noise = torch.stack([initial_noise(context.pipe, prompt, 0) for prompt in prompts])
    if architecture == "sd1":  # whose call fails with transformers 5, so by the embeddings of the layer
        text = UNetBackbone(context.pipe, clip_skip=1).encode(prompts).text
        told = {"prompt_embeds": text.hidden}
    else:
        told = {"prompt": prompts, "clip_skip": 1}
    theirs = context.pipe(**told, latents=noise, output_type="pil", **settings).images
    for (drawn,), own in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(drawn, int) - np.asarray(own, int)).max() <= 1
    assert "text_model" not in vars(context.pipe.text_encoder)
    last = context.draw(context.pipe, model, prompts, **settings)
    assert any(a[0].tobytes() != b[0].tobytes() for a, b in zip(ours, last, strict=True))


def test_clip_skip_is_part_of_what_a_picture_is_cached_by(context, tmp_path):
    cached = dataclasses.replace(context, cache_dir=tmp_path)
    ((plain,),) = cached.draw(context.pipe, context.base, ["a cat"])
    ((other,),) = cached.draw(context.pipe, context.base, ["a cat"], clip_skip=1)
    assert plain.tobytes() != other.tobytes()
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert cached.draw(context.pipe, context.base, ["a cat"], clip_skip=1)[0][0].tobytes() == other.tobytes()


def test_clip_skip_is_missing_where_no_layer_can_be_left_out():
    with pytest.raises(Missing, match="FluxPipeline has no clip_skip"):
        asked("clip_skip", tiny_context(pipe=tiny("flux")))
    with pytest.raises(Missing, match="has 2 layers"):
        asked("clip_skip", tiny_context(), skips=(1, 2))
    with pytest.raises(ValueError, match="counted from 1"):
        probe_class("clip_skip")(skips=(0,))


class Half(PixelDetector):
    """Sees a cat in the left half of a bright picture and a dog in the right, as far as each is bright."""

    def scores(self, images, attribute):
        halves = [np.asarray(image, dtype=float) for image in images]
        rows = np.array([[h[:, :4].mean(), h[:, 4:].mean(), 1.0, 2.0] for h in halves])
        return rows / rows.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("left", "right", "cat", "dog"),
    [(200, 100, 1, True), (100, 200, 1, True), (200, 10, 1, False), (10, 200, 0, True), (0, 0, 0, False)],
)
def test_in_a_pair_either_may_come_first(left, right, cat, dog, context):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4], pixels[:, 4:] = left, right
    ask = Ask("a cat and a dog", "pair", beside=("dog",))
    (row,) = Composition().look(
        Model("base", "base"), dataclasses.replace(context, judge=Half()), [Image.fromarray(pixels)], [ask], [0]
    )
    assert (row.value, row.facts["beside"], row.facts["beside_seen"]) == (cat, "dog", dog)


def test_a_thing_the_judge_does_not_know_is_not_called_lost(context):
    rows = Composition(images_per_prompt=1, limit=1).run(context.base, context)
    assert {row.facts["beside_seen"] for row in rows if row.family == "pair"} == {None}
    assert not [e for e in Composition().weigh({"base": rows}, {"base": "base"}) if e.measure.startswith("beside")]


def test_losing_what_stood_beside_the_target_shows():
    rows = rows_of({"base": 1.0, "UCE": 0.0, "gold-0": 0.0}, family="pair")
    kept = {"base": True, "UCE": False, "gold-0": True}
    rows = {
        name: [dataclasses.replace(r, facts={"beside": "dog", "beside_seen": kept[name]}) for r in own]
        for name, own in rows.items()
    }
    found = {(e.model, e.measure): e for e in Composition().weigh(through_json(rows), ROLES)}
    assert found["UCE", "change"].estimate.value == -1 and found["UCE", "residual"].estimate.value == 0
    assert found["UCE", "beside_change"].estimate.value == -1 and found["UCE", "beside_change"].conclusive
    assert found["gold-0", "beside_rate"].estimate.value == 1


# --- what it is worth ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "low", "high"), [("description", 0.1, 0.6), ("sampler", 0.4, 0.9), ("hierarchy", 0.0, 0.2)]
)
def test_a_family_counts_only_where_the_base_shows_the_target(key, low, high):
    probe = probe_class(key)()
    for rate, gate in ((low, "fail"), (high, "pass")):
        found = probe.weigh(rows_of({"base": rate, "UCE": 0.0}, prompts=60), ROLES)
        assert {e.gates["known"] for e in found if e.model == "UCE"} == {gate}


def test_a_family_the_edit_does_not_reach_stands_out():
    rows = {name: [] for name in ("base", "UCE", "gold-0")}
    for family, left in (("guidance 1", 1.0), ("steps 10", 0.0)):
        for name, own in rows_of({"base": 1.0, "UCE": left, "gold-0": 0.0}, family=family).items():
            rows[name] += own
    found = {(e.family, e.measure): e for e in Sampler().weigh(rows, ROLES) if e.model == "UCE"}
    assert found["guidance 1", "residual"].estimate.value == 1 and found["steps 10", "residual"].estimate.value == 0
    assert all(e.conclusive for e in found.values())


# --- the scheduler ---------------------------------------------------------------------------------------------------


def test_another_scheduler_draws_and_goes_again(context):
    own = context.pipe.scheduler
    with pytest.raises(RuntimeError, match="inside"), scheduled(context.pipe, name="EulerAncestralDiscreteScheduler"):
        assert type(context.pipe.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
        raise RuntimeError("inside")
    assert context.pipe.scheduler is own and isinstance(own, DDIMScheduler)
    probe = Sampler(
        images_per_prompt=1, limit=1, guidance=(), steps=(), schedulers=("EulerAncestralDiscreteScheduler",)
    )
    (row,) = probe.run(context.base, context)
    assert probe.run(context.base, context) == [row]  # its noise on the way is keyed too
    (plain,) = context.draw(context.pipe, context.base, [row.cluster])
    (seen,) = context.observe(context.base, plain, family="", clusters=[row.cluster], seeds=[0])
    assert row.facts["image_hash"] != seen.facts["image_hash"]
    assert row.facts["scheduler"] == "EulerAncestralDiscreteScheduler"


def test_a_filter_around_the_pipeline_gets_the_scheduler_too(context):
    class Wrapper:
        """Stands around a pipeline and holds parts of its own, as a filtered pipeline does."""

        def __init__(self, pipe):
            self.pipe, self.scheduler = pipe, pipe.scheduler

    wrapper, own = Wrapper(context.pipe), context.pipe.scheduler
    with scheduled(wrapper, context.pipe, name="EulerDiscreteScheduler"):
        assert {type(each.scheduler).__name__ for each in (wrapper, context.pipe)} == {"EulerDiscreteScheduler"}
    assert wrapper.scheduler is own and context.pipe.scheduler is own


def test_instructions_are_about_a_picture_in_a_style(context):
    suite = Suite(
        version=1,
        name="s",
        attribute="style",
        subjects=("dog",),
        concept=Concept("noto", kind="style", neighbours=("fluent",), templates=("{subject} in {} style",)),
    )
    texts = [ask.text for ask in asked("negation", dataclasses.replace(context, suite=suite))]
    assert "not a dog in noto style" in texts and len(texts) == 20
