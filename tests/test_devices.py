"""Every architecture on a GPU that is not there (tests/pretend.py): whatever stays on the CPU by mistake raises."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import erasure
from erasure.artifact import Erasure, OperatorErasure, export_lora, export_official, export_single_file, import_official
from erasure.backbone import DENOISERS, backbone_of, denoiser_of
from erasure.eval.core.metrics import ClipFeatures, features_of
from erasure.eval.core.pictures import generate, weights_hash
from erasure.eval.detectors.clip import ClipDetector
from erasure.eval.worldkit import detectors as world
from erasure.methods import method_class
from erasure.methods.base import Request
from erasure.pipelines import load_erasure, set_erasures, unload_erasures
from erasure.pipelines.attach import attach_erasures
from studies.reproduce.sets import cmmd, frechet
from tests.builders import BUILDERS, CALLS
from tests.pretend import DeviceFault, NumpyFault, device_of, pretend
from tests.slow import every_method, first
from tests.tiny import identical, shortest, tiny, weights

CONCEPT = erasure.Concept("superhero", anchor="ninja", neighbours=("wizard",))
# A U-Net with two encoders; the others run with `pytest -m slow`.
QUICK = ("sdxl",)


def built(architecture: str) -> Any:
    """On the pretended GPU. Architectures whose pipeline is here before its backbone are left out."""
    pipe = BUILDERS[architecture]()
    kinds = {kind.__name__ for kind in type(denoiser_of(pipe)).__mro__}
    if not kinds & set(DENOISERS):
        pytest.skip(f"no backbone for {type(denoiser_of(pipe)).__name__} yet")
    return pipe.to("cuda")


def made(pipe: Any, method: str, **settings: Any) -> Erasure:
    """An erasure by a method, or a skip where the method says that it does not work on this architecture."""
    settings = shortest(method) | settings
    try:
        method_class(method).preset(None, **settings).validate(backbone_of(pipe), Request((CONCEPT,), ("wizard",)))
    except DeviceFault:
        raise
    except ValueError as error:
        pytest.skip(str(error))
    return erasure.erase(pipe, CONCEPT, method, keep=["wizard"], apply=False, progress=False, **settings)


def draw(pipe: Any, architecture: str = "") -> Any:
    return pipe(
        prompt=["a superhero"],
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator("cuda").manual_seed(0),
        **CALLS.get(architecture, {}),
    )


# --- the library -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", first(BUILDERS, *QUICK))
def test_an_erasure_lives_on_the_gpu(architecture, tmp_path):
    with pretend():
        pipe = built(architecture)
        before = weights(pipe)
        edit = made(pipe, "uce")
        edit.apply(pipe)
        draw(pipe, architecture)
        edit.apply(pipe, 0.5)
        edit.remove(pipe)
        assert identical(weights(pipe), before)
        edit.save_pretrained(tmp_path / "edit")
        load_erasure(pipe, tmp_path / "edit")
        set_erasures(pipe, [edit.name], 0.5)
        unload_erasures(pipe)
        assert identical(weights(pipe), before)
        assert all(device_of(parameter).type == "cuda" for parameter in denoiser_of(pipe).parameters())
        assert all(device_of(tensor).type == "cpu" for tensor in edit.tensors.values())
        with attach_erasures(pipe, edit):
            draw(pipe, architecture)
        weights_hash(pipe)
        edit.fuse(pipe)


@pytest.mark.parametrize("method", every_method("uce", "esd", "sld"))
def test_every_method_works_on_the_gpu(method, tmp_path):
    with pretend():
        pipe = tiny("sd1").to("cuda")
        before = weights(pipe)
        edit = made(pipe, method)
        edit.apply(pipe)
        draw(pipe)
        edit.remove(pipe)
        assert identical(weights(pipe), before)
        edit.save_pretrained(tmp_path)
        Erasure.from_pretrained(tmp_path).apply(pipe).remove(pipe)


@pytest.mark.parametrize("architecture", first(BUILDERS))  # esd trains above
def test_a_training_step_works_on_the_gpu(architecture, tmp_path):
    with pretend():
        pipe = built(architecture)
        made(pipe, "esd")
        edit = made(pipe, "esd", adapter="lora")
        edit.apply(pipe)
        draw(pipe, architecture)


@pytest.mark.slow
def test_an_adapter_at_the_text_alone_works_on_the_gpu(tmp_path):
    with pretend():
        pipe = built("z-image")
        edit = made(pipe, "z-erase")
        edit.apply(pipe)
        draw(pipe, "z-image")
        edit.remove(pipe)


@pytest.mark.slow
def test_a_training_is_resumed_on_the_gpu(tmp_path):
    with pretend():
        pipe = tiny("sd1").to("cuda")
        settings = shortest("esd") | {"gradient_checkpointing": True}
        for _ in range(2):
            edit = erasure.erase(
                pipe, CONCEPT, "esd", keep=["wizard"], apply=False, progress=False, checkpoint=tmp_path, **settings
            )
        edit.apply(pipe)


@pytest.mark.slow
def test_other_programs_files_are_written_from_the_gpu(tmp_path):
    with pretend():
        pipe = tiny("sd1").to("cuda")
        edit = made(pipe, "uce")
        export_lora(edit, pipe, tmp_path / "lora")
        export_single_file(pipe, tmp_path / "whole.safetensors", edit)
        file = export_official(edit, pipe, tmp_path / "official.safetensors")
        import_official(file, pipe, method="uce", concept="superhero").apply(pipe)
        draw(pipe)


def test_pictures_are_drawn_and_judged_on_the_gpu():
    with pretend():
        pipe = tiny("sd1").to("cuda")
        edit = made(pipe, "uce")
        rows = generate(pipe, ["a cat", "a superhero"], seeds=range(8), num_inference_steps=2, progress=False)
        with attach_erasures(pipe, edit, rows=[[edit], []]):
            generate(pipe, ["a cat", "a superhero"], num_inference_steps=2, progress=False)
        generate(pipe, ["a cat"], num_inference_steps=2, progress=False, autocast=True)
        images = [image for row in rows for image in row]
        for name in ("a", "b"):  # copies: the shipped ones are loaded once
            detector = copy.deepcopy(world.load(name))
            detector.model.to("cuda")
            assert np.isfinite(detector.scores(images, "concept")).all()


def test_clip_and_the_metrics_work_on_the_gpu():
    noise = np.random.default_rng(0).integers(0, 255, (2, 20, 32, 32, 3), dtype=np.uint8)
    real, fake = ([Image.fromarray(picture) for picture in half] for half in noise)
    with pretend():
        clip = ClipDetector.load(world.WEIGHTS / "clip", device="cuda", labels={"concept": ("cat", "dog")})
        assert clip.device.type == "cuda"
        assert np.isfinite(clip.scores(real, "concept")).all() and np.isfinite(clip.cosines(real, ["a cat"] * 20)).all()
        features = ClipFeatures(clip)
        assert frechet(real, fake, features, "clip")[1].value is not None
        assert np.isfinite(features_of(real, features)).all()
        assert cmmd(real, fake, clip)[1].value is not None


# --- the mode --------------------------------------------------------------------------------------------------------


def vector(device: str = "cpu", n: int = 3) -> torch.Tensor:
    return torch.arange(float(n), device=device)


FAULTS: dict[str, Callable[[], Any]] = {
    "sum": lambda: vector("cuda") + vector(),
    "product": lambda: vector("cuda") @ vector(),
    "join": lambda: torch.cat([vector("cuda"), vector()]),
    "in place": lambda: vector().add_(vector("cuda")),
    "GPU scalar with CPU tensor": lambda: vector() + vector("cuda").sum(),
    "GPU index of a CPU tensor": lambda: vector()[torch.tensor([0]).cuda()],
    "CPU values into a GPU tensor": lambda: vector("cuda").index_put_((torch.tensor([0, 1]),), vector(n=2)),
    "CPU mask": lambda: vector("cuda").masked_fill(vector() > 1, 0.0),
    "select": lambda: vector("cuda").index_select(0, torch.tensor([0])),
    "module": lambda: torch.nn.Linear(3, 3)(vector("cuda")),
    "embedding": lambda: torch.nn.Embedding(4, 2).to("cuda")(torch.tensor([1])),
    "backward": lambda: (vector("cuda").requires_grad_() * torch.ones(3)).sum().backward(),
    "view": lambda: vector("cuda").view(3, 1)[:2].T + vector(n=2),
    "copy of a module": lambda: copy.deepcopy(torch.nn.Linear(3, 3).to("cuda"))(vector()),
    "CPU generator": lambda: torch.randn(2, device="cuda", generator=torch.Generator()),
    "GPU generator": lambda: torch.randn(2, generator=torch.Generator("cuda")),
    "generator in place": lambda: vector("cuda").normal_(generator=torch.Generator()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_devices_that_meet_are_caught(fault):
    with pretend(), pytest.raises(DeviceFault):
        FAULTS[fault]()


@pytest.mark.parametrize(
    "read", [lambda x: x.numpy(), np.asarray, lambda x: x[0].numpy(), lambda x: x.detach().numpy()]
)
def test_numpy_takes_no_gpu_tensor(read):
    with pretend(), pytest.raises(NumpyFault):
        read(vector("cuda"))


def test_what_torch_allows_is_allowed():
    with pretend():
        x, y = vector("cuda"), vector()
        assert x.device == torch.device("cuda:0") and x.is_cuda and not y.is_cuda and y.device.type == "cpu"
        results = [x + torch.tensor(2.0), 2 * x, x[torch.tensor([0])], x[y > 0], y.to(x), y.to("cuda", torch.float16)]
        results += [y.cuda(), x.double(), x.clone(), torch.zeros_like(x), x.new_zeros(2), x.new_tensor([1.0]), x.data]
        results += [torch.nn.functional.one_hot(x.long()), torch.as_tensor(y, device="cuda"), torch.nn.Parameter(x)]
        assert all(device_of(result).type == "cuda" for result in results)
        assert device_of(x.cpu()).type == device_of(y).type == device_of(x.to("cpu", torch.float64)).type == "cpu"
        assert x.to("cuda") is x and y.to("cpu") is y and x.cpu().numpy().tolist() == x.tolist() == [0, 1, 2]
        assert device_of(y.copy_(x)).type == "cpu" and device_of(x.copy_(y)).type == "cuda"
        assert torch.randn(2, device="cuda", generator=torch.Generator("cuda")).is_cuda
        assert torch.empty(2, device="meta").is_meta and x.to("meta").is_meta
    assert vector().device.type == "cpu"


def test_a_backward_pass_and_an_optimiser_stay_on_the_gpu():
    with pretend():
        layer = torch.nn.Linear(3, 3).to("cuda")
        optimizer = torch.optim.AdamW(layer.parameters())
        layer(vector("cuda")).square().sum().backward()
        optimizer.step()
        assert layer.weight.grad.is_cuda and optimizer.state[layer.weight]["exp_avg"].is_cuda


def test_a_fault_planted_in_a_pipeline_is_caught():
    """The kind that only a GPU finds: a mask made in a forward pass without saying where."""

    def planted(module: Any, args: Any) -> Any:
        return (args[0] * torch.ones(args[0].shape[-1]), *args[1:])

    pipe = tiny("sd1")
    handle = pipe.unet.conv_in.register_forward_pre_hook(planted)
    pipe("a superhero", num_inference_steps=1, output_type="latent")  # on the CPU nobody notices
    with pretend():
        pipe.to("cuda")
        with pytest.raises(DeviceFault):
            draw(pipe)
        handle.remove()
        draw(pipe)


def test_a_fault_planted_in_an_erasure_is_caught():
    class Forgetful(OperatorErasure):
        def edit(self, name: str, weight: torch.Tensor, scale: float) -> torch.Tensor:
            return weight + scale * torch.zeros(weight.shape)

    with pretend():
        pipe = tiny("sd1").to("cuda")
        edit = made(pipe, "uce")
        faulty = Forgetful(edit.name, edit.config, edit.tensors)
        with pytest.raises(DeviceFault):
            faulty.apply(pipe)
