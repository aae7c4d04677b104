"""UNDO: what the student begins as, what it is taught, and what is refused."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from erasure import Concept, Erasure
from erasure.backbone import backbone_of
from erasure.backbone.base import layer_at
from erasure.captioned import opened
from erasure.methods import method_class
from erasure.methods.adv_unlearn import AdvUnlearn
from erasure.methods.base import Request
from erasure.methods.esd import ESD
from erasure.methods.students import swapped
from erasure.methods.undo import UNDO
from erasure.train import Draw
from erasure.train.modules import trainable
from tests.reference import finetunes as plain
from tests.tiny import identical, make, tiny, tiny_pipeline, weights

QUICK = {"trajectories": 3, "num_inference_steps": 4, "keep_steps": 2, "batch_size": 3}
SHORT = {**QUICK, "iterations": 4, "lr": 1e-2, "progress": False}
SUPERHERO, KEEP = Concept("superhero", anchor="ninja"), ("wizard", "castle")


@pytest.fixture
def captions(tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("a wizard on a hill\na castle\nA Superhero, flying\na bee and a crab\na castle\n")
    return str(file)


def started(method, keep=KEEP):
    """A method, its student and its loss, and the pipeline that the student is trained in."""
    pipe = tiny_pipeline()
    backbone, request = backbone_of(pipe), Request(concepts=(SUPERHERO,), keep=keep, progress=False)
    student = method.student(backbone)
    return pipe, student, method.objective(backbone, student, request, None)


def test_the_loss_is_the_distance_to_the_erased_model_on_pictures_that_it_draws(captions):
    method = UNDO(captions=captions, dropout=0.4, **QUICK)
    pipe, student, loss = started(method)
    taught = make(tiny_pipeline(), SUPERHERO, "uce", keep=list(KEEP), progress=False)
    teacher, other = tiny_pipeline(), tiny_pipeline(seed=7)
    taught.apply(teacher)
    texts = ["a wizard on a hill", "a castle", "a bee and a crab"]  # no target, and each once
    order = torch.randperm(3, generator=torch.Generator().manual_seed(0)).tolist()
    texts = [texts[i] for i in order]
    backbone = backbone_of(teacher)
    request = Request(concepts=(SUPERHERO,), progress=False)
    bank = method.pictures(backbone, backbone.encode(texts).text, request, None, "again")
    dropped = torch.rand(len(bank), generator=torch.Generator().manual_seed(0)) < 0.4
    assert 0 < dropped.sum() < len(bank)
    for step in range(4):
        chosen = bank.pick(3, Draw(0, step).generator)
        asked = ["" if dropped[i] else texts[bank.prompt[i]] for i in chosen]
        theirs = plain.onto(
            plain.Plain(teacher, teacher.unet),
            plain.Plain(teacher, other.unet),
            bank.x[chosen],
            bank.t[chosen],
            asked,
            asked,
        )
        frozen, pipe.unet = pipe.unet, other.unet
        torch.testing.assert_close(loss(Draw(0, step)), theirs, rtol=1e-5, atol=1e-6)
        pipe.unet = frozen


@pytest.fixture
def images(tmp_path):
    """A folder of four pictures, one of a target, two with one caption; and the captions of the others."""
    folder, texts = tmp_path / "images", ["a wizard on a hill", "A Superhero, flying", "a castle", "a wizard on a hill"]
    folder.mkdir()
    for i, picture in enumerate(noise_pictures(4)):
        picture.save(folder / f"{i}.png")
    write_lines(folder, [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(texts)])
    return folder


def write_lines(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def noise_pictures(count):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(count)]


def test_real_pictures_take_the_place_of_those_that_the_teacher_draws(images, monkeypatch):
    monkeypatch.setattr(UNDO, "pictures", lambda *args, **kwargs: pytest.fail("the teacher drew"))
    method = UNDO(images=str(images), dropout=0, keep_steps=2, batch_size=4)
    pipe, student, loss = started(method, keep=())
    base = backbone_of(pipe)
    shown = [opened(images / f"{i}.png") for i in (0, 2, 3)]  # the picture of a superhero is left out
    clean, texts = base.latents(shown), ["a wizard on a hill", "a castle", "a wizard on a hill"]
    teacher, other = tiny_pipeline(), tiny_pipeline(seed=7)
    make(tiny_pipeline(), SUPERHERO, "uce", progress=False).apply(teacher)
    generator = torch.Generator().manual_seed(0)
    x, t = [], []
    for part in (0, 1):  # of the two equal parts of the range of times
        times = base.noise.times((part + torch.rand(3, generator=generator)) / 2)
        x.append(base.noise.mix(clean, torch.randn(clean.shape, generator=generator), times))
        t.append(times)
    x, t, captions = torch.cat(x), torch.cat(t), texts * 2
    for step in range(3):
        chosen = torch.randint(6, (4,), generator=Draw(0, step).generator)
        asked = [captions[i] for i in chosen]
        models = plain.Plain(teacher, teacher.unet), plain.Plain(teacher, other.unet)
        theirs = plain.onto(*models, x[chosen], t[chosen], asked, asked)
        frozen, pipe.unet = pipe.unet, other.unet
        torch.testing.assert_close(loss(Draw(0, step)), theirs, rtol=1e-5, atol=1e-6)
        pipe.unet = frozen


def test_a_checkpoint_belongs_to_its_pictures(images, tmp_path):
    given = {"images": str(images), "checkpoint": tmp_path / "run", **SHORT, "iterations": 1}
    one = make(tiny("sd1"), SUPERHERO, "undo", **given)
    assert identical(one.tensors, make(tiny("sd1"), SUPERHERO, "undo", **given).tensors)
    Image.new("RGB", (64, 64)).save(images / "2.png")
    with pytest.raises(ValueError, match="another run"):
        make(tiny("sd1"), SUPERHERO, "undo", **given)


def test_pictures_that_cannot_be_used_are_refused(images):
    pipe, given = tiny("sd1"), {"images": str(images), **SHORT}
    with pytest.raises(ValueError, match="leave one of them out"):
        make(pipe, SUPERHERO, "undo", captions="captions.txt", **given)
    (images / "2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"2\.png cannot be read"):
        make(pipe, SUPERHERO, "undo", **given)
    write_lines(images, [{"file_name": "0.png"}])
    with pytest.raises(ValueError, match=r"line 1: lacks \['text'\]; each line needs file_name and text"):
        make(pipe, SUPERHERO, "undo", **given)
    write_lines(images, [{"file_name": "1.png", "text": "a superhero"}])
    with pytest.raises(ValueError, match="images=FOLDER"):
        make(pipe, SUPERHERO, "undo", **given)
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl of file_name and text"):
        make(pipe, SUPERHERO, "undo", **{**given, "images": str(images / "none")})
    assert identical(weights(pipe), weights(tiny("sd1")))


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_the_student_begins_as_a_mixture_of_the_teacher_and_fresh_weights(share):
    method = UNDO(share=share, **QUICK)
    pipe, student, _ = started(method)
    base = weights(pipe)
    taught = make(tiny_pipeline(), SUPERHERO, "uce", keep=list(KEEP), progress=False)
    with trainable(student.parameters, student.modules):
        method.begin(student)
        begun, now = {n: p.detach().clone() for n, p in student.parameters.items()}, weights(pipe)
    assert identical(base, weights(pipe)) and set(taught.parameter_names) <= set(begun)
    moved = {name for name in base if not torch.equal(base[name], now[name])}
    assert not any("norm" in name for name in moved)
    if share:
        assert moved == {f"unet.{name}" for name in begun}
    for name, value in begun.items():
        own = base[f"unet.{name}"]
        start = taught.edit(name, own, 1.0) if name in taught.parameter_names else own
        fresh = value - (1 - share) * start
        bound = share / math.sqrt(layer_at(student.backbone, name.rpartition(".")[0]).weight[0].numel())
        assert fresh.abs().max() <= bound * (1 + 1e-5) + 1e-6
        if share and fresh.numel() > 500:
            assert fresh.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    if share == 1:  # nothing of the base is left in them
        other = tiny_pipeline(seed=7)
        again = method.student(backbone_of(other))
        again.teacher = {}
        with trainable(again.parameters, again.modules):
            method.begin(again)
            assert all(torch.equal(p, begun[name]) for name, p in again.parameters.items())


def test_fresh_weights_are_not_those_that_a_model_was_started_with():
    method = UNDO(share=1.0, **QUICK)
    for seed in (0, 1):
        pipe = tiny_pipeline(seed=seed)  # made under torch.manual_seed(seed), as Emoji World was
        base, student = weights(pipe), dataclasses.replace(method, seed=seed).student(backbone_of(pipe))
        student.teacher = {}
        with trainable(student.parameters, student.modules):
            dataclasses.replace(method, seed=seed).begin(student)
            alike = [n for n, p in student.parameters.items() if torch.allclose(p, base[f"unet.{n}"], atol=1e-4)]
        assert not alike


def test_the_seed_chooses_the_fresh_weights():
    one, two, other = (
        make(tiny("sd1"), SUPERHERO, "undo", keep=list(KEEP), seed=s, **SHORT).tensors for s in (0, 0, 1)
    )
    assert identical(one, two) and not identical(one, other)


@pytest.mark.slow
def test_distilling_brings_the_student_to_the_teacher(captions):
    settings = {**QUICK, "iterations": 150, "lr": 3e-3, "share": 0.5, "captions": captions, "ema": 0.9}
    method = UNDO(**settings)
    pipe, student, loss = started(method)
    edit = make(tiny_pipeline(), SUPERHERO, "undo", keep=list(KEEP), progress=False, **settings)
    with trainable(student.parameters, student.modules), torch.no_grad():
        method.begin(student)
        first = sum(loss(Draw(9, i)) for i in range(8))
    edit.apply(pipe)
    with torch.no_grad():
        assert sum(loss(Draw(9, i)) for i in range(8)) < 0.5 * first


def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path, monkeypatch, captions):
    given = {"keep": list(KEEP), "captions": captions, **SHORT}
    whole = make(tiny("sd1"), SUPERHERO, "undo", **given)
    calls, real = itertools.count(), UNDO.error

    def killed(self, *args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *args)

    training = UNDO.training
    monkeypatch.setattr(UNDO, "training", lambda self: dataclasses.replace(training(self), checkpoint_every=1))
    monkeypatch.setattr(UNDO, "error", killed)
    with pytest.raises(KeyboardInterrupt):
        make(tiny("sd1"), SUPERHERO, "undo", checkpoint=tmp_path / "run", **given)
    monkeypatch.setattr(UNDO, "error", real)
    monkeypatch.setattr(UNDO, "pictures", lambda *args, **kwargs: pytest.fail("the bank was made again"))
    again = make(tiny("sd1"), SUPERHERO, "undo", checkpoint=tmp_path / "run", **given)
    assert identical(whole.tensors, again.tensors)
    with pytest.raises(ValueError, match="another run"):
        make(tiny("sd1"), SUPERHERO, "undo", checkpoint=tmp_path / "run", share=0.5, **given)


SOON = {"iterations": 2, "trajectories": 2, "keep_steps": 2, "num_inference_steps": 2, "lr": 1e-2}


@pytest.mark.parametrize(("teacher", "preset"), [("speed", "many"), ("esd", "short")])
def test_another_teacher_is_made_with_its_own_preset(teacher, preset, captions, monkeypatch):
    monkeypatch.setitem(ESD.presets, "short", {**SOON, "adapter": "weights"})
    method = UNDO(teacher=teacher, teacher_preset=preset, captions=captions, **QUICK)
    assert method.erasing_method() == method_class(teacher).preset(preset)
    pipe, student, _ = started(method)
    assert student.teacher and all(not torch.equal(student.parameters[n], w) for n, w in student.teacher.items())
    assert not any(p.requires_grad and p.grad is not None for p in pipe.unet.parameters())
    with swapped({n: student.parameters[n] for n in student.teacher}, student.teacher):
        assert not identical(weights(pipe), weights(tiny_pipeline()))


def test_it_is_an_ordinary_erasure_of_the_whole_denoiser(tmp_path, captions):
    pipe = tiny("sd1")
    before = weights(pipe)
    edit = make(pipe, SUPERHERO, "undo", captions=captions, keep=list(KEEP), **SHORT)
    assert edit.config.settings["images"] == ""
    assert identical(before, weights(pipe)) and edit.kind == "delta"
    assert set(edit.parameter_names) == set(backbone_of(pipe).select("all"))
    assert edit.config.settings["captions"] == "captions.txt" and edit.config.keep == list(KEEP)
    again = Erasure.from_pretrained(edit.save_pretrained(tmp_path / "edit"))
    again.apply(pipe)
    changed = weights(pipe)
    assert not identical(before, changed)
    again.remove(pipe)
    assert identical(before, weights(pipe))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "lora"}, "every weight"),
        ({"robust": True}, "has no attack"),
        ({"saliency": 0.5, "optimizer": "adam"}, "every weight"),
        ({"share": 1.5}, "share"),
        ({"dropout": 1.0}, "dropout"),
        ({"teacher": "uec"}, "unknown method 'uec'"),
        ({"teacher_preset": "none"}, "uce has no preset 'none'"),
        ({"teacher": "negative-prompt"}, "which 'negative-prompt' does not leave; set teacher='uce'"),
        ({"teacher": "adv-unlearn", "teacher_preset": "short"}, "weights, which 'adv-unlearn' does not leave"),
        ({"teacher": "undo"}, "the teacher of undo is another method"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message, monkeypatch):
    monkeypatch.setitem(AdvUnlearn.presets, "short", {**SOON, "warmup_steps": 1, "attack_steps": 1})
    pipe = tiny("sd1")
    before = weights(pipe)
    with pytest.raises(ValueError, match=message):
        make(pipe, SUPERHERO, "undo", keep=list(KEEP), **{**SHORT, **settings})
    assert identical(before, weights(pipe))


def test_without_anything_to_draw_it_says_so_before_any_work(tmp_path, monkeypatch):
    pipe = tiny("sd1")
    monkeypatch.setattr(UNDO, "taught", lambda *args: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="captions=FILE"):
        make(pipe, SUPERHERO, "undo", **SHORT)
    only = tmp_path / "only.txt"
    only.write_text("a superhero\n")
    with pytest.raises(ValueError, match="captions=FILE"):
        make(pipe, SUPERHERO, "undo", captions=str(only), **SHORT)
    with pytest.raises(FileNotFoundError, match="missing.txt"):
        make(pipe, SUPERHERO, "undo", captions=str(tmp_path / "missing.txt"), **SHORT)
