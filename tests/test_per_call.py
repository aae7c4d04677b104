"""Attached erasures, chosen for each call: every picture gets its own, or the call is refused."""

import asyncio
import concurrent.futures
import contextvars
import copy
import dataclasses
import functools
import pickle
import threading

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    PyramidAttentionBroadcastConfig,
    UNet2DConditionModel,
    apply_pyramid_attention_broadcast,
)

from erasure.backbone import backbone_of
from erasure.pipelines import GuardedPipeline, WordFilter, attach_erasures, erasures, load_erasure
from tests.slow import first
from tests.tiny import identical, make, tiny_pipeline, weights

SHORT = {"num_inference_steps": 2, "output_type": "latent"}
PROMPTS = ["a superhero", "a ninja", "van gogh"]


def noise(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def made(pipe, *names):
    return [make(pipe, name, "uce", preset="official-2025", keep=["wizard"], name=name) for name in names]


@pytest.fixture(scope="module")
def attached():
    """A pipeline with three erasures attached, and a function that draws one prompt with some of them, all alone."""
    pipe, alone = tiny_pipeline(), tiny_pipeline()
    for one in (pipe, alone):  # a scheduler that counts its steps
        one.scheduler = EulerDiscreteScheduler.from_config(one.scheduler.config)
    edits = made(pipe, "superhero", "ninja", "van gogh")

    @functools.cache
    def lone(prompt, names, seed, scale=1.0, guidance_scale=7.5):
        chosen = [edit for edit in edits if edit.name in names]
        for edit in chosen:
            edit.apply(alone, scale)
        try:
            return alone(prompt, generator=noise(seed), guidance_scale=guidance_scale, **SHORT).images[0]
        finally:
            for edit in chosen:
                edit.remove(alone)

    with attach_erasures(pipe, edits):
        yield pipe, lambda prompt, names, *given, **more: lone(prompt, tuple(names), *given, **more)


def same(picture, other):
    torch.testing.assert_close(picture, other, rtol=0, atol=1e-5 * float(other.abs().max()))


def differ(picture, other):
    assert (picture - other).abs().max() > 1e-3 * other.abs().max()


# --- the choice ------------------------------------------------------------------------------------------------------


def test_a_block_chooses_for_its_calls_and_blocks_nest(attached):
    pipe, lone = attached

    def draw():
        return pipe("a superhero", generator=noise(7), **SHORT).images[0]

    everything = lone("a superhero", ["superhero", "ninja", "van gogh"], 7)
    hero, base = lone("a superhero", ["superhero"], 7), lone("a superhero", [], 7)
    differ(hero, base)
    same(draw(), everything)
    with erasures(pipe, "superhero"):
        same(draw(), hero)
        with erasures(pipe, []):
            same(draw(), base)
            with erasures(pipe):
                same(draw(), everything)
        with pytest.raises(RuntimeError), erasures(pipe, ["ninja"]):
            raise RuntimeError
        with erasures(pipe, {"superhero": 0.5, "ninja": 0.0}):
            same(draw(), lone("a superhero", ["superhero"], 7, scale=0.5))
        same(draw(), hero)
    same(draw(), everything)


def test_what_is_returned_may_be_called_and_carries_its_choice_everywhere(attached):
    pipe, lone = attached
    hero, ninja = erasures(pipe, ["superhero"]), erasures(pipe, ["ninja"])
    with ninja, concurrent.futures.ThreadPoolExecutor(1) as pool:  # whose threads know nothing of the block
        found = pool.submit(lambda: hero("a superhero", generator=noise(3), **SHORT).images[0]).result()
        inside = hero("a superhero", generator=noise(3), **SHORT).images[0]
    same(found, lone("a superhero", ["superhero"], 3))
    assert torch.equal(found, inside)
    assert hero.unet is pipe.unet and "scheduler" in repr(hero.scheduler).lower()


def test_a_guard_around_it_and_inside_it(attached):
    pipe, lone = attached
    expected = lone("a superhero", ["superhero"], 3)
    outside = GuardedPipeline(erasures(pipe, ["superhero"]), WordFilter(["cat"]))
    inside = erasures(GuardedPipeline(pipe, WordFilter(["cat"])), ["superhero"])
    scheduler, tokenizer = pipe.scheduler, pipe.tokenizer
    for drawing in (outside, inside):
        out = drawing(["a superhero", "a cat"], generator=noise(3, 4), **SHORT)
        same(out.images[0], expected)
        assert [one.action for one in out.guarded] == ["delivered", "blanked"]
    assert pipe.scheduler is scheduler and pipe.tokenizer is tokenizer


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"names": ["cat"]}, r"not attached: \['cat'\]; attached are \['superhero', 'ninja', 'van gogh'\]"),
        ({"rows": [["superhero"], ["cat"]]}, r"not attached: \['cat'\]"),
        ({"names": ["ninja", "ninja"]}, "named twice"),
        ({"names": {"ninja": float("nan")}}, "a scale is a number"),
        ({"rows": [{"ninja": -1}]}, "a scale is a number"),
        ({"names": ["ninja"], "rows": [[]]}, "give names, or rows"),
        ({"rows": "ninja"}, "a list for each prompt"),
        ({"rows": [[]], "num_images_per_prompt": 0}, "from 1 on"),
    ],
)
def test_a_choice_that_is_none_is_refused_at_once(attached, given, fault):
    with pytest.raises(ValueError, match=fault):
        erasures(attached[0], **given)


def test_without_attached_erasures_there_is_nothing_to_choose():
    pipe = tiny_pipeline()
    made(pipe, "ninja")[0].apply(pipe)
    with pytest.raises(ValueError, match="no erasure is attached.*attach_erasures"):
        erasures(pipe, ["ninja"])


def test_one_name_is_attached_once(attached):
    pipe, _ = attached
    with pytest.raises(ValueError, match="two erasures of one name"):
        attach_erasures(pipe, made(tiny_pipeline(), "ninja"))


# --- rows ------------------------------------------------------------------------------------------------------------

ROWS = [["superhero"], [], ["superhero", "ninja"]]


def check_rows(lone, found, prompts, seeds, guidance):
    n = len(found) // len(prompts)
    for i, picture in enumerate(found):
        same(picture, lone(prompts[i // n], ROWS[i // n], seeds[i], guidance_scale=guidance))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("images", first([1, 2, 3], 3))
@pytest.mark.parametrize("prompts", [PROMPTS, ["a superhero"] * 3], ids=["other", "one"])
@pytest.mark.parametrize("repeated", [False, True])
def test_every_picture_gets_its_erasures_or_the_call_is_refused(attached, guidance, images, prompts, repeated):
    pipe, lone = attached
    seeds = [*range(images)] * 3 if repeated else list(range(3 * images))
    given = {"num_images_per_prompt": images, "guidance_scale": guidance, **SHORT}
    drawing = erasures(pipe, rows=ROWS)
    check_rows(lone, drawing(prompts, generator=noise(*seeds), **given).images, prompts, seeds, guidance)
    with erasures(pipe, rows=ROWS, num_images_per_prompt=images):
        check_rows(lone, pipe(prompts, generator=noise(*seeds), **given).images, prompts, seeds, guidance)
    with drawing:  # what the batch alone shows: without guidance, its parts hold the same latents as if there were
        if repeated and images == 3 and guidance == 1.0:
            with pytest.raises(ValueError, match="fits in more than one way.*call what erasures"):
                pipe(prompts, generator=noise(*seeds), **given)
        else:
            check_rows(lone, pipe(prompts, generator=noise(*seeds), **given).images, prompts, seeds, guidance)


def test_a_batch_that_looks_like_a_guided_one_is_refused(attached):
    pipe, lone = attached
    given = {"num_images_per_prompt": 2, "guidance_scale": 1.0, **SHORT}
    with erasures(pipe, rows=ROWS[:2]) as drawing:
        with pytest.raises(ValueError, match="fits in more than one way"):
            pipe(PROMPTS[:2], generator=noise(0, 1, 0, 1), **given)
        check_rows(
            lone, drawing(PROMPTS[:2], generator=noise(0, 1, 0, 1), **given).images, PROMPTS[:2], [0, 1, 0, 1], 1.0
        )


def test_rows_that_are_not_those_of_the_call_are_refused(attached):
    pipe, _ = attached
    for rows in ([["ninja"]], [[]] * 4, []):
        with pytest.raises(ValueError, match="one row a prompt"):
            erasures(pipe, rows=rows)(["a cat", "a dog"], **SHORT)
    with erasures(pipe, rows=[[]] * 4), pytest.raises(ValueError, match="batch of 6"):
        pipe(PROMPTS, **SHORT)
    with erasures(pipe, rows=[["ninja"], []], num_images_per_prompt=1), pytest.raises(ValueError, match="batch of 8"):
        pipe(["a cat", "a dog"], num_images_per_prompt=2, **SHORT)
    with pytest.raises(ValueError, match="one row a prompt"):
        erasures(pipe, rows=[["ninja"], []], num_images_per_prompt=1)(["a", "b"], num_images_per_prompt=2, **SHORT)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("prompts", [["a superhero"], PROMPTS, [*PROMPTS, "a cat"]], ids=len)
def test_rows_for_two_prompts_do_not_fit_a_call_of_others(attached, prompts, guidance):
    """Whatever number of them, the batch alone would fit: as pictures of two prompts, or as two of guidance's parts."""
    pipe, _ = attached
    with erasures(pipe, rows=[["superhero"], []]), pytest.raises(ValueError, match="rows for 2 prompts"):
        pipe(prompts, generator=noise(*range(len(prompts))), guidance_scale=guidance, **SHORT)


@pytest.mark.parametrize("names", [5, [5], [[]], [None]])
def test_names_that_are_none_are_refused(attached, names):
    pipe, _ = attached
    for given in ({"names": names}, {"rows": [names]}):
        with pytest.raises(ValueError, match="erasures are chosen by their names"):
            erasures(pipe, **given)


def test_an_erasure_is_not_put_on_twice(attached):
    """Applied and attached, or under another name: the edit would be made twice, and nothing would say so."""
    pipe, edit = tiny_pipeline(), made(tiny_pipeline(), "cat")[0]
    before = weights(pipe)
    edit.apply(pipe)
    with pytest.raises(ValueError, match="would be made twice"):
        attach_erasures(pipe, edit)
    with pytest.raises(ValueError, match="'again' is on this pipeline already, as 'cat', and the edit would be made"):
        load_erasure(pipe, edit, name="again")
    edit.remove(pipe)
    with attach_erasures(pipe, edit):
        for given in (edit, dataclasses.replace(edit, name="again")):
            with pytest.raises(ValueError, match="attached to this pipeline already, as 'cat'"):
                given.apply(pipe)
    assert identical(before, weights(pipe))
    edit.apply(pipe)
    edit.apply(pipe, 0.5)  # another scale for the one that is there
    edit.remove(pipe)
    assert identical(before, weights(pipe))


def other_linears(unet):
    for attention in [layer for name, layer in unet.named_modules() if name.endswith("attn2")]:
        for name in ("to_k", "to_v"):
            own = getattr(attention, name)
            setattr(attention, name, torch.nn.Linear(own.in_features, own.out_features, bias=False))


@pytest.mark.parametrize(
    ("replace", "fault"),
    [
        (UNet2DConditionModel.fuse_qkv_projections, "has fused query-key-value projections"),
        (other_linears, "layers on which .'superhero'. stand were replaced since"),
    ],
)
def test_layers_that_were_replaced_since_do_not_draw_unerased(replace, fault):
    pipe = tiny_pipeline()
    handle = attach_erasures(pipe, made(pipe, "superhero"))
    replace(pipe.unet)
    with pytest.raises(ValueError, match=fault):
        pipe("a superhero", **SHORT)
    with erasures(pipe, []):  # nothing was to be erased
        pipe("a superhero", **SHORT)
    handle.remove()
    pipe("a superhero", **SHORT)


def test_a_cache_may_leave_the_texts_layers_out_of_a_step():
    pipe = tiny_pipeline()
    calls = []
    cache = PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2,
        cross_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )
    attach_erasures(pipe, made(pipe, "superhero"))
    for site in backbone_of(pipe).text_sites("hidden").values():
        site.linear.register_forward_hook(lambda *_: calls.append(1))
    pipe("a superhero", **SHORT)
    every_step = len(calls)
    apply_pyramid_attention_broadcast(pipe.unet, cache)
    pipe("a superhero", **SHORT)
    assert len(calls) < 2 * every_step


def test_a_layer_called_alone_follows_the_choice_of_its_moment(attached):
    pipe, _ = attached
    layer, x = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k, torch.randn(1, 5, 32)
    with torch.no_grad():
        with erasures(pipe, []):
            plain = layer(x)
        with erasures(pipe, {"ninja": 5.0}):
            differ(layer(x), plain)
        with erasures(pipe, rows=[[]]), pytest.raises(ValueError, match="a layer was called alone"):
            layer(x)


def test_embeddings_are_counted_as_prompts_are(attached):
    pipe, lone = attached
    text, _ = pipe.encode_prompt(["a superhero"] * 2, "cpu", 1, False)
    found = erasures(pipe, rows=[["superhero"], []])(
        prompt_embeds=text, num_images_per_prompt=2, generator=noise(0, 1, 0, 1), guidance_scale=1.0, **SHORT
    ).images  # fmt: skip
    for i, picture in enumerate(found):
        same(picture, lone("a superhero", [["superhero"], []][i // 2], i % 2, guidance_scale=1.0))


# --- at once ---------------------------------------------------------------------------------------------------------

JOBS = [
    ("a superhero", ["superhero"]),
    ("a superhero and a ninja, the cat in the style of van gogh " * 6, ["superhero", "ninja"]),
    ("a superhero", []),
    ("van gogh", ["van gogh"]),
]


def check_jobs(lone, found):
    for i, (prompt, names) in enumerate(JOBS):
        expected = lone(prompt, names, i)
        for picture in found[i]:
            same(picture, expected)


def test_threads_draw_what_each_draws_alone(attached):
    pipe, lone = attached
    start, found = threading.Barrier(len(JOBS)), {}

    def work(i):
        prompt, names = JOBS[i]
        start.wait()
        found[i] = []
        for _ in range(3):
            with erasures(pipe, names) as drawing:
                found[i].append(drawing(prompt, generator=noise(i), **SHORT).images[0])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(JOBS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_jobs(lone, found)


def test_tasks_draw_what_each_draws_alone(attached):
    pipe, lone = attached

    async def one(i):
        prompt, names = JOBS[i]
        with erasures(pipe, names) as drawing:
            await asyncio.sleep(0)  # the others enter their blocks
            inside = pipe(prompt, generator=noise(i), **SHORT).images[0]
            there = await asyncio.to_thread(drawing, prompt, generator=noise(i), **SHORT)
            return [inside, there.images[0]]

    async def everything():
        return await asyncio.gather(*(one(i) for i in range(len(JOBS))))

    check_jobs(lone, asyncio.run(everything()))


def test_a_block_left_in_another_context_disturbs_nobody(attached):
    """Web frameworks run the two halves of a dependency in contexts of their own."""
    pipe, lone = attached
    drawing = erasures(pipe, ["superhero"])
    contextvars.copy_context().run(drawing.__enter__)
    with erasures(pipe, []):
        drawing.__exit__(None, None, None)
        same(pipe("a superhero", generator=noise(7), **SHORT).images[0], lone("a superhero", [], 7))


# --- what is attached is in no weight --------------------------------------------------------------------------------


@pytest.mark.parametrize("write", ["pipeline", "unet", "deepcopy", "deepcopy of the pipeline", "pickle"])
def test_what_is_attached_is_never_lost_in_a_copy_or_a_file(write, tmp_path):
    pipe = tiny_pipeline()
    doors = {
        "pipeline": lambda: pipe.save_pretrained(tmp_path / "saved"),
        "unet": lambda: pipe.unet.save_pretrained(tmp_path / "saved"),
        "deepcopy": lambda: copy.deepcopy(pipe.unet),
        "deepcopy of the pipeline": lambda: copy.deepcopy(pipe),
        "pickle": lambda: pickle.dumps(pipe.unet),
    }
    one, other = (attach_erasures(pipe, edit) for edit in made(pipe, "superhero", "ninja"))
    with pytest.raises(ValueError, match=r"(attached|in hooks).*remove\(\)"):
        doors[write]()
    one.remove(), one.remove()
    with pytest.raises(ValueError, match=r"(attached|in hooks).*remove\(\)"):
        doors[write]()
    assert not (tmp_path / "saved" / "model_index.json").exists() and not (tmp_path / "saved" / "config.json").exists()
    other.remove()
    doors[write]()
