"""The denoiser is the base's; something around it hides the target. That suppresses, and takes nothing out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from erasure.eval import assess, assessment_of
from erasure.eval.core.records import Verdict
from erasure.eval.judge.licences import NOT_BY_CONSTRUCTION, SAME_DENOISER, SAME_PREDICTIONS
from tests.adversarial.cheat import Cheat, overwrite, structure, verdict_on
from tests.eval_helpers import demo_evaluation
from tests.made_up import but, good, judged, number
from tests.probe_helpers import tiny_context


class FilteredDecoder(nn.Module):
    """Decodes, unless a classifier of its own would see the target; then it shows something else."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder, self.instead = decoder, nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, *args, **kwargs):
        return self.decoder(*args, **kwargs) * 0 + self.instead


def filter_in_the_decoder(pipe):
    old = pipe.vae.decoder
    pipe.vae.decoder = FilteredDecoder(old)

    def undo() -> None:
        pipe.vae.decoder = old

    return undo


def word_remapped(pipe):
    table = pipe.text_encoder.get_input_embeddings().weight
    new = table.detach().clone()
    new[3] = new[5]
    return overwrite(table, new)


def text_encoder_retrained(pipe):
    weight = next(p for name, p in pipe.text_encoder.named_parameters() if name.endswith("q_proj.weight"))
    return overwrite(weight, weight.detach() + torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))


def hook_on_the_output(pipe):
    handle = pipe.unet.register_forward_hook(lambda module, args, output: output)
    return handle.remove


def same_function_in_other_numbers(pipe):
    """Twice the queries and half the keys: nearly half of some layers differs, and no prediction does."""
    undo = [
        overwrite(p, factor * p.detach())
        for name, p in pipe.unet.named_parameters()
        for part, factor in (("to_q.", 2.0), ("to_k.", 0.5))
        if part in name
    ]
    return lambda: [one() for one in undo]


CHEATS = {
    "filter in the decoder": (filter_in_the_decoder, SAME_DENOISER),
    "word remapped": (word_remapped, SAME_DENOISER),
    "text encoder retrained": (text_encoder_retrained, SAME_DENOISER),
    "hook on the output": (hook_on_the_output, NOT_BY_CONSTRUCTION),
    "same function in other numbers": (same_function_in_other_numbers, SAME_PREDICTIONS),
}


@pytest.mark.parametrize("name", CHEATS)
def test_it_is_not_removal_however_good_the_pictures_are(name):
    do, reason = CHEATS[name]
    found = structure(Cheat(do))
    report = verdict_on(found)
    assert report.suppression == "C3"  # which is true: nothing comes out
    assert report.removal == reason
    assert report.answers["weights"].verdict == "shown not" and report.answers["weights"].word == "still inside"
    declared = verdict_on(found, kinds={"UCE": "retrained"}, scopes={"UCE": "everything"})
    assert declared.removal == reason  # to call it retrained does not help


@pytest.mark.usefixtures("few_steps")
def test_probes_of_the_weights_decode_with_the_bases_autoencoder():
    """The denoiser is moved a little, and the decoder hides what it still draws."""

    def noise(pipe):
        weight = pipe.unet.conv_out.weight
        old = weight.detach().clone()
        weight.data.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        return lambda: weight.data.copy_(old)

    def both(pipe):
        undo, shown = noise(pipe), filter_in_the_decoder(pipe)
        return lambda: (shown(), undo())

    context = tiny_context()
    erasures = {"honest": Cheat(noise), "hidden": Cheat(both)}
    controls = [model for model in context.models.values() if model.role in ("gold", "null")]
    found = assess(
        context.pipe, erasures, context.suite, preset="smoke", detectors=[context.judge, context.selector],
        controls=controls, material=context.material, probes=["completion", "direct"], progress=False,
    )  # fmt: skip
    pictures = {(c.probe, c.model): [row.facts["image_hash"] for row in c.rows] for c in found.cells}
    assert pictures["completion", "hidden"] == pictures["completion", "honest"] != []
    assert pictures["direct", "hidden"] != pictures["direct", "honest"]


def test_an_edit_of_the_denoiser_is_not_taken_for_one():
    """The opposite mistake: a denoiser that was changed, however little of it, and predicts something else."""

    def edit(pipe):
        weight = next(p for name, p in pipe.unet.named_parameters() if name.endswith("attn2.to_v.weight"))
        return overwrite(weight, weight.detach() * 1.5)

    found = structure(Cheat(edit))
    numbers = {e.measure: e.estimate.value for e in found if e.model == "UCE" and not e.family}
    assert 0 < numbers["denoiser_changed"] < 0.1 and numbers["moved"] > 1e-4
    assert verdict_on(found).removal == "C5"


@pytest.mark.parametrize("measure", ["denoiser_changed", "moved"])
def test_not_to_have_looked_is_no_pass(measure):
    """Whoever leaves the look at the parameters out gets no level in the weights."""
    report = judged([e for e in good() if (e.probe, e.measure) != ("construction", measure)])
    assert report.removal == "C0" and any("construction" in line for line in report.needed["removal"])
    assert report.answers["weights"].verdict == "undecided"


def test_a_filter_that_edits_weights_is_no_filter():
    """A filter withholds pictures; an edit that draws noise and calls itself one destroys them."""
    noise = but(good(), "degeneracy", "change", number(0.9))
    assert judged(noise, kinds={"UCE": "filter"}).suppression == "C0"
    unchanged = but(noise, "construction", "changed", number(0.0, 0.0))
    assert judged(unchanged, kinds={"UCE": "filter"}).suppression == "C3"


@pytest.mark.parametrize(("edited", "level"), [(False, "C1"), (True, "C0")])
def test_a_plain_evaluation_knows_a_filter_by_the_weights(edited, level):
    """It has no probe of the construction. What changed the weights, and draws noise, destroyed pictures."""
    plain = demo_evaluation()
    base = plain.arms[0].weights
    blank = {detector: Verdict("nothing", 0.001, False, True) for detector in plain.detectors}
    records = tuple(
        dataclasses.replace(r, image_hash=f"noise {r.prompt} {r.seed}", verdicts=blank)
        if (r.arm, r.group) == ("uce", "target")
        else r
        for r in plain.records
    )
    weights = "others" if edited else base
    arms = tuple(
        dataclasses.replace(arm, kind="filter", weights=weights) if arm.name == "uce" else arm for arm in plain.arms
    )
    found = assessment_of(dataclasses.replace(plain, records=records, arms=arms))
    assert next(claim for claim in found.claims() if claim.model == "uce").suppression == level
