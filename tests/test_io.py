"""What is written is whole, what is read is bounded, what is printed does nothing."""

import errno
import hashlib
import json
import os
import re
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from erasure import Concept, Suite
from erasure.artifact.files import check_name
from erasure.io import (
    blake2b,
    check_file,
    check_writable,
    folder_name,
    markdown,
    parse_json,
    parse_yaml,
    printable,
    read_json,
    remove_partials,
    sha256,
    sha256_file,
    sha256_json,
    shown,
    write_atomically,
    write_json,
    writing,
    writing_folder,
)
from erasure.methods.base import Request
from erasure.methods.uce import UCE
from erasure.terminal import PlainTable, say
from tests.import_everything import FOLDERS, REPOSITORY

HOSTILE = [
    "\x1b[2J\x1b[31mred",
    "\x1b]0;title\x07",
    "\x9b31m",
    "cat\u202etac\u2066",
    "zero\u200bwidth\ufeff",
    "[/]x[link=https://evil.example]ok[/link]",
    ":bomb:",
    "<script>alert(1)</script>",
    "a\n\n# INJECTED\r| b |",
    "`code` **bold** ~~gone~~ [a](javascript:alert(1)) ![i](https://evil.example/i.png)",
    "line\u2028separator",
    "half \ud800 character",
    "unassigned \u0378 and private \ue000",
]
HARMFUL = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\uf8ff\u0378]"
)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_file_is_whole_or_as_it_was(tmp_path):
    file = tmp_path / "new" / "a.json"
    write_json(file, {"a": "é"})
    assert file.read_text("utf-8") == '{\n  "a": "é"\n}\n'
    with pytest.raises(ZeroDivisionError), writing(file) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert json.loads(file.read_text("utf-8")) == {"a": "é"} and len(list(file.parent.iterdir())) == 1


def test_permissions_are_those_of_any_other_file(tmp_path):
    (tmp_path / "plain").write_text("x")
    write_atomically(tmp_path / "ours", "x")
    with writing_folder(tmp_path / "folder") as folder:
        (folder / "x").write_text("x")
    (tmp_path / "plain folder").mkdir()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "plain folder").stat().st_mode


def test_a_long_name_can_be_written(tmp_path):
    write_atomically(tmp_path / ("a" * 240 + ".json"), "x")
    with writing_folder(tmp_path / ("b" * 240)) as folder:
        (folder / "x").write_text("x")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["a" * 256, "é" * 128, "a" * 256 + "/b"])
@pytest.mark.parametrize("check", [check_writable, check_file])
def test_a_name_that_no_file_can_have_is_refused_before_the_work(check, name, tmp_path):
    with pytest.raises(ValueError, match="a name of more than 255 bytes; got"):
        check(tmp_path / name)
    check(tmp_path / ("a" * 255))


@pytest.mark.parametrize("check", [check_writable, check_file])
def test_a_path_that_is_no_text_is_refused_before_the_work(check, tmp_path):
    with pytest.raises(ValueError, match="a path of bytes that are no text; got .*udce9"):
        check(tmp_path / os.fsdecode(b"caf\xe9"))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc, where nobody can make a file")
@pytest.mark.parametrize("check", [check_writable, check_file])
def test_a_folder_in_which_even_root_makes_nothing_is_refused_before_the_work(check):
    with pytest.raises(PermissionError, match="/proc/self may not be written to; give another folder"):
        check("/proc/self/new/of mine")


def test_looking_whether_a_folder_can_be_written_leaves_nothing(tmp_path):
    check_writable(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_folder_appears_whole_and_is_replaced_file_by_file(tmp_path):
    target = tmp_path / "f"
    with pytest.raises(ZeroDivisionError), writing_folder(target) as folder:
        (folder / "config").write_text("1")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    for number in (1, 2):
        with writing_folder(target, last="config") as folder:
            (folder / "unet").mkdir()
            (folder / "config").write_text(str(number))
            (folder / "unet" / "weights").write_text(str(number))
        (target / "own.txt").write_text("of the user")
    assert (target / "config").read_text() == (target / "unet" / "weights").read_text() == "2"
    assert (target / "own.txt").exists() and len(list(tmp_path.iterdir())) == 1


def test_the_file_that_completes_a_folder_is_replaced_last(tmp_path, monkeypatch):
    target, order = tmp_path / "f", []
    with writing_folder(target) as folder:
        (folder / "a").write_text("old")
    move = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), move(a, b)))
    with writing_folder(target, last="a") as folder:
        for name in "bac":
            (folder / name).write_text("new")
    assert order == ["b", "c", "a"]


def test_what_killed_writers_left_in_a_folder_is_deleted_and_nothing_else(tmp_path):
    deep = tmp_path / "probes"
    deep.mkdir()
    left = [
        tmp_path / ".result.0123456789ab.json", deep / ".a.b.0123456789ab.jsonl", tmp_path / ".no-suffix.0123456789ab"
    ]  # fmt: skip
    kept = [tmp_path / ".lock", tmp_path / ".result.json", tmp_path / "a.0123456789ab.json", deep / ".hidden.txt"]
    for file in (*left, *kept):
        file.touch()
    (tmp_path / ".erasure.x7_abc12" / "new").mkdir(parents=True)
    (tmp_path / ".erasure.x7_abc12" / "new" / "file").touch()
    remove_partials(tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(kept)
    assert {path for path in tmp_path.rglob("*") if path.is_dir()} == {deep}


@pytest.mark.parametrize("into", [writing, writing_folder])
def test_a_disk_that_takes_no_more_is_an_oserror_from_safetensors_too(into, tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as refused, into(tmp_path / "out") as place:
            save_file({"a": torch.zeros(1000)}, place / "weights" if place.is_dir() else place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.value.errno == errno.EFBIG and not list(tmp_path.iterdir())


def test_what_is_to_last_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """The order that a loss of power leaves no hole in: content, name, the folder's list of names."""
    order, real = [], (os.fsync, os.replace)
    name = lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append(("sync", name(descriptor))), real[0](descriptor)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(("name", str(b))), real[1](a, b)))
    write_json(tmp_path / "a.json", 1)
    assert [what for what, _ in order] == ["sync", "name", "sync"]
    assert order[0][1] != order[1][1] == str(tmp_path / "a.json") and order[2][1] == str(tmp_path)
    order.clear()
    write_atomically(tmp_path / "b", "cached", durable=False)
    assert [what for what, _ in order] == ["name"]
    order.clear()
    with writing_folder(tmp_path / "f") as folder:
        (folder / "part").mkdir()
        (folder / "part" / "file").write_text("x")
    assert [Path(where).name for _, where in order] == ["file", "part", "new", tmp_path.name]


def test_nothing_else_in_the_library_writes_or_hashes_by_hand():
    by_hand = re.compile(r"^\s*(import|from) (hashlib|yaml)\b|os\.replace\(|\bmkstemp\(", re.MULTILINE)
    found = [
        str(path.relative_to(REPOSITORY))
        for top in FOLDERS.values()
        for path in (REPOSITORY / top).rglob("*.py")
        if by_hand.search(path.read_text("utf-8"))
    ]
    assert {name.rpartition("/")[0] for name in found} == {"erasure/io"}


# --- hashes ----------------------------------------------------------------------------------------------------------


def test_hashes_are_those_of_hashlib(tmp_path):
    raw = bytes(range(256)) * 100
    (tmp_path / "f").write_bytes(raw)
    expected = hashlib.sha256(raw).hexdigest()
    assert sha256(raw) == sha256_file(tmp_path / "f") == sha256([raw[:7], memoryview(raw[7:])]) == expected
    assert sha256("é") == hashlib.sha256("é".encode()).hexdigest()
    assert blake2b([raw], size=20) == hashlib.blake2b(raw, digest_size=20).hexdigest()


def test_the_hash_of_data_does_not_depend_on_its_order():
    a, b = {"x": [1, 2.5], "y": "é"}, {"y": "é", "x": [1, 2.5]}
    assert sha256_json(a) == sha256_json(b) == hashlib.sha256(b'{"x":[1,2.5],"y":"\\u00e9"}').hexdigest()
    assert sha256_json(a, spaced=True) == hashlib.sha256(b'{"x": [1, 2.5], "y": "\\u00e9"}').hexdigest()
    with pytest.raises(TypeError):
        sha256_json({"p": Path("x")})
    assert sha256_json({"p": Path("x")}, default=str) == sha256_json({"p": "x"})


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": 1e999}', "no finite number"),
        ("9" * 5000, "5,000 digits"),
        ("[" * 100_000, "JSON"),
        ("[" * 40 + "]" * 40, "nested more than"),
        ('{"a": "\\ud800"}', "half a character"),
        ("{", "JSON"),
        (b"\xff\xfe", "JSON"),
        ('{"' + "k" * 100_000 + '": 1, "' + "k" * 100_000 + '": 2}', "stands twice"),
    ],
)
def test_json_that_its_grammar_leaves_open_is_refused_in_one_short_line(text, fault):
    with pytest.raises(ValueError, match=fault) as caught:
        parse_json(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_json_is_bounded_by_its_size(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, 2.5, "x"]}')
    assert read_json(tmp_path / "a.json") == {"a": [1, 2.5, "x"]}
    with open(tmp_path / "sparse.json", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="bytes"):
        read_json(tmp_path / "sparse.json")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "pipe.json")


def bomb(depth=8, width=10):
    text = "&l0 [x,x,x,x,x,x,x,x,x,x]"
    for level in range(1, depth):
        text = f"&l{level} [{text}, {', '.join([f'*l{level - 1}'] * (width - 1))}]"
    return text


MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}], y{i}: 1}}\n" for i in range(1, 9)
)
SUITE = "version: 1\nname: s\nconcept: {name: superhero, neighbours: [ninja]}\nunrelated: [cat]\n"


@pytest.mark.parametrize(
    "text",
    [
        f"{SUITE}words: {{paraphrases: [{bomb()}]}}\n",
        f"{SUITE}x: {bomb()}\n",
        SUITE.replace("name: s\n", f"name: {bomb()}\n"),
        f"{SUITE}keep: &k [*k]\n",
        "&r\nversion: 1\nname: s\nconcept: *r\n",
        SUITE + MERGES,
        f"{SUITE}keep: {'[' * 5000}{']' * 5000}\n",
        f"{SUITE}keep: !!python/object/apply:os.system ['true']\n",
        f"{SUITE}unrelated: [dog]\n",
        f"{SUITE}guidance_scale: .nan\n",
        f"{SUITE}guidance_scale: .inf\n",
        f"{SUITE}images_per_prompt: {'9' * 5000}\n",
        f"{SUITE}images_per_prompt: 0x{'f' * 5000}\n",
        f"{SUITE}keep: 2020-99-99\n",
        f"{SUITE}keep: ['\0']\n",
        f'{SUITE}keep: ["\\ud800"]\n',
        f"{SUITE}---\n{SUITE}",
        f"{SUITE}? [a]\n: b\n",
        f"{SUITE}{'k' * 100_000}: 1\n",
        SUITE.replace("ninja", f"superhero, {', '.join(f'n{i}' for i in range(20_000))}"),
        "\x00\xff",
        "- a\n",
        "",
    ],
)
def test_hostile_yaml_is_refused_quickly_in_one_short_line(text, tmp_path):
    (tmp_path / "suite.yaml").write_text(text, "utf-8", "surrogatepass")
    began = time.process_time()
    with pytest.raises(ValueError, match=r"suite\.yaml: ") as caught:
        Suite.load(tmp_path / "suite.yaml")
    assert time.process_time() - began < 10
    fault = str(caught.value).removeprefix(str(tmp_path))
    assert len(fault) < 700 and not HARMFUL.search(fault) and "\n" not in fault


def test_aliases_that_only_save_writing_are_read():
    text = "base: &b {lamb: 0.1}\nuce: {<<: *b, rank: 2}\nesd: *b\n"
    assert parse_yaml(text) == {"base": {"lamb": 0.1}, "uce": {"lamb": 0.1, "rank": 2}, "esd": {"lamb": 0.1}}
    assert parse_yaml("") is None and parse_yaml("0.5") == 0.5 and parse_yaml("[a, 1]") == ["a", 1]


# --- printing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_foreign_text_does_nothing_where_it_is_printed(text, capsys):
    for form in (printable, markdown, shown):
        assert not HARMFUL.search(form(text)) and "\n" not in form(text)
    console = Console(force_terminal=True, color_system="truecolor", width=300)
    table = PlainTable(text, "x", title=text)
    table.add_row(text, text)
    say(text, on=console)
    console.print(table)
    out = capsys.readouterr().out
    own = re.sub(r"\x1b\[[\d;]*m", "", out)  # what the table itself is drawn with
    assert not HARMFUL.search(own)
    assert own.count(printable(text)) == 5 and "\x1b]" not in out  # each whole, as itself, and no link


def test_markdown_shows_the_text_itself():
    assert markdown("a | b") == "a \\| b" and markdown("<b> -> c") == "&lt;b> -> c" and markdown("`x`") == "\\`x\\`"
    assert markdown("[a](https://b)") == "\\[a\\](https://b)" and markdown("# a") == "\\# a"
    assert markdown("to_k of Van Gogh, -0.91") == "to_k of Van Gogh, -0.91"
    assert (
        markdown("-0.91") == "-0.91"
        and markdown("- a") == "\\- a"
        and markdown(">a") == "\\>a"
        and markdown("1. a") == "1\\. a"
    )


def test_text_that_does_no_harm_stays():
    for text in ("Beyoncé", "超人", "👨\u200d🚀", "שלום", "naïve – “quoted”"):
        assert printable(text) == text
    assert printable("a" * 1000, limit=10) == "a" * 10 + "…" and len(printable("\x1b" * 1000, limit=10)) == 11
    assert len(shown(["x" * 10_000] * 10_000)) < 250 and len(shown(10**400)) < 250


# --- names of folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["../../etc", "/etc/passwd", "C:\\x", "CON", "nul.txt", "a:b", "x. ", "", " ", "..", "~root", "a\x00b", "字" * 300]
    + HOSTILE,
)
def test_a_folder_name_is_safe_everywhere(text, tmp_path):
    name = folder_name(text)
    assert 0 < len(name) <= 100 and len(name.encode()) <= 200
    assert not set(name) & set('<>:"/\\|?*~') and name.isprintable() and ".." not in name
    assert name == name.strip(" .") and not re.fullmatch(r"(?i)(con|nul)(\..*)?", name)
    (tmp_path / name).mkdir()
    check_name(name)


def test_long_names_are_cut_and_stay_apart():
    many = [Concept(f"concept number {i}") for i in range(200)]
    names = [UCE().name_for(Request(tuple(concepts))) for concepts in (many, many[:-1], many[::-1])]
    assert len(set(names)) == 3 and all(len(name) <= 100 and name.endswith("-uce") for name in names)
    assert UCE().name_for(Request((Concept("cat"),))) == "cat-uce"
