"""What is installed here, which known traps are set, and the command that mends each.

:func:`diagnose` looks; ``erasure doctor`` prints. Nothing heavy is imported at the top, and every check stands
alone, because an environment in which torch does not import is the one that needs this.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from erasure.cli.options import LOOK_UP, follow
from erasure.io import cache_folder, first_line
from erasure.terminal import PlainTable, console, print_json

if TYPE_CHECKING:  # where it is used, so that --help need not read its grammar
    from packaging.requirements import Requirement

commands = typer.Typer()
Status = Literal["ok", "warn", "fail"]

DISTRIBUTION = "diffusion-erasure"
REPOSITORY = "https://github.com/diffusion-erasure/erasure"
WORLD, WEIGHTS = "erasure/world/emoji-world", "eval/worldkit/weights"  # in a clone
OLDEST_PYTHON = (3, 11)
GIB = 2**30
# Stable Diffusion 1.x in float32 takes about 5 GiB; a run on Emoji World writes some tens of megabytes.
ROOM_FOR_A_CHECKPOINT, ROOM_TO_WORK = 6 * GIB, GIB // 2

# distribution -> (module, an attribute that makes its lazy import do the real work, "" for none)
PACKAGES = {
    "diffusers": ("diffusers", "StableDiffusionPipeline"),
    "transformers": ("transformers", "CLIPTextModel"),
    "accelerate": ("accelerate", ""),
    "huggingface_hub": ("huggingface_hub", ""),
    "safetensors": ("safetensors.torch", ""),
    "open_clip_torch": ("open_clip", ""),
    "torchmetrics": ("torchmetrics", ""),
}


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Attributes:
        name: what was looked at, "torchvision".
        status: ``ok``; ``warn``: the library works, something near it does not; ``fail``: the library does not work.
        detail: what was found, versions included.
        remedy: the command that mends it; empty only when ``status`` is ``ok``.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def diagnose() -> list[Finding]:
    """Every check, in the order in which to mend: an early fault often causes the later ones. Raises nothing."""
    checks: dict[str, Callable[[], Finding]] = {
        "python": check_python,
        "torch": partial(check_package, "torch", "torch"),
        "torchvision": check_torchvision,
        **{distribution: partial(check_package, distribution, *probe) for distribution, probe in PACKAGES.items()},
        "torchmetrics CLIPScore": check_clip_score,
        "device": check_device,
        "disk": check_disk,
        "cache": check_cache,
        "Emoji World": check_world,
        "detectors": check_detectors,
    }
    return [_guarded(name, check) for name, check in checks.items()]


@commands.command(rich_help_panel=LOOK_UP, epilog="Example: [bold]erasure doctor[/bold]")
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Check the installation: versions, device, known traps, and the command that mends each."""
    findings = diagnose()
    failed = any(finding.status == "fail" for finding in findings)
    if as_json:
        print_json([asdict(finding) for finding in findings])
        raise typer.Exit(int(failed))
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = PlainTable("", "check", "found", "to mend it")
    for finding in findings:
        status = Text(finding.status, style=colours[finding.status])
        table.add_row(status, finding.name, finding.detail, finding.remedy or "")
    console.print(table)
    follow("mend the first line that says fail, and run this again" if failed else "erasure demo")
    if failed:
        raise typer.Exit(1)


def check_python() -> Finding:
    """The interpreter against the floor that torch, diffusers and transformers share."""
    found = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info[:2] >= OLDEST_PYTHON:
        return Finding("python", "ok", found)
    return Finding("python", "fail", f"{found}; 3.11 or newer is needed", "python3.11 -m venv .venv")


def check_package(distribution: str, module: str, attribute: str = "") -> Finding:
    """Whether a package is there, in the range that setup.cfg asks for, and imports."""
    wanted = _wanted(distribution)
    try:
        found = version(distribution)
    except PackageNotFoundError:
        return Finding(distribution, "fail", "not installed", _pip(str(wanted)))
    if not wanted.specifier.contains(found, prereleases=True):
        return Finding(distribution, "fail", f"{found} is installed; {wanted.specifier} is needed", _pip(str(wanted)))
    try:
        loaded = import_module(module)
        if attribute:
            getattr(loaded, attribute)
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        # A broken torchvision surfaces here under other names ("could not import CLIPModel"): mend from the top down.
        detail = f"{found} is installed but does not import: {first_line(error)}; mend what fails above it first"
        return Finding(distribution, "fail", detail, _pip("--force-reinstall", "--no-deps", f"{distribution}=={found}"))
    return Finding(distribution, "ok", found)


def check_torchvision() -> Finding:
    """Whether torchvision belongs to this torch: its declared requirement, its import, and its compiled operators.

    Taken from two places they install without complaint; then "operator torchvision::nms does not exist".
    """
    from packaging.requirements import Requirement

    mend = _pip("--force-reinstall", str(_wanted("torch")), str(_wanted("torchvision")))
    finding = check_package("torchvision", "torchvision")
    if finding.status == "fail":
        return Finding("torchvision", "fail", finding.detail, mend)
    pair = f"torchvision {version('torchvision')} with torch {version('torch')}"
    declared = [Requirement(line) for line in requires("torchvision") or []]
    for requirement in declared:
        if requirement.name == "torch" and not requirement.specifier.contains(version("torch"), prereleases=True):
            return Finding("torchvision", "fail", f"{pair}; it was built for torch {requirement.specifier}", mend)
    try:
        import_module("torch").ops.torchvision.nms  # noqa: B018  the look-up itself is the check
    except (AttributeError, RuntimeError) as error:
        detail = f"{pair}: its operators are missing ({first_line(error)}); the two come from different builds"
        return Finding("torchvision", "fail", detail, mend)
    return Finding("torchvision", "ok", pair)


def check_clip_score() -> Finding:
    """torchmetrics up to 1.9.0 calls ``.norm`` on what transformers 5 returns as an object (torchmetrics#3408)."""
    from packaging.version import Version

    name = "torchmetrics CLIPScore"
    metrics, transformers = Version(version("torchmetrics")), Version(version("transformers"))
    if metrics > Version("1.9.0") or transformers.major < 5:
        return Finding(name, "ok", f"torchmetrics {metrics} with transformers {transformers}")
    detail = (
        f"crashes with torchmetrics {metrics} and transformers {transformers}. This library does not use it "
        "(it scores through open_clip); your own code should not either until a later torchmetrics is out"
    )
    return Finding(name, "warn", detail, _pip("--upgrade", "torchmetrics>1.9.0"))


def check_device() -> Finding:
    """Where the work will run, and how much memory there is."""
    torch = import_module("torch")
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        found = ", ".join(f"{card.name}, {card.total_memory / GIB:.0f} GiB" for card in cards)
        return Finding("device", "ok", f"cuda: {found}")
    if torch.backends.mps.is_available():
        return Finding("device", "ok", f"mps, {_memory()} shared with the processor")
    found = f"cpu, {os.cpu_count()} cores, {_memory()}"
    if shutil.which("nvidia-smi"):
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        detail = f"{found}; there is an NVIDIA driver, but this torch ({build}) cannot use it"
        mend = _pip("--force-reinstall", str(_wanted("torch")), str(_wanted("torchvision")))
        return Finding("device", "warn", detail, f"{mend}  # if the driver is older than that CUDA, update the driver")
    return Finding("device", "ok", found)


def check_disk() -> Finding:
    """Room where checkpoints are cached and room where results are written."""
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    rooms = {"model cache": (_room(cache), ROOM_FOR_A_CHECKPOINT), "current folder": (_room(Path.cwd()), ROOM_TO_WORK)}
    found = ", ".join(f"{room / GIB:.1f} GiB free in the {where}" for where, (room, _) in rooms.items())
    if rooms["current folder"][0] < ROOM_TO_WORK:
        return Finding("disk", "fail", f"{found}; results need about 0.5 GiB", "hf cache prune")
    if rooms["model cache"][0] < ROOM_FOR_A_CHECKPOINT:
        return Finding("disk", "warn", f"{found}; Stable Diffusion 1.x needs about 6 GiB", "hf cache prune")
    return Finding("disk", "ok", found)


def check_cache() -> Finding:
    """Where the library keeps what it can make again, and how much of it."""
    folder = cache_folder()
    if folder is None:
        return Finding("cache", "ok", "off (ERASURE_CACHE)")
    return Finding("cache", "ok", f"{_size(folder) / 2**20:.0f} MiB in {folder}; delete it to clear it")


def check_world() -> Finding:
    """Whether the weights of Emoji World, the default model, are here."""
    folder = Path(__file__).parents[1] / "world" / "emoji-world"
    if (folder / "model_index.json").is_file():
        return Finding("Emoji World", "ok", f"{_size(folder) / 2**20:.0f} MiB")
    return Finding("Emoji World", "fail", f"the default model is missing ({WORLD})", _restore(WORLD))


def check_detectors() -> Finding:
    """Whether the weights of the detectors are here; looked up without importing ``erasure.eval``."""
    spec = find_spec("erasure.eval")
    if spec is None or not spec.submodule_search_locations:
        return Finding("detectors", "fail", "erasure.eval is not installed: this is a bare checkout", _pip("-e", "."))
    folder = Path(spec.submodule_search_locations[0]) / "worldkit" / "weights"
    if _size(folder):
        return Finding("detectors", "ok", f"{_size(folder) / 2**20:.0f} MiB")
    return Finding("detectors", "fail", f"the weights of the detectors are missing ({WEIGHTS})", _restore(WEIGHTS))


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """A check that trips over the very fault it stands beside is itself a finding."""
    try:
        return check()
    except PackageNotFoundError as error:
        return Finding(name, "fail", f"cannot be checked: {error.name} is not installed", _pip(error.name))
    except Exception as error:  # a broken environment may raise anything, and the other lines still count
        detail = f"cannot be checked: {type(error).__name__}: {first_line(error)}; mend what fails above it first"
        return Finding(name, "fail", detail, "erasure doctor")


def _wanted(distribution: str) -> Requirement:
    """What setup.cfg asks for, read from the installed metadata; any version where this is a bare checkout."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        lines = []
    for requirement in map(Requirement, lines):
        if canonicalize_name(requirement.name) == canonicalize_name(distribution) and not requirement.marker:
            return requirement
    return Requirement(distribution)


def _pip(*arguments: str) -> str:
    """The pip command line for this interpreter, quoted for a shell."""
    short = "python" if (path := shutil.which("python")) and os.path.samefile(path, sys.executable) else sys.executable
    return shlex.join([short, "-m", "pip", "install", *arguments])


def _restore(folder: str) -> str:
    """A clone has its weights in git; a wheel that has lost files is installed again."""
    clone = Path(__file__).parents[2]
    if (clone / ".git").exists():
        return shlex.join(["git", "-C", str(clone), "checkout", "HEAD", "--", folder])
    return _pip("--force-reinstall", "--no-deps", f"{DISTRIBUTION} @ git+{REPOSITORY}")


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.0f} GiB memory"
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return "memory unknown"


def _room(folder: Path) -> int:
    """Free bytes where ``folder`` is, or will be once it is made."""
    return shutil.disk_usage(next(path for path in [folder, *folder.parents] if path.exists())).free


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
