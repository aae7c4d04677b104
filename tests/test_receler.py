"""Receler: its loss, mask and attack against plain readings of them, and erasers on a model."""

import pytest
import torch
from torch import nn

from erasure import Concept, Erasure
from erasure.artifact import export_lora
from erasure.artifact.residual import ResidualErasure
from erasure.backbone import backbone_of
from erasure.backbone.text import Text
from erasure.methods.adversary import with_soft_tokens
from erasure.methods.base import Request
from erasure.methods.receler import Receler, outside
from erasure.train import Draw
from tests.reference.finetunes import Plain, squared
from tests.test_operator import draw
from tests.tiny import identical, make, tiny, tiny_pipeline, weights

HERO = Concept("superhero")
QUICK = {
    "iterations": 2,
    "lr": 1e-2,
    "trajectories": 3,
    "num_inference_steps": 4,
    "keep_steps": 2,
    "batch_size": 3,
    "rank": 4,
}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Eraser(nn.Module):
    """As in the paper: two linear layers with a GELU between them, around an attention whose output they add to."""

    def __init__(self, attention, tensors):
        super().__init__()
        rank, width = tensors[0].shape
        self.attention, self.net = attention, nn.Sequential(nn.Linear(width, rank), nn.GELU(), nn.Linear(rank, width))
        for parameter, tensor in zip(self.net.parameters(), tensors, strict=True):
            parameter.data = tensor
        self.added = None

    def forward(self, *args, **kwargs):
        output = self.attention(*args, **kwargs)
        self.added = self.net(output)
        return output + self.added


def with_erasers(unet, tensors):
    """The U-Net with every attn2 in an Eraser of these tensors; returns the erasers."""
    found = []
    for name, module in list(unet.named_modules()):
        if name.endswith("attn2"):
            own = [tensors[f"{name}.{part}"].detach() for part in ("down", "down_bias", "up", "up_bias")]
            found.append(Eraser(module, own))
            unet.get_submodule(name.rpartition(".")[0]).attn2 = found[-1]
    return found


def moved(student):
    """Every tensor of the erasers off zero."""
    for i, parameter in enumerate(student.parameters.values()):
        parameter.data = 0.2 * random(*parameter.shape, seed=i)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_the_papers(prediction_type):
    pipe = tiny_pipeline(prediction_type=prediction_type)
    backbone, request = backbone_of(pipe), Request((HERO,), progress=False)
    method = Receler(**{**QUICK, "eta": 1.5, "locality": 0.7, "threshold": 0.4, "robust": False})
    student = method.student(backbone)
    loss = method.objective(backbone, student, request, None)
    moved(student)
    bank = method.bank(backbone, backbone.encode(["superhero"]).text, request, None, "again")
    chosen = bank.pick(3, Draw(0, 0).generator)
    x, t = bank.x[chosen], bank.t[chosen]
    ours = loss(Draw(0, 0))
    base = Plain(pipe, pipe.unet)
    with torch.no_grad():
        concept, empty = base(x, t, ["superhero"] * 3), base(x, t, [""] * 3)
    looked = mask(pipe, x, t, above=0.4)
    erasers = with_erasers(pipe.unet, student.parameters)
    erase = squared(base(x, t, ["superhero"] * 3), empty - 1.5 * (concept - empty))
    locality = 0
    for eraser in erasers:
        side = round(eraser.added.shape[1] ** 0.5)
        keep = 1 - looked[:, :: 8 // side, :: 8 // side].reshape(3, -1, 1)
        locality = locality + (keep * eraser.added).square().mean() / len(erasers)
    torch.testing.assert_close(ours, erase + 0.7 * locality, rtol=1e-5, atol=1e-6)


def mask(pipe, x, t, *, above):
    """By diffusers' own attention scores: mean over layers at the latents' size, scaled, above a threshold."""
    text = pipe.encode_prompt("superhero", "cpu", 1, False)[0].expand(len(x), -1, -1)
    count = len(pipe.tokenizer("superhero", add_special_tokens=False).input_ids)
    seen, handles = [], []
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn2"):

            def heard(layer, args, kwargs):
                query = layer.head_to_batch_dim(layer.to_q(args[0]))
                key = layer.head_to_batch_dim(layer.to_k(kwargs["encoder_hidden_states"]))
                scores = layer.get_attention_scores(query, key).unflatten(0, (len(x), -1))
                looked = scores[..., 1 : 1 + count].sum(-1).mean(1)
                side = round(looked.shape[1] ** 0.5)
                seen.append(nn.functional.interpolate(looked.reshape(len(x), 1, side, side), (8, 8), mode="bilinear"))

            handles.append(module.register_forward_pre_hook(heard, with_kwargs=True))
    with torch.no_grad():
        pipe.unet(x, t, encoder_hidden_states=text)
    for handle in handles:
        handle.remove()
    mean = torch.stack(seen).mean(0)[:, 0]
    low, high = mean.amin((1, 2), keepdim=True), mean.amax((1, 2), keepdim=True)
    return ((mean - low) / (high - low) > above).float()


def test_the_regulariser_counts_what_is_added_outside_of_the_mask():
    added, masks = [random(2, 16, 3), random(2, 4, 5, seed=1)], torch.zeros(2, 4, 4)
    assert outside(added, torch.ones(2, 4, 4)) == 0
    torch.testing.assert_close(outside(added, masks), (added[0].square().mean() + added[1].square().mean()) / 2)
    masks[0, 0, 0] = 1  # the first place of the fine layer, and of the coarse one
    total = (
        added[0].square().sum() - added[0][0, 0].square().sum(),
        added[1].square().sum() - added[1][0, 0].square().sum(),
    )
    torch.testing.assert_close(outside(added, masks), (total[0] / 96 + total[1] / 40) / 2)


def test_the_attack_learns_the_tokens_behind_the_words_and_no_others():
    text, wanted = Text(random(2, 8, 4)), random(2, 8, 4, seed=1)
    places = torch.tensor([2, 6])

    def error(moved):
        return (moved.hidden - wanted).square().mean()

    found = [
        with_soft_tokens(
            text, places, error, count=3, steps=steps, lr=0.05, generator=torch.Generator().manual_seed(0)
        ).hidden
        for steps in (0, 40)
    ]
    changed = (found[1] != text.hidden).any(-1)
    assert changed.tolist() == [[2 <= i < 5 for i in range(8)], [i >= 6 for i in range(8)]]
    assert error(Text(found[1])) < error(Text(found[0])) and not found[1].requires_grad
    p = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)) * text.hidden.std()
    torch.testing.assert_close(found[0][0, 2:5], p[0])
    torch.testing.assert_close(found[0][1, 6:], p[1, :2])


def test_the_attack_reaches_the_model():
    """The official code's soft tokens do not: there, a loss with them equals one without."""
    pipe = tiny_pipeline()
    backbone, request, values = backbone_of(pipe), Request((HERO,), progress=False), []
    for steps in (0, 1, 4):
        method = Receler(**{**QUICK, "attack_steps": steps, "robust": True})
        student = method.student(backbone)
        loss = method.objective(backbone, student, request, None)
        moved(student)
        values.append(loss(Draw(0, 0)).item())
    assert len({round(value, 6) for value in values}) == 3


def test_an_erasure_is_what_was_trained(tmp_path):
    pipe = tiny_pipeline()
    before, base = weights(pipe), draw(pipe)
    edit = make(pipe, HERO, "receler", progress=False, **{**QUICK, "attack_steps": 1})
    assert isinstance(edit, ResidualErasure) and identical(before, weights(pipe))
    assert all("attn2" in site for site in edit.sites) and edit.config.prompts == ["superhero", "a superhero"]
    edit.apply(pipe)
    erased = draw(pipe)
    edit.remove(pipe)
    assert torch.equal(draw(pipe), base) and (erased - base).abs().max() > 1e-5
    with_erasers(pipe.unet, edit.tensors)
    torch.testing.assert_close(draw(pipe), erased, rtol=1e-4, atol=1e-5)


def test_damaged_and_foreign_erasures_are_refused(tmp_path):
    pipe = tiny_pipeline()
    edit = make(pipe, HERO, "receler", progress=False, **{**QUICK, "attack_steps": 1})
    site = edit.sites[0]
    for name, tensor in (("up", random(16, 5)), ("down_bias", random(5)), ("other", random(3))):
        with pytest.raises(ValueError, match="a residual erasure holds"):
            type(edit)(edit.name, edit.config, {**edit.tensors, f"{site}.{name}": tensor}).check_tensors()
    wide = {f"{site}.{k}": edit.tensors[f"{site}.{k}"] for k in ("down_bias",)}
    tensors = {
        **edit.tensors,
        **wide,
        f"{site}.down": random(4, 20),
        f"{site}.up": random(20, 4),
        f"{site}.up_bias": random(20),
    }
    other = type(edit)(edit.name, edit.config, tensors)
    other.check_tensors()
    with pytest.raises(ValueError, match="has width"):
        other.apply(pipe)
    with pytest.raises(ValueError, match="changes no layer"):
        export_lora(edit, pipe, tmp_path / "lora")
    with pytest.raises(ValueError, match="cannot be composed"):
        edit.compose(edit)
    assert Erasure.from_pretrained(edit.save_pretrained(tmp_path / "edit")).kind == "residual"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adapter": "lora"}, "erasers of its own"),
        ({"saliency": 0.5}, "erasers of its own"),
        ({"rank": 0}, "rank"),
        ({"words": 0}, "words"),
        ({"threshold": 1.0}, "threshold"),
        ({"locality": -1.0}, "locality"),
        ({"attack_lr": 0.0}, "attack_lr"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        make(tiny_pipeline(), HERO, "receler", progress=False, **{**QUICK, **given})


@pytest.mark.parametrize("architecture", ["sd3", "flux"])
def test_models_without_cross_attention_are_refused(architecture):
    with pytest.raises(ValueError, match="receler does not work on .*choose another"):
        make(tiny(architecture), HERO, "receler", progress=False, **QUICK)
