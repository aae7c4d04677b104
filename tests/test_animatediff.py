"""Video models made from image models: erasures of the image model go on them, and temporal layers stay as they are."""

import diffusers
import pytest
import torch

from erasure.backbone import backbone_of
from erasure.pipelines import attach_erasures
from tests.every import backbone
from tests.slow import first
from tests.tiny import identical, make, tiny, weights
from tests.tiny_relatives import RELATIVES

FEW = {"iterations": 1, "trajectories": 1, "keep_steps": 1, "num_inference_steps": 2, "progress": False}


def adapter(pipe, *, zero=False):
    """Temporal layers as wide as the level they stand on, some of them as wide as the text."""
    torch.manual_seed(1)
    motion = diffusers.MotionAdapter(
        block_out_channels=pipe.unet.config.block_out_channels,
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
    )
    for name, parameter in motion.named_parameters():  # as published ones begin: they change nothing until trained
        if "proj_out" in name:
            torch.nn.init.zeros_(parameter) if zero else torch.nn.init.normal_(parameter, std=0.1)
    return motion


def animated(pipe, **options):
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1)
    parts = {"vae": pipe.vae, "unet": pipe.unet, "scheduler": scheduler, "motion_adapter": adapter(pipe, **options)}
    encoders = {name: part for name, part in pipe.components.items() if name.startswith(("text_encoder", "tokenizer"))}
    kind = diffusers.AnimateDiffSDXLPipeline if "text_encoder_2" in encoders else diffusers.AnimateDiffPipeline
    made = kind(**parts, **encoders)
    made.set_progress_bar_config(disable=True)
    if "text_encoder_2" in encoders:  # diffusers 0.42 leaves this part of the copy at random values
        made.unet.add_embedding.load_state_dict(pipe.unet.add_embedding.state_dict())
    return made


def temporal(pipe):
    parts = ("motion", "temp", "transformer_in")
    return {name: p.clone() for name, p in pipe.unet.named_parameters() if any(part in name for part in parts)}


@pytest.fixture(scope="module")
def sd1():
    return tiny("sd1")


@pytest.fixture
def animatediff(sd1):
    return animated(sd1)


@pytest.mark.parametrize("architecture", first(["sd1", "sd2", "sdxl"], "sd1", "sdxl"))
@pytest.mark.parametrize(("method", "settings"), [("uce", {}), ("esd", FEW)])
def test_an_erasure_of_the_image_model_is_the_same_change_on_the_video_model(architecture, method, settings):
    pipe = tiny(architecture)
    edit = make(pipe, "superhero", method=method, keep=["ninja", "wizard"], **settings)
    video = animated(pipe)
    before, moving = weights(video), temporal(video)
    edit.apply(video)
    after = weights(video)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    edit.apply(pipe)
    image = weights(pipe)
    assert changed == {f"unet.{name}" for name in edit.parameter_names}
    assert all(torch.equal(after[name], image[name]) for name in changed)
    assert len(moving) > 100 and identical(moving, temporal(video))
    edit.remove(video)
    assert identical(before, weights(video))


def test_pictures_of_a_still_video_are_those_of_the_edited_image_model(sd1):
    video = animated(sd1, zero=True)
    edit = make(sd1, "superhero", preset="official-2025", keep=["ninja"])
    x, t = torch.randn(1, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    text = backbone_of(sd1).encode(["superhero"]).hidden

    def drawn(pipe, x):
        with torch.no_grad():
            return pipe.unet(x, t, encoder_hidden_states=text).sample

    plain = drawn(video, x)
    with attach_erasures(video, edit):
        attached = drawn(video, x)
    edit.apply(video), edit.apply(sd1)
    applied = drawn(video, x)
    torch.testing.assert_close(applied[:, :, 0], drawn(sd1, x[:, :, 0]), atol=1e-4, rtol=1e-4)
    edit.remove(video), edit.remove(sd1)
    torch.testing.assert_close(attached, applied, atol=1e-4, rtol=1e-4)
    assert (applied - plain).norm() > 1e-2 * plain.norm()


def test_an_erasure_made_on_the_video_model_goes_on_the_image_model(sd1, animatediff):
    there, here = (make(pipe, "superhero", preset="official-2025", keep=["ninja"]) for pipe in (animatediff, sd1))
    assert there.prints == here.prints and identical(there.tensors, here.tensors)
    there.apply(sd1).remove(sd1)


def test_another_image_model_under_the_motion_is_refused(sd1):
    edit = make(sd1, "superhero", preset="official-2025", keep=["ninja"])
    other = tiny("sd1", seed=1)
    other.text_encoder = sd1.text_encoder
    with pytest.raises(ValueError, match="wrong base model"):
        edit.apply(animated(other))


@pytest.mark.parametrize(
    ("method", "settings", "relative"),
    [
        pytest.param("uce", {}, "animatediff", marks=pytest.mark.slow),
        ("uce", {}, "text-to-video"),
        ("esd", FEW, "animatediff"),
        pytest.param("esd", FEW, "text-to-video", marks=pytest.mark.slow),
    ],
)
def test_no_temporal_layer_is_edited_where_all_widths_are_equal(relative, method, settings):
    pipe = RELATIVES[relative]()
    pipe.set_progress_bar_config(disable=True)
    width = pipe.text_encoder.config.hidden_size
    moving = temporal(pipe)
    assert any(name.endswith("attn2.to_k.weight") and p.shape[1] == width for name, p in moving.items())
    model = backbone(pipe, relative)  # two frames
    edit = make(model, "superhero", method=method, keep=["ninja"], **settings)
    assert not set(edit.parameter_names) & set(moving)
    sites = {name for name in edit.parameter_names if name.endswith(("to_k.weight", "to_v.weight"))}
    spatial = {n for n, _ in pipe.unet.named_parameters() if ".attn2.to_k" in n or ".attn2.to_v" in n} - set(moving)
    assert sites == spatial


def test_a_video_is_predicted_as_its_pipeline_predicts_it():
    pipe = RELATIVES["animatediff"]()
    pipe.set_progress_bar_config(disable=True)
    model = backbone(pipe, "animatediff")
    text = model.encode(["a superhero", "a cat"]).text
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    for step in model.trajectory(text, noise, num_inference_steps=2, guidance_scale=3.0):
        with torch.no_grad():
            ours = model.predict(step.x, step.t, text)
        torch.testing.assert_close(ours, step.conditional, rtol=1e-3, atol=1e-4)
