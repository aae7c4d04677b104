"""Z-Erase: its loss and multiplier against plain readings of them, and a LoRA that the picture's rows never meet."""

import copy
import functools
import math

import pytest
import torch
from diffusers.models.transformers import transformer_z_image
from torch import nn

from erasure import Concept, Erasure
from erasure.artifact import export_lora
from erasure.artifact.text_lora import TextLoraErasure, text_low_rank
from erasure.backbone import architectures
from erasure.backbone.streams import looking_at, text_projections
from erasure.backbone.text import Text
from erasure.methods.base import Request
from erasure.methods.z_erase import Balanced, Multiplier, ZErase, words_of
from erasure.train import Checkpoint, Draw, Run, Training
from tests.every import backbone, build
from tests.reference.finetunes import squared
from tests.slow import first
from tests.tiny import identical, make, weights
from tests.tiny_joint import draw

HERO = Concept("superhero")
QUICK = {
    "iterations": 2,
    "lr": 1e-2,
    "trajectories": 3,
    "num_inference_steps": 3,
    "keep_steps": 2,
    "batch_size": 3,
    "rank": 4,
}
KEEP = ["wizard", "ninja"]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def model_of(name):
    """A backbone that no test changes."""
    return backbone(build(name), name)


def trial(name, **settings):
    """A method on a model, its loss, and its student with every factor off zero."""
    model = model_of(name)
    method, request = ZErase(**{**QUICK, **settings}), Request((HERO,), tuple(KEEP), progress=False)
    student = method.student(model)
    loss = method.objective(model, student, request, None)
    for i, parameter in enumerate(student.parameters.values()):
        parameter.data = 0.3 * random(*parameter.shape, seed=i)
    return method, request, student, loss


def drawn_rows(method, request, model):
    """What the first draw chooses: latents, times and prompts of the concept, and of what is kept."""
    generator = Draw(0, 0).generator
    found = []
    for name, prompts in (("bank", ["superhero"]), ("kept", KEEP)):
        bank = method.bank(model, model.encode(prompts).text, request, None, name)
        chosen = bank.pick(3, generator)
        found.append((bank.x[chosen], bank.t[chosen], [prompts[i] for i in bank.prompt[chosen]]))
    return found


def places_of(ids, word):
    """Where a word's pieces stand among the ids of a prompt."""
    return next(list(range(i, i + len(word))) for i in range(len(ids)) if ids[i : i + len(word)] == word)


# --- the loss ---------------------------------------------------------------------------------------------------------


class AtText(nn.Module):
    """A layer with a low-rank addition behind the first 32 rows, which are the tiny picture's."""

    def __init__(self, linear, up, down):
        super().__init__()
        self.linear, self.edited = linear, nn.Linear(linear.in_features, linear.out_features, bias=False)
        self.edited.weight.data = linear.weight + up @ down

    def forward(self, x):
        return torch.cat([self.linear(x[:, :32]), self.edited(x[:, 32:])], dim=1)


def z_image(pipe, transformer, x, t, prompts):
    text = [pipe.encode_prompt(prompt, do_classifier_free_guidance=False)[0][0] for prompt in prompts]
    return torch.stack(transformer(list(x), t, text, return_dict=False)[0])


def test_the_loss_is_the_papers(monkeypatch):
    method, request, student, loss = trial("z-image", eta=1.5, attention=0.3, retain=0.4)
    model = student.backbone
    pipe, base = model.pipe, model.denoiser
    ours = loss(Draw(0, 0))
    (x, t, asked), (y, s, kept) = drawn_rows(method, request, model)
    with torch.no_grad():
        concept, empty, still = (z_image(pipe, base, *row) for row in ((x, t, asked), (x, t, [""] * 3), (y, s, kept)))
    other = copy.deepcopy(base)
    for name in ("layers.0.attention.to_q", "layers.0.attention.to_k", "layers.1.attention.to_q"):
        parent, last = other.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        factors = (student.parameters[f"{name}.lora_{k}"].detach() for k in "BA")
        setattr(parent, last, AtText(getattr(parent, last), *factors))
    name = "layers.1.attention.to_k"
    factors = (student.parameters[f"{name}.lora_{k}"].detach() for k in "BA")
    other.layers[1].attention.to_k = AtText(other.layers[1].attention.to_k, *factors)
    heard, attention = [], transformer_z_image.dispatch_attention_fn

    def listening(query, key, value, **given):
        heard.append((query, key))
        return attention(query, key, value, **given)

    monkeypatch.setattr(transformer_z_image, "dispatch_attention_fn", listening)
    push = squared(z_image(pipe, other, x, t, asked), empty - 1.5 * (concept - empty))
    monkeypatch.undo()
    word = pipe.tokenizer("superhero", add_special_tokens=False).input_ids
    places = [32 + i for i in places_of(model.encode(["superhero"]).ids[0].tolist(), word)]
    total = torch.zeros(3)
    for query, key in heard[2:]:  # behind the two refiners: rows of the picture, then 32 of the text
        assert query.shape[1] == 64
        scores = torch.einsum("nphd,nkhd->nhpk", query, key) / math.sqrt(query.shape[-1])
        total = total + scores.softmax(-1)[:, :, :32, places].square().sum((1, 2, 3))
    hold = squared(z_image(pipe, other, y, s, kept), still)
    torch.testing.assert_close(ours, 0.5 * (push + 0.3 * total.sqrt().mean()) + 0.5 * 0.4 * hold, rtol=1e-5, atol=1e-6)


def sd3(pipe, transformer, x, t, prompts):
    hidden, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    return transformer(x, hidden, pooled, t, return_dict=False)[0]


def test_projections_of_the_text_alone_are_trained_as_a_lora():
    """SD3: the picture stands first in its attention, and words stand in two stretches, CLIP's and T5's."""
    method, request, student, loss = trial("sd3", attention=0.3)
    model = student.backbone
    pipe, base = model.pipe, model.denoiser
    ours = loss(Draw(0, 0))
    (x, t, asked), (y, s, kept) = drawn_rows(method, request, model)
    with torch.no_grad():
        concept, empty, still = (sd3(pipe, base, *row) for row in ((x, t, asked), (x, t, [""] * 3), (y, s, kept)))
    other = copy.deepcopy(base)
    for name in student.projections:
        other.get_submodule(name).weight.data += (
            student.parameters[f"{name}.lora_B"] @ student.parameters[f"{name}.lora_A"]
        )
    heard, handles = {}, []
    for i, block in enumerate(other.transformer_blocks):
        for last in ("to_q", "to_k", "add_k_proj"):
            layer = getattr(block.attn, last)
            handles.append(layer.register_forward_hook(lambda m, a, out, key=(i, last): heard.update({key: out})))
    push = squared(sd3(pipe, other, x, t, asked), 2 * empty - concept)
    for handle in handles:
        handle.remove()
    columns = []
    for tokenizer, offset in ((pipe.tokenizer, 16), (pipe.tokenizer_3, 16 + 77)):
        ids, word = tokenizer("superhero").input_ids, tokenizer("superhero", add_special_tokens=False).input_ids
        columns += [offset + i for i in places_of(ids, [i for i in word if i != tokenizer.eos_token_id])]
    total = torch.zeros(3)
    for i in range(len(other.transformer_blocks)):
        q, k = heard[i, "to_q"], torch.cat([heard[i, "to_k"], heard[i, "add_k_proj"]], dim=1)
        assert q.shape[1] == 16
        q, k = (part.unflatten(2, (4, 8)).transpose(1, 2) for part in (q, k))
        total = total + (q @ k.mT / math.sqrt(8)).softmax(-1)[..., columns].square().sum((1, 2, 3))
    hold = squared(sd3(pipe, other, y, s, kept), still)
    theirs = 0.5 * (push + 0.3 * total.sqrt().mean()) + 0.5 * 0.1 * hold
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_norm_without_weight_leaves_the_first_term():
    values = [trial("z-image", attention=weight)[3](Draw(0, 0)).item() for weight in (0.0, 1e-9, 1.0)]
    assert values[0] == pytest.approx(values[1], rel=1e-5) and values[2] > values[0]


def test_attention_that_cannot_be_heard_is_named():
    model = backbone(build("z-image"), "z-image")
    model.denoiser.layers[1].attention.set_processor(lambda attn, x, *_, **__: attn.to_out[0](attn.to_v(x)))
    text = model.encode(["superhero"])
    with pytest.raises(ValueError, match=r"layers\.1\.attention runs through another.*set_attention_backend"):
        with torch.no_grad(), looking_at(model, words_of(text)):
            model.predict(random(1, *model.latent_shape), torch.tensor([0.5]), text.text)


# --- the multiplier ---------------------------------------------------------------------------------------------------


class Valley(nn.Module):
    """A point that erasing draws to 3, and keeping to 0."""

    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.tensor(1.0))

    def loss(self, *, feedback=True, tolerance=0.1):
        return Balanced(
            lambda draw: (self.at - 3).square(),
            lambda rows: (self.at * rows).square().mean(),
            lambda draw: torch.randn(4, generator=draw.generator),
            Multiplier(lr=0.3, decay=0.01, tolerance=tolerance),
            rate=lambda step: 0.05,
            feedback=feedback,
        )


def plain_balance(steps, *, feedback):
    """Weights and places of the same descent, with Adam written out."""
    at, w, m, v, found = 1.0, 1.0, 0.0, 0.0, []
    for step in range(steps):
        rows = torch.randn(4, generator=Draw(0, step).generator).square().mean().item()
        shares = 1 / (1 + max(w, 0)), max(w, 0) / (1 + max(w, 0))
        found.append((w, at))
        before = at * at * rows
        at -= 0.05 * (shares[0] * 2 * (at - 3) + shares[1] * 2 * at * rows)
        gradient = ((before - at * at * rows) / 0.05 if feedback else 0.0) - 0.1 + 0.01 * w
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        w -= 0.3 * (m / (1 - 0.9 ** (step + 1))) / (math.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
    return found


@pytest.mark.parametrize("feedback", [True, False])
def test_the_multiplier_follows_what_is_kept(feedback):
    valley = Valley()
    loss = valley.loss(feedback=feedback)
    for step, (w, at) in enumerate(plain_balance(60, feedback=feedback)):
        assert valley.at.item() == pytest.approx(at, abs=1e-5)
        value = loss(Draw(0, step))
        assert loss.multiplier.w.item() == pytest.approx(w, abs=1e-5)
        (gradient,) = torch.autograd.grad(value, [valley.at])
        valley.at.data -= 0.05 * gradient
    if not feedback:  # the official code's: its fixed point, whatever the losses do
        assert loss.multiplier.w.item() == pytest.approx(10.0, abs=2.0)


def test_below_zero_only_the_concept_counts():
    multiplier = Multiplier(lr=0.3, decay=0.0, tolerance=0.0)
    assert multiplier.shares == (0.5, 0.5)
    for _ in range(8):
        multiplier.update(5.0)
    assert multiplier.w < 0 and multiplier.shares == (1.0, 0.0)
    for _ in range(40):
        multiplier.update(-5.0)
    assert multiplier.w > 1 and sum(multiplier.shares) == pytest.approx(1.0)


def test_a_run_taken_up_again_ends_with_the_same_bits(tmp_path):
    def run(steps, folder=None):
        valley = Valley()
        loss, settings = valley.loss(), Training(steps, 0.05, optimizer="adamw", checkpoint_every=1)
        checkpoint = None if folder is None else Checkpoint.open(folder, "valley")
        going = Run({"at": valley.at}, loss, training=settings, checkpoint=checkpoint, progress=False)
        yield from ((going.step, valley.at.item(), loss.multiplier.w.item()) for _ in going)

    whole = list(run(6))
    stopped = run(6, tmp_path)
    parts = [next(stopped) for _ in range(3)]
    parts += list(run(6, tmp_path))
    assert parts == whole and len({w for _, _, w in whole}) == 6


def test_parts_of_one_step_have_one_weight():
    valley = Valley()
    loss = valley.loss()
    seen = []
    for step in range(3):
        for part in range(2):
            loss(Draw(0, step, part, 2))
            seen.append(loss.multiplier.w.item())
    assert seen[0] == seen[1] == 1.0 and seen[2] == seen[3] and seen[4] == seen[5] and len(set(seen)) == 3


# --- rows of text and rows of the picture -----------------------------------------------------------------------------


def random_text(model, *, tokens, seed):
    """Text of random numbers, in the form the encoders give it; all that is not token embeddings is the same."""
    text = model.encode(["superhero"]).text
    length = text.hidden.shape[1] if tokens is None else tokens
    hidden = random(1, length, text.hidden.shape[2], seed=seed).to(text.hidden)
    return Text(hidden, text.pooled, None if text.mask is None else torch.ones(1, length, dtype=text.mask.dtype))


def heard_inputs(model, x, text, names):
    """Input and output of some layers in one prediction."""
    heard = {}
    handles = [
        model.denoiser.get_submodule(name).register_forward_hook(
            lambda m, given, out, name=name: heard.update({name: (given[0], out)})
        )
        for name in names
    ]
    with torch.no_grad():
        model.predict(x, torch.tensor([0.5]), text)
    for handle in handles:
        handle.remove()
    return heard


def unmixed(model):
    """The model with streams that stay apart until the first layer that reads both."""
    for name, module in model.denoiser.named_modules():
        if name.partition(".")[0] == model.streams.apart and name.endswith(("to_out.0", "to_add_out")):
            for parameter in module.parameters():
                parameter.data.zero_()
    return model


MODELS = ZErase.architectures


@pytest.mark.parametrize("name", first(MODELS, "z-image", "flux", "flux2-klein", "sd3", "qwen-image", "auraflow"))
def test_rows_of_the_picture_pass_the_bases_weight_alone(name):
    model = unmixed(backbone(build(name), name))
    known = text_projections(model)
    assert known
    tokens = 64 if name == "z-image" else None  # without padding, which is the same for every text
    shared = [layer for layer, projection in known.items() if projection.shared][:1]
    x = random(1, *model.latent_shape)
    texts = [random_text(model, tokens=tokens, seed=seed) for seed in (1, 2)]
    factors = {
        layer: (random(p.outputs, 2, seed=1), random(2, p.linear.in_features, seed=2)) for layer, p in known.items()
    }
    plain, other = (heard_inputs(model, x, text, [*known]) for text in texts)
    handles = text_low_rank(model, {layer: known[layer] for layer in [*known][:1] + shared}, factors)
    edited = heard_inputs(model, x, texts[0], [*known])
    handles.remove()
    for layer in dict.fromkeys([*known][:1] + shared):
        (given, before), (again, after), (elsewhere, _) = (heard[layer] for heard in (plain, edited, other))
        if not known[layer].shared:
            text = torch.ones(given.shape[1], dtype=torch.bool)
        else:
            text = (given != elsewhere).any(-1)[0]  # what another text changes is text
        assert text.any() and (known[layer].shared == (not text.all()))
        assert torch.equal(given, again)  # nothing in front of it was edited
        up, down = factors[layer]
        width = known[layer].outputs
        assert torch.equal(before[:, ~text], after[:, ~text])
        assert torch.equal(before[:, text, width:], after[:, text, width:])
        moved = (given @ down.T @ up.T)[:, text]
        torch.testing.assert_close(after[:, text, :width], before[:, text, :width] + moved, rtol=1e-4, atol=1e-4)
        assert (moved.abs().amax(-1) > 0).all()
    handles = text_low_rank(model, known, factors, 0.0)
    assert all(
        torch.equal(a[1], b[1])
        for a, b in zip(heard_inputs(model, x, texts[0], [*known]).values(), plain.values(), strict=True)
    )
    handles.remove()


@pytest.mark.parametrize("size", [(4, 4), (16, 12)])
def test_the_picture_may_have_another_size(size):
    """The official mask is that of 512 pixels."""
    model = model_of("z-image")
    known, layer = text_projections(model), "layers.0.attention.to_q"
    channels, frames = model.latent_shape[:2]
    x, text = random(1, channels, frames, *size), random_text(model, tokens=40, seed=1)
    factors = {layer: (random(32, 2, seed=1), random(2, 32, seed=2))}
    plain = heard_inputs(model, x, text, [layer])[layer][1]
    handles = text_low_rank(model, {layer: known[layer]}, factors)
    edited = heard_inputs(model, x, text, [layer])[layer][1]
    handles.remove()
    rows = -(-size[0] * size[1] // 4 // 32) * 32  # patches of two by two, filled up
    assert plain.shape[1] == rows + 64
    assert torch.equal(plain[:, :rows], edited[:, :rows]) and (plain != edited)[:, rows:].any(-1).all()


def test_prompts_of_a_batch_may_have_different_lengths():
    model = model_of("z-image")
    known, layer = text_projections(model), "layers.0.attention.to_k"
    rows = [random_text(model, tokens=count, seed=count) for count in (20, 70)]
    both, x = rows[0] + rows[1], random(2, *model.latent_shape)
    factors = {layer: (random(32, 2, seed=1), random(2, 32, seed=2))}
    handles = text_low_rank(model, {layer: known[layer]}, factors)
    with torch.no_grad():
        together = model.predict(x, torch.tensor([0.5, 0.5]), both)
        alone = [model.predict(x[i : i + 1], torch.tensor([0.5]), rows[i]) for i in range(2)]
    handles.remove()
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_the_models_it_is_for_are_those_with_known_rows():
    known = {name for name, kind in architectures().items() if kind.streams is not None}
    assert set(ZErase.architectures) == known


# --- the erasure ------------------------------------------------------------------------------------------------------


def made(pipe, **settings):
    return make(pipe, HERO, "z-erase", keep=KEEP, progress=False, **{**QUICK, **settings})


@pytest.mark.parametrize("name", first(["z-image", "flux2-klein", "qwen-image"], "z-image"))
def test_an_erasure_is_what_was_trained_and_comes_off_without_a_trace(name, tmp_path):
    pipe = build(name)
    before, base = weights(pipe), draw(pipe, "a superhero")
    edit = made(pipe)
    assert isinstance(edit, TextLoraErasure) and identical(before, weights(pipe))
    assert edit.config.prompts == ["superhero", "a superhero"]
    edit.apply(pipe)
    erased = draw(pipe, "a superhero")
    assert not torch.equal(erased, base) and identical(before, weights(pipe))
    edit.apply(pipe, 15.0)
    assert (draw(pipe, "a superhero") - base).norm() > (erased - base).norm()
    edit.apply(pipe, 0.0)
    assert torch.equal(draw(pipe, "a superhero"), base)
    edit.remove(pipe)
    assert torch.equal(draw(pipe, "a superhero"), base)
    again = Erasure.from_pretrained(edit.save_pretrained(tmp_path / "edit"))
    assert again.kind == "text-lora" and identical(again.tensors, edit.tensors)
    again.apply(pipe)
    assert torch.equal(draw(pipe, "a superhero"), erased)
    with pytest.raises(ValueError, match="changes no layer|changes no weight"):
        export_lora(again, pipe, tmp_path / "lora")
    again.remove(pipe)
    assert torch.equal(draw(pipe, "a superhero"), base) and identical(before, weights(pipe))


def test_half_precision():
    pipe = build("z-image").to(torch.bfloat16)
    before, base = weights(pipe), draw(pipe, "a superhero")
    edit = made(pipe).apply(pipe)
    assert all(tensor.dtype == torch.float32 for tensor in edit.tensors.values())
    assert torch.isfinite(draw(pipe, "a superhero")).all() and not torch.equal(draw(pipe, "a superhero"), base)
    edit.remove(pipe)
    assert identical(before, weights(pipe)) and torch.equal(draw(pipe, "a superhero"), base)


def test_damaged_and_foreign_erasures_are_refused():
    pipe = build("z-image")
    edit = made(pipe)
    site = edit.sites[0]
    for name, tensor in (("lora_A", random(3, 32)), ("lora_B", random(32, 4, 1)), ("other", random(3))):
        with pytest.raises(ValueError, match="a text-lora erasure holds"):
            type(edit)(edit.name, edit.config, {**edit.tensors, f"{site}.{name}": tensor}).check_tensors()
    for changed, message in (
        ({"sites": [site]}, "has shape"),
        ({"sites": ["layers.0.attention.to_v"]}, "makes no queries"),
    ):
        tensors = {f"{changed['sites'][0]}.lora_A": random(2, 32), f"{changed['sites'][0]}.lora_B": random(8, 2)}
        other = type(edit)(edit.name, edit.config.with_facts(**changed), tensors)
        other.check_tensors()
        with pytest.raises(ValueError, match=message):
            other.apply(pipe)
    assert "no joint attention" in edit.misfits(model_of("wan"))[0]
    with pytest.raises(ValueError, match="none whose rows of text are known"):
        text_projections(model_of("wan"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adapter": "lora"}, "an adapter in hooks of its own"),
        ({"saliency": 0.5}, "an adapter in hooks of its own"),
        ({"gradient_checkpointing": True}, "an adapter in hooks of its own"),
        ({"retain": 0.0}, "balances erasing against a keep list"),
        ({"attention": -1.0}, "attention"),
        ({"decay": -1.0}, "decay"),
        ({"rank": 0}, "rank"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        made(model_of("z-image").pipe, **given)
    with pytest.raises(ValueError, match="balances erasing against a keep list"):
        make(model_of("z-image").pipe, HERO, "z-erase", progress=False, **QUICK)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "wan"])
def test_models_whose_queries_are_the_pictures_alone_are_refused(name):
    with pytest.raises(
        ValueError, match="z-erase does not work on .*; it supports Z-Image, FLUX.1, .*; choose another"
    ):
        made(model_of(name).pipe)
