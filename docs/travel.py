"""Write the tables of docs/travel.md: each erasure in each form, read by another program, compared with ours.

python docs/travel.py            both tables, some minutes on two cores
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tiny pipelines and the readers are the tests'

from erasure.artifact.engines import ENGINES  # noqa: E402
from erasure.opening import quiet  # noqa: E402
from tests.every import EVERY  # noqa: E402
from tests.travel import TARGETS, Cell, cell  # noqa: E402

PAGE = Path(__file__).with_suffix(".md")
# Kinds of erasures on one U-Net and one transformer each; the name of the row.
ROWS: list[tuple[str, str, str, torch.dtype]] = [
    ("closed form (UCE)", "sd1", "operator", torch.float32),
    ("the same, model in float16", "sd1", "operator", torch.float16),
    ("the same, model in bfloat16", "flux", "operator", torch.bfloat16),
    ("fine-tune of an adapter (ESD, `adapter=lora`)", "sd1", "lora", torch.float32),
    ("the same", "flux", "lora", torch.float32),
    ("the same", "qwen-image", "lora", torch.float32),
    ("the same", "chroma", "lora", torch.float32),
    ("fine-tune of weights (ESD)", "sd1", "delta", torch.float32),
    ("gated adapter (SPM)", "sd1", "gated", torch.float32),
    ("guidance while drawing (SLD)", "sd1", "hooks", torch.float32),
    ("text encoder (AdvUnlearn)", "sd1", "text encoder", torch.float32),
]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def said(found: Cell, reasons: list[str]) -> str:
    """A cell; long reasons stand below the table, under a number."""
    if found.error is not None:
        return str(found)
    text = found.said.replace("|", "\\|")
    if text not in reasons:
        reasons.append(text)
    return f"refused ({reasons.index(text) + 1})"


def listed(reasons: list[str]) -> str:
    return "\n".join(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))


def architectures(log: Callable[[str], None]) -> str:
    rows, reasons = [], []  # type: ignore[var-annotated]
    for name in EVERY:
        rows.append([f"`{name}`", *(said(cell(name, target), reasons) for target in TARGETS)])
        log(f"{name}: {rows[-1][1:]}")
    return table(["architecture", *TARGETS], rows) + "\n\n" + listed(reasons)


def kinds(log: Callable[[str], None]) -> str:
    rows, reasons = [], []  # type: ignore[var-annotated]
    for title, name, kind, dtype in ROWS:
        found = [said(cell(name, target, kind, dtype), reasons) for target in TARGETS]
        rows.append([title, f"`{name}`", *found])
        log(f"{title}, {name}: {found}")
    return table(["erasure", "model", *TARGETS], rows) + "\n\n" + listed(reasons)


def engines() -> str:
    """What each engine reads, from the exporter's own table."""
    rows = [[f"`{key}`", one.title, ", ".join(f"`{form}`" for form in one.forms)] for key, one in ENGINES.items()]
    return table(["`--for`", "program", "forms, the first that works is written"], rows)


def main() -> None:
    def log(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    makers: dict[str, Callable[[], str]] = {
        "engines": engines,
        "architectures": lambda: architectures(log),
        "kinds": lambda: kinds(log),
    }
    for name, make in makers.items():
        with quiet():
            block = make()
        PAGE.write_text(replaced(PAGE.read_text("utf-8"), name, block), "utf-8")


def replaced(text: str, name: str, block: str) -> str:
    """A page with what stands between the marks of a name replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{block}\n{end}", text, flags=re.DOTALL)


if __name__ == "__main__":
    main()
