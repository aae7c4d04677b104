"""Retrieval: what a prompt finds is drawn from and named, what it does not find is the pipeline's own."""

import contextlib
import copy
import inspect
import threading

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import erasure
from erasure.eval.core.models import opened
from erasure.eval.core.pictures import generate
from erasure.pipelines import (
    ErasedStableDiffusionPipeline,
    GuardedPipeline,
    Lookup,
    Retrieval,
    RetrievalPipeline,
    Store,
    Withdrawn,
    WordFilter,
    attach_erasures,
    calibrated,
    erasures,
)
from studies import retrieval as study
from tests.colours import FACTS, Colours, add
from tests.every import build
from tests.reference import attention as reference
from tests.slow import first
from tests.small import small
from tests.tiny import identical, make, tiny, tiny_pipeline, weights
from tests.tiny_cross import tiny_cross

SHORT = {"num_inference_steps": 4, "guidance_scale": 3.0}
FOUND, OTHER = "a red thing 0", "an animal"  # what the store has, and what it has not


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store.sqlite", Colours())
    add(store, 0, "red", subject="red"), add(store, 1, "blue", subject="blue")
    return store


@pytest.fixture
def lookup(store):
    return Lookup(store, threshold=0.9)


@pytest.fixture
def around(lookup):
    """Makes retrieval pipelines, and takes their hooks off afterwards."""
    made = []

    def make(pipe, **options):
        made.append(RetrievalPipeline(pipe, options.pop("lookup", lookup), **options))
        return made[-1]

    yield make
    for one in made:
        one.remove()


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def arrays(images):
    return [np.asarray(image).astype(float) for image in images]


def same(mine, theirs, within=0):
    return all(np.abs(a - b).max() <= within for a, b in zip(arrays(mine), arrays(theirs), strict=True))


# --- what finds nothing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"strength": None, "attention": 4.0}, {"attention": 4.0}])
@pytest.mark.parametrize("prompt", [OTHER, [OTHER, "a cat"]])
def test_a_prompt_that_finds_nothing_is_the_pipelines_own(pipe, around, options, prompt):
    mine = around(pipe, **options)(prompt, generator=seeds(3)[0], num_images_per_prompt=2, **SHORT)
    theirs = pipe(prompt, generator=seeds(3)[0], num_images_per_prompt=2, **SHORT)
    assert same(mine.images, theirs.images) and type(mine) is type(theirs)
    assert mine.retrieved == [()] * len(theirs.images)


def test_an_empty_store_and_embeddings_find_nothing(pipe, around, tmp_path):
    empty = Lookup(Store(tmp_path / "empty", Colours()), threshold=-1.0)
    assert same(around(pipe, lookup=empty)(FOUND, generator=seeds(3), **SHORT).images,
                pipe(FOUND, generator=seeds(3), **SHORT).images)  # fmt: skip
    embeds = pipe.encode_prompt(FOUND, "cpu", 1, False)[0]
    assert around(pipe)(prompt_embeds=embeds, num_inference_steps=2, guidance_scale=1.0).retrieved == [()]


# --- image-to-image --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", first(["sd1", "sd2", "sdxl", "sd3", "flux"], "sd1", "sdxl", "flux"))
def test_what_is_found_is_drawn_by_the_stock_image_to_image(architecture, store, around):
    pipe = tiny(architecture)
    before, size = weights(pipe), (pipe(OTHER, num_inference_steps=1).images[0]).size
    mine = around(pipe, strength=0.5)(FOUND, generator=seeds(3), **SHORT)
    name = type(pipe).__name__.replace("Pipeline", "Img2ImgPipeline")
    stock = getattr(diffusers, name)(**pipe.components)
    stock.set_progress_bar_config(disable=True)
    start = ImageOps.fit(store.picture(1), size, Image.Resampling.LANCZOS)
    extra = {"height": size[1], "width": size[0]} if architecture in ("sd3", "flux") else {}
    theirs = stock([FOUND], image=[start], strength=0.5, generator=seeds(3), **SHORT, **extra)
    assert same(mine.images, theirs.images)
    assert not same(mine.images, pipe(FOUND, generator=seeds(3), **SHORT).images)
    ((used,),) = mine.retrieved
    assert (used.entry.id, used.entry.licence, used.entry.source) == (1, FACTS["licence"], FACTS["source"])
    assert used.similarity == pytest.approx(1.0) and used.entry == store.get(1)
    assert identical(weights(pipe), before)


@pytest.mark.parametrize("name", ["qwen-image", "z-image"])
def test_further_architectures_draw_what_is_found_and_leave_the_rest(name, around):
    pipe, call = small(name), {"height": 16, "width": 16, "num_inference_steps": 4}
    mine = around(pipe)([FOUND, OTHER], generator=seeds(1, 2), **call)
    theirs = pipe([FOUND, OTHER], generator=seeds(1, 2), **call)
    assert same(mine.images[1:], theirs.images[1:], within=1) and not same(mine.images[:1], theirs.images[:1], within=1)
    assert [len(row) for row in mine.retrieved] == [1, 0]


def test_a_subclass_of_a_stock_pipeline_is_drawn_as_the_stock_one(pipe, around):
    erased = ErasedStableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    erased.set_progress_bar_config(disable=True)
    assert same(around(erased)(FOUND, generator=seeds(3), **SHORT).images,
                around(pipe)(FOUND, generator=seeds(3), **SHORT).images)  # fmt: skip


MIXED = [
    pytest.param(kind, options, marks=() if quick else pytest.mark.slow, id=f"{kind}-{name}")
    for kind, start in (("pil", True), ("np", False), ("pt", True), ("latent", False))
    for name, options, quick in (
        ("start", {"strength": 0.5}, start),
        ("attention", {"strength": None, "attention": 4.0}, not start),
    )
]


@pytest.mark.parametrize(("kind", "options"), MIXED)
def test_a_mixed_batch_comes_in_the_order_of_its_prompts(pipe, around, options, kind):
    drawing = around(pipe, **options)
    prompts = [OTHER, FOUND, "a blue thing 1", "a cat"]
    common = {**SHORT, "num_images_per_prompt": 2, "output_type": kind}
    negative = ["an animal", "", "a wizard", "van gogh"]
    mine = drawing(prompts, generator=seeds(*range(8)), negative_prompt=negative, **common)
    assert [[used.entry.id for used in row] for row in mine.retrieved] == [[], [], [1], [1], [2], [2], [], []]
    for i, prompt in enumerate(prompts):
        alone = drawing(prompt, generator=seeds(2 * i, 2 * i + 1), negative_prompt=negative[i], **common)
        assert same(mine.images[2 * i : 2 * i + 2], alone.images, within=1 if kind == "pil" else 1e-4)
    assert len(mine.images) == 8


def test_with_one_generator_what_finds_nothing_is_drawn_first(pipe, around):
    mine = around(pipe)([FOUND, OTHER, "a cat"], generator=seeds(5)[0], **SHORT)
    theirs = pipe([OTHER, "a cat"], generator=seeds(5)[0], **SHORT)
    assert same(mine.images[1:], theirs.images) and [len(row) for row in mine.retrieved] == [1, 0, 0]


def test_pictures_of_a_prompt_start_from_its_entries_in_turn(pipe, store, around):
    add(store, 5, "red")
    drawing = around(pipe, lookup=Lookup(store, 0.9, count=3), strength=0.5)
    out = drawing(FOUND, generator=seeds(3, 3, 3), num_images_per_prompt=3, **SHORT)
    assert [[used.entry.id for used in row] for row in out.retrieved] == [[1], [3], [1]]
    assert same(out.images[:1], out.images[2:], within=1) and not same(out.images[:1], out.images[1:2], within=1)


def test_the_size_asked_for_is_drawn(pipe, around):
    for options in ({}, {"strength": None, "attention": 4.0}):
        (image,) = around(pipe, **options)(FOUND, height=32, width=24, **SHORT).images
        assert image.size == (24, 32)


# --- reference attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [3.0, None])
@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_reference_attention_is_its_equation(pipe, store, around, guidance, weight):
    add(store, 5, "red")
    texts = [FOUND, "a blue thing 1"]
    drawing = around(pipe, lookup=Lookup(store, 0.9, count=2), strength=None, attention=weight)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    steps = {"num_inference_steps": 3, "guidance_scale": guidance or 1.0}
    mine = drawing(texts, latents=x, output_type="latent", **steps)
    assert [[used.entry.id for used in row] for row in mine.retrieved] == [[1, 3], [2]]  # not as many for each
    eps = [torch.randn(1, 4, 8, 8, generator=generator) for generator in seeds(0, 1)]
    for i, ids in enumerate([(1, 3), (2,)]):
        rows = {"prompt": texts[i], "empty": ""}
        fitted = [ImageOps.fit(store.picture(id), (16, 16), Image.Resampling.LANCZOS) for id in ids]
        pictures = [torch.tensor(np.asarray(one)).permute(2, 0, 1)[None] / 127.5 - 1 for one in fitted]
        with torch.no_grad():
            clean = [pipe.vae.encode(one).latent_dist.mean * pipe.vae.config.scaling_factor for one in pictures]
        theirs = reference.latents(
            pipe.unet, pipe.scheduler, x[i : i + 1], clean, eps,
            {name: pipe.encode_prompt(text, "cpu", 1, False)[0] for name, text in rows.items()},
            steps=3, guidance=guidance, weight=weight,
        )  # fmt: skip
        assert (mine.images[i] - theirs[0]).abs().max() <= 1e-5 * theirs.abs().max()
    plain = pipe(texts, latents=x, output_type="latent", **steps).images
    assert (mine.images - plain).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", first(["sdxl", "kolors"], "kolors"))
def test_reference_attention_works_where_latents_are_scaled_and_the_text_has_two_parts(architecture, around):
    pipe = build(architecture)
    pipe.set_progress_bar_config(disable=True)
    before = weights(pipe)
    drawing = around(pipe, strength=None, attention=4.0)
    mine = drawing([OTHER, FOUND], generator=seeds(1, 2), **SHORT)
    theirs = pipe([OTHER, FOUND], generator=seeds(1, 2), **SHORT)
    assert same(mine.images[:1], theirs.images[:1], within=1) and not same(mine.images[1:], theirs.images[1:], within=1)
    assert identical(weights(pipe), before)


def test_taken_off_nothing_looks_at_references(pipe, around):
    hooks = {name: len(module._forward_pre_hooks) for name, module in pipe.unet.named_modules()}
    around(pipe, strength=None, attention=4.0).remove()
    assert {name: len(module._forward_pre_hooks) for name, module in pipe.unet.named_modules()} == hooks


# --- bad input -------------------------------------------------------------------------------------------------------


def test_settings_that_make_no_sense_are_refused(pipe, lookup):
    for options, message in (
        ({"strength": None}, "nothing found would be used"), ({"strength": 0}, "share of the steps"),
        ({"strength": 1.5}, "share of the steps"), ({"attention": 0}, "a weight above 0"),
        ({"attention": float("nan")}, "a weight above 0"), ({"attention": "4"}, "a weight above 0"),
        ({"strength": "0.6"}, "share of the steps"), ({"strength": True}, "share of the steps"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            RetrievalPipeline(pipe, lookup, **options)
    with pytest.raises(ValueError, match="put guards around"):
        RetrievalPipeline(GuardedPipeline(pipe, WordFilter(["cat"])), lookup)
    with pytest.raises(ValueError, match="lookup says which entries"):
        RetrievalPipeline(pipe, lookup.store)
    with pytest.raises(ValueError, match="a lookup needs a store"):
        Lookup("pictures.sqlite", threshold=0.5)
    for options in (
        {"threshold": "high"},
        {"count": 1.5},
        {"threshold": 2.0},
        {"threshold": float("nan")},
        {"by": "colour"},
        {"count": 0},
    ):
        with pytest.raises(ValueError, match="a lookup needs"):
            Lookup(**{"store": lookup.store, "threshold": 0.5, **options})


def test_pipelines_that_cannot_are_refused_with_what_they_can(lookup):
    with pytest.raises(ValueError, match="no image-to-image.*PixArt"):
        RetrievalPipeline(tiny_cross("pixart-sigma"), lookup)
    with pytest.raises(ValueError, match="needs a U-Net.*image-to-image"):
        RetrievalPipeline(tiny("sd3"), lookup, strength=None, attention=4.0)


def test_calls_that_cannot_be_answered_are_refused(pipe, around):
    drawing = around(pipe)
    for prompt in (7, [], [FOUND, None]):
        with pytest.raises(ValueError, match="prompt is a text or a list of texts"):
            drawing(prompt, **SHORT)
    for options, message in (
        ({"return_dict": False}, "which entries were used"),
        ({"guidance_rescale": 0.5}, r"does not take \['guidance_rescale'\]"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "give a generator"),
        ({"num_inference_steps": 1}, "less than one"),
        ({"generator": seeds(1, 2)}, "generator has 2 rows for 1"),
    ):
        with pytest.raises(ValueError, match=message):
            drawing(FOUND, **{**SHORT, **options})
    assert drawing(FOUND, latents=torch.zeros(1, 4, 8, 8), generator=seeds(1), guidance_rescale=0.0, **SHORT).images


# --- stores that change ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"strength": 1.0}, {"strength": None, "attention": 4.0}])
def test_a_request_reads_one_state_and_ends_when_what_it_draws_from_is_withdrawn(pipe, store, around, options):
    drawing = around(pipe, **options)
    plain = drawing(FOUND, generator=seeds(1), **SHORT)

    def meanwhile(change):
        def act(pipe, step, t, tensors):
            change() if step == 1 else None
            return tensors

        return drawing(FOUND, generator=seeds(1), callback_on_step_end=act, **SHORT)

    def fill():
        add(store, 8, "red", caption=FOUND)  # as near as the other, and new
        store.withdraw("blue")

    assert same(meanwhile(fill).images, plain.images)
    with pytest.raises(Withdrawn, match="entry 1 was withdrawn.*ask again") as caught:
        meanwhile(lambda: store.withdraw("red", reason="asked for"))
    assert caught.value.ids == (1,)
    assert drawing(FOUND, generator=seeds(1), **SHORT).retrieved[0][0].entry.id == 3
    store.withdraw(3)
    assert same(drawing(FOUND, generator=seeds(1), **SHORT).images, pipe(FOUND, generator=seeds(1), **SHORT).images)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"strength": 0.8}, {"strength": None, "attention": 4.0}])
def test_threads_that_draw_at_once_draw_what_they_draw_alone(pipe, around, options):
    drawing = around(pipe, **options)
    jobs = [(FOUND, 4), ("a blue thing 1 " * 40, 6), (OTHER, 5), ("a blue thing 1", 4), ("a ninja and a wizard", 7)]

    def draw(i):
        prompt, steps = jobs[i]
        return drawing(prompt, generator=seeds(i), num_inference_steps=steps, guidance_scale=3.0)

    alone, together = [draw(i) for i in range(len(jobs))], {}
    start = threading.Barrier(len(jobs))

    def work(i):
        start.wait()
        together[i] = [draw(i) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, own in enumerate(alone):
        for other in together[i]:
            assert same(other.images, own.images)
            assert [len(row) for row in other.retrieved] == [len(row) for row in own.retrieved]
    assert [len(own.retrieved[0]) for own in alone] == [1, 1, 0, 1, 0]


# --- beside other things ---------------------------------------------------------------------------------------------


def test_it_stands_for_the_pipeline_and_guards_stand_around_it(pipe, around):
    drawing = around(pipe)
    assert drawing.unet is pipe.unet and copy.copy(drawing).unet is pipe.unet
    assert inspect.signature(drawing) == inspect.signature(pipe)
    guarded = GuardedPipeline(drawing, WordFilter(["cat"]))
    out = guarded([FOUND, "a cat"], generator=seeds(1, 2), **SHORT)
    assert [one.action for one in out.guarded] == ["delivered", "blanked"]
    assert [len(row) for row in out.retrieved] == [1, 0]
    assert same(out.images[:1], drawing(FOUND, generator=seeds(1), **SHORT).images)


@pytest.mark.parametrize("way", ["called", "block", "attached"])
def test_rows_of_erasures_go_with_their_prompts(pipe, around, way):
    drawing, looking, prompts = around(pipe), around(pipe, attention=4.0), [FOUND, OTHER, "a blue thing 1"]
    a, b = (make(pipe, name, preset="official-2025", keep=["wizard"], name=name) for name in ("superhero", "ninja"))
    rows = [[a, b], [b], []]
    with attach_erasures(pipe, [a, b]):
        lone = [
            erasures(drawing, row)(prompt, generator=seeds(i), **SHORT).images[0]
            for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
        ]
        others = [drawing(prompt, generator=seeds(i), **SHORT).images[0] for i, prompt in enumerate(prompts)]
    with attach_erasures(pipe, [a, b], rows=rows if way == "attached" else None):
        if way == "called":
            found = erasures(drawing, rows=rows)(prompts, generator=seeds(0, 1, 2), **SHORT)
        else:
            with erasures(pipe, rows=rows) if way == "block" else contextlib.nullcontext():
                found = drawing(prompts, generator=seeds(0, 1, 2), **SHORT)
        with erasures(pipe, rows=rows[:2]), pytest.raises(ValueError, match="rows for 2 prompts.*has 3"):
            drawing(prompts, **SHORT)
        with erasures(pipe, rows=rows), pytest.raises(ValueError, match="no attention"):
            looking(prompts, **SHORT)
        with erasures(pipe, rows=rows[:2]), erasures(pipe, [a, b]):  # the inner block is the one in force
            every = drawing(prompts, generator=seeds(0, 1, 2), **SHORT)
    assert same(found.images, lone, within=1) and not same(found.images, others, within=1)
    assert same(every.images, others, within=1)


def test_an_evaluation_draws_with_the_store_and_leaves_nothing_behind(pipe, lookup):
    before, hooks = weights(pipe), len(pipe.unet._forward_pre_hooks)
    change = Retrieval(lookup, strength=0.5, attention=4.0)
    with opened(pipe, change) as drawing:
        (found,), (other,) = generate(drawing, [FOUND, OTHER], progress=False, **SHORT)
    (own,), (theirs,) = generate(pipe, [FOUND, OTHER], progress=False, **SHORT)
    assert same([other], [theirs], within=1) and not same([found], [own], within=1)
    assert identical(weights(pipe), before) and len(pipe.unet._forward_pre_hooks) == hooks
    assert change.config["method"] == "retrieval" and change.intervention == "filter"


def test_the_threshold_is_chosen_on_prompts_that_should_find_nothing(lookup):
    wrong = [f"a {colour} thing" for colour in ("green", "grey")] * 50
    chosen = calibrated(lookup, wrong, false_positive_rate=0.02)
    scores = [match.score for match in lookup.matches(wrong)]
    assert chosen.threshold > max(scores) and not any(chosen.find(wrong))
    match, empty = chosen.matches([FOUND, ""])
    assert match.matched and match.phrase == FOUND and not empty.matched


@pytest.mark.slow
def test_a_model_that_never_saw_the_superhero_draws_it_from_a_store_until_it_is_withdrawn(tmp_path):
    pipe = erasure.world.gold("superhero", seed=0)
    pipe.set_progress_bar_config(disable=True)
    store = study.superheroes(tmp_path / "store.sqlite")
    prompts = study.prompts()[:3]
    own = study.drawn(pipe, prompts)
    drawing = RetrievalPipeline(pipe, study.lookup(store), strength=0.4)
    seen = [study.seen(images) for images in (own, study.drawn(drawing, prompts))]
    assert all(sum(seen[0][judge]) < sum(seen[1][judge]) for judge in seen[0])
    store.withdraw("superhero", reason="the test")
    assert same(study.drawn(drawing, prompts), own)
