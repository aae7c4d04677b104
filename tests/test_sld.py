"""Safe Latent Diffusion against a loop of its equations: guidance changes, weights do not."""

import copy
import inspect
import itertools
import threading

import diffusers
import pytest
import torch

from erasure import Erasure
from erasure.backbone import backbone_of
from erasure.methods import method_class
from tests.every import backbone, build
from tests.reference import sld as reference
from tests.slow import first
from tests.tiny import identical, make, tiny, weights
from tests.tiny_cross import tiny_cross

# on random models predictions differ little, so the threshold is wide and the strength moderate: m is no constant
SETTINGS = {"warmup": 1, "strength": 20.0, "threshold": 0.02, "momentum_scale": 0.5, "momentum": 0.6}
GUIDED = ["sd1", "sd2", "sdxl", "sd3"]
MASKED = ["pixart-sigma", "sana", "auraflow", "ltx", "cogvideox", "kolors"]


def noise_for(pipe, n=1, seed=0):
    return torch.randn(n, *backbone_of(pipe).latent_shape, generator=torch.Generator().manual_seed(seed))


def guided_by(pipe, prompts, noise, **settings):
    """Latents the pipeline draws, and the predictions its scheduler was given."""
    seen, step = [], pipe.scheduler.step

    def listen(output, *args, **kwargs):
        seen.append(output.clone())
        return step(output, *args, **kwargs)

    pipe.scheduler.step = listen
    try:
        latents = pipe(prompts, latents=noise, output_type="latent", **settings).images
    finally:
        del pipe.scheduler.step
    return latents, seen


def predictor(architecture, pipe, prompt, concept):
    """The denoiser for the prompt, without one, and for the concept, each by a call of its own."""
    if architecture in ("sd1", "sd2"):
        texts = {"prompt": prompt, "empty": "", "concept": concept}
        rows = {which: pipe.encode_prompt(text, "cpu", 1, False)[0] for which, text in texts.items()}
        return lambda which, x, t: pipe.unet(x, t, encoder_hidden_states=rows[which]).sample
    if architecture == "sdxl":
        found = {}
        found["prompt"], found["empty"] = (
            (hidden, pooled) for hidden, pooled in zip(*_pairs(pipe.encode_prompt(prompt)), strict=True)
        )
        hidden, _, pooled, _ = pipe.encode_prompt(concept, do_classifier_free_guidance=False)
        found["concept"] = hidden, pooled
        ids = torch.tensor([[16, 16, 0, 0, 16, 16]]).double()
        return lambda which, x, t: (
            pipe.unet(x, t, found[which][0], added_cond_kwargs={"text_embeds": found[which][1], "time_ids": ids}).sample
        )
    found = {}
    for which, text in (("prompt", prompt), ("empty", ""), ("concept", concept)):
        hidden, _, pooled, _ = pipe.encode_prompt(text, None, None, do_classifier_free_guidance=False)
        found[which] = hidden, pooled
    return lambda which, x, t: (
        pipe.transformer(
            hidden_states=x,
            timestep=t.expand(1),
            encoder_hidden_states=found[which][0],
            pooled_projections=found[which][1],
        ).sample
    )


def _pairs(encoded):
    hidden, other, pooled, other_pooled = encoded
    return (hidden, other), (pooled, other_pooled)


@pytest.mark.parametrize(
    ("scale", "architecture"),
    first(itertools.product((1.0, 0.4), GUIDED), (1.0, "sd1"), (0.4, "sd2"), (0.4, "sdxl"), (1.0, "sd3")),
)
def test_the_guided_prediction_is_that_of_the_equations(architecture, scale):
    pipe = tiny(architecture)
    for module in backbone_of(pipe).components.values():
        module.double()  # what is left of a difference is not rounding
    before, noise = weights(pipe), noise_for(pipe).double()
    draw = {"num_inference_steps": 5, "guidance_scale": 4.0}
    base, plain = guided_by(pipe, "a cat", noise, **draw)
    edit = make(pipe, "superhero", "sld", **SETTINGS).apply(pipe, scale)
    ours, guided = guided_by(pipe, "a cat", noise, **draw)
    edit.remove(pipe)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(5)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    theirs, expected = reference.latents(
        predictor(architecture, pipe, "a cat", "superhero"),
        scheduler, x, steps=5, guidance=4.0, scale=scale, **SETTINGS,
    )  # fmt: skip
    size = max(step.abs().max().item() for step in expected)
    for a, b in zip(guided, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(size, 1.0))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
    assert torch.equal(guided[0], plain[0])  # the warm-up
    assert (guided[1] - plain[1]).abs().max() > 100 * 1e-5 * max(size, 1.0)
    assert identical(before, weights(pipe)) and torch.equal(guided_by(pipe, "a cat", noise, **draw)[0], base)


def heard(pipe, prompt, **settings):
    """What a pipeline draws by itself: the calls of its denoiser, the predictions its scheduler takes, and that
    scheduler and the latents as they were before the first step."""
    denoiser, step = getattr(pipe, "unet", None) or pipe.transformer, pipe.scheduler.step
    calls, steps, start = [], [], []

    def listen(module, args, kwargs):
        calls.append(inspect.signature(module.forward).bind(*args, **kwargs).arguments)

    def listen_to_step(output, t, sample, *args, **kwargs):
        if not start:
            scheduler = copy.deepcopy(pipe.scheduler)
            del scheduler.step
            start.extend([scheduler, sample.clone()])
        steps.append(output.clone())
        return step(output, t, sample, *args, **kwargs)

    pipe.scheduler.step = listen_to_step
    handle = denoiser.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="latent", **settings)
    finally:
        handle.remove()
        del pipe.scheduler.step
    return calls, steps, start


def row(value, i):
    """One of the two rows, the empty prompt's and the prompt's, of everything a denoiser's call holds twice."""
    if isinstance(value, dict):
        return {key: row(part, i) for key, part in value.items()}
    return value[i : i + 1] if isinstance(value, torch.Tensor) and value.dim() and len(value) == 2 else value


@pytest.mark.parametrize("architecture", first(MASKED, "pixart-sigma", "ltx", "kolors"))
def test_it_is_that_of_the_equations_wherever_it_is_claimed_to_work(architecture):
    """The three predictions are made with what the pipeline gives its denoiser for the prompt and for the concept."""
    pipe = build(architecture)
    for module in backbone_of(pipe).components.values():
        module.double()
    settings = SETTINGS | ({"strength": 1e5} if architecture == "auraflow" else {})  # text moves little in a small one
    draw = {"num_inference_steps": 5, "guidance_scale": 4.0, **backbone(pipe, architecture).call}
    calls, plain, (scheduler, x) = heard(pipe, "a cat", **draw)
    concept, _, _ = heard(pipe, "superhero", **draw)
    edit = make(pipe, "superhero", "sld", **settings).apply(pipe)
    _, guided, _ = heard(pipe, "a cat", **draw)
    edit.remove(pipe)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    times, channels = scheduler.timesteps.tolist(), plain[0].shape[1]
    scheduler.set_timesteps = lambda steps: None  # as the pipeline set them

    def predict(which, x, t):
        inputs = (concept if which == "concept" else calls)[times.index(float(t))]
        inputs = {name: row(value, 0 if which == "empty" else 1) for name, value in inputs.items()}
        latents = next(iter(inputs))
        output = denoiser(**{**inputs, latents: x.to(inputs[latents]), "return_dict": False})[0]
        return output[:, :channels].to(x)  # PixArt's variance is left out

    _, expected = reference.latents(predict, scheduler, x, steps=5, guidance=4.0, **settings)
    effect = (guided[1] - plain[1]).abs().max().item()
    assert effect > 1e-5 and len(guided) == len(expected) == 5
    for a, b in zip(guided, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * effect, check_dtype=False)
    assert torch.equal(guided[0], plain[0])  # the warm-up


def test_every_architecture_that_is_claimed_is_held_against_the_equations():
    held = {backbone_of(tiny(one)).architecture for one in GUIDED} | {
        backbone_of(build(a)).architecture for a in MASKED
    }
    assert held == set(method_class("sld").architectures)


@pytest.mark.parametrize(("steps", "waits"), [(4, 1), (8, 1), (25, 4)])
def test_the_warm_up_may_be_a_share_of_the_steps(steps, waits):
    pipe, found = tiny("sd1"), []
    noise, draw = noise_for(pipe), {"num_inference_steps": steps, "guidance_scale": 4.0}
    for warmup in (0.14, waits, 0):
        edit = make(pipe, "superhero", "sld", **{**SETTINGS, "warmup": warmup}).apply(pipe)
        found.append(guided_by(pipe, "a cat", noise, **draw)[0])
        edit.remove(pipe)
    share, count, none = found
    assert torch.equal(share, count) and not torch.equal(share, none)
    backbone = backbone_of(pipe)  # a loop of one's own, without a pipeline that is calling: the scheduler knows
    text = backbone.encode(["a cat"]).text
    edit = make(pipe, "superhero", "sld", **{**SETTINGS, "warmup": 0.14}).apply(pipe)
    pipe.scheduler.set_timesteps(steps)
    both, acted = backbone.encode(["", "a cat"]).text, []
    for t in pipe.scheduler.timesteps[: waits + 1]:
        plain = [backbone.predict(noise, t.reshape(1), one) for one in (both[:1], text)]
        with torch.no_grad():
            out = pipe.unet(noise.repeat(2, 1, 1, 1), t, encoder_hidden_states=both.hidden).sample
        acted.append(not torch.allclose(out, torch.cat(plain), atol=1e-5))
    edit.remove(pipe)
    assert acted == [i >= waits for i in range(waits + 1)]


@pytest.mark.parametrize("architecture", ["flux", "z-image", "qwen-image", "lcm-sd"])
def test_where_guidance_has_another_form_it_is_refused_before_any_work(architecture, monkeypatch):
    pipe = build(architecture)
    monkeypatch.setattr(type(pipe), "encode_prompt", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="sld does not work|an LCM U-Net has none"):
        make(pipe, "superhero", "sld")


def test_masked_text_and_variances_are_steered_too():
    pipe = tiny_cross("pixart-sigma")
    edit = make(pipe, "superhero", "sld", **{**SETTINGS, "warmup": 0, "threshold": 1.0})
    assert set(edit.tensors) == {"hidden", "mask"}
    backbone = backbone_of(pipe)
    noise = noise_for(pipe)
    settings = {"num_inference_steps": 1, "guidance_scale": 4.0, "use_resolution_binning": False}
    _, [plain] = guided_by(pipe, "a cat", noise, **settings)
    text = backbone.encode(["a cat", "superhero"]).text
    [step] = backbone.trajectory(text[:1], noise, num_inference_steps=1, guidance_scale=4.0)
    with torch.no_grad():
        concept = backbone.predict(step.x, step.t, text[1:])
    away = step.conditional - concept
    m = torch.where(away < 1.0, (20 * away.abs()).clamp(max=1), torch.zeros_like(away))
    gamma = (concept - step.unconditional) * m
    edit.apply(pipe)
    _, [steered] = guided_by(pipe, "a cat", noise, **settings)
    edit.remove(pipe)
    channels = gamma.shape[1]
    torch.testing.assert_close(steered[:, :channels], plain[:, :channels] - 4.0 * gamma, rtol=1e-4, atol=1e-5)
    assert gamma.abs().max() > 1e-3


@pytest.mark.parametrize("architecture", ["sd1", "sd3"])
def test_several_prompts_and_no_guidance(architecture):
    pipe = tiny(architecture)
    noise, prompts = noise_for(pipe, 2), ["a cat", "a superhero"]
    unguided = {"num_inference_steps": 3, "guidance_scale": 1.0}
    base = guided_by(pipe, prompts, noise, **unguided)[0]
    edit = make(pipe, "superhero", "sld", **SETTINGS).apply(pipe)
    with pytest.warns(UserWarning, match="SLD acts on guidance, and this call of the denoiser has none"):
        assert torch.equal(guided_by(pipe, prompts, noise, **unguided)[0], base)  # there is nothing to steer
    draw = {"num_inference_steps": 3, "guidance_scale": 4.0}
    together = guided_by(pipe, prompts, noise, **draw)[0]
    for i, prompt in enumerate(prompts):
        alone = guided_by(pipe, [prompt], noise[i : i + 1], **draw)[0]
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-4 * alone.abs().max().item())
    edit.remove(pipe)


def test_two_threads_that_draw_keep_their_own_momentum():
    pipe = tiny("sd1")
    pipes = [pipe, copy.copy(pipe)]
    pipes[1].scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    pipes[1].tokenizer = copy.deepcopy(pipe.tokenizer)  # one keeps the padding of its last call
    edit = make(pipe, "superhero", "sld", **SETTINGS).apply(pipe)
    prompts, noises = ["a cat", "van gogh"], [noise_for(pipe, seed=seed) for seed in (1, 2)]
    draw = {"num_inference_steps": 8, "guidance_scale": 4.0, "output_type": "latent"}

    def run(i):
        found[i] = pipes[i](prompts[i], latents=noises[i], **draw).images

    found: dict[int, torch.Tensor] = {}
    for i in range(2):
        run(i)
    alone = dict(found)
    for _ in range(3):
        turns = threading.Barrier(2)
        # step by step, one beside the other
        handle = pipe.unet.register_forward_pre_hook(lambda *_, turns=turns: _meet(turns))
        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        handle.remove()
        for i in range(2):
            torch.testing.assert_close(found[i], alone[i], rtol=1e-5, atol=1e-6)
    edit.remove(pipe)


@pytest.mark.parametrize(("scheduler", "steps"), [(None, 1), (None, 3), ("HeunDiscreteScheduler", 3)])
def test_one_picture_leaves_nothing_for_the_next(scheduler, steps):
    pipe = tiny("sd1")
    if scheduler:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    noise, draw = noise_for(pipe), {"num_inference_steps": steps, "guidance_scale": 4.0}
    edit = make(pipe, "superhero", "sld", **{**SETTINGS, "warmup": 0}).apply(pipe)
    first = guided_by(pipe, "a cat", noise, **draw)[0]
    guided_by(pipe, "van gogh", noise_for(pipe, seed=1), **draw)
    assert torch.equal(guided_by(pipe, "a cat", noise, **draw)[0], first)
    edit.remove(pipe)
    assert not torch.equal(guided_by(pipe, "a cat", noise, **draw)[0], first)


def _meet(turns):
    try:
        turns.wait(timeout=60)
    except threading.BrokenBarrierError:
        pytest.fail("a thread stopped drawing")


def test_it_is_saved_with_what_it_steers_by(tmp_path):
    pipe = tiny("sdxl")
    noise, draw = noise_for(pipe), {"num_inference_steps": 3, "guidance_scale": 4.0}
    edit = make(pipe, "superhero", "sld", **SETTINGS)
    assert set(edit.tensors) == {"hidden", "pooled"} and not edit.parameter_names
    again = Erasure.from_pretrained(edit.save_pretrained(tmp_path / "sld"))
    pictures = []
    for one in (edit, again):
        one.apply(pipe)
        pictures.append(guided_by(pipe, "a cat", noise, **draw)[0])
        one.remove(pipe)
    assert torch.equal(*pictures)
    card = again.card()
    assert "no weight changes" in card and "It changes weights" not in card
