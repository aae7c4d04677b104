"""Write what is generated in docs/methods.md: the comparison on Emoji World, and a section for each method.

erasure compare --suite superhero -m uce -m esd --out comparison
python docs/methods.py comparison "erasure compare --suite superhero -m uce -m esd"
erasure compare --targets 5 -m uce -m rece --out targets
python docs/methods.py targets "erasure compare --targets 5 -m uce -m rece"  # several targets: a block of their own
python docs/methods.py targets "..." more docs/results                       # run in parts: methods with every target
python docs/methods.py runs/shapes                                           # the second base: studies/second_base.py
python docs/methods.py                   # the sections, and the picture from docs/results/comparison.json
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import ROOT, replace_block  # beside this file

from erasure.batch.comparison import MEANS_NOTE, table
from erasure.batch.comparison import TARGETS as FIVE
from erasure.batch.lines import GROUPS, Line, means, ranked
from erasure.batch.pictures import kept_out
from erasure.methods import BUILT_IN, method_class
from erasure.methods.base import Method
from erasure.methods.finetune import FineTune
from studies.second_base import TARGETS as SHAPES

PAGE = ROOT / "docs" / "methods.md"
PICTURE = ROOT / "docs" / "images" / "comparison.png"
RESULTS = ROOT / "docs" / "results" / "comparison.json"
TARGETS = RESULTS.with_name("comparison-targets.json")
SECOND = RESULTS.with_name("comparison-second-base.json")
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


def rows_in(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))
    return rows


def of_each_target(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of single targets, of methods that have one for each; of two for one target, the first."""
    own: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        own.setdefault((Line.read(row).label, row["suite"]), row)
    whole = [label for label in dict.fromkeys(label for label, _ in own) if all((label, t) in own for t in FIVE)]
    return [own[label, target] for target in FIVE for label in whole]


def over_targets(rows: Sequence[dict[str, Any]]) -> str:
    """Means over targets, and under them each target by itself."""
    lines = [Line.read(row) for row in rows]
    own = {(line.label, line.suite): line for line in lines}
    before = {line.suite: line.before for line in lines if line.before}
    lines = [dataclasses.replace(line, before=before[line.suite]) for line in lines]
    under = [f"| method | {' | '.join(FIVE)} |", "|---" * (len(FIVE) + 1) + "|"]
    under.append(f"| base | {' | '.join(_three([before[target][group] for group in GROUPS]) for target in FIVE)} |")
    for line in ranked(over := means(lines)):
        cells = [_three([own[line.label, target].rates[group].value for group in GROUPS]) for target in FIVE]
        under.append(f"| `{line.label}` | {' | '.join(cells)} |")
    each = "Each target by itself, target shown / neighbours right / unrelated right, in per cent:"
    return "\n\n".join([table(over), MEANS_NOTE, each, "\n".join(under)])


def on_both_bases(rows: Sequence[dict[str, Any]]) -> str:
    """The second base beside Emoji World: five targets where a method was run on them, else the superhero."""
    second = means([Line.read(row) for row in rows])
    five = {line.label: line for line in means([Line.read(row) for row in rows_in(TARGETS)])}
    world = {**{line.label: line for line in map(Line.read, rows_in(RESULTS))}, **five}
    bases = [_three([line.before[group] for group in GROUPS]) for line in (second[0], next(iter(five.values())))]
    lines = [
        "| method | shapes | Emoji World | on |",
        "|---|---|---|---|",
        f"| base | {' | '.join(bases)} | 5 targets |",
    ]
    for line in ranked(second):
        other = world.get(line.method)
        there = "" if other is None else _three([other.rates[group].value for group in GROUPS])
        cells = [f"`{line.method}`", _three([line.rates[group].value for group in GROUPS]), there]
        lines.append(f"| {' | '.join([*cells, '' if other is None else other.suite])} |")
    return "\n".join(lines)


def _three(rates: Sequence[float]) -> str:
    return " / ".join(f"{100 * rate:.0f}" for rate in rates)


def main(folder: str | None = None, command: str = "erasure compare --suite superhero", *more: str) -> None:
    text = PAGE.read_text("utf-8")
    files = [Path(one) / "comparison.json" for one in (folder, *more) if one is not None]
    rows = [row for file in files for row in rows_in(file)]
    suites = {row["suite"] for row in rows}
    if suites & SHAPES.keys():
        shutil.copyfile(files[0], SECOND)
        text = replace_block(text, "second base", on_both_bases(rows))
    elif folder is not None and len(suites) > 1:
        chosen = of_each_target(rows)
        TARGETS.write_text(json.dumps(chosen, indent=1) + "\n", "utf-8")
        text = replace_block(text, "targets", f"```\n{command}\n```\n\n{over_targets(chosen)}")
    elif folder is not None:
        made = (Path(folder) / "comparison.md").read_text("utf-8").strip()
        shutil.copyfile(Path(folder) / "comparison.json", RESULTS)
        file = "images/comparison.png"
        picture = f"[![{ALT}]({file})]({file})"
        if (weights := Path(folder) / "weights.png").exists():  # where it was compared with a preset's probes
            shutil.copyfile(weights, PICTURE.with_name(weights.name))
            file = f"images/{weights.name}"
            picture += (
                f"\n\n[![a row for each method: what is still in the weights, and what else changed]({file})]({file})"
            )
        text = replace_block(text, "methods", f"```\n{command}\n```\n\n{picture}\n\n{made}")
    kept_out([Line.read(row) for row in rows_in(RESULTS)], PICTURE)
    text = replace_block(text, "methods list", "\n".join(section(name) for name in sorted(BUILT_IN)))
    PAGE.write_text(text, "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
