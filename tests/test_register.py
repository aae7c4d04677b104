"""The register: what is entered stays, what is in force is erased together, and pages say so plainly."""

import datetime
import hashlib
import html.parser
import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from erasure import Concept, Erasure, Suite, erase
from erasure.artifact import files
from erasure.backbone import backbone_of
from erasure.cli import main
from erasure.cli.register import commands
from erasure.eval.detectors import choice
from erasure.methods.gram import Gram
from erasure.register import Register, Settings, applying
from erasure.register.applying import apply, hashes_of, prints_of
from erasure.register.page import card, page
from erasure.register.rows import Base
from erasure.register.verifying import verify
from tests.eval_helpers import PixelDetector
from tests.register_helpers import BASE, FACTS, add, ago, made_up, new_register, pipe, prints, raw
from tests.tiny import identical, tiny_pipeline, weights

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e{{ 7 * 7 }}"


@pytest.fixture
def register(tmp_path):
    return new_register(tmp_path)


# --- end to end -------------------------------------------------------------------------------------------------------


def test_fifty_are_added_applied_verified_one_is_withdrawn_and_all_of_it_is_reported(register):
    before = weights(pipe())
    for number in range(50):
        add(register, made_up(number), keep=["ninja"], languages={"de": [f"{made_up(number)} mann"]})
    first = apply(register, pipe(), BASE)
    assert identical(weights(pipe()), before)
    assert len(first.entries) == len(first.served) == 50
    assert {entry.status for entry in register.entries()} == {"in force"}
    checked = verify(register, pipe(), BASE)
    assert not checked.problems and len(checked.moved) == 50 and checked.report["hidden"]["target"]["moved"] > 0

    assert register.behind() == []
    register.withdraw("R7", reason="the parties settled")
    assert register.behind() == [BASE]
    assert verify(register, pipe(), BASE).problems == ("withdrawn and still erased: R7; run `erasure register apply`",)
    second = apply(register, pipe(), BASE)
    assert len(second.entries) == 49 and not second.served and second.hash != first.hash
    assert not verify(register, pipe(), BASE).problems
    edit = Erasure.from_pretrained(second.folder)
    assert made_up(6) not in [concept["name"] for concept in edit.config.concepts]
    gone = register.entry("r7")
    assert (gone.status, gone.reason, gone.served is not None) == ("withdrawn", "the parties settled", True)
    text = page(register)
    assert "49 requests since" in text and "the parties settled" in text and made_up(6) in text
    assert not register.check()


def test_it_is_the_joint_erasure_from_the_base_whatever_came_before(register, tmp_path):
    for number in range(3):
        add(register, made_up(number), keep=["ninja"])
        apply(register, pipe(), BASE)  # one after the other
    grown = Erasure.from_pretrained(apply(register, pipe(), BASE).folder)
    once = erase(
        pipe(), [made_up(i) for i in range(3)], "uce", keep=["ninja"], preset="official-2025", synonyms=True,
        apply=False, progress=False,
    )  # fmt: skip
    for name, tensor in once.tensors.items():
        assert torch.equal(grown.tensors[name], tensor)


def test_the_same_set_has_the_same_bytes_in_any_register(register, tmp_path):
    (tmp_path / "other").mkdir()
    other = new_register(tmp_path / "other")
    for number in range(4):
        add(register, made_up(number))
        if number != 2:
            add(other, made_up(number))
    with_all = apply(register, pipe(), BASE)
    register.withdraw("R3", reason="a mistake")
    a, b = apply(register, pipe(), BASE), apply(other, pipe(), BASE)
    assert a.hash == b.hash != with_all.hash and a.folder.name != b.folder.name
    assert hashes_of(with_all.folder) != hashes_of(a.folder)  # the earlier one stays, as a record


def test_what_is_there_is_not_made_again_and_what_was_altered_is(register):
    add(register, "spiderman")
    done = apply(register, pipe(), BASE)
    assert done.seconds > 0 and apply(register, pipe(), BASE).seconds == 0
    (done.folder / files.WEIGHTS).write_bytes(b"no tensors")
    (problem,) = verify(register, pipe(), BASE).problems
    assert "cannot be opened" in problem
    assert apply(register, pipe(), BASE).hash == done.hash and not verify(register, pipe(), BASE).problems


def test_when_the_last_one_is_withdrawn_the_base_is_used_as_it_is(register):
    add(register, "spiderman")
    apply(register, pipe(), BASE)
    register.withdraw("R1", reason="a mistake")
    done = apply(register, pipe(), BASE)
    assert done.folder is None and done.hash == ""
    checked = verify(register, pipe(), BASE)
    assert not checked.problems and "as it is" in checked.notes[0]


def test_a_request_is_served_when_all_its_bases_have_it(register):
    other = tiny_pipeline(seed=1)
    register.add_base("other", prints_of(other))
    add(register, "spiderman")
    add(register, "batman", bases=["other"])
    assert not apply(register, pipe(), BASE).served and register.entry("R1").served is None
    assert [entry.request for entry in apply(register, other, "other").served] == ["R1", "R2"]
    with pytest.raises(ValueError, match="is not the base 'other'"):
        apply(register, pipe(), "other")


# --- contradictions ---------------------------------------------------------------------------------------------------


def test_erasing_wins_over_keeping_and_over_anchors_and_is_written_down(register):
    add(register, Concept("superhero", anchor="ninja", neighbours=("wizard",)), keep=["a ninja", "cat"])
    add(register, "ninja", keep=["superhero", "cat"])
    done = apply(register, pipe(), BASE)
    found = [(one.word, one.role, one.wanted_by, one.erased_by) for one in done.overruled]
    assert found == [("ninja", "anchor", 1, 2), ("a ninja", "keep", 1, 2), ("superhero", "keep", 2, 1)]
    config = Erasure.from_pretrained(done.folder).config
    assert list(config.keep) == ["cat", "wizard"] and config.concepts[0]["anchor"] == ""
    assert register.applied(BASE).detail["overruled"] == [["anchor", 1, 2], ["keep", 1, 2], ["keep", 2, 1]]
    assert "a name that it keeps is erased by R2" in page(register)
    register.redact("R2")
    assert "a name that it keeps is erased by another request" in page(register)
    assert not verify(register, pipe(), BASE).problems


def test_two_requests_for_one_name_erase_it_once_and_both_must_be_withdrawn(register):
    add(register, Concept("batman", synonyms=("dark knight",)))
    add(register, "Batman", languages={"de": ["Fledermausmann"]})
    add(register, "BATMAN")
    config = Erasure.from_pretrained(apply(register, pipe(), BASE).folder).config
    assert [(c["name"], c["synonyms"]) for c in config.concepts] == [
        ("batman", ["dark knight"]),
        ("Fledermausmann", []),
    ]
    assert len(verify(register, pipe(), BASE).moved) == 3
    register.withdraw("R1", reason="a mistake")
    config = Erasure.from_pretrained(apply(register, pipe(), BASE).folder).config
    assert [c["name"] for c in config.concepts] == ["Batman"]


def test_a_name_that_the_model_cannot_read_is_reported_with_its_request(register):
    add(register, "spiderman")
    add(register, " ".join(["word"] * 90))
    with pytest.raises(ValueError, match="the request 'R2': .*tokens"):
        apply(register, pipe(), BASE)
    assert register.applied(BASE) is None and register.entry("R1").status == "received"


def test_a_set_that_changes_while_it_is_solved_is_solved_again(register, monkeypatch):
    add(register, "spiderman")
    late = iter(["batman"])

    def slow(*args, **settings):
        for concept in late:
            add(register, concept)
        return erase(*args, **settings)

    monkeypatch.setattr(applying, "erase", slow)
    assert [entry.request for entry in apply(register, pipe(), BASE).entries] == ["R1", "R2"]


# --- verification -----------------------------------------------------------------------------------------------------


def test_verify_says_what_is_wrong(register):
    assert "nothing was applied" in verify(register, pipe(), BASE).problems[0]
    add(register, "spiderman", keep=["cat"])
    done = apply(register, pipe(), BASE)
    add(register, "batman")
    assert "not in force yet: R2" in verify(register, pipe(), BASE).problems[0]
    register.withdraw("R2", reason="a mistake")
    other = erase(pipe(), "ninja", keep=["animal"], name="register", apply=False, progress=False)
    other.save_pretrained(done.folder)
    text = " ".join(verify(register, pipe(), BASE).problems)
    assert "is not what the log recorded" in text and "other concepts" in text and "keeps other prompts" in text
    register.configure(Settings(method="time"))
    assert "the method" in " ".join(verify(register, pipe(), BASE).problems)


def test_verify_sees_an_erasure_that_does_nothing(register):
    add(register, "spiderman")
    done = apply(register, pipe(), BASE)
    edit = Erasure.from_pretrained(done.folder)
    faint = type(edit)(edit.name, edit.config, {name: 1e-6 * tensor for name, tensor in edit.tensors.items()})
    faint.save_pretrained(done.folder)
    text = " ".join(verify(register, pipe(), BASE).problems)
    assert "R1: the embedding of a name moves by 0.0 % only" in text and "did not move" in text


def test_a_judge_has_its_say_and_evidence_is_kept_with_the_request(register):
    add(register, "spiderman")
    apply(register, pipe(), BASE)
    record = {"verdicts": {"asked": {"verdict": "shown", "number": "at most 3 %"}}, "report": "r.html", "sha256": "ab"}

    def judge(edit):
        register.record_evidence(["R1"], BASE, record)
        return ["still drawn"] if edit.config.concepts[0]["name"] == "spiderman" else []

    assert verify(register, pipe(), BASE, judge=judge).problems == ("still drawn",)
    done = register.applied(BASE).detail["hash"]
    assert record.items() <= register.entry("R1").evidence.items()
    assert register.entry("R1").evidence["erasure"] == done
    assert "asked: shown (at most 3 %)" in card(register) and "earlier erasure" not in card(register)
    add(register, "batman")
    apply(register, pipe(), BASE)
    assert "asked: shown (at most 3 %); of an earlier erasure" in card(register)
    assert not register.check()


def test_verify_sees_that_a_file_of_the_settings_changed(register, tmp_path):
    for captions in ("a cat", "a photo of an animal"):
        Gram.of(backbone_of(pipe()), [captions]).save(tmp_path / "captions.safetensors")
        register.configure(Settings(settings={"corpus": str(tmp_path / "captions.safetensors")}))
        if register.entries():
            assert "settings or files" in verify(register, pipe(), BASE).problems[0]
        else:
            add(register, "spiderman")
        apply(register, pipe(), BASE)
        assert not verify(register, pipe(), BASE).problems


# --- what may be entered ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"concept": " "}, "name"),
        ({"concept": "x" * 501}, "501 characters"),
        ({"concept": "\ud800"}, "unicode"),
        ({"concept": "cat", "basis": " "}, "legal basis must be text"),
        ({"concept": "cat", "requester": "lawyer"}, "unknown class of requester"),
        ({"concept": "cat", "languages": {"german": ["Katze"]}}, "'de' or 'pt-BR'"),
        ({"concept": "cat", "languages": {"de": [""]}}, "empty"),
        ({"concept": "cat", "keep": ["CAT"]}, "both to be erased and to be kept"),
        ({"concept": "cat", "keep": ["dog"] * 201}, "at most 200 names"),
        ({"concept": "cat", "received": "2026-11-30"}, "needs a zone"),
        ({"concept": "cat", "received": "yesterday"}, "ISO 8601"),
        ({"concept": "cat", "received": "2999-01-01T00:00:00Z"}, "must not lie in the future"),
        ({"concept": "cat", "due": "2001-01-01T00:00:00Z"}, "due must not lie before received"),
        ({"concept": "cat", "bases": ["tinny"]}, "unknown base.*did you mean 'tiny'"),
        ({"concept": "cat", "request": "r1"}, "'r1' already"),
        ({"concept": "cat", "request": ""}, "id of a request must be text"),
        ({"concept": "cat", "reviewer": 3}, "reviewer must be text"),
    ],
)
def test_what_cannot_be_entered_is_refused_and_nothing_is_left(register, given, message):
    add(register, "dog")
    rows = len(register.log())
    with pytest.raises(ValueError, match=message):
        register.add(**{**FACTS, **given})
    assert len(register.entries()) == 1 and len(register.log()) == rows


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(hours=0), "hours must be"),
        (Settings(hours=float("nan")), "hours must be"),
        (Settings(method="esd"), "choose a closed form"),
        (Settings(method="uec"), "did you mean 'uce'"),
        (Settings(preset="best"), "no preset"),
        (Settings(settings={"synonyms": False}), "erases every alias"),
        (Settings(settings={"lambda": 1}), "no setting"),
    ],
)
def test_settings_are_checked_before_anything_is_made(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        Register.create(tmp_path / "register.sqlite", settings)
    assert not list(tmp_path.iterdir())


def test_only_what_is_open_is_refused_and_what_is_over_stays_over(register):
    add(register, "cat")
    add(register, "dog")
    register.refuse("R1", reason="a parody")
    for end, request, message in (
        (register.refuse, "R1", "is refused"),
        (register.withdraw, "R1", "is refused"),
        (register.withdraw, "R3", "no request 'R3'"),
    ):
        with pytest.raises(ValueError, match=message):
            end(request, reason="why not")
    with pytest.raises(ValueError, match="reason must be text"):
        register.withdraw("R2", reason="")
    apply(register, pipe(), BASE)
    with pytest.raises(ValueError, match="withdraw it instead"):
        register.refuse("R2", reason="too late")


def test_another_model_under_a_known_name_is_refused(register):
    other = {part: {**facts, "samples": [0.0] * len(facts["samples"])} for part, facts in prints().items()}
    with pytest.raises(ValueError, match="registered with other weights"):
        register.add_base(BASE, other)
    assert isinstance(register.add_base(BASE, prints()), Base) and len(register.bases()) == 1


# --- the clock --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("received", "due", "act", "word", "sentence"),
    [
        (1, None, None, "open", "open for 1 h 00 min, 46 h 59 min left"),
        (50, None, None, "overdue", "open for 50 h 00 min, overdue by 2 h 00 min"),
        (1, None, "apply", "in time", "served in 1 h 00 min, in time"),
        (100, None, "apply", "late", "served in 4 d 4 h, late by 52 h 00 min"),
        (3, 2, "refuse", "late", "refused in 3 h 00 min, late by 2 h 00 min"),
        (3, None, "withdraw", "in time", "withdrawn before it was served in 3 h 00 min, in time"),
    ],
)
def test_the_clock_says_in_time_late_open_or_overdue(register, received, due, act, word, sentence):
    add(register, "spiderman", received=ago(received), due=None if due is None else ago(due))
    if act == "apply":
        apply(register, pipe(), BASE)
    elif act:
        getattr(register, act)("R1", reason="decided")
    entry = register.entry("R1")
    assert entry.clock(datetime.datetime.now(datetime.UTC)) == (word, sentence)


def test_the_term_is_that_of_the_register_and_of_its_time(tmp_path):
    register = Register.create(tmp_path / "register.sqlite", Settings(hours=24))
    register.add_base(BASE, prints())
    first = add(register, "cat", received="2026-01-01T10:00:00+01:00")
    register.configure(Settings(hours=72))
    second = add(register, "dog", received="2026-01-01T09:00:00Z")
    assert [(e.due - e.received).total_seconds() / 3600 for e in (first, second)] == [24, 72]
    assert first.received == second.received
    assert [event.action for event in register.log()] == ["settings", "base", "received", "settings", "received"]


# --- redaction --------------------------------------------------------------------------------------------------------


def on_disk(register):
    return b"".join(file.read_bytes() for file in register.path.parent.glob(f"{register.path.name}*"))


def test_a_redacted_name_is_not_shown_and_is_gone_when_the_request_is_over(register):
    add(register, Concept("spiderman", synonyms=("webslinger",)))
    apply(register, pipe(), BASE)
    proof = register.names("R1")
    register.redact("R1")
    for text in (page(register), page(register, request="R1"), card(register), str(register.log())):
        assert "spiderman" not in text and "webslinger" not in text
    assert register.entry("R1").name in page(register) and "can still tell" in page(register)
    assert not verify(register, pipe(), BASE).problems and b"spiderman" in on_disk(register)

    register.withdraw("R1", reason="settled")
    assert b"spiderman" not in on_disk(register) and register.entry("R1").subject is None
    seal = hashlib.sha256(f"{proof['salt']}\n{proof['subject']}".encode()).hexdigest()
    assert seal == proof["seal"] == register.entry("R1").seal
    assert not register.check()
    apply(register, pipe(), BASE)
    for again in (register.redact, register.names):
        with pytest.raises(ValueError, match="names of the request 'R1' are gone"):
            again("R1")


# --- pages ------------------------------------------------------------------------------------------------------------


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_names_do_nothing_on_pages_and_the_page_needs_nothing_from_elsewhere(register):
    add(register, Concept(f"{HOSTILE} hero", synonyms=(f"{HOSTILE} two",)), request=HOSTILE, basis=HOSTILE,
        reviewer=HOSTILE, keep=[HOSTILE])  # fmt: skip
    register.refuse(HOSTILE, reason=HOSTILE)
    text = page(register, request=HOSTILE)
    tags = Tags()
    tags.feed(text)
    assert not {tag for tag, _ in tags.found} & {"script", "img", "link", "iframe"}
    assert not [attrs for _, attrs in tags.found if {"src", "href", "onclick"} & set(attrs)]
    assert "\x1b" not in text and "\u202e" not in text and "{{ 7 * 7 }}" in text
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    for part in (text, card(register)):
        assert "<script>" not in part


def test_the_sheet_says_what_is_shown_and_what_is_not_claimed(register):
    add(register, "spiderman", received=ago(60))
    add(register, "batman")
    apply(register, pipe(), BASE)
    verify(register, pipe(), BASE)
    add(register, "ninja")
    register.refuse("R3", reason="a parody")
    text = page(register)
    for part in (
        "In force: 2 of 3 requests",
        "served in 60 h 00 min, late by 12 h 00 min",
        "Verifications recorded: 1, without a fault: 1",
        "Closed in time: 2, closed late: 1",
        "Refused: 1, withdrawn: 0",
        "no fault; on embeddings, without pictures, the layers&#39; outputs move: targets ",
        "That works are removed from the weights",
        "no legal advice",
        "appropriate and proportionate",
        "That a request is a complaint in the sense of the Code",
        "That these requests are about copyright",
        "of 10 July 2025",
    ):
        assert part in text


def test_a_page_is_of_a_month_or_of_a_request(register):
    add(register, "spiderman", received="2026-01-31T23:30:00-02:00")
    add(register, "batman", received="2026-01-31T23:30:00Z")
    assert "spiderman" in page(register, month="2026-02") and "batman" not in page(register, month="2026-02")
    assert "Its part of the log" in page(register, request="R2") and "spiderman" not in page(register, request="R2")
    for given, message in (
        ({"month": "2026-13"}, "is written 2026-11"),
        ({"month": "2026-01", "request": "R1"}, "got both"),
        ({"request": "R9"}, "no request"),
    ):
        with pytest.raises(ValueError, match=message):
            page(register, **given)


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def erasure(tmp_path, monkeypatch, capsys):
    """The program, in a folder of its own: its exit code, output and error stream."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    pipe().save_pretrained("tiny")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["erasure", "register", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        found = capsys.readouterr()
        return stopped.value.code or 0, found.out, found.err

    return run


def test_the_commands_from_init_to_report(erasure, tmp_path):
    assert erasure("init", "--base", "tiny", "--preset", "official-2025")[0] == 0
    assert erasure("init", "--hours", "24")[0] == 0  # the rest stays
    code, out, _ = erasure(
        "add", "superhero", "--basis", "copyright", "--requester", "rights-holder", "--alias", "hero", "--language",
        "de=Held", "--keep", "ninja", "--received", "2026-01-01T00:00:00Z", "--reviewer", "Ann",
    )  # fmt: skip
    assert code == 0 and "R1: superhero, due 2026-01-02 00:00 UTC" in out
    assert erasure("add", f"cat {HOSTILE}", "--basis", "likeness", "--requester", "person-depicted")[0] == 0
    code, out, _ = erasure("list")
    assert code == 0 and "overdue by" in out and "\x1b[31m" not in out and "\u202e" not in out
    code, out, err = erasure("apply")
    assert code == 0 and "2 requests in force" in out and "served: R1, R2" in out, err
    assert erasure("verify")[0] == 0
    assert "next: erasure register verify" in erasure("list")[1]
    assert erasure("withdraw", "R2", "--reason", "settled")[0] == 0
    assert "next: erasure register apply" in erasure("list")[1]
    code, out, _ = erasure("verify")
    assert code == 1 and "withdrawn and still erased: R2" in out
    assert erasure("redact", "R2", "--proof", "proof.json")[0] == 0
    assert json.loads((tmp_path / "proof.json").read_text("utf-8"))["request"] == "R2"
    shown = json.loads(erasure("show", "R2")[1])
    assert shown["status"] == "withdrawn" and shown["subject"] is None and len(shown["log"]) == 4
    assert len(json.loads(erasure("list", "--json", "--status", "in force")[1])) == 1
    assert erasure("report", "--card", "card.md")[0] == 0
    assert "superhero" in (tmp_path / "register.html").read_text("utf-8")
    assert "SHA-256 of the erasure" in (tmp_path / "card.md").read_text("utf-8")
    code, out, _ = erasure("log", "--check")
    assert code == 0 and "each as it was written" in out
    assert "applied" in erasure("log")[1]
    raw(Register("register.sqlite"), "UPDATE log SET action = 'nothing' WHERE id = 3")
    code, out, _ = erasure("log", "--check")
    assert code == 1 and "row 3 was changed" in out


def test_verify_draws_the_prompts_of_a_suite_and_keeps_the_verdicts(erasure, tmp_path, monkeypatch):
    concept = Concept("cat", neighbours=("dog",))
    Suite(1, "one", concept, base="tiny", unrelated=("sun",), num_inference_steps=2).save("cat.yaml")
    monkeypatch.setattr(choice, "detectors_for", lambda *_, **__: ([PixelDetector()], None))
    erasure("init", "--base", "tiny", "--preset", "official-2025")
    code, _, err = erasure("verify", "--suite", "cat.yaml")
    assert code == 2 and "no request in force is about the target" in err
    erasure("add", "CAT", "--basis", "copyright", "--requester", "authority")
    erasure("apply")
    code, out, err = erasure("verify", "--suite", "cat.yaml", "--draw", "1", "--out", "evaluation")
    evidence = Register("register.sqlite").entry("R1").evidence
    assert set(evidence["verdicts"]) == {"asked", "words", "attacked", "weights", "rest"}, err
    assert evidence["sha256"] == hashlib.sha256((tmp_path / "evaluation" / "report.html").read_bytes()).hexdigest()
    assert code == (evidence["verdicts"]["asked"]["verdict"] == "shown not")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list",), "no register at"),
        (("list", "--register", "."), "is a folder"),
        (("init", "--method", "esd"), "choose a closed form"),
        (("init", "--set", "lamb"), "--set needs key=value"),
        (("log", "--head", "ab"), "add --check"),
        (("verify", "--draw", "2"), "add --suite"),
    ],
)
def test_slips_are_one_line(erasure, arguments, message):
    code, _, err = erasure(*arguments)
    assert code == 2 and message in err and "Traceback" not in err


@pytest.mark.parametrize("command", [c.name or c.callback.__name__ for c in commands.registered_commands])
def test_every_command_has_help_with_an_example(command):
    result = CliRunner().invoke(commands, [command, "--help"])
    assert result.exit_code == 0 and f"erasure register {command}" in result.output


def test_entering_a_request_needs_none_of_the_heavy_libraries():
    code = (
        "import sys, erasure.register; sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'erasure.eval',"
        " 'erasure.pipelines')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- what is given in the wrong form ----------------------------------------------------------------------------------


def test_one_name_is_no_list_of_letters(register):
    entry = add(register, "cat", languages={"de": "Katze"}, keep="dog", bases=BASE)
    assert entry.subject.languages == {"de": ("Katze",)} and entry.subject.keep == ("dog",)
    assert list(entry.bases) == [BASE]


@pytest.mark.parametrize(
    "wrong",
    [{"languages": 5}, {"languages": ["de"]}, {"languages": {"de": [5]}}, {"keep": 5}, {"keep": [None]}, {"bases": 5}],
)
def test_what_is_no_list_of_names_is_refused_in_one_line(register, wrong):
    with pytest.raises(ValueError, match="languages map codes|one string or a list of strings") as caught:
        add(register, "cat", **wrong)
    assert "\n" not in str(caught.value) and not register.entries()


@pytest.mark.parametrize(
    "wrong", [{"method": []}, {"preset": 0}, {"preset": []}, {"settings": None}, {"settings": [1]}]
)
def test_settings_of_the_wrong_type_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="are names; got|are a mapping; got"):
        Register.create(tmp_path / "r.sqlite", Settings(**wrong))
    assert not list(tmp_path.iterdir())


def test_an_unknown_status_finds_nothing_and_says_so(register):
    with pytest.raises(ValueError, match="unknown status; got 'done'; choose one of"):
        register.entries(status="done")
