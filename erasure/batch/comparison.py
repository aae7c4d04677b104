"""Several methods on one page: what each keeps out, what it keeps, what is still inside, what it cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from erasure.batch.lines import GROUPS, INSIDE, Line, averaged, lines_of, means, ranked
from erasure.batch.pictures import kept_out, still_inside
from erasure.batch.recipe import Recipe
from erasure.batch.stages import replacing
from erasure.eval.judge import QUESTIONS
from erasure.io import write_atomically, write_json, writing

TARGETS = ("superhero", "cat", "rose", "violin", "taxi")  # shipped suites of Emoji World, for `--targets`


def table(lines: Sequence[Line]) -> str:
    """A Markdown table: the base, those that keep the target out best first, failed ones last with their reason."""
    rows = [
        "| method | on | target shown | neighbours right | unrelated right | forward passes | seconds | file |",
        "|---|---|---|---|---|---|---|---|",
    ]
    bases: set[str] = set()
    for line in ranked(lines):
        if line.before and line.suite not in bases:
            bases.add(line.suite)
            shown = [f"{100 * line.before[group]:.0f} %" if group in line.before else "" for group in GROUPS]
            rows.append(f"| base | {line.suite} | {' | '.join(shown)} | | | |")
        if line.error is not None:
            rows.append(f"| `{line.label}` | {line.suite} | failed: {line.error.replace('|', '/')} | | | | | |")
            continue
        shown = [str(line.rates[group]) if group in line.rates else "" for group in GROUPS]
        cost = [f"{line.passes:,}", f"{line.seconds:.0f}", f"{line.size / 1e6:.2f} MB"]
        rows.append(f"| `{line.label}` | {line.suite} | {' | '.join([*shown, *cost])} |")
    return "\n".join(rows)


def verdicts(lines: Sequence[Line]) -> str:
    """A Markdown table of the five verdicts and of what is still in the weights, in the order of :func:`table`.

    Means have no verdict: that is for one target.
    """
    single = any(line.answers for line in lines)
    headings = [question.heading for question in QUESTIONS.values()] if single else []
    names = ["method", "on", *headings, *INSIDE.values(), *([] if single else ["the rest, against the base"])]
    rows = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for line in ranked([line for line in lines if line.error is None]):
        inside = [line.inside[measure].written("{:.2f}") if measure in line.inside else "" for measure in INSIDE]
        rest = [] if single else ["" if line.rest is None else line.rest.written("{:+.0f}", 100, " points")]
        answers = [line.answers.get(key, "") for key in QUESTIONS] if single else []
        rows.append(f"| {' | '.join([f'`{line.label}`', line.suite, *answers, *inside, *rest])} |")
    return "\n".join(rows)


NOTE = (
    "Shown and right: shares of pictures with 95 % intervals, by the less flattering detector. This says what is drawn "
    "when the target is asked for by name; it says nothing about attacks or about the weights. Seconds compare within "
    "this run only."
)
INSIDE_NOTE = (
    "Residual: what probes recover, from 0 (as from a model that never saw the target) to 1 (as from the base), of the "
    "probe that recovers most. Relearnt: how much faster than such a model the target is learnt again, as a power of "
    "two; 0 is as fast. A number is missing where a probe could not run or a gate of it failed. The reports say which."
)
NULL_NOTE = (
    "On some targets no retrained model is there, and the comparison is with a null control; that can prevent a claim "
    "and is no evidence about removal."
)
MEANS_NOTE = (
    "Means over targets: the interval is the wider of two at each end, one from the targets' own intervals and one "
    "from how much they differ."
)


def page(lines: Sequence[Line]) -> str:
    """The whole comparison as Markdown."""
    parts, over = [table(lines), NOTE], means(lines)
    if any(line.inside or len(line.answers) for line in lines):
        parts += [verdicts(lines), INSIDE_NOTE]
        parts += [NULL_NOTE] if any("null" in line.controls for line in lines) else []
    if over:
        parts += [table(over), *([verdicts(over)] if any(line.inside for line in over) else []), MEANS_NOTE]
    return "\n\n".join(parts) + "\n"


def write_comparison(recipe: Recipe) -> list[Path]:
    """``comparison.json`` and ``comparison.md`` beside the cells, and pictures of what was measured.

    Raises:
        ValueError: no cell of the recipe has been run.
    """
    lines = lines_of(recipe)
    if not lines:
        raise ValueError(f"no cell of the recipe has a result in {recipe.out}; run it first")
    text, table_, kept, inside = (
        recipe.out / name for name in ("comparison.json", "comparison.md", "comparison.png", "weights.png")
    )
    shown, files = averaged(lines), [text, table_]
    with replacing(text, table_, kept, inside):
        write_json(text, [dataclasses.asdict(line) for line in (*lines, *means(lines))])
        write_atomically(table_, page(lines))
        for file, picture, measured in (
            (kept, kept_out, any({"target", "neighbours"} <= line.rates.keys() for line in shown)),
            (inside, still_inside, any(line.inside and line.rest for line in shown)),
        ):
            if measured:
                with writing(file) as partial:
                    picture(shown, partial)
                files.append(file)
    return files


__all__ = ["TARGETS", "page", "table", "verdicts", "write_comparison"]
