"""Methods that act while pictures are drawn, SLD aside: what all of them leave alone, and what they give back."""

import contextlib
import copy
import threading

import pytest
import torch

from erasure import Concept, Erasure
from erasure.artifact import HookErasure
from erasure.backbone import backbone_of
from erasure.methods import method_class
from tests.every import build
from tests.slow import first
from tests.test_operator import assert_same, draw
from tests.test_unreached import with_controlnet
from tests.tiny import identical, make, tiny, weights

# random encoders give one prompt much like another: SAFREE lets all of them in, AdaVD most tokens
SETTINGS = {
    "negative-prompt": {},
    "negative-prompt plain": {"preset": "plain"},
    "safree": {"midpoint": 0.0},
    "safree official": {"preset": "official-2025", "midpoint": 0.0},
    "safree re-attention": {"midpoint": 0.0, "reattention": 0.5, "max_steps": 2},
    "adavd": {},
    "adavd paper": {"preset": "paper", "midpoint": 0.5},
}
ON = {"negative-prompt": ("sd1", "sd2", "sdxl", "sd3"), "safree": ("sd1", "sd2", "sdxl", "sd3"),
      "adavd": ("sd1", "sd2", "sdxl"), "safree re-attention": ("sd1", "sdxl")}  # fmt: skip
WORKS = [(case, architecture) for case in SETTINGS for architecture in ON.get(case, ("sd1",))]
EVERY = pytest.mark.parametrize("case", SETTINGS)
QUICK = [("negative-prompt", "sd1"), ("negative-prompt plain", "sd1"), ("safree", "sd1"),
         ("safree re-attention", "sd1"), ("adavd", "sdxl")]  # fmt: skip
PROMPTS = ["a photo of a superhero", "a ninja and a wizard"]


def made(pipe, case, concept="superhero", **changes):
    return make(pipe, concept, case.split()[0], **{**SETTINGS[case], **changes})


def size(latents):
    return latents.abs().max().item()


@pytest.mark.parametrize(("case", "architecture"), first(WORKS, *QUICK))
def test_it_acts_and_comes_off_without_a_trace(case, architecture, tmp_path):
    pipe = tiny(architecture)
    before, base, hooks = weights(pipe), draw(pipe, PROMPTS), hooks_on(pipe)
    edit = made(pipe, case)
    assert isinstance(edit, HookErasure) and not edit.parameter_names
    assert identical(before, weights(pipe)) and torch.equal(draw(pipe, PROMPTS), base)
    edit.apply(pipe, 0.0)
    assert torch.equal(draw(pipe, PROMPTS), base)
    edit.apply(pipe)
    drawn = draw(pipe, PROMPTS)
    assert (drawn - base).abs().amax(dim=(1, 2, 3)).min() > 1e-4 * size(base) and identical(before, weights(pipe))
    edit.apply(pipe, 0.5)
    half = draw(pipe, PROMPTS)
    assert 1e-4 * size(base) < (half - base).abs().max() and not torch.equal(half, drawn)
    edit.remove(pipe)
    assert identical(before, weights(pipe)) and torch.equal(draw(pipe, PROMPTS), base)
    assert hooks_on(pipe) == hooks
    again = Erasure.from_pretrained(edit.save_pretrained(tmp_path / "edit"))
    assert type(again) is type(edit) and again.config == edit.config and identical(again.tensors, edit.tensors)
    again.apply(pipe)
    assert torch.equal(draw(pipe, PROMPTS), drawn)
    again.remove(pipe)
    assert "There are no weight changes" in again.card() and torch.equal(draw(pipe, PROMPTS), base)


def hooks_on(pipe):
    """How many hooks stand on the parts of a pipeline."""
    modules = [module for part in backbone_of(pipe).components.values() for module in part.modules()]
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


BATCHES = [(c, a) for c, a in WORKS if a != "sd2" and "plain" not in c]


@pytest.mark.parametrize(("case", "architecture"), first(BATCHES, *(b for b in BATCHES if b in QUICK)))
def test_each_picture_of_a_batch_is_the_one_drawn_alone(case, architecture):
    pipe = tiny(architecture)
    edit = made(pipe, case).apply(pipe)
    settings = {"num_inference_steps": 3, "output_type": "latent"}
    settings |= {} if hasattr(pipe, "unet") else {"height": 16, "width": 16}
    noise = [torch.Generator().manual_seed(i) for i in range(4)]
    together = pipe(PROMPTS, num_images_per_prompt=2, generator=noise, **settings).images
    for i in range(4):
        alone = pipe([PROMPTS[i // 2]], generator=torch.Generator().manual_seed(i), **settings).images
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-4 * size(alone))
    edit.remove(pipe)


@pytest.mark.parametrize("case", first(SETTINGS, "negative-prompt", "safree re-attention", "adavd"))
def test_two_threads_that_draw_do_not_mix(case):
    pipe = tiny("sd1")
    pipes = [pipe, copy.copy(pipe)]
    pipes[1].scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    edit = made(pipe, case).apply(pipe)
    steps = (6, 8)  # they come to their steps at different times
    texts = [pipe.encode_prompt(prompt, "cpu", 1, True) for prompt in PROMPTS]  # tokenizers serve one thread at a time

    def run(i):
        found[i] = pipes[i](
            prompt_embeds=texts[i][0],
            negative_prompt_embeds=texts[i][1],
            num_inference_steps=steps[i],
            generator=torch.Generator().manual_seed(i),
            output_type="latent",
        ).images

    found: dict[int, torch.Tensor] = {}
    for i in range(2):
        run(i)
    alone = dict(found)
    for _ in range(2):
        turns = threading.Barrier(2)
        handle = pipe.unet.register_forward_pre_hook(lambda *_, turns=turns: meet(turns), prepend=True)
        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        handle.remove()
        for i in range(2):
            torch.testing.assert_close(found[i], alone[i], rtol=0, atol=1e-5 * size(alone[i]))
    edit.remove(pipe)


def meet(turns):
    """Wait for the other thread, as long as it draws."""
    try:
        turns.wait(timeout=0.5)
    except threading.BrokenBarrierError:
        pass


@EVERY
def test_one_picture_leaves_nothing_for_the_next(case):
    pipe = tiny("sd1")
    edit = made(pipe, case).apply(pipe)
    first = draw(pipe, PROMPTS)
    draw(pipe, ["van gogh", "a superhero"])
    assert torch.equal(draw(pipe, PROMPTS), first)
    edit.remove(pipe)


@pytest.mark.parametrize("case", ["safree", "safree re-attention", "adavd"])
def test_it_works_without_guidance(case):
    pipe = tiny("sd1")
    base = draw(pipe, PROMPTS, guidance_scale=1.0)
    edit = made(pipe, case).apply(pipe)
    drawn = draw(pipe, PROMPTS, guidance_scale=1.0)
    assert (drawn - base).abs().amax(dim=(1, 2, 3)).min() > 1e-4 * size(base)
    for i, prompt in enumerate(PROMPTS):
        noise = torch.Generator().manual_seed(i)
        alone = pipe(prompt, num_inference_steps=2, generator=noise, output_type="latent", guidance_scale=1.0).images
        assert_same(drawn[i : i + 1], alone)
    edit.remove(pipe)


@pytest.mark.parametrize("case", ["safree", "adavd", "negative-prompt"])
def test_two_prompts_from_the_same_noise_without_guidance_are_no_guided_call(case):
    pipe = tiny("sd1")
    edit, one = made(pipe, case), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    given = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 1.0}
    base = pipe(PROMPTS, latents=one.repeat(2, 1, 1, 1), **given).images
    edit.apply(pipe)
    with pytest.warns(UserWarning, match="has none") if case == "negative-prompt" else contextlib.nullcontext():
        both = pipe(PROMPTS, latents=one.repeat(2, 1, 1, 1), **given).images
        alone = torch.cat([pipe(prompt, latents=one, **given).images for prompt in PROMPTS])
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-4 * size(base))
    assert all(torch.equal(a, b) == (case == "negative-prompt") for a, b in zip(both, base, strict=True))


@pytest.mark.parametrize("case", ["safree", "adavd"])
def test_a_negative_prompt_of_the_users_stays_as_it_is(case):
    """It may name the concept itself, and means the opposite there: only the prompt's prediction changes."""
    pipe, seen = tiny("sd1"), []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda output, *args, **kwargs: (seen.append(output.clone()), step(output, *args, **kwargs))[
        1
    ]
    draws = [{"negative_prompt": "a superhero", "guidance_scale": w} for w in (2.0, 3.0)]

    def unconditional():
        """``u`` of ``u + w (p - u)`` from two scales of guidance, at the first step."""
        seen.clear()
        for settings in draws:
            pipe("a wizard", num_inference_steps=2, generator=torch.Generator().manual_seed(0),
                 output_type="latent", **settings)  # fmt: skip
        two, three = seen[0], seen[2]
        return 3 * two - 2 * three, three - two

    (base, towards), edit = unconditional(), made(pipe, case).apply(pipe)
    drawn, changed = unconditional()
    edit.remove(pipe)
    assert_same(drawn, base)
    assert (changed - towards).abs().max() > 1e-4 * size(towards)


BESIDE = [("negative-prompt", "safree re-attention"), ("adavd", "negative-prompt"), ("safree", "adavd")]


@pytest.mark.parametrize(("one", "other"), first(BESIDE, BESIDE[1], BESIDE[2]))
def test_two_of_them_stand_side_by_side(one, other):
    """The further predictions of one are not changed by the other."""
    pipe = tiny("sd1")
    base = draw(pipe, PROMPTS)
    edits = [made(pipe, one), made(pipe, other)]
    alone = []
    for edit in edits:
        edit.apply(pipe)
        alone.append(draw(pipe, PROMPTS))
        edit.remove(pipe)
    pictures = []
    for one, other in (edits, edits[::-1]):
        one.apply(pipe), other.apply(pipe)
        pictures.append(draw(pipe, PROMPTS))
        one.remove(pipe), other.remove(pipe)
    assert_same(*pictures)  # in either order
    assert all((pictures[0] - picture).abs().max() > 1e-4 * size(base) for picture in alone)
    assert torch.equal(draw(pipe, PROMPTS), base)


@pytest.mark.parametrize(
    ("method", "architecture", "why"),
    [
        ("negative-prompt", "flux", "negative-prompt does not work on FLUX"),
        ("negative-prompt", "qwen-image", "negative-prompt does not work on Qwen"),
        ("negative-prompt", "lcm-sd", "an LCM U-Net has none"),
        ("safree", "flux", "safree does not work on FLUX"),
        ("safree", "pixart-sigma", "safree does not work on PixArt"),
        ("adavd", "flux", "adavd does not work on FLUX"),
        ("adavd", "sd3", "adavd does not work on Stable Diffusion 3"),
        ("adavd", "kolors", "adavd does not work on Kolors"),
    ],
)
def test_a_model_it_does_not_fit_is_refused_before_any_work(method, architecture, why, monkeypatch):
    pipe = build(architecture)
    monkeypatch.setattr(type(pipe), "encode_prompt", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=why):
        make(pipe, "superhero", method)


@pytest.mark.parametrize("method", ["negative-prompt", "safree", "adavd"])
def test_a_request_that_means_nothing_is_refused(method):
    pipe = tiny("sd1")
    with pytest.raises(ValueError, match="needs a name"):
        make(pipe, " ", method)
    with pytest.raises(ValueError, match="nothing to erase"):
        make(pipe, [], method)
    with pytest.raises(ValueError, match="both to be erased and to be kept"):
        make(pipe, "superhero", method, keep=["superhero"])
    with pytest.raises(ValueError, match="has no setting"):
        make(pipe, "superhero", method, guidance_scale=3.0)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("negative-prompt", {"strength": 0}), ("safree", {"reattention": 0}), ("safree", {"max_steps": 0}),
     ("safree", {"alpha": -1}), ("adavd", {"midpoint": 2}), ("adavd", {"height": 0}), ("adavd", {"steepness": -1})],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused(method, settings):
    with pytest.raises(ValueError, match=f"{method}: .*{next(iter(settings))}"):
        method_class(method).preset(None, **settings)


@pytest.mark.parametrize("case", first(["negative-prompt", "safree", "adavd"], "negative-prompt", "adavd"))
def test_synonyms_and_several_concepts_count(case):
    pipe = tiny("sdxl")
    one = made(pipe, case, synonyms=True)
    more = made(pipe, case, Concept("superhero", synonyms=("spiderman",)), synonyms=True)
    two = made(pipe, case, ["superhero", "van gogh"])
    pictures = []
    for edit in (one, more, two):
        edit.apply(pipe)
        pictures.append(draw(pipe, ["spiderman and van gogh"]))
        edit.remove(pipe)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (pictures[i] - pictures[j]).abs().max() > 1e-5 * size(pictures[0])


@pytest.mark.parametrize("case", ["negative-prompt", "safree re-attention"])
def test_a_controlnets_features_go_with_each_prediction(case):
    """Those of the prompts' half belong to every further prediction: more of them for a batch changes nothing."""
    pipe = with_controlnet()
    pipe.set_progress_bar_config(disable=True)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    settings = {"num_inference_steps": 2, "output_type": "latent"}

    def latents(rows):
        noise = [torch.Generator().manual_seed(i) for i in rows]
        return pipe([PROMPTS[i] for i in rows], image=images[rows], generator=noise, **settings).images

    plain, edit = latents([0, 1]), made(pipe, case)
    edit.apply(pipe)
    together = latents([0, 1])
    alone = torch.cat([latents([0]), latents([1])])
    edit.remove(pipe)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4 * size(alone))
    assert (together - plain).abs().amax(dim=(1, 2, 3)).min() > 1e-4 * size(plain)
