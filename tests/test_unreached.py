"""What an edit does not reach is said once, when the edit is made: pooled paths, ControlNets that read the text."""

import pytest
import torch
from diffusers import ControlNetModel, MultiControlNetModel, StableDiffusionControlNetPipeline

from erasure.pipelines import attach_erasures, load_erasure, set_erasures
from tests.every import build
from tests.slow import first
from tests.tiny import identical, make, tiny, unet, weights

QUICK = {"iterations": 1, "trajectories": 1, "keep_steps": 1, "num_inference_steps": 2, "progress": False}


def said(caught, part):
    return [str(w.message) for w in caught if part in str(w.message)]


@pytest.mark.parametrize("architecture", first(["sdxl", "sd3", "flux", "kolors"], "sdxl", "flux"))
def test_a_pooled_path_that_is_not_edited_is_said_once(architecture, recwarn):
    pipe = build(architecture)
    make(pipe, "superhero", keep=["ninja"]).apply(pipe)
    (message,) = said(recwarn, "pooled embedding")
    assert "not edited" in message and "pass pooled=True" in message


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("sd1", {}),
        pytest.param("qwen-image", {}, marks=pytest.mark.slow),
        ("sdxl", {"pooled": True}),
        pytest.param("flux", {"pooled": True}, marks=pytest.mark.slow),
        ("sdxl", {"preset": "official-2025"}),  # as its authors have it
    ],
)
def test_nothing_is_said_where_it_is_edited_or_as_published_or_not_there(architecture, settings, recwarn):
    make(build(architecture), "superhero", keep=["ninja"], **settings)
    assert not said(recwarn, "pooled embedding")


def with_controlnet(*, several=False):
    base = tiny("sd1")
    net = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(16, 32)).eval()
    for name, p in net.named_parameters():
        if "controlnet_" in name and p.ndim == 4:
            torch.nn.init.normal_(p, std=0.1)
    controlnet = MultiControlNetModel([net, net]) if several else net
    parts = {**base.components, "controlnet": controlnet}
    return StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)


@pytest.mark.parametrize("several", [False, True])
def test_a_controlnet_that_reads_the_text_is_said_once_when_the_edit_is_put_on(several, recwarn):
    pipe = with_controlnet(several=several)
    read = sum(name.endswith(("attn2.to_k", "attn2.to_v")) for name, _ in pipe.controlnet.named_modules())
    before = {name: tensor.clone() for name, tensor in pipe.controlnet.state_dict().items()}
    edit = make(pipe, "superhero", preset="official-2025", keep=["ninja"])
    assert not said(recwarn, "controlnet")  # the pipeline is as it was
    load_erasure(pipe, edit)
    set_erasures(pipe, edit.name, 0.5)
    edit.apply(pipe, 0.7)
    (message,) = said(recwarn, "controlnet")
    assert f"by {read} layers" in message and "adv-unlearn" in message
    assert identical(before, pipe.controlnet.state_dict())


def test_what_gligen_reads_of_its_phrases_is_said(recwarn):
    pipe = tiny("sd1")
    pipe.unet = unet(32, attention_type="gated")
    make(pipe, "superhero", preset="official-2025", keep=["ninja"]).apply(pipe)
    assert len(said(recwarn, "the position_net reads the text by 3 layers")) == 1


def test_it_is_said_of_attached_and_fused_ones_too(recwarn):
    pipe = with_controlnet()
    edit = make(pipe, "superhero", preset="official-2025", keep=["ninja"])
    with attach_erasures(pipe, edit):
        assert len(said(recwarn, "controlnet")) == 1
    edit.fuse(pipe, low_memory=True)
    assert len(said(recwarn, "controlnet")) == 2


def test_a_change_of_the_text_encoder_reaches_all_that_read_it(recwarn):
    pipe = tiny("sd1")
    edit = make(pipe, "superhero", method="adv-unlearn", keep=["ninja"], **QUICK, attack_steps=1, batch_size=1)
    both = with_controlnet()
    before = weights(both)
    edit.apply(both)
    assert not said(recwarn, "controlnet") and not identical(before, weights(both))


def test_a_pipeline_without_one_says_nothing(recwarn):
    pipe = tiny("sd1")
    make(pipe, "superhero", preset="official-2025", keep=["ninja"]).apply(pipe)
    assert not said(recwarn, "layers of its own")
