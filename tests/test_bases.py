"""What may stand as the base of an evaluation: a bare pipeline without an erasure on, in or beside any of its parts."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from torch import nn

from erasure import erase
from erasure.concept import Concept, Suite
from erasure.eval import assess, evaluate
from erasure.eval.core.models import check_base
from erasure.opening import load_base
from erasure.pipelines import attach_erasures, fuse_erasures
from erasure.pipelines.guardrails import Guard
from tests.eval_helpers import PixelDetector
from tests.every import build
from tests.slow import first
from tests.tiny import tiny_pipeline

SUITE = Suite(version=1, name="tiny", concept=Concept("cat", neighbours=("dog",)), num_inference_steps=1)
ARCHITECTURES = ("sd1", "sdxl", "sd3", "flux", "wan2.2")


def refused(pipe, match: str) -> None:
    """Both ways in say the same, before anything is drawn."""
    with pytest.raises(ValueError, match=match):
        evaluate(pipe, {}, SUITE, detectors=[PixelDetector()], progress=False)
    with pytest.raises(ValueError, match=match):
        assess(pipe, {}, SUITE, preset="smoke", detectors=[PixelDetector()], progress=False)


@functools.cache
def made(architecture: str):
    """A tiny pipeline and an erasure for it, which is not on it."""
    pipe = build(architecture)
    return pipe, erase(pipe, Concept("cat"), "uce", apply=False)


@pytest.mark.parametrize("architecture", first(ARCHITECTURES, "sd1", "sdxl", "flux"))
def test_an_erased_model_of_any_architecture_is_no_base(architecture):
    pipe, edit = made(architecture)
    check_base(pipe)
    edit.apply(pipe)
    refused(pipe, "must be unmodified.*'cat-uce'")
    edit.remove(pipe)
    with attach_erasures(pipe, edit):
        refused(pipe, "must be unmodified.*an attached Attached")
    check_base(pipe)


@pytest.mark.parametrize("architecture", first(ARCHITECTURES, "sd1", "sdxl", "flux"))
@pytest.mark.parametrize("low_memory", first([False, True], False))
def test_a_fused_erasure_is_remembered_by_its_part_and_by_its_files(architecture, low_memory, tmp_path):
    pipe = build(architecture)
    made(architecture)[1].fuse(pipe, low_memory=low_memory)
    refused(pipe, "must be unmodified.*'cat-uce', fused into the (unet|transformer)")
    pipe.save_pretrained(tmp_path)
    refused(load_base(tmp_path, device="cpu"), "fused into the (unet|transformer)")


def test_an_erasure_of_the_text_encoder_is_seen_on_and_in_it(tmp_path):
    pipe = build("sd1")
    settings = {"iterations": 2, "trajectories": 1, "warmup_steps": 0, "attack_steps": 1, "num_inference_steps": 2}
    edit = erase(pipe, Concept("cat"), "adv-unlearn", progress=False, keep=["dog"], apply=False, **settings)
    assert all(name.startswith("text_encoder:") for name in edit.parameter_names)
    edit.apply(pipe)
    other = build("sd1", seed=1)
    other.register_modules(text_encoder=pipe.text_encoder)  # another denoiser in front of the same encoder
    refused(other, "must be unmodified.*'cat-adv-unlearn'")
    fuse_erasures(pipe)
    refused(pipe, "fused into the text_encoder")
    pipe.save_pretrained(tmp_path)
    refused(load_base(tmp_path, device="cpu"), "fused into the text_encoder")
    check_base(build("sd1"))


def test_an_erasure_fused_at_nothing_is_none():
    pipe = build("sd1")
    made("sd1")[1].fuse(pipe, 0.0)
    check_base(pipe)


@contextlib.contextmanager
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_wrapped_parts_are_refused_by_the_name_of_the_wrapper(part, tmp_path):
    pipe = tiny_pipeline()
    inner = getattr(pipe, part)
    setattr(pipe, part, nn.DataParallel(inner))
    refused(pipe, f"{part} is wrapped in a DataParallel.*its .module")
    with one_process(tmp_path):
        setattr(pipe, part, nn.parallel.DistributedDataParallel(inner))
        refused(pipe, f"{part} is wrapped in a DistributedDataParallel.*its .module")
    setattr(pipe, part, torch.compile(inner))
    refused(pipe, f"{part} is compiled")
    setattr(pipe, part, nn.Sequential(inner))
    refused(pipe, f"{part} is wrapped in a Sequential")
    setattr(pipe, part, inner)
    check_base(pipe)


def test_models_changed_in_place_are_refused():
    compiled = tiny_pipeline()
    compiled.unet.compile()
    refused(compiled, "unet is compiled")
    patched = tiny_pipeline()
    patched.unet.forward = functools.partial(patched.unet.forward)  # as accelerate's prepare does
    refused(patched, "unet has another forward")


def test_a_lora_is_no_part_of_a_base():
    from peft import LoraConfig

    pipe = tiny_pipeline()
    pipe.unet.add_adapter(LoraConfig(r=1, target_modules=["to_k"]))
    refused(pipe, "unet carries a LoRA adapter")


def test_a_filter_or_a_function_around_a_pipeline_is_no_base():
    pipe = tiny_pipeline()
    refused(Guard.of_words(["cat"]).wrap(pipe), "plain diffusers pipeline; got a GuardedPipeline")
    refused(functools.partial(pipe), "plain diffusers pipeline; got a partial")
