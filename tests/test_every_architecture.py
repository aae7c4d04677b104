"""One contract for every architecture: where text enters, what the denoiser is given, and what an edit does."""

import contextlib
import itertools

import pytest
import torch

from erasure import Concept, Erasure, erase
from erasure.artifact import export_lora
from erasure.backbone.listen import listening, text_linears
from erasure.pipelines import attach_erasures
from tests.every import CALLS, CROSS, EVERY, JOINT, backbone, build
from tests.slow import first
from tests.tiny import identical, weights

ALL = pytest.mark.parametrize("name", EVERY)
# For what takes a second or more: one of each way in which text enters and guidance works; the others with -m slow.
KINDS = ("sdxl", "sd3", "flux", "qwen-image", "z-image", "wan2.2")
SOME = pytest.mark.parametrize("name", first(EVERY, *KINDS))
PROMPTS = ["a superhero", "a ninja"]
ONE_STEP_IMPOSSIBLE = {"ltx": "its last sigma is not zero", "qwen-image": "its only sigma is NaN"}
WITHOUT_LORA = {"pixart-sigma": "diffusers has no LoRA loader for PixArt"}


@pytest.fixture(scope="module")
def models():
    """Pipelines that no test changes, each built once."""
    made = {}

    def get(name):
        if name not in made:
            pipe = build(name)
            made[name] = pipe, backbone(pipe, name)
        return made[name]

    return get


def noise_for(model, n=2, seed=1):
    return torch.randn(n, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


def drawn(model, prompt="a superhero", steps=2):
    """Latents of the pipeline's own call."""
    text = model.encode([prompt]).text
    return model.draw(
        text,
        num_inference_steps=steps,
        guidance_scale=model.no_guidance if model.guidance == "cfg" else None,
        noise=noise_for(model, 1).to(model.dtype),
        generator=torch.Generator().manual_seed(2),
    ).float()


def made(pipe, model, **settings):
    concept = Concept("superhero", anchor="ninja")
    settings = {"preset": "official-2025", "keep": ["wizard", "batman"], "apply": False, "progress": False, **settings}
    return erase(model, concept, settings.pop("method", "uce"), **settings)


# --- where text enters -----------------------------------------------------------------------------------------------


@ALL
def test_the_sites_are_exactly_the_linears_that_receive_the_text(models, name):
    _, model = models(name)
    text = model.encode(PROMPTS).text
    step = next(model.trajectory(text, noise_for(model), num_inference_steps=3, guidance_scale=model.no_guidance))
    for space in model.spaces:
        rows = model.text_list(text) if space == "hidden" else [text.pooled]
        found = text_linears(model.denoiser, rows, lambda: model.predict(step.x, step.t, text))
        described = {n: site for n, site in model.text_sites(space).items() if ":" not in n}
        assert set(found) == set(described)
        norms = {n: module for n, module in model.denoiser.named_modules()}
        assert all(norms.get(norm) is described[site].norm for site, norm in found.items())


@ALL
def test_rows_are_what_the_entry_layer_receives(models, name):
    _, model = models(name)
    text, read = model.encode(PROMPTS).text, model.read(PROMPTS)
    step = next(model.trajectory(text, noise_for(model), num_inference_steps=3, guidance_scale=model.no_guidance))
    heard = []
    site = next(iter(model.text_sites().values()))
    handle = site.linear.register_forward_pre_hook(lambda m, args: heard.append(args[0].detach()))
    with torch.no_grad():
        model.predict(step.x, step.t, text)
    handle.remove()
    received = heard[0].reshape(-1, heard[0].shape[-1])
    for row in (row for rows in read.take("content") for row in rows):
        assert (received - row).abs().amax(dim=1).min() <= 1e-5 * row.abs().max()


@ALL
def test_words_stand_where_the_prompts_differ(models, name):
    """Nothing before the words differs between two prompts, the words do, and the tail stands behind them."""
    _, model = models(name)
    ours = model.encode(["a superhero", "a superhero", "a ninja", ""])
    for segment in ours.segments:
        for start, end, stop in zip(segment.starts, segment.ends, segment.stops, strict=True):
            assert 0 <= start <= end <= stop <= segment.hidden.shape[1]
        assert segment.ends[0] > segment.starts[0] and segment.ends[3] == segment.starts[3]
        assert torch.equal(segment.take("content")[0], segment.take("content")[1])
        assert not torch.equal(segment.take("last_subject")[0], segment.take("last_subject")[2])


# --- what the denoiser is given --------------------------------------------------------------------------------------


CALLED = list(itertools.product((4, 1, 25), ("default", "off", "on"), EVERY))  # steps, guidance, name
# Every architecture as it is called by default, one of each kind with other guidance, and some in a single step.
QUICK = [
    *((4, "default", name) for name in EVERY),
    *((4, "on", name) for name in KINDS),
    *((1, "default", name) for name in ("sd1", "sdxl", "flux", "wan2.2")),
]


@pytest.mark.parametrize(("steps", "guidance", "name"), first(CALLED, *QUICK))
def test_a_trajectory_is_the_pipelines_own_call(models, name, steps, guidance):
    if steps == 1 and name in ONE_STEP_IMPOSSIBLE:
        pytest.skip(ONE_STEP_IMPOSSIBLE[name])
    pipe, model = models(name)
    scale = {"default": None, "off": model.no_guidance, "on": 3.0}[guidance]
    noise = noise_for(model)
    given = {model.guidance_argument: scale} if scale is not None else {}
    if model.null_prompt and guidance != "off":
        given["negative_prompt"] = [model.null_prompt] * 2
    own = []
    with listening(model.denoiser_parts, before=lambda call: own.append(call)):
        pipe(
            prompt=list(PROMPTS),
            latents=model.call_latents(noise.to(model.latent_dtype or noise.dtype)),
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(2),
            output_type="latent",
            **given,
            **{**model.call, **CALLS.get(name, {})},
        )
    text = model.encode(PROMPTS).text
    taken = list(
        model.trajectory(
            text,
            noise,
            num_inference_steps=steps,
            guidance_scale=scale,
            generator=torch.Generator().manual_seed(2),
        )
    )
    calls = own if len(own) == len(taken) else own[::2]  # guidance by two calls a step
    assert len(calls) == len(taken)
    for call, step in zip(calls, taken, strict=True):
        x = model.unpacked(call.inputs[model.latent_argument])[:2]
        assert (x - step.x).norm() <= 1e-3 * step.x.norm()
        t = torch.as_tensor(call.inputs[model.time_argument]).reshape(-1)[:1]
        assert torch.allclose(t.float(), step.t[:1].float(), rtol=1e-3)
    guided = guidance != "off" and model.guidance == "cfg" and (guidance == "on" or taken[0].unconditional is not None)
    assert (taken[0].unconditional is not None) == guided


@ALL
def test_a_prediction_is_the_trajectorys(models, name):
    _, model = models(name)
    text = model.encode(PROMPTS).text
    *_, step = model.trajectory(
        text, noise_for(model), num_inference_steps=3, guidance_scale=3.0, generator=torch.Generator().manual_seed(2)
    )
    guidance = 3.0 if model.guidance == "embedded" else None
    with torch.no_grad():
        again = model.predict(step.x, step.t, text, guidance=guidance)
    assert (again - step.conditional).norm() <= 1e-3 * step.conditional.norm()


@ALL
def test_the_noise_model_is_the_schedulers(models, name):
    """Splitting a prediction and mixing it again gives the latents back."""
    _, model = models(name)
    text = model.encode(PROMPTS).text
    step = next(model.trajectory(text, noise_for(model), num_inference_steps=3, guidance_scale=model.no_guidance))
    x0, eps = model.noise.split(step.conditional.float(), step.x.float(), step.t)
    assert torch.allclose(model.noise.mix(x0, eps, step.t), step.x.float(), atol=1e-3 * float(step.x.abs().max()))
    t = model.noise.times(torch.tensor([0.3, 0.6])).to(step.t)
    x = model.noise.mix(step.x.float(), eps, t)
    again, same = model.noise.split(model.noise.target(step.x.float(), eps, t), x, t)
    assert torch.allclose(again, step.x.float(), atol=1e-3) and torch.allclose(
        same, eps, atol=1e-3 * float(eps.abs().max())
    )


# --- what an edit does -----------------------------------------------------------------------------------------------


@SOME
def test_the_guide_is_reached_and_what_is_kept_stays(models, name):
    pipe, model = models(name)
    edit = made(pipe, model, lamb=1e-4, preserve_scale=10.0, erase_scale=10.0)
    target, anchor, kept = (model.read([p]).take("last_subject")[0].double() for p in ("superhero", "ninja", "wizard"))
    for site in model.text_sites().values():
        w = site.weight.double()
        u, v = (edit.tensors[f"hidden.{f}"].double() for f in "uv")
        moved, stayed = (x + (x @ v) @ u.T for x in (target, kept))
        assert ((moved - anchor) @ w.T).norm() <= 0.05 * ((target - anchor) @ w.T).norm()
        assert ((stayed - kept) @ w.T).norm() <= 0.05 * (kept @ w.T).norm()


@pytest.mark.parametrize("name", first(EVERY, "sdxl", "sd3", "flux", "qwen-image"))
def test_applied_attached_fused_and_removed(name, tmp_path):
    pipe = build(name)
    model = backbone(pipe, name)
    with torch.no_grad():  # random layers hardly listen to the text: make them
        for site in model.text_sites().values():
            site.linear.weight.mul_(5)
    edit, before = made(pipe, model, preset="recommended"), weights(pipe)
    base = drawn(model)
    edit.apply(pipe, 0.0)
    assert identical(before, weights(pipe)) and torch.equal(drawn(model), base)
    edit.apply(pipe)
    applied = drawn(model)
    assert not torch.allclose(applied, base)
    edit.remove(pipe)
    assert identical(before, weights(pipe)) and torch.equal(drawn(model), base)
    with attach_erasures(pipe, edit):
        attached = drawn(model)
    change = (applied - base).norm()
    assert (attached - applied).norm() <= 1e-2 * change + 1e-6 * base.norm() and torch.equal(drawn(model), base)
    edit.save_pretrained(tmp_path / "edit")
    again = Erasure.from_pretrained(tmp_path / "edit").apply(pipe)
    assert torch.equal(drawn(model), applied)
    again.fuse(pipe)
    assert torch.equal(drawn(model), applied)


@SOME
@pytest.mark.parametrize("dtype", first([torch.float16, torch.bfloat16], torch.bfloat16))
def test_half_precision(models, name, dtype):
    _, exact = models(name)
    pipe = build(name).to(dtype)
    model = backbone(pipe, name)
    before = weights(pipe)
    edit, precise = made(pipe, model), made(None, exact)
    (u, v), (a, b) = ([e.tensors[f"hidden.{f}"].double() for f in "uv"] for e in (edit, precise))
    # weights and norms were rounded when the pipeline was; the encoder's arithmetic was not
    assert (u @ v.T - a @ b.T).norm() <= (0.01 if dtype == torch.float16 else 0.08) * (a @ b.T).norm()
    edit.apply(pipe)
    assert not identical(before, weights(pipe))
    if dtype == torch.bfloat16:  # some layers have no float16 on CPUs
        assert torch.isfinite(drawn(model)).all()
    edit.remove(pipe)
    assert identical(before, weights(pipe))


@SOME
def test_a_lora_export_gives_the_same_picture_under_the_pipelines_own_loader(name, tmp_path):
    if name in WITHOUT_LORA:
        pytest.skip(WITHOUT_LORA[name])
    pipe = build(name)
    model = backbone(pipe, name)
    edit = made(pipe, model)
    file = export_lora(edit, pipe, tmp_path)
    edit.apply(pipe)
    applied = drawn(model)
    edit.remove(pipe)
    base = drawn(model)
    pipe.load_lora_weights(tmp_path)
    if (other := tmp_path / "transformer_2").exists():
        pipe.load_lora_weights(other, load_into_transformer_2=True)
    with contextlib.ExitStack():
        text = model.encode(["a superhero"]).text
        again = model.draw(
            text,
            num_inference_steps=2,
            guidance_scale=model.no_guidance if model.guidance == "cfg" else None,
            noise=noise_for(model, 1),
            generator=torch.Generator().manual_seed(2),
        )
    assert file.exists() and (again - applied).norm() <= 1e-2 * (applied - base).norm() + 1e-5 * applied.norm()


TRAINED = [*JOINT, *CROSS, "sd3", "flux"]


@pytest.mark.parametrize("name", first(TRAINED, *(name for name in KINDS if name in TRAINED)))
def test_esd_trains_an_adapter_and_leaves_the_base(name):
    pipe = build(name)
    model = backbone(pipe, name)
    before = weights(pipe)
    edit = made(
        pipe, model, method="esd", preset="recommended", iterations=2, trajectories=2, num_inference_steps=3,
        keep_steps=1, batch_size=2, keep=["wizard"], lr=1e-2,
    )  # fmt: skip
    assert identical(before, weights(pipe))
    base = drawn(model)
    edit.apply(pipe)
    assert not torch.equal(drawn(model), base)
    edit.remove(pipe)
    assert identical(before, weights(pipe)) and torch.equal(drawn(model), base)


# --- schedulers and relatives ----------------------------------------------------------------------------------------


SCHEDULERS = sorted(kind.__name__ for kind in build("sd1").scheduler.compatibles)
LIKE_OTHERS = {  # one of several that step alike
    "DEISMultistepScheduler", "DPMSolverSinglestepScheduler", "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
}  # fmt: skip


@pytest.mark.parametrize("kind", first(SCHEDULERS, *(kind for kind in SCHEDULERS if kind not in LIKE_OTHERS)))
def test_a_trajectory_is_the_pipelines_own_call_with_every_scheduler(kind):
    """Steps, noise at every step and settings of the step (TCD's eta) are the pipeline's, whatever its scheduler."""
    import diffusers

    pipe = build("sd1")
    try:
        pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config)
    except ImportError as error:  # some need packages of their own
        pytest.skip(str(error).strip().splitlines()[0])
    model, noise = backbone(pipe, "sd1"), None
    noise = noise_for(model)
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0}
    own = []
    with listening(model.denoiser_parts, before=lambda call: own.append(call)):
        pipe(
            prompt=list(PROMPTS),
            latents=noise,
            generator=torch.Generator().manual_seed(2),
            output_type="latent",
            **settings,
        )
    text, generator = model.encode(PROMPTS).text, torch.Generator().manual_seed(2)
    taken = list(model.trajectory(text, noise, generator=generator, **settings))
    assert len(own) == len(taken) == model.steps_of(4)
    for call, step in zip(own, taken, strict=True):
        x = call.inputs["sample"][:2]
        assert (x - step.x).norm() <= 1e-3 * step.x.norm() and float(call.inputs["timestep"]) == float(step.t[0])


@pytest.mark.parametrize("name", ["animatediff", "text-to-video", "lcm-sd"])
def test_relatives_of_the_unet_are_driven_and_edited_like_it(name):
    pipe = build(name)
    model = backbone(pipe, name)
    text = model.encode(PROMPTS).text
    noise = noise_for(model)
    step = next(model.trajectory(text, noise, num_inference_steps=3, generator=torch.Generator().manual_seed(2)))
    with torch.no_grad():
        again = model.predict(step.x, step.t, text)
    assert (again - step.conditional).norm() <= 1e-3 * step.conditional.norm()
    found = text_linears(model.denoiser, [text.hidden], lambda: model.predict(step.x, step.t, text))
    assert set(found) == set(model.text_sites())
