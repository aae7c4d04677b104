"""Prompt files: the right file is read whole, and any other is refused with what is wrong about it."""

from __future__ import annotations

import csv
import dataclasses
import hashlib

import pytest

from erasure.eval.core.prompt_files import KINDS, PERCENTAGES, load, named, named_files, overlap, unlearn_canvas
from erasure.eval.probes import probe_class
from erasure.eval.probes.base import LACKING, Evidence, lacking
from tests.made_up import KNOWN, good, judged, share
from tests.probe_helpers import tiny_context

I2P_HEADER = ["prompt", "categories", *PERCENTAGES, "evaluation_seed", "evaluation_guidance", "case_number"]


def i2p_rows(count: int, guidance: float = 7) -> list[list[object]]:
    return [
        [f"a harmless prompt, {i}", "sexual, shocking", 40.0, 10.0, 5.0, 100 + i, guidance, i] for i in range(count)
    ]


def written(path, header: list[str] | None, rows: list[list[object]]):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([*([header] if header else []), *rows])
    return path


def test_rows_keep_text_seed_guidance_category_and_percentages(tmp_path) -> None:
    path = written(
        tmp_path / "i2p.csv", I2P_HEADER, [["two\nlines, and a comma ", "hate", 50.0, 1.5, 2, 2**32 - 1, 12, "007"]]
    )
    file = load(path, "i2p", expected=1)
    (row,) = file.rows
    assert (row.text, row.seed, row.guidance, row.category) == ("two\nlines, and a comma ", 2**32 - 1, 12.0, "hate")
    assert row.facts["nudity_percentage"] == 1.5 and row.facts["case_number"] == "007"
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and file.kind == "i2p"


@pytest.mark.parametrize(
    ("seed", "guidance"), [("evaluation_seed", "evaluation_guidance"), ("sd_seed", "sd_guidance_scale")]
)
def test_both_spellings_of_i2p_are_read(tmp_path, seed: str, guidance: str) -> None:
    header = [{"evaluation_seed": seed, "evaluation_guidance": guidance}.get(name, name) for name in I2P_HEADER]
    (row,) = load(written(tmp_path / "a.csv", header, i2p_rows(1)), "i2p", expected=1).rows
    assert (row.seed, row.guidance) == (100, 7.0)


def test_a_file_without_a_header_is_refused_and_does_not_lose_its_first_row(tmp_path) -> None:
    path = written(tmp_path / "a.csv", None, [["a church", 1, 7.5]] * 50)
    with pytest.raises(ValueError, match="no header.*first prompt would be lost"):
        load(path, "uda_objects")


def test_a_missing_column_is_named(tmp_path) -> None:
    rows = [row[:-2] + row[-1:] for row in i2p_rows(3)]
    path = written(tmp_path / "a.csv", [name for name in I2P_HEADER if name != "evaluation_guidance"], rows)
    with pytest.raises(ValueError, match="lacks the columns.*evaluation_guidance or sd_guidance_scale"):
        load(path, "i2p", expected=None)


def test_another_number_of_rows_is_refused_unless_it_is_declared(tmp_path) -> None:
    path = written(tmp_path / "a.csv", I2P_HEADER, i2p_rows(3))
    with pytest.raises(ValueError, match="4703 rows; got 3.*expected=None"):
        load(path, "i2p")
    assert len(load(path, "i2p", expected=None).rows) == len(load(path, "i2p", expected=3).rows) == 3


def test_the_guidance_of_the_nudity_prompts_is_read_and_checked(tmp_path) -> None:
    right = i2p_rows(104) + i2p_rows(38, guidance=12)
    file = load(written(tmp_path / "right.csv", I2P_HEADER, right), "uda_nudity")
    assert file.guidances() == {7.0: 104, 12.0: 38}
    with pytest.raises(ValueError, match="guidance 7 in 104 rows; got 142"):
        load(written(tmp_path / "wrong.csv", I2P_HEADER, i2p_rows(142)), "uda_nudity")


def test_a_file_that_says_nothing_about_guidance_gives_none(tmp_path) -> None:
    path = written(
        tmp_path / "a.csv", ["case_number", "prompt", "evaluation_seed", "artist"], [[0, "Irises", 3, "Van Gogh"]]
    )
    (row,) = load(path, "uda_styles", expected=None).rows
    assert row.guidance is None and row.category == "Van Gogh"


def test_gated_files_need_a_declared_number(tmp_path) -> None:
    path = written(tmp_path / "a.csv", ["sensitive prompt", "evaluation_seed"], [["x", 1], ["y", 2]])
    with pytest.raises(ValueError, match="not published"):
        load(path, "ring_a_bell")
    assert [r.text for r in load(path, "ring_a_bell", expected=2, columns={"text": "sensitive prompt"}).rows] == [
        "x",
        "y",
    ]


def test_captions_of_coco_are_read(tmp_path) -> None:
    header = ["case_number", "source", "prompt", "evaluation_seed", "coco_id"]
    path = written(tmp_path / "a.csv", header, [[0, "coco-30k", "A cat.", 41337, 203564]])
    (row,) = load(path, "coco_30k", expected=None).rows
    assert (row.text, row.seed, row.facts["coco_id"]) == ("A cat.", 41337, "203564")


def test_shifted_and_broken_rows_are_named(tmp_path) -> None:
    shifted = written(
        tmp_path / "a.csv", ["prompt", "evaluation_seed", "evaluation_guidance"], [["a", 1, 7], ["b", "c", 7]]
    )
    with pytest.raises(ValueError, match="a.csv, row 2: not a number: 'c'"):
        load(shifted, "uda_objects", expected=None)
    (tmp_path / "b.csv").write_text("prompt,evaluation_seed,evaluation_guidance\na, b,1,7\n")
    with pytest.raises(ValueError, match="row 1: another number of fields"):
        load(tmp_path / "b.csv", "uda_objects", expected=None)


def test_unknown_kinds_and_columns_are_refused(tmp_path) -> None:
    path = written(tmp_path / "a.csv", ["prompt"], [["a"]])
    with pytest.raises(ValueError, match="unknown kind.*i2p"):
        load(path, "i3p")
    with pytest.raises(ValueError, match=r"columns are named by what they hold; got \['words'\]"):
        load(path, "coco_10k", columns={"words": "prompt"})


def test_prompts_of_unlearn_canvas_are_made_from_lists() -> None:
    file = unlearn_canvas(["Van_Gogh", "Seed_Images"], ["Cats"], seeds=(188, 288), expected=None)
    assert [row.text for row in file.rows[:1]] == ["A Cats image in Van Gogh style."]
    assert len(file.rows) == 4 and file.rows[0].guidance == 9.0
    assert file.rows[0].facts == {"style": "Van_Gogh", "object": "Cats"}
    assert file.sha256 != unlearn_canvas(["Van_Gogh"], ["Cats"], expected=None).sha256
    with pytest.raises(ValueError, match="51 styles and 20 objects; got 1 and 1"):
        unlearn_canvas(["Van_Gogh"], ["Cats"])


def test_the_published_counts() -> None:
    counts = {name: kind.expected for name, kind in KINDS.items()}
    assert counts == {
        "i2p": 4703, "uda_nudity": 142, "uda_objects": 50, "uda_styles": 50, "ring_a_bell": None,
        "coco_30k": 30_000, "coco_10k": 10_000, "p4d_nudity": 361, "imagenette": 100, "unlearn_canvas": 5100,
        "geneval": 553, "erased_objects": None, "emma_name": None, "emma_long": None, "t2i_compbench": None,
        "tuned_on": None, "mma": None, "own": None,
    }  # fmt: skip


def test_columns_of_classes_are_read_under_the_names_their_authors_gave_them(tmp_path) -> None:
    classes = written(tmp_path / "a.csv", ["prompt", "seed", "class"], [["a picture of a church", 1825, "church"]])
    (row,) = load(classes, "erased_objects", expected=1).rows
    assert (row.seed, row.category) == (1825, "church")
    canvas = written(
        tmp_path / "b.csv", ["prompt", "evaluation_seed", "style", "object"], [["A Cats image", 188, "Rust", "Cats"]]
    )
    (row,) = load(canvas, "unlearn_canvas", expected=None).rows
    assert (row.category, row.facts) == ("Rust", {"object": "Cats"})


def test_prompts_two_files_share_are_found_whatever_their_case_and_spaces(tmp_path) -> None:
    first, second = (
        load(written(tmp_path / name, ["prompt"], [[text] for text in texts]), "tuned_on", expected=None)
        for name, texts in (("a.csv", ["A  cat", "a dog", "a\ncat", "A  cat"]), ("b.csv", ["a CAT ", "a heron"]))
    )
    assert overlap(first, second) == ("A  cat", "a\ncat")
    assert overlap(second, first) == ("a CAT ",) and overlap(first, first) == ("A  cat", "a dog", "a\ncat")


def test_the_command_line_names_a_kind_or_takes_a_list_of_ones_own(tmp_path) -> None:
    path = written(tmp_path / "mine.csv", ["prompt", "note"], [["a cat", "x"], ["a dog", "y"]])
    name, file = named(str(path))
    assert (name, file.kind, [row.text for row in file.rows]) == ("mine", "own", ["a cat", "a dog"])
    assert named(f"mma={path}")[0] == "mma"
    with pytest.raises(ValueError, match="4703 rows|lacks the columns"):
        named(f"i2p={path}")
    with pytest.raises(FileNotFoundError, match="none is shipped"):
        named("p4d_nudity=nowhere.csv")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "no header"),
        (b"prompt\n", "a header and no prompts"),
        (b"Prompt\na cat\n", r"none of \['prompt'\] in this spelling; got \['Prompt'\]"),
        (b"prompt;seed\na cat;3\n", "with commas between"),
        ("prompt\na cat\n".encode("utf-16"), "not UTF-8 text"),
        ("prompt\na café\n".encode("latin-1"), "not UTF-8 text"),
        (b'prompt\na cat\n"  "\n', "row 2: an empty prompt"),
        (b"prompt,prompt\na,b\n", "the column 'prompt' twice"),
        (b'prompt\n"' + b"x" * 200_000, "not readable as CSV"),
    ],
)
def test_a_file_that_is_no_list_of_prompts_is_refused_with_its_name(tmp_path, content, fault) -> None:
    (tmp_path / "mine.csv").write_bytes(content)
    with pytest.raises(ValueError, match=f"^mine.csv.*{fault}"):
        named(str(tmp_path / "mine.csv"))


def test_two_files_of_one_name_are_refused_and_none_is_dropped(tmp_path) -> None:
    (tmp_path / "other").mkdir()
    first, second = (written(folder / "mine.csv", ["prompt"], [["a cat"]]) for folder in (tmp_path, tmp_path / "other"))
    assert list(named_files([str(first), f"mma={second}"])) == ["mine", "mma"]
    with pytest.raises(ValueError, match="would be called 'mine'.*rename one"):
        named_files([str(first), str(second)])


@pytest.mark.parametrize(
    ("given", "error", "fault"),
    [
        ("x=y", ValueError, "unknown kind of prompt file 'x'"),
        ("I2P=y", ValueError, "did you mean 'i2p'"),
        ("i2p=", ValueError, "needs a path"),
        ("", ValueError, "needs a path"),
        (".", FileNotFoundError, "a folder, not a file"),
        ("nowhere.csv", FileNotFoundError, "no such file; give your own CSV"),
    ],
)
def test_a_slip_in_what_names_a_file_is_told(given, error, fault) -> None:
    with pytest.raises(error, match=fault):
        named(given)


def test_every_model_is_asked_with_the_prompts_of_every_file_once(tmp_path) -> None:
    """Prompts that a file has twice are asked once, and long ones say why they have no picture."""
    files = {
        "one": load(written(tmp_path / "a.csv", ["prompt"], [["a cat"], ["a cat"], ["the cat"]]), "own", expected=None),
        "two": load(written(tmp_path / "b.csv", ["prompt"], [["a dog " * 99]]), "own", expected=None),
    }
    context = dataclasses.replace(tiny_context(), prompt_files=files)
    probe = probe_class("prompt_file").preset("full")
    rows = {name: probe.run(context.models[name], context) for name in ("base", "noise")}
    asked = [(row.family, row.cluster, row.value is None) for row in rows["noise"]]
    assert sorted(asked) == [("one", "a cat", False), ("one", "the cat", False), ("two", "a dog " * 99, True)]
    found = probe.weigh(rows, {"base": "base", "noise": "erased"})
    assert {(e.model, e.family) for e in found if e.measure == "rate"} >= {("base", "one"), ("noise", "one")}


def test_without_a_file_the_probe_says_what_to_give() -> None:
    assert lacking(probe_class("prompt_file").preset("smoke"), tiny_context()) == LACKING["prompts"]


def test_prompts_of_a_file_that_bring_the_target_back_stand_against_the_claim() -> None:
    drawn = Evidence("prompt_file", "UCE", "rate", share(0.6), "i2p", None, KNOWN)
    assert judged(good()).suppression == "C3"  # not everybody has such a file
    report = judged([*good(), drawn])
    assert report.suppression == "C1" and report.answers["words"].verdict == "shown not"
