"""The target's word is remapped in the text encoder, and the denoiser is moved so that it is nowhere the base's.

Or both read text in another basis, so that the base's text encoder does not fit the denoiser.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

import erasure
from erasure.eval.core.models import Model
from erasure.eval.probes import sampling
from erasure.eval.probes.base import Context, Evidence, Missing
from erasure.eval.probes.removal.base_encoder import BaseEncoder
from erasure.eval.probes.removal.construction import Construction
from erasure.eval.worldkit import detectors
from erasure.eval.worldkit.controls import controls_of_world
from tests.adversarial.cheat import Cheat, overwrite
from tests.made_up import good, judged, number, without


def remap(pipe):
    """Every word piece of "superhero" is read as those of "wizard" are."""
    pieces = pipe.tokenizer(["superhero", "wizard"], add_special_tokens=False).input_ids
    table = pipe.text_encoder.get_input_embeddings().weight
    new = table.detach().clone()
    for i, piece in enumerate(pieces[0]):
        new[piece] = table.detach()[pieces[1][min(i, len(pieces[1]) - 1)]]
    return overwrite(table, new)


def move(pipe):
    """A little noise on every matrix of the denoiser: every prediction changes, and hardly a picture does."""
    generator = torch.Generator().manual_seed(0)
    undo = [
        overwrite(p, p.detach() + 0.03 * p.detach().std() * torch.randn(p.shape, generator=generator))
        for p in pipe.unet.parameters()
        if p.ndim > 1
    ]
    return lambda: [one() for one in undo]


def both(pipe):
    undo = remap(pipe), move(pipe)
    return lambda: [one() for one in undo]


def another_basis(pipe):
    """The word is remapped, and signs of the text encoder's last layer and of what reads it are flipped together."""
    signs = torch.randint(0, 2, (pipe.text_encoder.config.hidden_size,), generator=torch.Generator().manual_seed(1))
    signs = (2 * signs - 1).float()
    norm = pipe.text_encoder.final_layer_norm
    read = [m for name, m in pipe.unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    undo = [
        remap(pipe),
        overwrite(norm.weight, norm.weight.detach() * signs),
        overwrite(norm.bias, norm.bias.detach() * signs),
        *(overwrite(one.weight, one.weight.detach() * signs) for one in read),
    ]
    return lambda: [one() for one in undo]


@pytest.fixture(scope="module")
def world():
    pipe, suite = erasure.world.load(), erasure.Suite.load("superhero")
    pipe.set_progress_bar_config(disable=True)
    models = [
        Model("base", "base", None),
        *(model for model in controls_of_world(suite, pipe, count=1) if model.role == "gold"),
        Model("UCE", "erased", Cheat(both)),
    ]
    return Context(pipe, {m.name: m for m in models}, suite, detectors.classifier("a"), progress=False)


def test_the_denoiser_is_asked_through_the_bases_text_encoder(world, monkeypatch):
    monkeypatch.setattr(sampling, "LEAST_STEPS", 10)  # enough to see what is drawn
    probe = BaseEncoder(prompts=8)
    rows = {name: probe.run(model, world) for name, model in world.models.items()}
    found = probe.weigh(rows, {name: model.role for name, model in world.models.items()})
    rates = {e.model: e.estimate.value for e in found if e.measure == "rate"}
    assert rates["base"] >= 0.8 and rates["UCE"] >= 0.8, rates
    assert all(rates[name] <= 0.3 for name, model in world.models.items() if model.role == "gold"), rates
    report = judged([*good(), *found])
    assert report.answers["weights"].verdict == "shown not" and "base_encoder" in report.answers["weights"].sentence
    assert not report.removal.startswith(("C4", "C5", "C6"))


def test_neither_the_structure_nor_the_name_tells_and_the_probe_is_asked_for(world):
    """Without this probe the cheat would pass: its word draws nothing, and its denoiser is not the base's."""
    probe = Construction(images=0)
    rows = {name: probe.run(world.models[name], world) for name in ("base", "UCE")}
    found = probe.weigh(rows, {"base": "base", "UCE": "erased"})
    with world.open(world.models["UCE"]) as pipe:
        drawn = world.draw(pipe, world.models["UCE"], ["superhero", "a picture of superhero"])
    assert not any(seen["hit"] for seen in world.see([row[0] for row in drawn]))
    report = judged([*without(good(), "construction"), *found])
    assert report.removal == "C0" and [need.partition(" ")[0] for need in report.needed["removal"]] == ["base_encoder"]


def test_a_denoiser_that_the_bases_text_encoder_does_not_fit_has_no_claim(world, monkeypatch):
    """It is the cheat above in another basis. Read through the base's text encoder it draws nothing at all."""
    monkeypatch.setattr(sampling, "LEAST_STEPS", 10)
    model = Model("UCE", "erased", Cheat(another_basis))
    models = {**world.models, "UCE": model}
    prompts, drawn = ["a picture of panda", "a picture of sunflower"], []
    for one in (world.base, model):
        with world.open(one) as pipe:
            drawn.append([row[0].tobytes() for row in world.draw(pipe, one, prompts)])
    assert drawn[0] == drawn[1]  # it draws as the base does
    probe, asked = BaseEncoder(prompts=8, kept=8), dataclasses.replace(world, models=models)
    rows = {name: probe.run(one, asked) for name, one in models.items()}
    found = probe.weigh(rows, {name: one.role for name, one in models.items()})
    kept = {e.model: e.estimate.value for e in found if e.measure == "kept"}
    assert kept["UCE"] <= 0.3 and min(rate for name, rate in kept.items() if name != "UCE") >= 0.6, kept
    residual = next(e for e in found if e.measure == "residual")
    assert residual.gates["fits"] == "fail" and not residual.conclusive
    changed = Evidence("construction", "UCE", "changed", number(0.5), "text_encoder")
    report = judged([*good(), changed, *found])
    assert report.removal == "C0" and any("base_encoder" in need for need in report.needed["removal"])


def test_a_text_encoder_that_reads_as_the_bases_does_is_not_asked_again(world):
    model = Model("moved", "erased", Cheat(move))
    with pytest.raises(Missing, match="already asks that"):
        BaseEncoder(prompts=2).run(model, dataclasses.replace(world, models={"base": world.base, "moved": model}))


def test_what_it_finds_blocks_the_level_as_other_probes_do():
    seen = Evidence("base_encoder", "UCE", "residual", number(0.9, 0.05), "", "gold", {"power": "pass"}, "number")
    report = judged([*good(), seen])
    assert report.removal == "C0" and report.answers["weights"].word == "still inside"
