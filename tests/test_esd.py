"""ESD against the paper's equation, step by step, and what it leaves alone."""

import copy

import pytest
import torch

from erasure import Concept, Suite, erase
from erasure.backbone import backbone_of
from erasure.methods.bank import TrajectoryBank
from erasure.methods.base import Request
from erasure.methods.esd import ESD
from erasure.train import Draw
from tests.reference import esd as reference
from tests.tiny import identical, make, tiny_pipeline, weights
from tests.tiny_relatives import RELATIVES

QUICK = {"iterations": 6, "lr": 1e-3, "trajectories": 3, "num_inference_steps": 5, "keep_steps": 2, "batch_size": 2}


def bank_of(backbone, prompts, **changes):
    settings = {"trajectories": 3, "keep": 2, "num_inference_steps": 5, "guidance_scale": 3.0, "seed": 0, **changes}
    text, empty = backbone.encode(prompts).text, backbone.encode([""]).text
    return TrajectoryBank.sample(backbone, text, empty, progress=False, **settings)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("erase_from", [None, "an animal"])
def test_the_loss_is_the_papers(prediction_type, erase_from):
    pipe = tiny_pipeline(prediction_type=prediction_type)
    backbone, method = backbone_of(pipe), ESD(eta=1.5, erase_from=erase_from)
    text = backbone.encode(["superhero"]).text
    bank = bank_of(backbone, [erase_from or "superhero"])
    targets = method.targets(backbone, bank, text)
    student = tiny_pipeline(prediction_type=prediction_type, seed=7).unet
    theirs = reference.loss(pipe, student, bank.x, bank.t, "superhero", eta=1.5, erase_from=erase_from)
    pipe.unet = student
    asked = backbone.encode([erase_from or "superhero"]).text
    ours = method.error(backbone_of(pipe), bank, targets, asked, torch.arange(len(bank)))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("erase_from", [None, "santa"])
def test_one_training_step_is_one_step_of_the_reference(erase_from):
    pipe = tiny_pipeline()
    backbone, settings = backbone_of(pipe), {**QUICK, "iterations": 1, "erase_from": erase_from}
    edit = make(pipe, "superhero", "esd", preset="official-2025-x", **settings)
    bank = bank_of(backbone, [erase_from or "superhero"])
    chosen = bank.pick(2, Draw(0, 0).generator)
    _, theirs = reference.step(
        pipe, bank.x[chosen], bank.t[chosen], "superhero", list(edit.tensors), eta=2.0, lr=1e-3, erase_from=erase_from
    )
    for name, delta in edit.tensors.items():
        # Adam's first step is lr times the sign of the gradient: compare where the sign is not a matter of rounding
        assert (delta - theirs[name]).abs().quantile(0.99) <= 1e-5
    assert set(edit.tensors) == {n for n, _ in pipe.unet.named_parameters() if ".attn2." in n}


def test_the_bank_holds_what_the_base_predicts():
    pipe = tiny_pipeline()
    backbone = backbone_of(pipe)
    bank = bank_of(backbone, ["superhero", "a ninja"])
    text, empty = backbone.encode(["superhero", "a ninja"]).text, backbone.encode([""]).text
    with torch.no_grad():
        torch.testing.assert_close(
            backbone.predict(bank.x, bank.t, text[bank.prompt]), bank.conditional, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            backbone.predict(bank.x, bank.t, empty.repeat(len(bank))), bank.unconditional, rtol=1e-4, atol=1e-5
        )
    assert len(bank) == 6 and set(bank.prompt.tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("preset", "touched"),
    [
        ("official-2025-x", lambda n: ".attn2." in n),
        ("official-2025-x-strict", lambda n: ".attn2.to_k" in n or ".attn2.to_v" in n),
        ("official-2025-u", lambda n: ".attn2." not in n),
        ("official-2025-all", lambda n: True),
    ],
)
def test_each_variant_trains_its_layers_and_no_norm(preset, touched):
    pipe = tiny_pipeline()
    edit = make(pipe, "superhero", "esd", preset=preset, **{**QUICK, "iterations": 1}, progress=False)
    layers = {n for n, m in pipe.unet.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    assert set(edit.tensors) == {
        n for n, _ in pipe.unet.named_parameters() if n.rsplit(".", 1)[0] in layers and touched(n)
    }


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"precision": "bfloat16"}, marks=pytest.mark.slow),
        {"synonyms": True, "articles": True},
        pytest.param({"adapter": "lora", "lr": 1e-2, "iterations": 200}, marks=pytest.mark.slow),
    ],
)
def test_training_lowers_the_loss_and_leaves_the_pipeline_alone(settings):
    pipe = tiny_pipeline()
    before = weights(pipe)
    backbone = backbone_of(pipe)
    edit = make(
        pipe, "superhero", "esd", preset="official-2025-x", **{**QUICK, "iterations": 30, **settings}, progress=False
    )
    assert identical(before, weights(pipe))
    text = backbone.encode(["superhero"]).text
    bank = bank_of(backbone, ["superhero"], seed=99)
    targets = ESD().targets(backbone, bank, text)
    everything = torch.arange(len(bank))
    with torch.no_grad():
        first = ESD().error(backbone, bank, targets, text, everything)
        edit.apply(pipe)
        assert ESD().error(backbone, bank, targets, text, everything) < 0.9 * first


@pytest.mark.slow
def test_retaining_holds_the_kept_prompts_closer():
    pipe = tiny_pipeline()
    backbone = backbone_of(pipe)
    kept = backbone.encode(["a ninja"]).text
    bank = bank_of(backbone, ["a ninja"], seed=5)

    def drift(**settings):
        edit = make(
            pipe,
            "superhero",
            "esd",
            preset="official-2025-x",
            keep=["a ninja"],
            **{**QUICK, "iterations": 60, **settings},
            progress=False,
        )
        edit.apply(pipe)
        with torch.no_grad():
            value = ESD().error(backbone, bank, bank.conditional, kept, torch.arange(len(bank)))
        edit.remove(pipe)
        return value

    assert drift(retain=5.0) < 0.5 * drift(retain=0.0)


class Counted:
    """Counts a UNet's forward passes: those that sample, and those that train, which it can interrupt."""

    def __init__(self, pipe, stop=None):
        self.sampled = self.trained = 0
        self.stop = stop
        pipe.unet.register_forward_hook(self.count)

    def count(self, module, args, output):
        if not torch.is_grad_enabled():
            self.sampled += 1
            return
        self.trained += 1
        if self.trained == self.stop:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_same_bits_and_samples_nothing_again(tmp_path):
    settings = {**QUICK, "iterations": 40, "preset": "official-2025-x", "keep": ["a ninja"], "retain": 1.0}
    whole = make(tiny_pipeline(), "superhero", "esd", progress=False, **settings)

    def run(stop=None):
        pipe = tiny_pipeline()
        before, counted, edit = weights(pipe), Counted(pipe, stop), None
        try:
            edit = make(pipe, "superhero", "esd", checkpoint=tmp_path, progress=False, **settings)
        except KeyboardInterrupt:
            assert stop
        assert identical(before, weights(pipe))
        return edit, counted

    _, counted = run(stop=61)  # two passes a step; the state after 25 steps is kept
    assert counted.sampled and counted.trained == 61
    resumed, counted = run()
    assert (counted.sampled, counted.trained) == (0, 30)
    assert all(torch.equal(whole.tensors[name], resumed.tensors[name]) for name in whole.tensors)


@pytest.mark.parametrize("name", ["training.safetensors", "training-bank.safetensors"])
def test_a_damaged_checkpoint_is_refused_before_anything_is_sampled(tmp_path, name):
    settings = {**QUICK, "preset": "official-2025-x", "checkpoint": tmp_path, "progress": False}
    make(tiny_pipeline(), "superhero", "esd", **settings)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-8])
    pipe = tiny_pipeline()
    counted = Counted(pipe)
    with pytest.raises(ValueError, match=f"{name} is not a complete checkpoint.*delete it"):
        make(pipe, "superhero", "esd", **settings)
    assert counted.sampled == counted.trained == 0


def test_inference_mode_is_refused_before_anything_is_sampled():
    pipe = tiny_pipeline()
    counted = Counted(pipe)
    with torch.inference_mode(), pytest.raises(ValueError, match="leave it"):
        erase(pipe, "superhero", method="esd", progress=False, **QUICK)
    assert counted.sampled == counted.trained == 0


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    pipe = tiny_pipeline()
    make(pipe, "superhero", "esd", preset="official-2025-x", checkpoint=tmp_path, **QUICK, progress=False)
    with pytest.raises(ValueError, match="another run"):
        make(pipe, "ninja", "esd", preset="official-2025-x", checkpoint=tmp_path, **QUICK, progress=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_trains_float32_copies_and_comes_back_bit_for_bit(dtype):
    pipe = tiny_pipeline().to(dtype)
    before = weights(pipe)
    edit = make(pipe, "superhero", "esd", preset="official-2025-x-strict", **{**QUICK, "lr": 5e-5}, progress=False)
    assert identical(before, weights(pipe)) and next(iter(edit.tensors.values())).dtype == torch.float32
    edit.apply(pipe)
    assert not identical(before, weights(pipe))
    edit.remove(pipe)
    assert identical(before, weights(pipe))


def test_a_run_that_cannot_move_the_weights_is_refused():
    with pytest.raises(ValueError, match="did not move"):
        make(
            tiny_pipeline(),
            Concept("superhero"),
            "esd",
            preset="official-2025-x",
            **{**QUICK, "lr": 1e-20},
            progress=False,
        )


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    runs = [
        make(tiny_pipeline(), "superhero", "esd", preset="official-2025-x", **QUICK, seed=seed, progress=False)
        for seed in (1, 1, 2)
    ]
    first, again, other = (copy.copy(run.tensors) for run in runs)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)


def test_training_works_where_gradients_are_switched_off():
    with torch.no_grad():
        make(tiny_pipeline(), "superhero", "esd", preset="official-2025-x", **QUICK, progress=False)
    assert torch.is_grad_enabled()


def test_every_prompt_of_a_bank_is_sampled():
    bank = bank_of(backbone_of(tiny_pipeline()), ["superhero", "ninja", "wizard", "batman"], trajectories=2)
    assert set(bank.prompt.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(("scheduler", "steps"), [("EulerAncestralDiscreteScheduler", 5), ("HeunDiscreteScheduler", 9)])
def test_stochastic_and_second_order_schedulers_are_sampled_whole_and_by_seed(scheduler, steps):
    import diffusers

    pipe = tiny_pipeline()
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    first, again = (bank_of(backbone_of(pipe), ["superhero"], keep=None) for _ in range(2))
    assert len(first) == 3 * steps and torch.equal(first.x, again.x)


@pytest.mark.parametrize("suite", ["superhero", "twemoji", "van_gogh"])
def test_no_prompt_of_a_suite_is_needed_to_train_on_it(suite):
    prompts = ESD.preset().prompts(backbone_of(tiny_pipeline()), Request(concepts=(Suite.load(suite).concept,)))
    assert prompts and not any("{" in prompt for prompt in prompts)


def test_a_keep_list_that_is_not_used_is_not_recorded():
    with pytest.warns(UserWarning, match="retain is 0"):
        edit = make(
            tiny_pipeline(), "superhero", "esd", preset="official-2025-x", keep=["ninja"], **QUICK, progress=False
        )
    assert edit.config["keep"] == []


@pytest.mark.parametrize("relative", ["inpainting", "ip-adapter", "unclip", "upscaler"])
def test_a_denoiser_that_wants_more_than_text_is_refused_before_anything_is_drawn(relative):
    pipe, calls = RELATIVES[relative](), []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    before = weights(pipe)
    with pytest.raises(ValueError, match="cannot be called with text alone"):
        make(pipe, "superhero", "esd", keep=["ninja"], **QUICK, progress=False)
    assert not calls and identical(before, weights(pipe))


def test_training_inside_inference_mode_is_refused():
    pipe = tiny_pipeline()
    with torch.inference_mode(), pytest.raises(ValueError, match="leave it"):
        make(pipe, "superhero", "esd", **QUICK, progress=False)


@pytest.mark.parametrize("adapter", ["weights", "lora"])
def test_on_policy_the_student_is_sampled_and_the_base_sets_the_target(adapter):
    pipe = tiny_pipeline()
    backbone = backbone_of(pipe)
    method = ESD(on_policy=True, adapter=adapter, eta=1.5, **{**QUICK, "batch_size": 2, "num_inference_steps": 3})
    request = Request(concepts=(Concept("superhero"),), progress=False)
    student = method.student(backbone)
    loss = method.objective(backbone, student, request, None)
    frozen = copy.deepcopy(pipe.unet)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # a student that is no longer the base
        for name, parameter in student.parameters.items():
            if adapter == "weights" or name.endswith("lora_B"):
                parameter.data = parameter.data + 0.5 * torch.randn(parameter.shape, generator=generator)
    seen = []
    handle = pipe.unet.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    ours = loss(Draw(0, 0))
    handle.remove()
    args, kwargs = seen[-1]  # the student's own prediction comes last
    x, t = (args[0], args[1]) if len(args) > 1 else (kwargs["sample"], kwargs["timestep"])
    with student.active():
        moved = pipe.unet(x, t, encoder_hidden_states=embedded(pipe, "superhero", len(x))).sample
    with torch.no_grad():
        of = [frozen(x, t, encoder_hidden_states=embedded(pipe, prompt, len(x))).sample for prompt in ("superhero", "")]
    target = of[0] - 1.5 * (of[0] - of[1])
    torch.testing.assert_close(ours, (moved - target).square().mean(), rtol=1e-5, atol=1e-6)


def embedded(pipe, prompt, rows):
    return pipe.encode_prompt(prompt, pipe.device, 1, False)[0].expand(rows, -1, -1)


def test_on_policy_costs_a_trajectory_a_step_and_puts_the_model_back():
    pipe = tiny_pipeline()
    before = weights(pipe)
    settings = {"iterations": 2, "num_inference_steps": 3, "batch_size": 1}
    edit = make(pipe, "superhero", "esd", preset="official-2023-x", progress=False, **settings)
    assert edit.kind == "delta" and identical(before, weights(pipe))
