"""A concept as the negative prompt: the pipeline's own, where it can be, and its equation everywhere else."""

import pytest
import torch

from erasure.artifact.files import CONFIG
from erasure.backbone import backbone_of
from erasure.methods import method_class
from tests.every import backbone, build
from tests.slow import first
from tests.tiny import make, tiny

GUIDED = ["sd1", "sd2", "sdxl", "sd3"]
OTHERS = ["pixart-sigma", "auraflow", "ltx", "cogvideox", "kolors"]
STEPS = 3


def predictions(pipe, architecture, prompts="a cat", **settings):
    """What the pipeline's scheduler is given at its first step, the final latents, and the calls of the denoiser."""
    seen, calls, step = [], [], pipe.scheduler.step

    def listen(output, *args, **kwargs):
        seen.append(output.clone())
        return step(output, *args, **kwargs)

    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    handle = denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    pipe.scheduler.step = listen
    settings = {"num_inference_steps": STEPS, "guidance_scale": 4.0, **backbone(pipe, architecture).call, **settings}
    try:
        latents = pipe(prompts, generator=torch.Generator().manual_seed(0), output_type="latent", **settings)[0]
    finally:
        handle.remove()
        del pipe.scheduler.step
    return seen[0], latents, len(calls)


def close(a, b, like):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * like.abs().max().item(), check_dtype=False)


def double(architecture):
    pipe = build(architecture)
    for module in backbone_of(pipe).components.values():
        module.double()  # what is left of a difference is not rounding
    return pipe


@pytest.mark.parametrize("architecture", [*GUIDED, *OTHERS])
def test_it_is_the_pipelines_own_negative_prompt(architecture):
    pipe = double(architecture)
    _, base, _ = predictions(pipe, architecture)
    _, expected, _ = predictions(pipe, architecture, negative_prompt="superhero")
    edit = make(pipe, "superhero", "negative-prompt", preset="plain").apply(pipe)
    _, drawn, calls = predictions(pipe, architecture)
    edit.remove(pipe)
    close(drawn, expected, base)
    effect = 1e-6 if architecture == "auraflow" else 1e-4  # text moves little in a small one
    assert (expected - base).abs().max() > effect * base.abs().max() and calls == STEPS  # it costs nothing


def test_every_architecture_that_is_claimed_is_compared():
    held = {backbone_of(build(one)).architecture for one in (*GUIDED, *OTHERS)}
    assert held == set(method_class("negative-prompt").architectures)


@pytest.mark.parametrize("architecture", first(GUIDED, "sd1", "sd3"))
@pytest.mark.parametrize(("negative", "factor"), [(None, 1.7), ("a dog", 0.4)])
def test_the_guided_prediction_is_that_of_the_equation(architecture, negative, factor):
    """``u + w (p - u)`` is linear in u: what u becomes can be read from three runs of the pipeline.

    SDXL has zeros where there is no negative prompt, and the empty prompt where there is one to compare with.
    """
    pipe = double(architecture)
    own = {} if negative is None else {"negative_prompt": negative}
    empty = {"negative_prompt": ""} if negative else {}
    concept, null, before = (
        predictions(pipe, architecture, **settings)[0] for settings in ({"negative_prompt": "superhero"}, empty, own)
    )
    edit = make(pipe, "superhero", "negative-prompt", preset="plain").apply(pipe, factor)
    drawn, _, calls = predictions(pipe, architecture, **own)
    edit.remove(pipe)
    close(drawn, before + factor * (concept - null), before)
    assert (concept - null).abs().max() > 1e-3 * before.abs().max()
    assert calls == STEPS * (3 if negative else 1 if factor == 1 else 2)


def test_strength_and_scale_are_one_factor():
    pipe = tiny("sd1")
    drawn = []
    for strength, scale in ((1.5, 1.0), (1.0, 1.5), (3.0, 0.5)):
        edit = make(pipe, "superhero", "negative-prompt", strength=strength).apply(pipe, scale)
        drawn.append(predictions(pipe, "sd1")[1])
        edit.remove(pipe)
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_each_prompt_of_a_batch_keeps_its_own_negative_prompt():
    pipe = tiny("sdxl")
    edit = make(pipe, "superhero", "negative-prompt", preset="plain").apply(pipe)
    prompts, negatives = ["a cat", "van gogh"], ["a dog", "an animal"]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    together = predictions(pipe, "sdxl", prompts, negative_prompt=negatives, latents=noise)[1]
    for i in range(2):
        alone = predictions(pipe, "sdxl", prompts[i], negative_prompt=negatives[i], latents=noise[i : i + 1])[1]
        close(together[i : i + 1], alone, 10 * alone)
    edit.remove(pipe)


def test_without_guidance_there_is_nothing_to_do_and_it_says_so():
    pipe = tiny("sd1")
    _, base, _ = predictions(pipe, "sd1", guidance_scale=1.0)
    edit = make(pipe, "superhero", "negative-prompt").apply(pipe)
    with pytest.warns(UserWarning, match="acts on guidance, and this call of the denoiser has none"):
        _, drawn, _ = predictions(pipe, "sd1", guidance_scale=1.0)
    edit.remove(pipe)
    assert torch.equal(drawn, base)


def test_its_file_holds_the_concept_and_the_empty_prompt(tmp_path):
    pipe = tiny("sdxl")
    edit = make(pipe, "superhero", "negative-prompt")
    assert {name: len(tensor) for name, tensor in edit.tensors.items()} == {"hidden": 2, "pooled": 2}
    folder = edit.save_pretrained(tmp_path / "edit")
    assert '"strength": 1.25' in (folder / CONFIG).read_text()
    edit.tensors["hidden"] = edit.tensors["hidden"][:1]
    with pytest.raises(ValueError, match="a negative prompt holds encoded text"):
        edit.check_tensors()
