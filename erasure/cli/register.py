"""The commands of a take-down register: enter requests, erase them together, check, take back, report."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from erasure.cli.options import Config, Device, Dtype, Variant, follow, note, open_base
from erasure.cli.register_parts import by_language, check_log, judge_of, pairs, plain_entry
from erasure.io import check_writable, parse_yaml, write_atomically, write_json
from erasure.terminal import PlainTable, console, print_json, say
from erasure.wording import counted

if TYPE_CHECKING:
    from erasure.register import Register

commands = typer.Typer(
    no_args_is_help=True,
    help="Take-down requests: enter, erase together, verify, withdraw, report; see docs/register.md.",
)
File = Annotated[
    str,
    typer.Option(
        "--register",
        envvar="ERASURE_REGISTER",
        help="The register's file, on a local disk, or postgresql://USER@HOST/DATABASE.",
    ),
]
FILE = "register.sqlite"
Request = Annotated[str, typer.Argument(help="Id of the request.")]
Reason = Annotated[str, typer.Option(help="Why; it stays in the register. Write no names of people in it.")]
BaseName = Annotated[str | None, typer.Option("--base", help="One base of the register; all of them by default.")]


@commands.command(epilog="Example: [bold]erasure register init --base emoji-world --hours 48[/bold]")
def init(
    register: File = FILE,
    base: Annotated[
        list[str] | None, typer.Option(help="Base model: emoji-world, a folder, a file, a hub id; repeat for more.")
    ] = None,
    config: Config = None,
    hours: Annotated[float | None, typer.Option(help="From receipt until a request is due; 48 by default.")] = None,
    method: Annotated[str | None, typer.Option("--method", "-m", help="Closed form; uce by default.")] = None,
    preset: Annotated[str | None, typer.Option(help="Named settings of the method.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, key=value; repeat for more.")
    ] = None,
    device: Device = None,
) -> None:
    """Make a register, or add bases to one and change its settings."""
    from erasure.methods import method_class
    from erasure.opening import configs_of
    from erasure.register import Register, Settings
    from erasure.register.applying import prints_of

    own = {key: parse_yaml(value) for key, value in pairs(settings or (), "--set")}
    for name in {*own} & {*method_class(method or "uce").files}:
        own[name] = str(Path(str(own[name])).resolve())  # apply may run in another folder
    given = {"hours": hours, "method": method, "preset": preset, "settings": own or None}
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    try:
        kept = Register(register)
    except FileNotFoundError:
        kept = Register.create(register, Settings(**changes))
    else:
        before = {} if method is not None else dataclasses.asdict(kept.settings)
        if own and before:
            changes["settings"] = {**before["settings"], **own}
        kept.configure(Settings(**{"hours": kept.settings.hours, **before, **changes}))
    for name, configs in zip(base or (), configs_of(base or (), config), strict=True):
        added = kept.add_base(name, prints_of(open_base(name, device, config=configs)))
        say(f"base {name}: fingerprint {added.hash[:12]}", wrap=False)
    facts = kept.settings
    bases = counted(len(kept.bases()), "base")
    say(f"register -> {kept.name}: due after {facts.hours:g} h, {facts.method}, {bases}", wrap=False)
    follow("erasure register add CONCEPT --basis TEXT --requester rights-holder")


@commands.command(
    epilog="Example: [bold]erasure register add superhero --basis copyright --requester rights-holder "
    "--alias hero --language de=Superheld --keep ninja --received 2026-11-30T09:15:00Z[/bold]"
)
def add(
    concept: Annotated[str, typer.Argument(help="What to erase.")],
    basis: Annotated[str, typer.Option(help="Legal basis, in your words.")],
    requester: Annotated[
        str,
        typer.Option(
            help="rights-holder, representative, person-depicted, authority, trusted-flagger, platform or other."
        ),
    ],
    register: File = FILE,
    request: Annotated[str | None, typer.Option("--request", help="Its id; R1, R2 ... by default.")] = None,
    alias: Annotated[list[str] | None, typer.Option(help="Another name; repeat for more.")] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="A name in another language, code=NAME; repeat for more.")
    ] = None,
    kind: Annotated[str, typer.Option(help="object, style, identity, nsfw or other.")] = "object",
    anchor: Annotated[str, typer.Option(help="What to draw instead; the empty prompt by default.")] = "",
    keep: Annotated[list[str] | None, typer.Option(help="A prompt that must not change; repeat for more.")] = None,
    received: Annotated[str | None, typer.Option(help="When it came in, ISO 8601 with zone; now by default.")] = None,
    due: Annotated[str | None, typer.Option(help="Until when; the register's hours later by default.")] = None,
    base: Annotated[list[str] | None, typer.Option(help="Only on this base; repeat for more.")] = None,
    reviewer: Annotated[str, typer.Option(help="Who decided.")] = "",
) -> None:
    """Enter a request."""
    from pydantic import ValidationError

    from erasure.concept import Concept
    from erasure.io import fault_of
    from erasure.register import Register

    try:
        target = Concept(concept, kind=kind, synonyms=tuple(alias or ()), anchor=anchor)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ValueError(fault_of(error)) from None
    entry = Register(register).add(
        target, basis=basis, requester=requester, languages=by_language(language), keep=keep or (), request=request,
        received=received, due=due, bases=base or (), reviewer=reviewer,
    )  # fmt: skip
    say(f"{entry.request}: {entry.name}, due {entry.due:%Y-%m-%d %H:%M} UTC", wrap=False)
    follow("erasure register apply")


@commands.command("list", epilog="Example: [bold]erasure register list --status received[/bold]")
def list_requests(
    register: File = FILE,
    status: Annotated[str | None, typer.Option(help="received, 'in force', withdrawn or refused.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the requests, and how each stands with its clock."""
    from erasure.io import meant
    from erasure.register import Register
    from erasure.register.entries import STATUSES, now

    if status is not None and status not in STATUSES:
        raise ValueError(f"unknown status {status!r}{meant(status, STATUSES)}; choose one of {list(STATUSES)}")
    kept = Register(register)
    entries, moment = kept.entries(status=status), now()  # type: ignore[arg-type]
    if as_json:
        print_json([plain_entry(entry) for entry in entries])
        return
    table = PlainTable("request", "concept", "status", "received, UTC", "clock")
    for entry in entries:
        table.add_row(
            entry.request, entry.name, entry.status, f"{entry.received:%Y-%m-%d %H:%M}", entry.clock(moment)[1]
        )
    console.print(table)
    follow("erasure register apply" if kept.behind() else "erasure register verify")


@commands.command(epilog="Example: [bold]erasure register show R1[/bold]")
def show(request: Request, register: File = FILE) -> None:
    """Print a request and its part of the log as JSON."""
    from erasure.register import Register

    opened = Register(register)
    entry = opened.entry(request)
    events = [
        {"row": e.id, "time": e.time.isoformat(), "action": e.action, "hash": e.hash} for e in opened.log(request)
    ]
    print_json({**plain_entry(entry), "log": events})


@commands.command(epilog="Example: [bold]erasure register apply[/bold]")
def apply(
    register: File = FILE,
    base: BaseName = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the erasures; beside the register by default.")] = None,
    variant: Variant = None,
    config: Config = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Erase everything that is received or in force, together, from the base; put it in force."""
    from erasure.opening import configs_of, quiet
    from erasure.register.applying import apply as put_in_force

    if out is not None:
        check_writable(out)
    opened, names = _opened(register, base)
    every = {entry.id: entry for entry in opened.entries()}
    for name, configs in zip(names, configs_of(names, config), strict=True):
        pipe = open_base(name, device, dtype, variant=variant, config=configs)
        with quiet():
            done = put_in_force(opened, pipe, name, folder=out)
        count = counted(len(done.entries), "request")
        say(f"{name}: {count} in force -> {done.folder or 'the base as it is'}", wrap=False)
        if done.served:
            say(f"- served: {', '.join(entry.request for entry in done.served)}")
        for one in done.overruled:
            wanted = "keeps" if one.role == "keep" else "has as its anchor"
            eraser = "another request" if every[one.erased_by].redacted else every[one.erased_by].request
            word = "a name" if every[one.wanted_by].redacted else repr(one.word)
            say(f"- {every[one.wanted_by].request} {wanted} {word}, which {eraser} erases: it is erased")
        if done.hash:
            say(f"- SHA-256 {done.hash}", wrap=False)
    say(f"head of the log, to be kept elsewhere: {opened.head()}", wrap=False)
    follow("erasure register verify")


@commands.command(
    epilog="Examples:\n\n[bold]erasure register verify[/bold]\n\n"
    "[bold]erasure register verify --suite superhero --draw 4[/bold]"
)
def verify(
    register: File = FILE,
    base: BaseName = None,
    suite: Annotated[
        str | None, typer.Option(help="Also evaluate by pictures: a shipped suite or a YAML file about one concept.")
    ] = None,
    draw: Annotated[int | None, typer.Option(min=1, help="With --suite: at most so many prompts per group.")] = None,
    out: Annotated[Path, typer.Option(help="With --suite: folder of the evaluation.")] = Path("register-evaluation"),
    variant: Variant = None,
    config: Config = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Check that what is in force is what the register says, and that it does something. Exits with 1 if not."""
    from erasure.opening import configs_of, quiet
    from erasure.register.verifying import verify as check

    if draw is not None and suite is None:
        raise ValueError(f"--draw is of an evaluation by pictures; got {draw}; add --suite")
    opened, names = _opened(register, base)
    if suite is not None and len(names) > 1:
        raise ValueError(f"an evaluation is of one base; got {names}; add --base")
    failed = False
    for name, configs in zip(names, configs_of(names, config), strict=True):
        pipe = open_base(name, device, dtype, variant=variant, config=configs)
        judge = None if suite is None else judge_of(opened, name, pipe, suite, draw, out)
        with quiet():
            found = check(opened, pipe, name, judge=judge)
        failed |= bool(found.problems)
        for remark in found.notes:
            note(remark)
        for problem in found.problems:
            say(f"! {name}: {problem}")
        if not found.problems:
            where = "" if found.folder is None else f": {found.folder}"
            say(f"{name}: {counted(len(found.moved), 'request')} in force, as the register says{where}", wrap=False)
    if failed:
        raise typer.Exit(1)
    follow("erasure register report")


@commands.command(epilog="Example: [bold]erasure register withdraw R1 --reason 'the parties settled'[/bold]")
def withdraw(request: Request, reason: Reason, register: File = FILE) -> None:
    """Take a request back: it stays in the history, and the next `apply` brings the concept back."""
    from erasure.register import Register

    entry = Register(register).withdraw(request, reason=reason)
    say(f"{entry.request}: withdrawn; its concept is erased until the next apply")
    follow("erasure register apply")


@commands.command(epilog="Example: [bold]erasure register refuse R1 --reason 'a parody'[/bold]")
def refuse(request: Request, reason: Reason, register: File = FILE) -> None:
    """Refuse a request that was not served yet."""
    from erasure.register import Register

    say(f"{Register(register).refuse(request, reason=reason).request}: refused")
    follow("erasure register list")


@commands.command(epilog="Example: [bold]erasure register redact R1 --proof R1.json[/bold]")
def redact(
    request: Request,
    register: File = FILE,
    proof: Annotated[
        Path | None, typer.Option(help="Write names and salt to this file, with which the entry can be proven later.")
    ] = None,
) -> None:
    """Show a salted hash instead of a request's names, and delete them as soon as it is over."""
    from erasure.register import Register

    opened = Register(register)
    if proof is not None:
        write_json(proof, opened.names(request))  # before they are deleted
        say(f"proof -> {proof}", wrap=False)
    entry = opened.redact(request)
    left = "its names are deleted" if entry.subject is None else "its names are deleted when it is withdrawn"
    say(f"{entry.request}: {entry.name}; {left}")
    say("erasures that were made with it, and copies of the register, still hold its names")
    follow("erasure register log --check")


@commands.command(
    epilog="Examples:\n\n[bold]erasure register log --check[/bold]\n\n"
    "[bold]erasure register log --check --signatures register-signatures --signers allowed_signers[/bold]"
)
def log(
    register: File = FILE,
    request: Annotated[str | None, typer.Option("--request", help="Only of this request.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Look for changed, deleted and moved rows. Exits with 1.")
    ] = False,
    head: Annotated[str | None, typer.Option(help="With --check: a head that you noted earlier.")] = None,
    signatures: Annotated[
        list[Path] | None,
        typer.Option(help="With --check: files of `sign`, or a folder of them, that it must agree with."),
    ] = None,
    signers: Annotated[
        Path | None, typer.Option(help="With --signatures: who may sign; a name and a public key on each line.")
    ] = None,
) -> None:
    """Print the log, or check that nothing in it was changed."""
    from erasure.register import Register

    if not check and (head is not None or signatures):
        option, given = ("--head", repr(head)) if head is not None else ("--signatures", str((signatures or [])[0]))
        raise ValueError(f"{option} is compared by --check; got {given}; add --check")
    if bool(signatures) != (signers is not None):
        raise ValueError(
            f"--signatures and --signers go together; got {'the first' if signatures else 'the second'} alone; add the "
            "other"
        )
    opened = Register(register)
    if check:
        check_log(opened, head, signatures or (), signers)
        return
    requests = {entry.id: entry.request for entry in opened.entries()}
    table = PlainTable("row", "time, UTC", "what", "request", "hash")
    for event in opened.log(request):
        named = requests.get(event.entry, "") if event.entry is not None else event.detail.get("base", "")
        table.add_row(str(event.id), f"{event.time:%Y-%m-%d %H:%M:%S}", event.action, named, event.hash[:12])
    console.print(table)
    say("hash: of the row and the one before it, so a changed row breaks the chain.")
    follow("erasure register log --check")


@commands.command(epilog="Example: [bold]erasure register copy postgresql://ann@db.example/takedown[/bold]")
def copy(
    where: Annotated[
        str, typer.Argument(metavar="TO", help="A new file, or postgresql://USER@HOST/DATABASE with nothing in it.")
    ],
    register: File = FILE,
) -> None:
    """Copy the register to another file or server, whole or not at all. The one it is copied from stays as it is."""
    from erasure.register import Register

    if not where.strip():
        raise ValueError("no place to copy to: TO is empty; give a new file, or postgresql://USER@HOST/DATABASE")
    source = Register(register)
    made = source.copy(where)
    entries, rows = len(made.entries()), len(made.log())
    each = f"{counted(entries, 'request')}, {counted(rows, 'row')} of the log"
    say(f"{source.name} -> {made.name}: {each}, each as it was", wrap=False)
    say(f"head of the log, as before: {made.head()}", wrap=False)
    say("use the copy alone from now on: name it with --register or ERASURE_REGISTER")
    follow("erasure register verify")


@commands.command(epilog="Example: [bold]erasure register sign --key ~/.ssh/id_ed25519[/bold]")
def sign(
    key: Annotated[
        Path, typer.Option(help="Your SSH key: the private file, or the public one of a key that ssh-agent has.")
    ],
    register: File = FILE,
    out: Annotated[Path | None, typer.Option(help="Folder of the signature; beside the register by default.")] = None,
) -> None:
    """Sign how the log ends now, with an SSH key: whoever keeps the file can tell when the log is written anew."""
    from erasure.register import Register, signing

    path = signing.sign(Register(register), key, out=out)
    say(f"signature -> {path}", wrap=False)
    say("send a copy to somebody else, such as the requester or an auditor")
    follow(f"erasure register log --check --signatures {shlex.quote(str(path))} --signers allowed_signers")


@commands.command(
    epilog="Examples:\n\n[bold]erasure register report --out register.html[/bold]\n\n"
    "[bold]erasure register report --month 2026-11[/bold]\n\n[bold]erasure register report --request R1[/bold]"
)
def report(
    register: File = FILE,
    month: Annotated[str | None, typer.Option(help="Only requests received in this month, like 2026-11.")] = None,
    request: Annotated[
        str | None, typer.Option("--request", help="Only this request, with its part of the log.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("register.html"),
    card: Annotated[Path | None, typer.Option(help="Also write the block for a model card, as Markdown.")] = None,
) -> None:
    """Write a page for people: the clock, what is in force, the GPAI sheet, a block for the model card."""
    from erasure.register import Register
    from erasure.register import page as pages

    opened = Register(register)
    write_atomically(out, pages.page(opened, month=month, request=request))
    say(f"report -> {out.resolve()}", wrap=False)
    if card is not None:
        write_atomically(card, pages.card(opened))
        say(f"card -> {card.resolve()}", wrap=False)
    follow("open the report in a browser, and print it from there")


def _opened(file: str, base: str | None) -> tuple[Register, list[str]]:
    """The register, and the bases that a command is about."""
    from erasure.register import Register

    register = Register(file)
    names = list(register.bases()) if base is None else [base]
    if not names:
        raise ValueError("the register has no base model; add one with `erasure register init --base`")
    for name in names:
        register.wanted(name)  # refuses an unknown one before a model is opened
    return register, names
