"""Write what is generated in docs/methods.md: the comparison on Emoji World, and a section for each method.

erasure compare --suite superhero -m uce -m esd --out comparison
python docs/methods.py comparison "erasure compare --suite superhero -m uce -m esd"
erasure compare --targets 5 -m uce -m rece --out targets
python docs/methods.py targets "erasure compare --targets 5 -m uce -m rece"  # several targets: a block of their own
python docs/methods.py                   # the sections, and the picture from docs/results/comparison.json
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from figures import ROOT, replace_block  # beside this file

from erasure.batch.comparison import MEANS_NOTE, table
from erasure.batch.lines import GROUPS, Line, Rate, ranked
from erasure.batch.pictures import kept_out
from erasure.methods import BUILT_IN, method_class
from erasure.methods.base import Method
from erasure.methods.finetune import FineTune

PAGE = ROOT / "docs" / "methods.md"
PICTURE = ROOT / "docs" / "images" / "comparison.png"
RESULTS = ROOT / "docs" / "results" / "comparison.json"
TARGETS = RESULTS.with_name("comparison-targets.json")
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


def lines_in(file: Path) -> list[Line]:
    """The lines of a ``comparison.json``, as far as tables and pictures of what is drawn go."""
    rows = json.loads(file.read_text("utf-8"))
    return [Line(**{**row, "rates": {g: Rate(**r) for g, r in row["rates"].items()}, "inside": {}, "rest": None})
            for row in rows]  # fmt: skip


def over_targets(lines: Sequence[Line]) -> str:
    """Means over targets, and under them each target by itself."""
    own = {(line.label, line.suite): line for line in lines}
    suites = [suite for suite in dict.fromkeys(line.suite for line in lines) if "targets" not in suite]
    means = ranked([line for line in lines if line.suite not in suites])
    rows = [f"| method | {' | '.join(suites)} |", "|---" * (len(suites) + 1) + "|"]
    base = (next(line.before for line in lines if line.suite == suite) for suite in suites)
    rows.append(f"| base | {' | '.join(' / '.join(f'{100 * rate:.0f}' for rate in one.values()) for one in base)} |")
    for line in means:
        cells = [own[line.label, suite].rates for suite in suites]
        shown = [" / ".join(f"{100 * r[group].value:.0f}" for group in GROUPS) for r in cells]
        rows.append(f"| `{line.label}` | {' | '.join(shown)} |")
    each = "Each target by itself, target shown / neighbours right / unrelated right, in per cent:"
    return "\n\n".join([table(means), MEANS_NOTE, each, "\n".join(rows)])


def main(folder: str | None = None, command: str = "erasure compare --suite superhero") -> None:
    text = PAGE.read_text("utf-8")
    lines = [] if folder is None else lines_in(Path(folder) / "comparison.json")
    if folder is not None and len({line.suite for line in lines}) > 1:
        shutil.copyfile(Path(folder) / "comparison.json", TARGETS)
        text = replace_block(text, "targets", f"```\n{command}\n```\n\n{over_targets(lines)}")
    elif folder is not None:
        rows = (Path(folder) / "comparison.md").read_text("utf-8").strip()
        shutil.copyfile(Path(folder) / "comparison.json", RESULTS)
        file = "images/comparison.png"
        picture = f"[![{ALT}]({file})]({file})"
        if (weights := Path(folder) / "weights.png").exists():  # where it was compared with a preset's probes
            shutil.copyfile(weights, PICTURE.with_name(weights.name))
            file = f"images/{weights.name}"
            picture += (
                f"\n\n[![a row for each method: what is still in the weights, and what else changed]({file})]({file})"
            )
        text = replace_block(text, "methods", f"```\n{command}\n```\n\n{picture}\n\n{rows}")
    kept_out(lines_in(RESULTS), PICTURE)
    text = replace_block(text, "methods list", "\n".join(section(name) for name in sorted(BUILT_IN)))
    PAGE.write_text(text, "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
