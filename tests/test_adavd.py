"""AdaVD against a loop over tokens: what becomes of the values of cross-attention, and of nothing else."""

import itertools

import numpy as np
import pytest
import torch

from erasure import Concept, erase
from erasure.backbone import backbone_of
from erasure.backbone.unet import UNetBackbone
from erasure.pipelines.adavd import component
from tests.every import build
from tests.reference import adavd as reference
from tests.slow import first
from tests.tiny import make, tiny


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sizes", [(1,), (3,), (1, 1), (2, 1, 4)])
@pytest.mark.parametrize(("a", "b", "c"), [(100.0, 0.93, 2.0), (5.0, 0.1, 1.0), (20.0, -0.2, 1.5)])
def test_the_component_is_that_of_the_equations(sizes, a, b, c):
    concepts = [rand(n, 12, seed=i) for i, n in enumerate(sizes)]
    v = rand(2, 6, 12, seed=9)
    v[0, 2], v[1, 3] = concepts[0][0] + 0.05 * rand(12), 2 * concepts[-1][-1]  # tokens that resemble one
    taken = component(v, concepts, lambda cosine: c * torch.sigmoid(a * (cosine - b)))
    for row, out in zip(v, v - taken, strict=True):
        expected = reference.erased(row.numpy(), [one.numpy() for one in concepts], a, b, c)
        np.testing.assert_allclose(out[1:].numpy(), expected[1:], atol=1e-10)
    assert taken[0, 2].norm() > 0.4 * c * v[0, 2].norm()


def test_a_shift_of_one_leaves_the_orthogonal_complement_of_all_concepts():
    concepts, v = [rand(1, 12, seed=i) for i in range(3)], rand(5, 12, seed=9)
    left = v - component(v, concepts, torch.ones_like)
    assert max((left @ one.T).abs().max().item() for one in concepts) < 1e-12
    again = component(v, [*concepts, concepts[0], concepts[1] + concepts[2]], torch.ones_like)
    torch.testing.assert_close(v - again, left, rtol=0, atol=1e-10)  # directions that are there already change nothing


def values_of(pipe, prompts, **settings):
    """Input and output of every layer that makes values, at the first step; and keys'."""
    seen, sites = {}, backbone_of(pipe).text_sites()

    def listen(name):
        return lambda layer, args, output: seen.update({name: (args[0].clone(), output.clone())})

    handles = [site.linear.register_forward_hook(listen(name)) for name, site in sites.items()]
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    pipe(prompts, num_inference_steps=1, generator=generators, output_type="latent", **settings)
    for handle in handles:
        handle.remove()
    return {name: (*seen[name], site.linear, site.role) for name, site in sites.items()}


def rows_of(pipe, architecture, name, *, end):
    """The embeddings of the last word piece, and of the end token, with the pipeline's own encoding."""
    hidden = pipe.encode_prompt(name, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
    last = len(pipe.tokenizer(name).input_ids) - 1
    return [hidden[0, last - 1], *([hidden[0, last]] if end else [])]


@pytest.mark.parametrize(
    ("guidance", "architecture"),
    first(itertools.product((1.0, 4.0), ("sd1", "sd2", "sdxl")), (1.0, "sd1"), (4.0, "sd1"), (4.0, "sdxl")),
)
@pytest.mark.parametrize(("preset", "scale"), [("recommended", 1.0), ("paper", 0.7)])
def test_values_of_the_prompt_are_decomposed_and_nothing_else(architecture, guidance, preset, scale):
    pipe = tiny(architecture)
    a, b, c = (100.0, 0.5, 1.0) if preset == "recommended" else (100.0, 0.5, 2.0)
    concepts = [Concept("superhero", synonyms=("spiderman",)), Concept("van gogh")]
    edit = make(pipe, concepts, "adavd", preset=preset, midpoint=b).apply(pipe, scale)
    rows = [rows_of(pipe, architecture, "superhero", end=False), rows_of(pipe, architecture, "van gogh", end=False)]
    if preset == "recommended":
        names = (["superhero", "spiderman", "a superhero", "a spiderman"], ["van gogh", "a van gogh"])
        rows = [[row for name in group for row in rows_of(pipe, architecture, name, end=True)] for group in names]
    found = values_of(pipe, ["a superhero", "the cat in the style of van gogh"], guidance_scale=guidance)
    edit.remove(pipe)
    moved = 0.0
    for text, output, layer, role in found.values():
        plain = torch.nn.functional.linear(text, layer.weight, layer.bias).detach()
        first = 2 if guidance > 1 else 0
        if role == "key":
            assert torch.equal(output, plain)
            continue
        assert torch.equal(output[:first], plain[:first]) and torch.equal(output[:, 0], plain[:, 0])
        c_values = [layer(torch.stack(group)).detach().double().numpy() for group in rows]
        for out, v in zip(output[first:], plain[first:], strict=True):
            expected = reference.erased(v.double().numpy(), c_values, a, b, c, scale)
            np.testing.assert_allclose(out.detach().numpy(), expected, atol=1e-5 * float(v.abs().max()))
        moved = max(moved, ((output - plain).norm() / plain.norm()).item())
    assert moved > 0.05


def test_a_layer_of_which_the_weights_were_edited_decomposes_by_its_new_values():
    """It stands beside an erasure of weights: c is what the layer makes of the concept now."""
    pipe = tiny("sd1")
    edit = make(pipe, "superhero", "adavd", height=1.0, midpoint=0.5)
    other = make(pipe, "van gogh", "uce", preset="official-2025", keep=["wizard"], token_span="content_to_end")
    edit.apply(pipe), other.apply(pipe)
    rows = edit.tensors["concept.0"]
    for text, output, layer, role in values_of(pipe, ["a superhero"]).values():
        if role == "value":
            c = torch.nn.functional.linear(rows, layer.weight)
            v, left = torch.nn.functional.linear(text[1, 3], layer.weight), output[1, 3]  # the subject
            nearest = c[torch.nn.functional.cosine_similarity(v[None], c).argmax()]
            assert abs(float(left @ nearest)) < 1e-4 * float(nearest.norm() * v.norm())
    other.remove(pipe), edit.remove(pipe)


def test_it_erases_at_the_layer_of_the_encoder_that_pictures_are_drawn_with():
    pipe = tiny("sd1")
    last, before = (erase(UNetBackbone(pipe, clip_skip=skip), "superhero", "adavd", apply=False) for skip in (None, 1))
    assert not torch.equal(last.tensors["concept.0"], before.tensors["concept.0"])
    assert before.config["encoding"] == {"clip_skip": 1}


@pytest.mark.parametrize("architecture", ["lcm-sd", "animatediff"])
def test_it_works_on_relatives_of_stable_diffusion(architecture):
    """Without guidance in the first, with a text for every frame in the second."""
    pipe = build(architecture)
    settings = {"num_inference_steps": 2, "output_type": "latent"} | (
        {"num_frames": 2} if architecture == "animatediff" else {}
    )

    def draw():
        return pipe("a superhero", generator=torch.Generator().manual_seed(0), **settings)[0]

    base, edit = draw(), make(pipe, "superhero", "adavd").apply(pipe)
    drawn = draw()
    edit.remove(pipe)
    assert (drawn - base).abs().max() > 1e-4 * base.abs().max() and torch.equal(draw(), base)


@pytest.mark.parametrize("fault", ["a name", "no tensor", "a width", "a setting"])
def test_a_file_with_other_tensors_is_refused(fault):
    edit = make(tiny("sd1"), ["superhero", "van gogh"], "adavd")
    tensors, config = dict(edit.tensors), edit.config
    if fault == "a name":
        tensors["concept.7"] = tensors.pop("concept.1")
    elif fault == "no tensor":
        tensors = {}
    elif fault == "a width":
        tensors["concept.1"] = tensors["concept.1"][:, 1:]
    else:
        config = config.with_facts(settings={**config["settings"], "midpoint": "high"})
    with pytest.raises(ValueError, match="a value erasure holds"):
        type(edit)(edit.name, config, tensors).check_tensors()


def test_an_erasure_of_another_width_does_not_fit():
    edit, other = make(tiny("sd1"), "superhero", "adavd"), tiny("sdxl")
    assert edit.misfits(backbone_of(other)) == ["its text is 32 wide, the model's 40"]
    assert not edit.misfits(backbone_of(tiny("sd1")))
