"""Each fine-tune's loss against a plain reading of its equation, and the settings that every one of them takes."""

import copy
import dataclasses

import pytest
import torch

from erasure import Concept
from erasure.backbone import backbone_of
from erasure.methods import BUILT_IN, method_class
from erasure.methods.age import AGE
from erasure.methods.bank import Bank, DrawnBank
from erasure.methods.base import Request
from erasure.methods.cogfd import CoGFD
from erasure.methods.concept_ablation import ConceptAblation
from erasure.methods.eap import EAP
from erasure.methods.erasediff import EraseDiff
from erasure.methods.esd import ESD
from erasure.methods.finetune import FineTune
from erasure.methods.forget_me_not import ForgetMeNot
from erasure.methods.gradient_ascent import GradientAscent
from erasure.methods.leco import LECO
from erasure.methods.random_label import RandomLabel
from erasure.methods.saliency import BEFORE, DRAWS, salient
from erasure.methods.salun import SalUn
from erasure.train import Draw
from tests.reference import finetunes as plain
from tests.slow import first
from tests.tiny import identical, make, tiny, tiny_pipeline, weights

QUICK = {"trajectories": 3, "num_inference_steps": 4, "keep_steps": 2, "batch_size": 3}
SUPERHERO = Concept("superhero", anchor="ninja")


class Trial:
    """A method's loss at a student that differs from the base, and what a reference needs to compute it anew."""

    def __init__(self, method: FineTune, *, keep=(), concept=SUPERHERO, prediction_type="epsilon") -> None:
        self.method, self.pipe = method, tiny_pipeline(prediction_type=prediction_type)
        self.backbone = backbone_of(self.pipe)
        self.request = Request(concepts=(concept,), keep=tuple(keep), progress=False)
        self.student = method.student(self.backbone)
        self.loss = method.objective(self.backbone, self.student, self.request, None)
        unet = tiny_pipeline(prediction_type=prediction_type, seed=7).unet
        self.base = plain.Plain(self.pipe, self.pipe.unet)
        self.other = plain.Plain(self.pipe, unet)

    def value(self) -> torch.Tensor:
        """Of the first draw, by the student."""
        frozen, self.pipe.unet = self.pipe.unet, self.other.unet
        try:
            return self.loss(Draw(0, 0))
        finally:
            self.pipe.unet = frozen

    def pictures(self, prompts, **given) -> DrawnBank:
        text = self.backbone.encode(prompts).text
        return self.method.pictures(self.backbone, text, self.request, None, "again", **given)

    def trajectories(self, prompts):
        text = self.backbone.encode(prompts).text
        return self.method.bank(self.backbone, text, self.request, None, "again")


def rows(bank: Bank, generator: torch.Generator, prompts: list[str], count: int = 3):
    """Inputs of the rows that a draw picks, with their prompts, and their numbers."""
    chosen = bank.pick(count, generator)
    return bank.x[chosen], bank.t[chosen], [prompts[i] for i in bank.prompt[chosen]], chosen


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# --- equations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("neutral", ["", "a person"])
def test_leco(prediction_type, neutral):
    trial = Trial(LECO(eta=3.0, neutral=neutral, adapter="weights", **QUICK), prediction_type=prediction_type)
    x, t, asked, _ = rows(trial.trajectories(["superhero"]), Draw(0, 0).generator, ["superhero"])
    close(trial.value(), plain.leco(trial.base, trial.other, x, t, asked, [neutral] * 3, eta=3.0))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("target", ["model", "noise"])
def test_concept_ablation(prediction_type, target):
    concept = dataclasses.replace(SUPERHERO, templates=("a photo of {}", "{} at sea"))
    method = ConceptAblation(target=target, prior=0.5, **QUICK)
    trial = Trial(method, concept=concept, prediction_type=prediction_type)
    anchors = ["a photo of ninja", "ninja at sea"]
    bank, generator = trial.pictures(anchors), Draw(0, 0).generator
    x, t, anchor, chosen = rows(bank, generator, anchors)
    asked = [prompt.replace("ninja", "superhero") for prompt in anchor]
    if target == "model":
        theirs = plain.onto(trial.base, trial.other, x, t, asked, anchor)
    else:
        theirs = plain.denoising(trial.other, x, t, asked, bank.truth[chosen])
    x, t, anchor, chosen = rows(bank, generator, anchors)
    close(trial.value(), theirs + 0.5 * plain.denoising(trial.other, x, t, anchor, bank.truth[chosen]))


def test_age_takes_the_nearest_and_holds_it():
    keep = ["wizard", "ninja", "castle"]
    trial = Trial(AGE(hold=0.5, retain=0.0, **QUICK), keep=keep, concept=Concept("superhero"))
    bank, generator = trial.trajectories(["superhero"]), Draw(0, 0).generator
    everywhere = [["superhero"] * len(bank), *([k] * len(bank) for k in keep)]
    with torch.no_grad():
        own, *others = (trial.base(bank.x, bank.t, prompts) for prompts in everywhere)
    nearest = keep[int(torch.stack([(other - own).square().mean() for other in others]).argmin())]
    x, t, asked, _ = rows(bank, generator, ["superhero"])
    theirs = plain.onto(trial.base, trial.other, x, t, asked, [nearest] * 3)
    x, t, _, _ = rows(bank, generator, ["superhero"])
    close(trial.value(), theirs + 0.5 * plain.onto(trial.base, trial.other, x, t, [nearest] * 3, [nearest] * 3))


def test_eap_holds_what_suffers_most():
    keep = ["wizard", "ninja", "castle"]
    trial = Trial(EAP(retain=0.5, retain_hardest=4, **QUICK), keep=keep)
    bank, generator = trial.trajectories(["superhero"]), Draw(0, 0).generator
    x, t, asked, _ = rows(bank, generator, ["superhero"])
    theirs = plain.onto(trial.base, trial.other, x, t, asked, [""] * 3)
    held = trial.trajectories(keep)
    x, t, kept, _ = rows(held, generator, keep, count=12)
    errors = (trial.other(x, t, kept) - trial.base(x, t, kept)).square().flatten(1).mean(1)
    close(trial.value(), theirs + 0.5 * errors.topk(3).values.mean())


@pytest.mark.parametrize("method", [RandomLabel, SalUn])
def test_random_labels(method):
    keep = ["wizard", "ninja", "castle"]
    trial = Trial(method(retain=0.5, **QUICK), keep=keep, concept=Concept("superhero"))
    bank, generator = trial.pictures(["superhero"]), Draw(0, 0).generator
    labels = torch.randint(3, (len(bank),), generator=torch.Generator().manual_seed(0))
    x, t, asked, chosen = rows(bank, generator, ["superhero"])
    theirs = plain.onto(trial.base, trial.other, x, t, asked, [keep[i] for i in labels[chosen]])
    held = trial.pictures(keep)
    x, t, kept, chosen = rows(held, generator, keep)
    close(trial.value(), theirs + 0.5 * plain.denoising(trial.other, x, t, kept, held.truth[chosen]))


def test_gradient_ascent():
    trial = Trial(GradientAscent(retain=0.5, **QUICK), keep=["wizard"])
    bank, held, generator = trial.pictures(["superhero"]), trial.pictures(["wizard"]), Draw(0, 0).generator
    x, t, asked, chosen = rows(bank, generator, ["superhero"])
    theirs = -plain.denoising(trial.other, x, t, asked, bank.truth[chosen])
    x, t, kept, chosen = rows(held, generator, ["wizard"])
    close(trial.value(), theirs + 0.5 * plain.denoising(trial.other, x, t, kept, held.truth[chosen]))


@pytest.mark.parametrize("eta", [None, 1.0])
def test_erasediff(eta):
    trial = Trial(EraseDiff(retain=0.5, eta=eta, **QUICK), keep=["wizard"])
    bank, held, generator = trial.pictures(["superhero"]), trial.pictures(["wizard"]), Draw(0, 0).generator
    uniform = torch.rand(bank.truth.shape, generator=torch.Generator().manual_seed(0))
    x, t, asked, chosen = rows(bank, generator, ["superhero"])
    unet = trial.other.unet
    parameters = [unet.get_parameter(name) for name in trial.student.parameters]
    forget = plain.denoising(trial.other, x, t, asked, uniform[chosen])
    x, t, kept, chosen = rows(held, generator, ["wizard"])
    keep = 0.5 * plain.denoising(trial.other, x, t, kept, held.truth[chosen])
    f, r = (
        torch.cat([g.flatten() for g in torch.autograd.grad(part, parameters, retain_graph=True)])
        for part in (forget, keep)
    )
    weight = 1.0 if eta is None else max(0.0, eta - (f @ r).item() / (f @ f).item())
    trial.student.parameters = dict(zip(trial.student.parameters, parameters, strict=True))
    trial.loss = trial.method.objective(trial.backbone, trial.student, trial.request, None)
    close(trial.value(), keep + weight * forget)
    if eta is not None:  # a small step lowers what is to be forgotten, as far as first order goes
        assert (r + weight * f) @ f >= eta * f @ f - 1e-6 or weight == 0


def test_cogfd():
    trial = Trial(CoGFD(push=0.5, retain=0.8, **QUICK), keep=["wizard"])
    times = {"window": (0.99, 1.0)}
    bank, held, generator = (
        trial.pictures(["superhero"], **times),
        trial.pictures(["wizard"], **times),
        Draw(0, 0).generator,
    )
    assert bank.t.min() >= 990
    x, t, asked, _ = rows(bank, generator, ["superhero"])
    moved = plain.onto(trial.base, trial.other, x, t, asked, asked)
    x, t, kept, _ = rows(held, generator, ["wizard"])
    still = plain.onto(trial.base, trial.other, x, t, kept, kept)
    close(trial.value(), 0.5 * torch.exp(-moved) + 0.8 * torch.exp(still))


def test_forget_me_not():
    trial = Trial(ForgetMeNot(**QUICK))
    bank, generator = trial.pictures(["superhero"]), Draw(0, 0).generator
    x, t, asked, _ = rows(bank, generator, ["superhero"])
    encoded = trial.backbone.encode(asked)
    columns = encoded.segments[0].span("content")
    theirs = plain.attention_mass(trial.other.unet, encoded.text.hidden, x, t, columns)
    close(trial.value(), theirs)


def test_a_drawn_bank_is_the_pipelines_pictures_mixed_with_noise():
    for architecture in ("sd1", "sd3", "flux"):
        pipe = tiny(architecture)
        backbone, prompts = backbone_of(pipe), ["superhero", "a ninja"]
        text = backbone.encode(prompts).text
        bank = DrawnBank.draw(
            backbone, text, pictures=2, mixes=3, num_inference_steps=3, guidance_scale=3.0, seed=5, progress=False
        )
        generator = torch.Generator().manual_seed(5)
        noise = torch.randn(2, *backbone.latent_shape, generator=generator)
        clean = backbone.draw(text, num_inference_steps=3, guidance_scale=3.0, noise=noise, generator=generator)
        first, _ = backbone.noise.split(bank.truth, bank.x, bank.t)  # a perfect prediction gives the picture back
        torch.testing.assert_close(first[:2], clean.float(), rtol=1e-3, atol=1e-4)
        assert len(bank) == 6 and bank.prompt.tolist() == [0, 1] * 3
        with torch.no_grad():
            predicted = backbone.predict(bank.x, bank.t, text[bank.prompt], guidance=backbone.plain_guidance)
        torch.testing.assert_close(predicted, bank.conditional, rtol=1e-4, atol=1e-5)


# --- settings of every one -------------------------------------------------------------------------------------------

TRAINED = [name for name in sorted(BUILT_IN) if issubclass(method_class(name), FineTune)]
SHORT = {"iterations": 3, "lr": 1e-2, **QUICK, "progress": False}


SEARCH = {"rounds": 1, "search_iterations": 1, "attack_iterations": 1, "pictures_each": 1}  # STEREO's first stage
ATTACKED = [name for name in TRAINED if name not in ("forget-me-not", "mace", "eraseflow", "undo", "z-erase")]
UNMASKED = ("spm", "leco", "mace", "cogfd", "eraseflow", "receler", "undo", "z-erase")
MASKED = [name for name in TRAINED if name not in UNMASKED]


@pytest.mark.parametrize("name", first(ATTACKED, "esd", "adv-unlearn"))
def test_every_fine_tune_trains_under_the_attack(name):
    pipe = tiny("sd1")
    own = {"adv-unlearn": {"warmup_steps": 0}, "salun": {"saliency": None}, "stereo": SEARCH}.get(name, {})
    given = {"keep": ["wizard"], **SHORT, "attack_steps": 2, **own}
    off, on = (make(pipe, SUPERHERO, name, robust=robust, seed=1, **given) for robust in (False, True))
    assert set(off.tensors) == set(on.tensors) and not identical(off.tensors, on.tensors)


@pytest.mark.parametrize("name", first(MASKED, "esd"))
def test_every_fine_tune_of_weights_takes_a_mask(name):
    pipe = tiny("sd1")
    own = {"adv-unlearn": {"warmup_steps": 0}, "stereo": SEARCH}.get(name, {})
    given = {"keep": ["wizard"], **SHORT, **own}
    edit = make(pipe, SUPERHERO, name, saliency=0.25, optimizer="adam", adapter="weights", **given)
    trained = method_class(name).preset(saliency=0.25).student(backbone_of(pipe)).parameters
    moved = sum(int((delta != 0).sum()) for delta in edit.tensors.values())
    total = sum(p.numel() for p in trained.values())
    assert 0.05 * total < moved <= 0.25 * total + 1


def test_a_mask_holds_the_weights_with_the_largest_gradient():
    pipe = tiny("sd1")
    backbone, request = backbone_of(pipe), Request(concepts=(SUPERHERO,), progress=False)
    method = ESD(**QUICK)
    student = method.student(backbone)
    loss = method.objective(backbone, student, request, None)
    for p in student.parameters.values():
        p.requires_grad_(True)
    masks = salient(student.parameters, loss, share=0.1, seed=0)
    for i in range(DRAWS):
        loss(Draw(0, BEFORE + i)).backward()
    total = {name: p.grad.abs() for name, p in student.parameters.items()}
    chosen = torch.cat([total[n][masks[n] == 1] for n in masks])
    left = torch.cat([total[n][masks[n] == 0] for n in masks])
    assert chosen.min() >= left.max() * (1 - 1e-4)
    assert abs(len(chosen) / (len(chosen) + len(left)) - 0.1) < 0.01


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("leco", {"saliency": 0.5}, "saliency chooses among the model's own weights"),
        ("salun", {"optimizer": "adamw"}, "saliency chooses among the model's own weights"),
        ("forget-me-not", {"robust": True}, "nothing to attack"),
        ("cogfd", {"saliency": 0.5}, "changing all weights"),
        ("cogfd", {"window": (0.5, 0.5)}, "swap them"),
        ("esd", {"saliency": 1.5}, "saliency"),
        ("esd", {"epsilon": 0.0}, "epsilon"),
        ("esd", {"retain_hardest": 0}, "retain_hardest"),
        ("leco", {"rank": 0}, "rank"),
        ("concept-ablation", {"target": "nothing"}, "target"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_any_work(name, settings, message, monkeypatch):
    pipe = tiny("sd1")
    monkeypatch.setattr(type(pipe), "__call__", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        make(pipe, SUPERHERO, name, keep=["wizard"], **{**SHORT, **settings})


@pytest.mark.parametrize("name", ["age", "random-label", "salun", "erasediff", "cogfd"])
def test_who_needs_something_to_keep_says_so(name):
    with pytest.raises(ValueError, match="keep"):
        make(tiny("sd1"), Concept("superhero"), name, **SHORT)


@pytest.mark.parametrize("name", ["gradient-ascent", "concept-ablation"])
def test_a_diverging_rate_is_stopped_and_named_and_nothing_is_left(name, tmp_path):
    pipe = tiny("sd1")
    before = weights(pipe)
    with pytest.raises(FloatingPointError, match="stopped being finite at step .*lower the learning rate"):
        make(pipe, SUPERHERO, name, keep=["wizard"], **{**SHORT, "iterations": 200, "lr": 1e30}, checkpoint=tmp_path)
    assert identical(before, weights(pipe))


def test_a_list_to_keep_that_is_not_used_is_not_recorded():
    assert copy.deepcopy(ESD.preset("official-2025-x")).retain == 0.0
    with pytest.warns(UserWarning, match="retain is 0"):
        edit = make(tiny("sd1"), "superhero", "concept-ablation", preset="paper", keep=["wizard"], **SHORT)
    assert not edit.config.keep
