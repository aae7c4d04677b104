"""What fine-tunes share: banks, students, checkpoints that survive a kill, and what is refused."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from erasure import Concept, erase
from erasure.backbone import backbone_of
from erasure.methods.adv_unlearn import AdvUnlearn
from erasure.methods.adversary import worst_text
from erasure.methods.bank import TrajectoryBank
from erasure.methods.base import Request
from erasure.methods.esd import ESD
from erasure.methods.spm import SPM
from erasure.methods.students import Student
from erasure.train import Draw
from tests.every import build
from tests.slow import first
from tests.tiny import identical, make, tiny, tiny_pipeline, weights
from tests.tiny_joint import tiny_joint

QUICK = {
    "iterations": 4,
    "lr": 1e-2,
    "trajectories": 2,
    "num_inference_steps": 3,
    "keep_steps": 2,
    "batch_size": 2,
    "progress": False,
}


def listening(pipe):
    """Random layers hardly listen to the text: make them."""
    with torch.no_grad():
        for site in backbone_of(pipe).text_sites().values():
            site.linear.weight.mul_(20)
    return pipe


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", first(["sd3", "flux"], "flux"))
@pytest.mark.parametrize("variant", first(["x", "x-strict"], "x-strict"))
def test_esd_trains_adapters_of_transformers(architecture, variant):
    pipe = listening(tiny(architecture))
    backbone, before = backbone_of(pipe), weights(pipe)
    settings = {**QUICK, "iterations": 30, "keep_steps": None, "variant": variant}
    edit = make(pipe, "superhero", "esd", preset="official-2025-x", adapter="auto", **settings)
    assert edit.kind == "lora" and identical(before, weights(pipe))
    names = {site.rpartition(".")[2] for site in edit.config["sites"]}
    assert ("add_k_proj" in names) and ("to_q" in names) == (variant == "x")
    assert not any(p.requires_grad and p.grad is not None for p in backbone.denoiser.parameters())
    method = ESD(**{k: v for k, v in settings.items() if k != "progress"})
    request = Request(concepts=(Concept("superhero"),), progress=False)
    student = method.student(backbone)  # of zero effect: an adapter begins there
    loss = method.objective(backbone, student, request, None)
    with torch.no_grad():
        first = sum(loss(Draw(0, i)) for i in range(5))
        edit.apply(pipe)
        assert sum(loss(Draw(0, i)) for i in range(5)) < 0.95 * first
    edit.remove(pipe)
    assert identical(before, weights(pipe))


def test_frozen_weights_keep_their_dtype_and_memory_while_an_adapter_is_trained(monkeypatch):
    pipe, seen = tiny("sd3").to(torch.bfloat16), []
    state = {name: (p.dtype, p.data_ptr()) for name, p in pipe.transformer.named_parameters()}
    real = Student.active

    def watched(self, *given):
        seen.append({name: (p.dtype, p.data_ptr()) for name, p in pipe.transformer.named_parameters()})
        return real(self, *given)

    monkeypatch.setattr(Student, "active", watched)
    edit = make(pipe, "superhero", "esd", **QUICK)
    assert len(seen) >= 4 and all(one == state for one in seen)
    assert all(tensor.dtype == torch.float32 for tensor in edit.tensors.values())


def test_gradient_checkpointing_changes_memory_and_not_the_result():
    plain, checkpointed = (
        make(tiny("sd1"), "superhero", "esd", preset="official-2025-x", gradient_checkpointing=on, **QUICK).tensors
        for on in (False, True)
    )
    for name, tensor in plain.items():
        torch.testing.assert_close(checkpointed[name], tensor, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "method", "settings"),
    [
        pytest.param("sd1", "leco", {"robust": True}, marks=pytest.mark.slow),
        ("sd1", "receler", {}),
        pytest.param("sd1", "eraseflow", {}, marks=pytest.mark.slow),
        pytest.param("flux", "esd", {}, marks=pytest.mark.slow),
        pytest.param("z-image", "spm", {}, marks=pytest.mark.slow),
    ],
)
def test_gradient_checkpointing_finds_the_adapters_again(architecture, method, settings):
    """The backward pass runs parts of the model again, when the block in which adapters stand on it is over."""
    concept, short = (
        Concept("superhero", anchor="wizard"),
        {"iterations": 2, "trajectories": 1, "num_inference_steps": 2},
    )
    plain, checkpointed = (
        make(
            build(architecture), concept, method, keep=["ninja"], apply=False, progress=False,
            gradient_checkpointing=on, **short, **settings,
        ).tensors
        for on in (False, True)
    )  # fmt: skip
    assert plain.keys() == checkpointed.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(checkpointed[name], tensor, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "method"), [("sd1", "forget-me-not"), ("sd1", "mace"), ("z-image", "z-erase")]
)
def test_a_method_on_attention_maps_refuses_gradient_checkpointing(architecture, method):
    concept = Concept("superhero", anchor="wizard")
    with pytest.raises(ValueError, match=f"{method} trains on attention maps, which gradient checkpointing does not"):
        make(build(architecture), concept, method, keep=["ninja"], gradient_checkpointing=True, **QUICK)


def test_modes_and_flags_are_put_back_and_a_failure_leaves_nothing(monkeypatch):
    pipe = tiny_pipeline()
    pipe.unet.train(), pipe.text_encoder.train()
    first = next(pipe.unet.parameters())
    first.requires_grad_(False)
    before, flags = weights(pipe), [p.requires_grad for p in pipe.unet.parameters()]
    make(pipe, "superhero", "esd", **QUICK)
    calls = iter(range(100))
    real = ESD.errors

    def failing(self, *given):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *given)

    monkeypatch.setattr(ESD, "errors", failing)
    for adapter in ("weights", "lora"):
        calls = iter(range(100))
        with pytest.raises(KeyboardInterrupt):
            make(pipe, "superhero", "esd", adapter=adapter, **QUICK)
        assert identical(before, weights(pipe)) and pipe.unet.training and pipe.text_encoder.training
        assert [p.requires_grad for p in pipe.unet.parameters()] == flags
        hooked = [m for m in pipe.unet.modules() if m._forward_hooks or m._forward_pre_hooks]
        assert not hooked


def test_sampled_null_and_the_empty_prompt_differ_where_guidance_uses_zeros():
    for architecture, same in (("sd1", True), ("sdxl", False)):
        backbone = backbone_of(tiny(architecture))
        text, empty = backbone.encode(["superhero"]).text, backbone.encode([""]).text
        settings = {"trajectories": 1, "keep": None, "num_inference_steps": 2, "guidance_scale": 3.0, "seed": 0}
        sampled, anew = (
            TrajectoryBank.sample(backbone, text, empty, sampled_null=null, progress=False, **settings)
            for null in (True, False)
        )
        assert torch.equal(sampled.x, anew.x) and torch.equal(sampled.conditional, anew.conditional)
        assert torch.allclose(sampled.unconditional, anew.unconditional, rtol=1e-4, atol=1e-5) == same


def test_a_bank_of_a_model_with_embedded_guidance_predicts_at_guidance_one():
    pipe = tiny("flux")
    backbone = backbone_of(pipe)
    method = ESD(**{k: v for k, v in QUICK.items() if k != "progress"}, guidance_scale=3.5)
    request = Request(concepts=(Concept("superhero"),), progress=False)
    text = backbone.encode(["superhero"]).text
    bank = method.bank(backbone, text, request, None, "bank")
    with torch.no_grad():
        x, t, rows = bank.inputs(backbone, text, torch.arange(len(bank)))
        for guidance, close in ((1.0, True), (3.5, False)):
            found = backbone.predict(x, t, rows, guidance=guidance)
            assert torch.allclose(found, bank.conditional, rtol=1e-4, atol=1e-5) == close


def test_what_is_kept_is_expanded_as_what_is_erased():
    request = Request(concepts=(Concept("superhero", synonyms=("cape man",)),), keep=("ninja", "Batman", "a wizard"))
    backbone = backbone_of(tiny("sd1"))
    for method in (ESD.preset(), AdvUnlearn.preset()):
        assert method.prompts(backbone, request) == ["superhero", "cape man", "a superhero", "a cape man"]
        assert method.kept(backbone, request) == ["ninja", "Batman", "a wizard", "a ninja"]
    assert ESD.preset("official-2025-x").kept(backbone, request) == []  # retain is 0
    assert SPM.preset("paper").prompts(backbone, request) == ["superhero"]


def test_the_attack_brings_the_concept_back_within_its_bound():
    pipe = listening(tiny("sd1"))
    backbone = backbone_of(pipe)
    method = ESD(**{k: v for k, v in QUICK.items() if k != "progress"})
    request = Request(concepts=(Concept("superhero"),), progress=False)
    bank = method.bank(backbone, backbone.encode(["superhero"]).text, request, None, "bank")
    chosen = torch.arange(len(bank))
    other = backbone.encode(["a cat"] * len(bank)).text  # what a trained encoder might say instead

    def error(text):
        return method.errors(backbone, bank, bank.conditional, text, chosen).mean()

    found = worst_text(other, error, steps=8, epsilon=0.5, generator=torch.Generator().manual_seed(0))
    assert (found.hidden - other.hidden).abs().max() <= 0.5 + 1e-6
    with torch.no_grad():
        assert error(found) < 0.8 * error(other)


# --- refused ---------------------------------------------------------------------------------------------------------


def test_a_distilled_model_is_sent_to_its_sibling_before_any_work(monkeypatch):
    pipe = tiny_joint("flux2-klein-distilled")
    monkeypatch.setattr(type(pipe), "encode_prompt", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="distilled.*undistilled sibling.*or use a closed form"):
        make(pipe, "superhero", "esd", **QUICK)


def test_an_undistilled_sibling_is_trained():
    pipe = tiny_joint("flux2-klein")
    before = weights(pipe)
    edit = make(pipe, "superhero", "esd", **QUICK)
    assert edit.kind == "lora" and identical(before, weights(pipe))


# --- checkpoints -----------------------------------------------------------------------------------------------------

LONG = {**QUICK, "iterations": 120, "preset": "official-2025-x-strict", "seed": 3}


@pytest.fixture
def one_thread():
    """A forked process may not start threads of its own, and the bits of sums depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train_until_killed(folder):
    torch.set_num_threads(1)
    make(tiny_pipeline(), "superhero", "esd", checkpoint=folder, **LONG)


def kill_when(folder, file, wait):
    """Train in a process of its own, and kill it some time after a file is there."""
    process = multiprocessing.get_context("fork").Process(target=train_until_killed, args=(folder,))
    process.start()
    deadline = time.monotonic() + 300
    while not (folder / file).exists() and time.monotonic() < deadline and process.is_alive():
        time.sleep(0.002)
    time.sleep(wait)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here")
def test_killed_and_called_again_it_ends_with_the_same_bits_and_samples_once(tmp_path, monkeypatch, one_thread):
    whole = make(tiny_pipeline(), "superhero", "esd", **LONG)
    chance = random.Random()
    kill_when(tmp_path, "training-bank.safetensors", chance.uniform(0, 0.02))
    kill_when(tmp_path, "training.safetensors", chance.uniform(0, 0.1))

    def sampled(*args, **kwargs):
        pytest.fail("the bank was sampled again")

    steps, real = [], ESD.errors
    monkeypatch.setattr(TrajectoryBank, "sample", sampled)
    monkeypatch.setattr(ESD, "errors", lambda self, *given: steps.append(1) or real(self, *given))
    pipe = tiny_pipeline()
    before = weights(pipe)
    resumed = make(pipe, "superhero", "esd", checkpoint=tmp_path, **LONG)
    assert len(steps) <= 120 - 25  # at least one checkpoint was taken up
    assert identical(whole.tensors, resumed.tensors) and identical(before, weights(pipe))
    assert not list(tmp_path.glob(".*"))


def test_a_checkpoint_of_another_request_is_refused_before_any_work(tmp_path, monkeypatch):
    pipe = tiny_pipeline()
    settings = {**QUICK, "preset": "official-2025-x-strict"}
    make(pipe, "superhero", "esd", checkpoint=tmp_path, **settings)
    monkeypatch.setattr(TrajectoryBank, "sample", lambda *args, **kwargs: pytest.fail("work was done"))
    others = [
        (pipe, "ninja", settings),
        (pipe, "superhero", {**settings, "lr": 1e-3}),
        (tiny_pipeline(seed=1), "superhero", settings),
        (pipe, "superhero", {**settings, "keep": ["ninja"], "retain": 1.0}),
        (pipe, Concept("superhero", anchor="ninja"), settings),
        (pipe, Concept("superhero", kind="style"), settings),
    ]
    for other, concept, changed in others:
        with pytest.raises(ValueError, match="another run"):
            make(other, concept, "esd", checkpoint=tmp_path, **changed)
    again = erase(pipe, "superhero", "esd", checkpoint=tmp_path, apply=False, **settings)  # finished: nothing is drawn
    assert again.tensors
