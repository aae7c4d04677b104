"""Write what is generated in docs/methods.md: the comparison on Emoji World, and a section for each method.

erasure compare --suite superhero -m uce -m esd --out comparison
python docs/methods.py comparison "erasure compare --suite superhero -m uce -m esd"
python docs/methods.py                   # the sections, and the picture from docs/results/comparison.json
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from figures import ROOT, replace_block  # beside this file

from erasure.batch.lines import Line, Rate
from erasure.batch.pictures import kept_out
from erasure.methods import BUILT_IN, method_class
from erasure.methods.base import Method
from erasure.methods.finetune import FineTune

PAGE = ROOT / "docs" / "methods.md"
PICTURE = ROOT / "docs" / "images" / "comparison.png"
RESULTS = ROOT / "docs" / "results" / "comparison.json"
ALT = "a row for each method: how often the target, its neighbours and unrelated things are drawn as asked"
# Licences of the official code. Ours is written from the papers; no line is copied.
LICENCES = {
    "uce": "MIT", "time": "none", "rece": "Apache-2.0", "speed": "Apache-2.0", "mace": "non-commercial",
    "mace-cfr": "non-commercial", "double-projections": "not looked at", "cure": "no code found", "esd": "MIT",
    "leco": "MIT", "concept-ablation": "MIT", "age": "none", "eap": "none", "salun": "MIT", "forget-me-not": "MIT",
    "erasediff": "none", "cogfd": "none", "random-label": "MIT", "gradient-ascent": "not looked at",
    "spm": "Apache-2.0", "eraseflow": "none", "stereo": "none", "receler": "MIT",
    "gloce": "none", "undo": "none", "z-erase": "BSD-3-Clause",
    "adv-unlearn": "CC-BY-4.0", "sld": "MIT", "safree": "none", "adavd": "Apache-2.0",
    "negative-prompt": "part of diffusers",
}  # fmt: skip


def section(name: str) -> str:
    """One method: what it is, its equation and settings as its docstring has them, where it comes from."""
    kind: type[Method] = method_class(name)
    reference = kind.reference
    works = "all" if kind.architectures is None else ", ".join(f"`{one}`" for one in kind.architectures)
    title, address = reference.title, f"https://arxiv.org/abs/{reference.arxiv}"
    paper = f"[{title}]({address})" if reference.arxiv else title
    text = inspect.cleandoc(kind.__doc__ or "").split("\nAttributes:")[0].strip()
    lines = [
        f"### {name}",
        "",
        f"{kind.summary[:1].upper()}{kind.summary[1:]}.",
        "",
        *plain(text),
        "",
        f"- paper: {paper}, {reference.venue}; official code: {reference.repository or 'none'}, licence "
        f"{LICENCES.get(name, 'not looked at')}",
        f"- presets: {', '.join(f'`{preset}`' for preset in kind.presets)}",
        f"- training: {'yes' if issubclass(kind, FineTune) else 'no'}; architectures: {works}",
        "",
    ]
    return "\n".join(lines)


def plain(text: str) -> list[str]:
    """A docstring as Markdown: references to classes and functions as code."""
    return [re.sub(r":\w+:`~?([\w.]+)`", last, line).replace("``", "`") for line in text.splitlines()]


def last(found: re.Match[str]) -> str:
    return f"`{found[1].rpartition('.')[2]}`"


def line_of(row: dict[str, Any]) -> Line:
    """A line of ``comparison.json``, as far as the picture of it goes."""
    rates = {group: Rate(**rate) for group, rate in row["rates"].items()}
    return Line(row["method"], row["suite"], rates, error=row["error"], preset=row.get("preset", ""))


def main(folder: str | None = None, command: str = "erasure compare --suite superhero") -> None:
    text = PAGE.read_text("utf-8")
    if folder is not None:
        table = (Path(folder) / "comparison.md").read_text("utf-8").strip()
        shutil.copyfile(Path(folder) / "comparison.json", RESULTS)
        file = "images/comparison.png"
        picture = f"[![{ALT}]({file})]({file})"
        if (weights := Path(folder) / "weights.png").exists():  # where it was compared with a preset's probes
            shutil.copyfile(weights, PICTURE.with_name(weights.name))
            file = f"images/{weights.name}"
            picture += (
                f"\n\n[![a row for each method: what is still in the weights, and what else changed]({file})]({file})"
            )
        text = replace_block(text, "methods", f"```\n{command}\n```\n\n{picture}\n\n{table}")
    kept_out([line_of(row) for row in json.loads(RESULTS.read_text("utf-8"))], PICTURE)
    text = replace_block(text, "methods list", "\n".join(section(name) for name in sorted(BUILT_IN)))
    PAGE.write_text(text, "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
