"""Erasures made to do harm: a folder costs no more than it holds, fits no other model, and prints as text."""

import hashlib
import json
import math
import os
import re
import shutil
import time

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from erasure import Concept, Erasure, erase
from erasure.artifact.files import CARD, CONFIG, SYSTEM, WEIGHTS, digest
from erasure.artifact.official import export_official
from erasure.backbone.fingerprint import fingerprint, matches
from erasure.pipelines import attach_erasures, erasures, load_erasure, set_erasures
from tests.slow import first
from tests.test_artifact import an_erasure
from tests.test_cli import run
from tests.test_io import HARMFUL, HOSTILE
from tests.tiny import identical, make, tiny_pipeline, weights

REFUSED = (ValueError, FileNotFoundError)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def originals(tmp_path_factory, pipe):
    root = tmp_path_factory.mktemp("hostile")
    an_erasure(pipe, "operator").save_pretrained(root / "operator", system=True)
    an_erasure(pipe, "delta").save_pretrained(root / "delta")
    return root


@pytest.fixture
def folder(originals, tmp_path):
    return shutil.copytree(originals / "operator", tmp_path / "e")


def forged(folder, change=lambda config: None):
    """Change a config and make every hash fit."""
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    hashes = {
        n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in (WEIGHTS, SYSTEM) if n in config["sha256"]
    }
    config["sha256"] = hashes | {CONFIG: digest(config)}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def refused(folder, pipe, fault=""):
    """It is refused in one short line, within seconds, and the model is as it was."""
    before, began = weights(pipe), time.process_time()
    with pytest.raises(REFUSED, match=fault) as caught:
        Erasure.from_pretrained(folder).apply(pipe)
    assert time.process_time() - began < 20 and identical(before, weights(pipe))
    message = str(caught.value).replace(str(folder), "")
    assert "\n" not in message and len(message) < 700 and not HARMFUL.search(message)


# --- sizes and counts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 2**20, 2**30])
def test_a_declared_count_is_bounded_by_the_file(count, folder, pipe):
    refused(forged(folder, lambda c: c["system"]["hidden"].update(kept=count)), pipe, "a system of hidden holds")


def test_declared_rows_are_bounded_by_the_file(folder, pipe):
    refused(forged(folder, lambda c: c["system"]["hidden"].update(rows=[1] * 1_000_000)), pipe, "a system of hidden")


@pytest.mark.parametrize("name", [WEIGHTS, SYSTEM, CONFIG])
def test_a_sparse_terabyte_is_refused_by_its_size(name, folder, pipe):
    with open(folder / name, "r+b") as file:
        file.truncate(2**40)
    refused(folder, pipe, "bytes")


@pytest.mark.parametrize("name", [WEIGHTS, SYSTEM])
def test_a_file_longer_or_shorter_than_its_header_says(name, folder, pipe):
    raw = (folder / name).read_bytes()
    for damaged in (raw + b"\0" * 64, raw[:-4]):
        (folder / name).write_bytes(damaged)
        refused(forged(folder), pipe, "its header adds up to")


@pytest.mark.parametrize("header", [2**62, 2**24 + 1, 1, 0])
def test_a_header_of_absurd_length(header, folder, pipe):
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(header.to_bytes(8, "little") + raw[8:])
    refused(forged(folder), pipe, "not a safetensors file")


def with_header(folder, change):
    raw = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    changed = json.dumps(change(header)).encode()
    (folder / WEIGHTS).write_bytes(len(changed).to_bytes(8, "little") + changed + raw[8 + length :])
    return forged(folder)


def entry(**changes):
    def change(header):
        name = next(name for name in header if name != "__metadata__")
        return {**header, name: {**header[name], **changes}}

    return change


@pytest.mark.parametrize(
    "change",
    [
        entry(shape=[2**40, 2**20]),
        entry(shape=[2**32, 2**32]),
        entry(shape=[-1]),
        entry(data_offsets=[0, 2**40]),
        entry(data_offsets=[-8, 8]),
        entry(data_offsets=[0]),
        entry(data_offsets="x"),
        entry(data_offsets=[0, "\x1b[2J"]),
        entry(dtype="F99"),
        lambda header: [],
        lambda header: {**header, "x": 3},
        lambda header: {},
    ],
)
def test_a_header_that_does_not_add_up(change, folder, pipe):
    refused(with_header(folder, change), pipe, "safetensors")


def test_what_is_no_file_is_not_opened(folder, pipe):
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    refused(folder, pipe, "missing")
    (folder / WEIGHTS).unlink()
    os.symlink("/dev/zero", folder / WEIGHTS)
    refused(folder, pipe, "missing")


def test_an_erasure_does_not_follow_its_file(folder):
    """It was loaded, and stays what it was when somebody writes over the file in place."""
    edit = Erasure.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in edit.tensors.items()}
    with open(folder / WEIGHTS, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        file.write(b"\xff" * size)
    assert identical(before, edit.tensors)


# --- fingerprints ----------------------------------------------------------------------------------------------------


def samples(values):
    def change(config):
        for print_ in config["base"]["components"].values():
            print_["samples"] = values(len(print_["samples"]))

    return change


@pytest.mark.parametrize("value", [1e39, -1e39, 1e308, 1.7e308, 3.5e38, 0.0, 10**200])
def test_no_fingerprint_fits_every_model(value, folder, pipe):
    refused(forged(folder, samples(lambda count: [value] * count)), pipe, "wrong base model")


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_a_fingerprint_of_few_samples_fits_none(count, folder, pipe):
    refused(forged(folder, samples(lambda _: [0.0] * count)), pipe, "wrong base model")


def test_a_fingerprint_fits_its_model_in_any_precision_and_no_other(pipe):
    print_ = fingerprint(pipe.unet)
    assert matches(print_, print_) and matches(print_, json.loads(json.dumps(print_)))
    for dtype in (torch.float16, torch.bfloat16):
        assert matches(print_, fingerprint(tiny_pipeline().to(dtype).unet))
    assert not matches(print_, fingerprint(tiny_pipeline(seed=7).unet))
    for bad in (math.nan, math.inf, -math.inf):
        broken = {**print_, "samples": [bad, *print_["samples"][1:]]}
        assert not matches(broken, broken) and not matches(print_, broken)
    empty = {**print_, "samples": []}
    assert not matches(empty, empty) and not matches({}, {}) and not matches(print_, {"layout": print_["layout"]})


# --- scales and factors ----------------------------------------------------------------------------------------------

SCALES = [math.nan, math.inf, -math.inf, 1e300, -1e5, 10**400, "1", None, [1.0], torch.tensor(math.nan)]


@pytest.mark.parametrize("kind", ["operator", "delta"])
@pytest.mark.parametrize("scale", SCALES, ids=repr)
def test_a_scale_that_is_none_is_refused_before_anything_is_written(kind, scale, originals):
    pipe, edit = tiny_pipeline(), Erasure.from_pretrained(originals / kind)
    before = weights(pipe)
    doors = [lambda: edit.apply(pipe, scale), lambda: load_erasure(pipe, edit, scale=scale)]
    if scale is not None:  # None is "as it is applied"
        doors += [lambda: edit.fuse(pipe, scale), lambda: edit.fuse(pipe, scale, low_memory=True)]
    for door in doors:
        with pytest.raises(ValueError, match="a scale is a number"):
            door()
        assert identical(before, weights(pipe))
    edit.apply(pipe, 0.5)
    half = weights(pipe)
    for scales in (scale, [scale]):
        if scales != [1.0]:
            with pytest.raises(ValueError, match="a scale is a number"):
                set_erasures(pipe, edit.name, scales)
        assert identical(half, weights(pipe))
    edit.remove(pipe)
    assert identical(before, weights(pipe))


@pytest.mark.parametrize("scale", [math.nan, math.inf, 1e300, "1"])
def test_attaching_and_exporting_refuse_it_too(scale, originals, tmp_path):
    pipe, edit = tiny_pipeline(), Erasure.from_pretrained(originals / "operator")
    for scales in (scale, [scale]):
        with pytest.raises(ValueError, match="a scale is a number"):
            attach_erasures(pipe, edit, scales=scales)
    with attach_erasures(pipe, edit), pytest.raises(ValueError, match="a scale is a number"):
        erasures(pipe, {edit: scale})
    with pytest.raises(ValueError, match="a scale is a number"):
        export_official(edit, pipe, tmp_path / "x.safetensors", scale=scale)
    assert not list(tmp_path.iterdir())


def test_scales_of_other_number_types_are_numbers(originals):
    pipe, edit = tiny_pipeline(), Erasure.from_pretrained(originals / "operator")
    edit.apply(pipe, 0.5)
    half = weights(pipe)
    for scale in (np.float32(0.5), np.array(0.5), torch.tensor(0.5), np.array([0.5]), (0.5,)):
        set_erasures(pipe, [edit.name], 0)
        set_erasures(pipe, [edit.name], scale)
        assert identical(half, weights(pipe))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["operator", "delta"])
def test_an_edit_that_overflows_is_refused_and_leaves_no_trace(kind, dtype, folder, originals):
    """Finite numbers in the file, and a weight that does not hold them."""
    shutil.rmtree(folder)
    shutil.copytree(originals / kind, folder)
    largest = torch.finfo(dtype).max if dtype != torch.float32 else 3e38
    tensors = {name: torch.full_like(t, largest / 2) for name, t in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    edit, pipe = Erasure.from_pretrained(forged(folder)), tiny_pipeline().to(dtype)
    before = weights(pipe)
    doors = [
        lambda: edit.apply(pipe, 100.0),
        lambda: edit.fuse(pipe, 100.0),
        lambda: edit.fuse(pipe, 100.0, low_memory=True),
    ]
    for door in doors:
        with pytest.raises(ValueError, match="overflows"):
            door()
        assert identical(before, weights(pipe))
    other = an_erasure(tiny_pipeline(), "operator", "van gogh")
    other.apply(pipe)
    with pytest.raises(ValueError, match="overflows"):
        edit.apply(pipe, 100.0)
    other.remove(pipe)
    assert identical(before, weights(pipe))


# --- foreign words ---------------------------------------------------------------------------------------------------


def everywhere(text):
    """Put a text wherever a folder holds words."""

    def change(config):
        config["concepts"][0] |= {"name": text, "synonyms": [text], "anchor": f"not {text}"}
        config |= {"method": text, "keep": [text], "preset": text, "settings": {text: text}}
        config["base"]["name"], config["base"]["licence"] = text, {"license": text, "license_link": text}
        config["report"] = {text: 1.0, "target": {"moved": 1.0, "cosine": 0.5}, f"{text} more": {text: 2.0}}
        config["evaluation"] = [{text: text, f"{text} n": 1}]

    return change


WRITABLE = [text for text in HOSTILE if "\ud800" not in text]


@pytest.mark.parametrize("text", WRITABLE)
def test_the_card_is_inert(text, folder):
    forged(folder, everywhere(text))
    edit = Erasure.from_pretrained(folder)
    if text.isprintable():
        edit.name = text.replace("/", "-")
    card = edit.card()
    assert not HARMFUL.search(card)
    _, header, body = card.split("---\n", 2)
    facts = yaml.safe_load(header)
    assert set(facts) <= {"library_name", "base_model", "base_model_relation", "license", "tags"}
    code = re.sub(r"```.*?```|`[^`\n]*`", "", body, flags=re.DOTALL)  # nothing in code is markup
    assert card.count("```") == 2 and code.count("`") == code.count("\\`")
    assert "<" not in code and not re.search(r"(?<!\\)\]\((?!https://github\.com/diffusion-erasure)", code)
    assert re.findall(r"^#+ .*", code, re.MULTILINE)[1:] == [
        "## What the edit moved", "## Evaluation", "## What this does and does not do", "## Licence",
    ]  # fmt: skip
    rows = re.findall(r"^\|.*", code, re.MULTILINE)
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} <= {3, 4}


@pytest.mark.parametrize("text", WRITABLE)
def test_inspect_is_inert(text, folder, monkeypatch, capsys):
    forged(folder, everywhere(text))
    monkeypatch.setenv("COLUMNS", "400")
    for options in ((), ("--json",)):
        code, out, err = run("inspect", folder, *options, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 0 and not HARMFUL.search(out + err)
    assert json.loads(out)["concepts"][0]["name"] == text


@pytest.mark.parametrize(
    "text", first(WRITABLE, *(text for text in WRITABLE if text.startswith(("\x1b[2J", "cat", "[/]", "a\n", "line"))))
)
def test_errors_that_quote_a_file_are_inert(text, folder, monkeypatch, capsys):
    def cli(*arguments):
        code, out, err = run(*arguments, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 2 and err.count("\n") == 1 and not HARMFUL.search(out + err) and len(err) < 2500
        return err

    for field in ("kind", "format"):
        cli(
            "inspect",
            forged(shutil.copytree(folder, folder.parent / field), lambda c, f=field: c.update({f: text * 50})),
        )
    recipe = folder.parent / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"version": 1, "out": "o", "concepts": [text], "methods": ["uce"]}))
    cli("batch", recipe, "--dry-run")
    recipe.write_text(yaml.safe_dump({"version": 1, "out": "o", "concepts": ["superhero"], "methods": [text]}))
    cli("batch", recipe, "--dry-run")
    recipe.write_text(yaml.safe_dump({"version": 1, text: 1}))
    cli("batch", recipe)


@pytest.mark.parametrize("text", WRITABLE)
def test_the_plan_of_a_batch_is_inert(text, tmp_path, monkeypatch, capsys):
    concept = {"name": text, "neighbours": ["ninja"]}
    plan = {"version": 1, "out": "o", "concepts": [concept], "methods": ["uce"], "bases": [text]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plan))
    code, out, err = run("batch", tmp_path / "recipe.yaml", "--dry-run", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0 and not HARMFUL.search(out + err)


def test_a_licence_is_passed_on_and_a_bomb_is_not(tmp_path):
    """The base model's own card is foreign too."""
    bomb = "&l0 [x,x,x,x,x,x,x,x,x,x]"
    for level in range(1, 9):
        bomb = f"&l{level} [{bomb}, {', '.join([f'*l{level - 1}'] * 9)}]"
    pipe = tiny_pipeline()
    pipe.register_to_config(_name_or_path=str(tmp_path))
    for text, known in {
        "license: mit\nlicense_link: https://example.org/licence": "https://example.org/licence",
        "license: mit\nlicense_link: javascript:alert(1)": None,
        f"license: {bomb}": None,
        f"license: {'[' * 3000}{']' * 3000}": None,
    }.items():
        (tmp_path / "README.md").write_text(f"---\n{text}\n---\n")
        card = erase(pipe, "cat", keep=["superhero"], apply=False).card()
        assert yaml.safe_load(card.split("---")[1]).get("license_link") == known
        assert "javascript" not in card and len(card) < 10_000


def test_names_of_a_thousand_concepts_make_a_folder(tmp_path):
    concepts = [Concept(f"thing {i}") for i in range(200)]
    edit = make(tiny_pipeline(), concepts, "uce", preset="official-2025", keep=["ninja"])
    assert len(edit.name) <= 100
    assert Erasure.from_pretrained(edit.save_pretrained(tmp_path / edit.name)).name == edit.name
    assert (tmp_path / edit.name / CARD).exists()
