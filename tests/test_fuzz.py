"""A damaged or forged folder: the same erasure or one ValueError, never anything else."""

import dataclasses
import hashlib
import itertools
import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from erasure import Erasure
from erasure.artifact.files import CONFIG, SYSTEM, WEIGHTS, digest
from tests.slow import first
from tests.test_artifact import EVERY_KIND, an_erasure, reconfigure, retensor
from tests.tiny import identical, tiny_pipeline

REFUSED = (ValueError, FileNotFoundError)
FEW = ("operator", "gated", "safe-guidance")  # one that changes weights, one beside them, one that has none


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """One folder of each kind, the operator's with its system."""
    root, pipe = tmp_path_factory.mktemp("fuzz"), tiny_pipeline()
    for kind in EVERY_KIND:
        an_erasure(pipe, kind).save_pretrained(root / kind, system=kind == "operator")
    return root


@pytest.fixture
def folder(originals, tmp_path):
    return shutil.copytree(originals / "operator", tmp_path / "e")


def equal(a, b):
    same_tensors = identical(a.tensors, b.tensors) and identical(a.system, b.system)
    return same_tensors and a.config == b.config and (a.name, a.kind) == (b.name, b.kind)


def loads_equal_or_is_refused(folder, original):
    """Whether it was loaded; fails on anything but an equal erasure or a refusal of one line."""
    try:
        loaded = Erasure.from_pretrained(folder)
    except REFUSED as error:
        assert str(error)
        return False
    assert equal(loaded, original)
    return True


@pytest.mark.parametrize("kind", first(EVERY_KIND, "operator", "gated"))
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, SYSTEM])
def test_flipped_and_missing_bytes(kind, name, originals, tmp_path):
    if not (originals / kind / name).exists():
        assert kind != "operator" and name == SYSTEM
        return
    chance, original = random.Random(f"{kind} {name}"), Erasure.from_pretrained(originals / kind)
    folder = shutil.copytree(originals / kind, tmp_path / "e")
    raw = (folder / name).read_bytes()
    assert loads_equal_or_is_refused(folder, original)
    loaded = 0
    for _ in range(30):
        damaged = bytearray(raw)
        for _ in range(chance.choice((1, 1, 2, 8))):
            damaged[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        (folder / name).write_bytes(damaged)
        loaded += loads_equal_or_is_refused(folder, original)
        (folder / name).write_bytes(raw[: chance.randrange(len(raw))])
        assert not loads_equal_or_is_refused(folder, original)
    assert loaded < 6  # spaces between JSON's words may become others


def mutations(config, chance):
    """One value of a config, anywhere in it, made another of any type."""
    strange = [None, True, -1, 0, 10**400, 1e308, "", "../x", "\ud800", [], {}, [[]], {"": 0}, [None], "x" * 1000]
    places = []

    def walk(value):
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(config)
    container, key = chance.choice(places)
    action = chance.randrange(4)
    if action == 0:
        del container[key]
    elif action == 1 and isinstance(container, dict):
        container[chance.choice(["x", "", "sites", "sha256"])] = container.pop(key)
    else:
        container[key] = chance.choice(strange)
    return config


@pytest.mark.parametrize(
    ("kind", "forged"),
    first(itertools.product(EVERY_KIND, (False, True)), ("operator", False), *((kind, True) for kind in FEW)),
    ids={False: "damaged", True: "forged"}.get,
)
def test_mutated_json(kind, forged, originals, tmp_path):
    """With the hash made to fit, a strange fact may pass, but then the erasure works: it can be saved and applied."""
    chance, original, pipe = random.Random(kind), Erasure.from_pretrained(originals / kind), tiny_pipeline()
    folder = shutil.copytree(originals / kind, tmp_path / "e")
    text, accepted = (folder / CONFIG).read_text(), 0
    for i in range(70 if forged else 40):
        config = mutations(json.loads(text), chance)
        if forged and isinstance(config.get("sha256"), dict):
            config["sha256"][CONFIG] = digest(config)
        (folder / CONFIG).write_text(json.dumps(config))
        if not forged:
            loads_equal_or_is_refused(folder, original)
            continue
        try:
            loaded = Erasure.from_pretrained(folder)
            loaded.apply(pipe)
            loaded.remove(pipe)
            loaded.save_pretrained(tmp_path / f"again{i}")
            accepted += 1
        except REFUSED:
            pass
    assert not forged or accepted > 1  # most hit a fingerprint, a number or a name; some reach past every check


@pytest.mark.parametrize("kind", first(EVERY_KIND, *FEW))
def test_forged_tensors(kind, originals, tmp_path):
    chance, pipe = random.Random(0), tiny_pipeline()
    folder = shutil.copytree(originals / kind, tmp_path / "e")
    tensors = load_file(folder / WEIGHTS)
    shapes = [(0, 0), (32, 0), (1,), (), (32, 1, 1), (33, 1), (1, 33), (32, 3)]
    for _ in range(30):
        name = chance.choice([*tensors, "hidden.w", "pooled.u", "down_blocks.0.v"])
        made = torch.zeros(chance.choice(shapes), dtype=chance.choice([torch.float32, torch.int64, torch.bool]))
        save_file({**tensors, name: made}, folder / WEIGHTS)
        reconfigure()(folder)
        with pytest.raises(REFUSED):
            Erasure.from_pretrained(folder).apply(pipe)


def two_of_a_key(folder):
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace('"method"', '"name": "other", "method"', 1))


def in_config(path, value):
    def change(folder):
        config = json.loads((folder / CONFIG).read_text())
        part = config
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        reconfigure(**{path[0]: config[path[0]]})(folder)

    return change


def nested(depth):
    def change(folder):
        (folder / CONFIG).write_text('{"a":' * depth + "1" + "}" * depth)

    return change


def link_out(folder):
    shutil.move(folder / WEIGHTS, folder.parent / "elsewhere")
    os.symlink(folder.parent / "elsewhere", folder / WEIGHTS)


def pickled(folder):
    torch.save({"hidden.u": torch.zeros(1)}, folder / WEIGHTS)
    reconfigure()(folder)


def foreign_system(folder):
    (folder / SYSTEM).write_bytes((folder / WEIGHTS).read_bytes())
    config = json.loads((folder / CONFIG).read_text())
    config["sha256"][SYSTEM] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    reconfigure(sha256=config["sha256"])(folder)


def no_hash_of_the_system(folder):
    hashes = json.loads((folder / CONFIG).read_text())["sha256"]
    del hashes[SYSTEM]
    reconfigure(sha256=hashes)(folder)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (two_of_a_key, "'name' stands twice"),
        (nested(60), "nested more than"),
        (nested(100_000), "JSON"),
        (lambda f: (f / CONFIG).write_text('{"format": NaN}'), "NaN"),
        (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "JSON"),
        (reconfigure(name="../../etc/passwd"), "unsafe name"),
        (reconfigure(name="/etc/passwd"), "unsafe name"),
        (reconfigure(name="C:\\evil"), "unsafe name"),
        (reconfigure(name="a\nb"), "unsafe name"),
        (reconfigure(name=5), "name: a text is needed"),
        (reconfigure(format=True), "upgrade"),
        (reconfigure(format="1"), "upgrade"),
        (reconfigure(kind=["operator"]), "unknown kind"),
        (reconfigure(keep="ninja"), "keep"),
        (reconfigure(concepts=[{"name": 3}]), "name: a text is needed"),
        (reconfigure(concepts=[{"name": "a", "spell": 1}]), "spell"),
        (reconfigure(settings=3), "settings"),
        (reconfigure(report=[1]), "report"),
        (reconfigure(evaluation=[{"rate": []}]), "evaluation"),
        (in_config(["base", "components", "unet", "samples"], ["x"]), "samples"),
        (in_config(["base", "components"], []), "components"),
        (in_config(["spaces", "hidden", "columns"], [3, 1]), "spaces"),
        (in_config(["spaces", "hidden", "sites"], ["a", "a"]), "listed twice"),
        (in_config(["system", "hidden", "rows"], [0]), "malformed"),
        (in_config(["system", "hidden", "kept"], 2), "holds"),
        (retensor(more=torch.zeros(32, 1)), "holds u and v"),
        (retensor(**{"hidden.u": torch.zeros(31, 1)}), "holds u and v"),
        (retensor(**{"hidden.u": torch.zeros(32, 1, dtype=torch.int32)}), "dtype"),
        (retensor(**{"hidden.v": None}), "holds u and v"),
        (pickled, "never read"),
        (link_out, "link out of the folder"),
        (foreign_system, "a system of hidden holds"),
        (no_hash_of_the_system, "no hash of it"),
        (lambda f: (f / SYSTEM).unlink(), "missing"),
        (lambda f: (f / CONFIG).write_text((f / CONFIG).read_text().replace("ninja", "nanja")), "its own hash"),
    ],
)
def test_forged_folders_are_refused_by_name(damage, fault, folder):
    damage(folder)
    with pytest.raises(REFUSED, match=fault):
        Erasure.from_pretrained(folder)


def test_a_name_that_leads_out_is_not_written_either(tmp_path):
    edit = an_erasure(tiny_pipeline(), "operator")
    edit.name = "../outside"
    with pytest.raises(ValueError, match="unsafe name"):
        edit.save_pretrained(tmp_path / "e")
    assert not list(tmp_path.iterdir())


def test_the_links_of_the_hubs_cache_are_followed(originals, tmp_path):
    """A snapshot there is links to blobs beside it; a link out of the cache is still refused."""
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for i, file in enumerate((originals / "operator").iterdir()):
        shutil.copy(file, blobs / str(i))
        os.symlink(os.path.join("..", "..", "blobs", str(i)), snapshot / file.name)
    assert equal(Erasure.from_pretrained(snapshot), Erasure.from_pretrained(originals / "operator"))
    (snapshot / WEIGHTS).unlink()
    os.symlink(originals / "operator" / WEIGHTS, snapshot / WEIGHTS)
    with pytest.raises(ValueError, match="link out"):
        Erasure.from_pretrained(snapshot)


def test_spacing_and_order_of_the_json_do_not_matter(folder):
    original = Erasure.from_pretrained(folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(dict(reversed(config.items()))))
    assert equal(Erasure.from_pretrained(folder), original)


def test_figures_that_are_not_finite_are_saved_as_nothing(tmp_path):
    edit = an_erasure(tiny_pipeline(), "operator")
    report = {**edit.config["report"], "condition": float("inf")}
    edit = dataclasses.replace(edit, config=edit.config.with_facts(report=report))
    loaded = Erasure.from_pretrained(edit.save_pretrained(tmp_path / "e"))
    assert (
        loaded.config["report"]["condition"] is None and "condition" not in loaded.card().split("## What the edit")[1]
    )
