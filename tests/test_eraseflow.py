"""EraseFlow: trajectory balance against a plain reading of it, and what its training promises."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from erasure import Concept
from erasure.backbone import backbone_of
from erasure.methods.base import Request
from erasure.methods.eraseflow import EraseFlow, clip_apart, timetable
from erasure.train import Draw
from tests.builders import BUILDERS
from tests.tiny import identical, make, tiny, tiny_pipeline, weights

HERO = Concept("superhero", anchor="ninja")
SHORT = {"iterations": 2, "num_inference_steps": 4, "early": 1, "late": 1, "batch_size": 2, "lr": 1e-2}


def trial(pipe, **changes):
    """A method, its adapter moved off zero, and its loss."""
    method = EraseFlow(**{**SHORT, **changes})
    backbone = backbone_of(pipe)
    student = method.student(backbone)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in student.parameters.items():
        if name.endswith("lora_B"):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return method, backbone, student, method.objective(backbone, student, Request((HERO,), progress=False), None)


def guided(pipe, x, t, prompt, scale):
    text = [pipe.encode_prompt(p, pipe.device, 1, False)[0].expand(len(x), -1, -1) for p in ("", prompt)]
    none, prompted = (pipe.unet(x, t, encoder_hidden_states=one).sample for one in text)
    return none + scale * (prompted - none)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_the_trajectory_balance_of_ddim_steps(prediction_type):
    pipe = tiny_pipeline(prediction_type=prediction_type)
    method, backbone, student, loss = trial(pipe, guidance_scale=3.0, late=2)
    ours = loss(Draw(0, 0))
    generator = Draw(0, 0).generator
    empty, anchor = (backbone.encode([prompt]).text for prompt in ("", "ninja"))
    t = timetable(backbone.noise, 4)
    taken = method.sampled(backbone, student, anchor, empty.repeat(2), t, Draw(0, 0))
    torch.randint(1, (2,), generator=generator), [torch.randn(2, 4, 8, 8, generator=generator) for _ in range(5)]
    early = torch.randperm(2, generator=generator)[:1].tolist()
    alphas, total = pipe.scheduler.alphas_cumprod.double(), -0.1953 - 2.5
    with torch.no_grad(), student.active():
        for i in [*early, 2, 3]:
            x, after, a, b = taken["x"][i], taken["x"][i + 1], alphas[t[i]], alphas[t[i + 1]]
            out = guided(pipe, x, t[i], "superhero", 3.0)
            if prediction_type == "epsilon":
                x0, eps = (x - (1 - a).sqrt() * out) / a.sqrt(), out
            else:
                x0, eps = a.sqrt() * x - (1 - a).sqrt() * out, a.sqrt() * out + (1 - a).sqrt() * x
            s = ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
            forward = torch.distributions.Normal(b.sqrt() * x0 + (1 - b - s**2).sqrt() * eps, s)
            backward = torch.distributions.Normal((a / b).sqrt() * after, (1 - a / b).sqrt())
            total = total + (forward.log_prob(after) - backward.log_prob(x)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(ours.double(), total.square().mean(), rtol=1e-5, atol=1e-5)


def test_the_trajectory_is_that_of_diffusers_ddim_with_eta_1():
    pipe = tiny_pipeline()
    method, backbone, student, _ = trial(pipe, num_inference_steps=5)
    empty, anchor = (backbone.encode([prompt]).text for prompt in ("", "ninja"))
    t = timetable(backbone.noise, 5)
    x = method.sampled(backbone, student, anchor, empty.repeat(2), t, Draw(0, 5))["x"]
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, steps_offset=1, timestep_spacing="leading")
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == t[:-1] and t[-1] == 0
    generator = Draw(0, 5).generator
    torch.randint(1, (2,), generator=generator), torch.randn(2, 4, 8, 8, generator=generator)
    for i in range(5):
        with torch.no_grad(), student.active():
            out = guided(pipe, x[i], t[i], "ninja", 5.0)
        noise = torch.randn(2, 4, 8, 8, generator=generator)
        theirs = scheduler.step(out, t[i], x[i], eta=1.0, variance_noise=noise).prev_sample
        torch.testing.assert_close(x[i + 1], theirs, rtol=1e-4, atol=2e-5)


def test_the_gradient_computed_step_by_step_is_that_of_the_whole_sum(monkeypatch):
    found = []
    for recompute in (True, False):
        _, _, student, loss = trial(tiny_pipeline())
        if not recompute:
            monkeypatch.setattr("erasure.methods.eraseflow.recomputed", lambda f, x, use_reentrant: f(x))
        loss(Draw(0, 0)).backward()
        found.append({name: p.grad for name, p in student.parameters.items()})
    assert found[0].keys() == found[1].keys() and all(g is not None and g.abs().sum() > 0 for g in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_after_the_fresh_steps_one_trajectory_is_used_and_a_resumed_run_has_the_same(tmp_path):
    drawn = []

    class Counting(EraseFlow):
        def sampled(self, *args):
            drawn.append(args[-1].step)
            return super().sampled(*args)

    pipe, request = tiny_pipeline(), Request((HERO,), progress=False, checkpoint=tmp_path / "run")
    settings = {**SHORT, "iterations": 3, "fresh": 1, "num_inference_steps": 2}
    whole = Counting(**settings).erase(backbone_of(pipe), Request((HERO,), progress=False))
    assert drawn == [0, 1]

    class Killed(Counting):
        def training(self):
            return super().training().__class__(**{**vars(super().training()), "checkpoint_every": 1})

        def objective(self, *args):
            loss = super().objective(*args)

            def until(draw):
                if draw.step == 2:
                    raise KeyboardInterrupt
                return loss(draw)

            return until

    with pytest.raises(KeyboardInterrupt):
        Killed(**settings).erase(backbone_of(pipe), request)
    drawn.clear()
    again = Counting(**settings).erase(backbone_of(pipe), request)
    assert drawn == [] and identical(whole.tensors, again.tensors)


def test_training_lowers_the_imbalance_and_moves_z_and_leaves_the_model_alone():
    pipe = tiny_pipeline()
    before = weights(pipe)
    method, _, student, loss = trial(pipe, fresh=0, lr=3e-2)
    parameters = list(student.parameters.values())
    optimizer = method.training().build(parameters)
    values = []
    for _ in range(6):
        value = loss(Draw(0, 0))
        optimizer.zero_grad(), value.backward(), optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.9 * values[0] and student.parameters["z"].item() != pytest.approx(-0.1953)
    edit = make(pipe, HERO, "eraseflow", progress=False, **SHORT)
    assert identical(before, weights(pipe)) and edit.kind == "lora"
    assert all(name.endswith(("lora_A", "lora_B")) for name in edit.tensors)
    names = {site.rpartition(".")[2] for site in edit.config.sites}
    assert names == {"to_q", "to_k", "to_v", "0"} and any("attn1" in site for site in edit.config.sites)


def test_the_gradients_of_adapter_and_z_are_clipped_apart():
    adapter, z = (
        [torch.zeros(3, requires_grad=True), torch.zeros(2, requires_grad=True)],
        torch.zeros((), requires_grad=True),
    )
    adapter[0].grad, adapter[1].grad, z.grad = torch.full((3,), 2.0), torch.zeros(2), torch.tensor(-8.0)
    clip_apart([*adapter, z], 1.0)
    assert adapter[0].grad.norm().item() == pytest.approx(1.0, rel=1e-4)
    assert z.grad.item() == pytest.approx(-1.0, rel=1e-4)
    settings = EraseFlow().training()
    for p in (*adapter, z):
        p.grad = torch.full_like(p, 100.0)
    settings.build([*adapter, z]).step()
    assert z.grad.abs() <= 1 and math.hypot(*(p.grad.norm() for p in adapter)) <= 1 + 1e-5


@pytest.mark.parametrize("architecture", ["sdxl", "kolors", "pixart-sigma"])
def test_it_trains_on_other_diffusion_models(architecture):
    pipe = BUILDERS[architecture]()
    edit = make(pipe, HERO, "eraseflow", progress=False, **{**SHORT, "iterations": 1})
    assert edit.kind == "lora" and edit.config.report["relative_change"] > 0


@pytest.mark.parametrize(
    ("concept", "settings", "message"),
    [
        ("superhero", {}, "needs an anchor for every concept"),
        (HERO, {"robust": True}, "compares no two predictions"),
        (HERO, {"adapter": "weights"}, "trains an adapter"),
        (HERO, {"null": "sampled"}, "with the empty prompt"),
        (HERO, {"rank": 0}, "rank"),
        (HERO, {"late": 0}, "late"),
        (HERO, {"fresh": -1}, "fresh"),
        (HERO, {"num_inference_steps": 501}, "at most half of the model's 1000 times"),
        (HERO, {"saliency": 0.5}, "saliency chooses among"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(concept, settings, message, monkeypatch):
    pipe = tiny("sd1")
    monkeypatch.setattr(type(pipe), "__call__", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        make(pipe, concept, "eraseflow", progress=False, **{**SHORT, **settings})


@pytest.mark.parametrize("architecture", ["sd3", "flux"])
def test_flow_models_are_refused_with_what_to_take(architecture):
    with pytest.raises(ValueError, match="eraseflow does not work on .*choose another"):
        make(tiny(architecture), HERO, "eraseflow", progress=False, **SHORT)
