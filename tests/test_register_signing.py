"""A signed end of the log: whoever writes the log anew, with every hash right, is found by it. Keys are thrown away."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from erasure.cli import main
from erasure.io import sha256_json
from erasure.register import Register
from erasure.register.signing import NAMESPACE, SUFFIX, check, sign
from tests.register_helpers import add, new_file, new_register, raw

needs_ssh = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not on this machine")
FIELDS = "id, time, action, entry, detail, digest, previous"


def new_key(path, *options):
    settings = {"-t": "ed25519", "-N": "", "-C": path.name, **dict(zip(options[::2], options[1::2], strict=True))}
    subprocess.run(["ssh-keygen", "-q", "-f", path, *(part for pair in settings.items() for part in pair)], check=True)
    return path


def another_letter(text):
    """A signature of which one letter of the base64 is another one."""
    return text[:-60] + (b"B" if text[-60:-59] == b"A" else b"A") + text[-59:]


def public(key):
    return Path(f"{key}.pub").read_text("utf-8").strip()


@pytest.fixture
def register(tmp_path):
    made = new_register(tmp_path)
    add(made, "spiderman")
    return made


@pytest.fixture
def key(tmp_path):
    return new_key(tmp_path / "ann")


@pytest.fixture
def signers(tmp_path, key):
    file = tmp_path / "allowed_signers"
    file.write_text(f"# who may sign\nann@example.org,backup@example.org {public(key)}\n")
    return file


def write_anew(register, *statements):
    """What somebody does who changes the past and then makes every hash of the log right again."""
    raw(register, *statements)
    [rows] = raw(register, f"SELECT {FIELDS} FROM log ORDER BY id")
    previous = "0" * 64
    for row in rows:
        hash = sha256_json((*row[:-1], previous))
        raw(register, f"UPDATE log SET previous = '{previous}', hash = '{hash}' WHERE id = {row[0]}")
        previous = hash
    assert not register.check()  # the chain shows nothing


def rows_after(register, row):
    return [
        "DELETE FROM entries", f"DELETE FROM log WHERE id > {row}", f"UPDATE sqlite_sequence SET seq = {row}"
    ]  # fmt: skip


# --- what holds -------------------------------------------------------------------------------------------------------


@needs_ssh
def test_a_signature_holds_while_the_register_goes_on(register, key, signers, tmp_path):
    first = sign(register, key)
    assert first.parent == tmp_path / "register-signatures" and first.suffix == SUFFIX
    register.redact("R1")
    register.withdraw("R1", reason="settled")
    add(register, "batman")
    second = sign(register, key)
    found = check(register, first.parent, signers)
    assert not found.problems and [one.path for one in found.signatures] == [first, second]
    assert [one.statement.row for one in found.signatures] == [3, 6]
    assert found.signatures[1].statement.hash == register.head()
    assert {one.signer for one in found.signatures} == {"ann@example.org"}
    assert b"spiderman" not in first.read_bytes()


@needs_ssh
def test_line_ends_that_mail_changed_do_not_count(register, key, signers):
    path = sign(register, key)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert not check(register, path, signers).problems


@needs_ssh
@pytest.mark.parametrize("options", [("-t", "ecdsa"), ("-t", "rsa", "-b", "1024")], ids=["ecdsa", "rsa"])
def test_other_keys_of_ssh(register, tmp_path, options):
    key, signers = new_key(tmp_path / "key", *options), tmp_path / "allowed_signers"
    signers.write_text(f"bob {public(key)}")
    assert check(register, sign(register, key), signers).signatures[0].signer == "bob"


@needs_ssh
def test_the_passphrase_is_asked_for_by_ssh(register, tmp_path, signers, monkeypatch):
    key = new_key(tmp_path / "locked", "-N", "open sesame", "-a", "1")
    signers.write_text(f"bob {public(key)}")
    asked = tmp_path / "asked"
    asked.write_text("#!/bin/sh\necho open sesame\n")
    asked.chmod(0o700)
    monkeypatch.setenv("SSH_ASKPASS", str(asked))
    monkeypatch.setenv("SSH_ASKPASS_REQUIRE", "force")
    assert not check(register, sign(register, key), signers).problems
    asked.write_text("#!/bin/sh\necho wrong\n")
    with pytest.raises(ValueError, match="ssh-keygen did not sign with .*locked, and said why above"):
        sign(register, key)
    assert len([*(tmp_path / "register-signatures").iterdir()]) == 1


@needs_ssh
@pytest.mark.skipif(shutil.which("ssh-agent") is None, reason="ssh-agent is not on this machine")
def test_the_agent_signs_where_only_the_public_key_is_given(register, key, signers, tmp_path, monkeypatch):
    socket = tmp_path / "s"
    if len(str(socket)) > 100:
        pytest.skip("the folder of this test has a path that is too long for a socket")
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.PIPE)
    try:
        agent.stdout.readline()  # written once it listens
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
        subprocess.run(["ssh-add", "-q", key], check=True)
        key.unlink()
        assert not check(register, sign(register, f"{key}.pub"), signers).problems
    finally:
        agent.terminate()
        agent.communicate()


# --- what is refused --------------------------------------------------------------------------------------------------


@needs_ssh
def test_a_log_that_was_written_anew_is_found_by_an_old_signature(register, key, signers):
    old = sign(register, key)
    write_anew(register, "UPDATE log SET time = '2001-01-01T00:00:00.000+00:00' WHERE id = 2")
    new = sign(register, key)  # by somebody who has a key as well
    found = check(register, [old, new], signers)
    assert [one.path for one in found.signatures] == [new]
    assert re.search(
        f"{old.name}: row 3, signed on .* is another one in the log: rows were written anew", *found.problems
    )


@needs_ssh
def test_a_log_that_was_cut_off_is_found(register, key, signers):
    path = sign(register, key)
    write_anew(register, *rows_after(register, 2))
    [problem] = check(register, path, signers).problems
    assert "row 3, signed on" in problem and "is not in the log: rows were cut off" in problem


@needs_ssh
def test_a_log_that_was_written_anew_from_its_first_row_on_is_found(register, key, signers, tmp_path):
    path = sign(register, key)
    other = Register.create(tmp_path / "other.sqlite")
    for there in (other, register):
        if there is register:
            write_anew(register, "UPDATE log SET time = '2001-01-01T00:00:00.000+00:00' WHERE id = 1")
        [problem] = check(there, path, signers).problems
        assert "is of another register, or this log was written anew from its first row on" in problem


@needs_ssh
def test_an_empty_log_is_refused(register, key, signers):
    path = sign(register, key)
    raw(register, *rows_after(register, 0))
    with pytest.raises(ValueError, match="the log is empty; nothing was signed"):
        sign(register, key)
    assert any("the log is empty; row 3" in problem for problem in check(register, path, signers).problems)


@needs_ssh
def test_rows_that_were_changed_one_by_one_are_reported_with_the_signatures(register, key, signers):
    path = sign(register, key)
    raw(register, "UPDATE log SET action = 'nothing' WHERE id = 2")
    assert any("row 2 was changed" in problem for problem in check(register, path, signers).problems)
    with pytest.raises(ValueError, match="the log does not hold: row 2 was changed.*nothing was signed"):
        sign(register, key)
    raw(register, "UPDATE log SET detail = 'no JSON' WHERE id = 2")
    assert "no signature was compared" in check(register, path, signers).problems[-1]


@needs_ssh
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda text: text.replace(b'"row": 3', b'"row": 2'), "what was signed is not what it says now"),
        (another_letter, "what was signed is not what it says now"),
        (lambda text: text.partition(b"-----BEGIN")[0], "there is no signature in it"),
        (lambda text: b"-----BEGIN" + text.partition(b"-----BEGIN")[2], "not readable as JSON"),
        (lambda text: text.replace(b"version 1", b"version 2"), "of a newer version"),
        (lambda text: text.replace(b'"row": 3', b'"row": true'), "row cannot be True"),
        (lambda text: text.replace(b'"row": 3', b'"row": [3]'), "row cannot be [3]"),
        (lambda text: re.sub(rb'"time": "\d+', b'"time": "0001', text), "nothing was signed in 1"),
        (lambda text: text + b"x" * 2**16, "at most 65,536 are read"),
    ],
)  # fmt: skip
def test_a_file_that_was_changed_is_refused(register, key, signers, change, fault):
    path = sign(register, key)
    path.write_bytes(change(path.read_bytes()))
    found = check(register, path, signers)
    assert not found.signatures and len(found.problems) == 1 and fault in found.problems[0], found.problems


@needs_ssh
def test_only_allowed_signers_count_and_for_this_purpose(register, key, signers, tmp_path):
    path, own = sign(register, key), public(key)
    stranger = sign(register, new_key(tmp_path / "eve"))
    [problem] = check(register, stranger, signers).problems
    assert "none of the keys in" in problem and "signed it" in problem
    for options, holds in (
        (f'namespaces="{NAMESPACE}"', True), ('namespaces="git"', False), ('valid-before="20010101"', False),
        ('valid-before="29990101"', True),
    ):  # fmt: skip
        signers.write_text(f"ann@example.org {options} {own}\n")
        assert bool(check(register, path, signers).signatures) == holds, options

    text, mark, _ = path.read_bytes().partition(b"-----BEGIN")
    (tmp_path / "text").write_bytes(text)
    subprocess.run(["ssh-keygen", "-q", "-Y", "sign", "-f", key, "-n", "git", tmp_path / "text"], check=True)
    path.write_bytes(text + (tmp_path / "text.sig").read_bytes())  # the same text, signed for another purpose
    signers.write_text(f"ann@example.org {own}\n")
    assert not check(register, path, signers).signatures


def test_without_ssh_keygen_one_sentence_says_so(register, tmp_path, monkeypatch):
    (tmp_path / "key").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="by ssh-keygen, which is not on this machine; install OpenSSH"):
        sign(register, tmp_path / "key")
    assert not list((tmp_path).glob(f"*/*{SUFFIX}"))


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def shell(tmp_path, monkeypatch, capfd):
    """Runs a line of the docs in the folder of the register, with a key of SSH in a home folder of its own."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "id_ed25519").touch()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "register.sqlite").write_bytes(new_file())

    def run(line):
        if not line.startswith("erasure "):
            subprocess.run(["bash", "-eu", "-c", line], check=True)
            return 0, *capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [os.path.expanduser(word) for word in line.split()])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code or 0, *capfd.readouterr()

    return run


@needs_ssh
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash, for which the docs are written, is not on this machine")
def test_the_commands_of_the_docs(shell, tmp_path):
    (tmp_path / "home" / ".ssh" / "id_ed25519").unlink()
    new_key(tmp_path / "home" / ".ssh" / "id_ed25519")
    page = (Path(__file__).parents[1] / "docs" / "register.md").read_text("utf-8")
    section = page.partition("\n## Sign the log\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```\n(.*?)^```", section, flags=re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    assert [line.split()[0] for line in lines].count("erasure") == 2 and "ssh-keygen" in lines[-1]
    said = ""
    for line in lines:
        code, out, err = shell(line)
        assert code == 0, f"{line}\n{out}\n{err}"
        said += out
    assert "- row 2 is as ann@example.org signed it" in said and "2 rows, each as it was written" in said
    assert f'Good "{NAMESPACE}" signature for ann@example.org' in said

    register = Register("register.sqlite")
    add(register, "batman")
    code, out, _ = shell("erasure register log --check --signatures register-signatures --signers allowed_signers")
    assert code == 0 and "no signature covers the rows after 2" in out and "next: erasure register sign" in out
    write_anew(register, "UPDATE log SET time = '2001-01-01T00:00:00.000+00:00' WHERE id = 2")
    assert shell("erasure register log --check")[0] == 0
    code, out, _ = shell("erasure register log --check --signatures register-signatures --signers allowed_signers")
    assert code == 1 and "rows were written anew" in out and "each as it was written" not in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sign --key none", "no key at none"),
        ("sign --key ~/.ssh/id_ed25518", "(did you mean 'id_ed25519'?)"),
        ("sign --key ~/.ssh/id_ed25519 --out register.sqlite", "is a file; give a folder"),
        ("log --signatures a --signers b", "--signatures is compared by --check; got a; add --check"),
        ("log --check --signatures a", "--signatures and --signers go together; got the first alone"),
        ("log --check --signers a", "--signatures and --signers go together; got the second alone"),
        ("log --check --signatures home --signers none", "no file of allowed signers at none"),
        ("log --check --signatures home --signers register.sqlite", "no signature in home"),
        ("log --check --signatures none --signers register.sqlite", "no signature at none"),
    ],
)
def test_slips_are_one_line(shell, line, message):
    code, _, err = shell(f"erasure register {line}")
    assert code == 2 and message in err and "Traceback" not in err
