"""The model card of an erasure: what was done, to which model, and what that does not show."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeGuard

from erasure.concept import WORLD
from erasure.io import LARGEST_YAML, dump_yaml, markdown, parse_yaml, printable, read_bytes


class Erasure(Protocol):
    """What a card says something about."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> Any: ...

    @property
    def tensors(self) -> Mapping[str, Any]: ...

    @property
    def kind(self) -> str: ...

    @property
    def intervention(self) -> str: ...


GROUPS = {"target": "target", "neighbours": "neighbours", "generic": "anything else"}
LICENCE = ("license", "license_name", "license_link")
LONGEST = 10_000  # characters of a list in the card: a keep list of hundreds of prompts
TEMPLATE = """---
{header}---

# {name}

An erasure made with [diffusion-erasure](https://github.com/diffusion-erasure/erasure): it makes **{base}** stop drawing
**{concepts}** when asked by name.

```python
import erasure
from diffusers import DiffusionPipeline

pipe = {load}
erasure.Erasure.from_pretrained("path/to/this/folder").apply(pipe)
```

| | |
|---|---|
{facts}

Settings: `{settings}`

{pictures}{report}{evaluation}## What this does and does not do

{intervention}
Filters at the system level complement an erasure and do not replace it, nor it them.

Not assessed here: prompts that describe the concept without naming it, optimised attack prompts, other languages,
other samplers, fine-tuning afterwards, downstream harm.{advice}

## Licence

{licence}
"""

INTERVENTION = {
    "weights": """\
It changes weights so that prompts which name the concept lead elsewhere: that *suppresses* outputs. Whether the
information is *removed* from the weights is a different question, which needs different evidence (relearning,
inversion, comparison with a model retrained without the concept). Nothing in this file claims it.""",
    "adapter": """\
There are no weight changes: it acts while pictures are drawn, so that prompts which name the concept lead elsewhere.
That *suppresses* outputs. Nothing is *removed*: the model holds the concept as before, and whoever takes the erasure
off has the base model.""",
}


def card(erasure: Erasure, pictures: Mapping[str, str] | None = None) -> str:
    """Fill the card from the erasure's config.

    Args:
        pictures: files beside the card that it shows, with what is said under each.
    """
    config = erasure.config
    base, licence = config["base"]["name"], config["base"].get("licence") or {}
    evaluated = bool(config.get("evaluation"))
    return TEMPLATE.format(
        header=dump_yaml(_header(config)),
        load="erasure.world.load()" if base == WORLD else f"DiffusionPipeline.from_pretrained({_literal(base)})",
        name=markdown(erasure.name),
        base=markdown(base),
        concepts=markdown(", ".join(concept["name"] for concept in config["concepts"]), limit=LONGEST),
        facts="\n".join(f"| {key} | {markdown(value, limit=LONGEST)} |" for key, value in facts(erasure).items()),
        settings=_code(json.dumps(config["settings"], ensure_ascii=False)),
        intervention=INTERVENTION[erasure.intervention],
        pictures=_pictures(pictures or {}),
        report=_report(config.get("report") or {}),
        evaluation=_evaluation(config.get("evaluation") or []),
        advice="" if evaluated else " Run `erasure evaluate` and publish its table with the model.",
        licence=_licence(licence, base),
    )


def facts(erasure: Erasure) -> dict[str, str]:
    """What the card and ``erasure inspect`` say of an erasure, line by line."""
    config = erasure.config
    preset = config.get("preset") or ""
    everyday = config.get("keep_everyday") or []
    kept = ", ".join(config["keep"]) or "nothing in particular"
    prints = config["base"]["components"]
    return {
        "base": config["base"]["name"],
        "architecture": f"{config['base']['architecture']}, {config['base']['prediction_type']} prediction",
        "fingerprints": ", ".join(f"{part} {facts['layout']}" for part, facts in prints.items()),
        "method": config["method"],
        "preset": preset if isinstance(preset, str) else ", ".join(preset),
        "kind": f"{erasure.kind} ({size(erasure):,} bytes)",
        "concepts": "; ".join(map(_concept, config["concepts"])),
        "kept": kept + (f"; and {len(everyday)} everyday words" if everyday else ""),
        **({"encoding": encoding} if (encoding := _encoding(config.get("encoding") or {})) else {}),
        "library": f"diffusion-erasure {config['library_version']}",
    }


def _encoding(settings: Mapping[str, Any]) -> str:
    """How prompts were encoded where that is not the pipeline's default: draw with the same."""
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def size(erasure: Erasure) -> int:
    """Bytes of its numbers."""
    return sum(tensor.nbytes for tensor in erasure.tensors.values())


def report_rows(report: Mapping[str, Any]) -> tuple[dict[str, float], list[tuple[str, float, float]]]:
    """A quick report's single figures, and its groups as ``(group, moved, cosine)``; other spaces' beside them."""
    figures = {key: value for key, value in report.items() if _is_figure(value)}
    groups = [(GROUPS[name], *_pair(report[name])) for name in GROUPS if isinstance(report.get(name), dict)]
    for space, part in report.items():
        if space not in GROUPS and isinstance(part, dict):
            more, rows = report_rows(part)
            figures |= {f"{space} {key}": value for key, value in more.items()}
            groups += [(f"{space} {name}", moved, cosine) for name, moved, cosine in rows]
    return figures, groups


def in_words(erasure: Erasure, bytes_: int | None = None) -> list[str]:
    """What an erasure is and what it moved, in words."""
    figures, groups = report_rows(erasure.config.get("report") or {})
    moved = figures.get("relative_change")
    if erasure.intervention == "adapter":
        effect = "no weight changes: it can be taken off"
    else:
        effect = (
            f"the weights it changes move by {moved:.2g} times their size" if moved is not None else "edits weights"
        )
    n = size(erasure) if bytes_ is None else bytes_
    lines = [f"{erasure.kind}, {f'{n / 1e6:.1f} MB' if n >= 1e6 else f'{n / 1000:.1f} kB'}; {effect}"]
    if groups:
        seen = ", ".join(f"{group} {100 * share:.0f} %" for group, share, _ in groups)
        lines.append(f"how far the words moved: {seen}; the target should move far, all else little")
    return lines


def one_line(erasure: Erasure) -> str:
    """Name, concepts, method and base, whatever their number and length."""
    config = erasure.config
    names = [concept["name"] for concept in config["concepts"]]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    concepts = printable(", ".join(names[:3]) + more, limit=100)
    method, base = printable(config["method"], limit=60), printable(config["base"]["name"], limit=60)
    name = printable(erasure.name, limit=60)
    return f"{type(erasure).__name__}({name!r}: {concepts!r} erased from {base!r} by {method!r})"


def html_card(erasure: Erasure) -> str:
    """A small table for notebooks: facts, and the quick report in words."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{key}</th><td style='text-align:left'>{_html(value)}</td></tr>"
        for key, value in facts(erasure).items()
        if key not in ("fingerprints", "library")
    )
    words = "".join(f"<li>{_html(line)}</li>" for line in in_words(erasure))
    return (
        f"<div><b>{_html(erasure.name)}</b><table>{rows}</table><ul>{words}</ul>"
        "<small>No picture was drawn for this: edit.preview(pipe, prompts) draws some, and an evaluation says what "
        "the erasure did.</small></div>"
    )


def _html(text: Any) -> str:
    return html.escape(printable(text, limit=300))


def licence_of(pipe: Any) -> dict[str, str]:
    """What the base model's own card says of its licence, if the pipeline came from a folder that has one."""
    folder = Path(str(pipe.config.get("_name_or_path") or ""))
    try:
        text = read_bytes(folder / "README.md", largest=LARGEST_YAML).decode("utf-8")
        header = parse_yaml(text.split("---")[1]) if text.startswith("---") else {}
    except (OSError, ValueError, IndexError):
        return {}
    return {key: header[key] for key in LICENCE if isinstance(header.get(key), str)} if isinstance(header, dict) else {}


def _header(config: Mapping[str, Any]) -> dict[str, Any]:
    base, licence = config["base"]["name"], config["base"].get("licence") or {}
    known = {"base_model": base, "base_model_relation": "adapter"} if base.count("/") == 1 else {}
    tags = ["concept-erasure", "diffusers", *config["method"].split("+")]
    facts = {"library_name": "diffusers", **known, **_shareable(licence), "tags": list(dict.fromkeys(tags))}
    return {k: [*map(printable, v)] if isinstance(v, list) else printable(v) for k, v in facts.items()}


def _shareable(licence: Mapping[str, str]) -> dict[str, str]:
    """What may stand in a card of a licence: of its link, only one to a web page."""
    known = {key: licence[key] for key in LICENCE if licence.get(key)}
    link = known.pop("license_link", "")
    return {**known, **({"license_link": link} if re.fullmatch(r"https?://[^\s<>\"']+|LICENSE[\w.-]*", link) else {})}


def _concept(concept: Mapping[str, Any]) -> str:
    synonyms = f" ({', '.join(concept['synonyms'])})" if concept.get("synonyms") else ""
    return f"{concept['name']}{synonyms}" + (f" -> {concept['anchor']}" if concept.get("anchor") else "")


def _report(report: Mapping[str, Any]) -> str:
    figures, groups = report_rows(report)
    if not figures and not groups:
        return ""
    lines = ["## What the edit moved", ""]
    lines += ["Measured on single embeddings when it was made; no picture was generated for this.", ""]
    lines += [", ".join(f"{markdown(key.replace('_', ' '))} {value:.3g}" for key, value in figures.items()) + ".", ""]
    if groups:
        lines += ["| embeddings of | moved, relative | cosine to before |", "|---|---|---|"]
        lines += [f"| {markdown(name)} | {moved:.3f} | {cosine:.3f} |" for name, moved, cosine in groups] + [""]
    return "\n".join([*lines, ""])


def _pictures(pictures: Mapping[str, str]) -> str:
    shown = [f"![{markdown(said)}]({file})\n\n*{markdown(said)}*\n" for file, said in pictures.items()]
    return "\n".join(["## Pictures", "", *shown, ""]) if shown else ""


def _evaluation(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["## Evaluation", "", f"| {' | '.join(map(markdown, columns))} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in rows]
    return "\n".join([*lines, "", ""])


def _licence(licence: Mapping[str, str], base: str) -> str:
    if not licence:
        return f"The erasure inherits the licence of its base model, {markdown(base)}: see there."
    licence = _shareable(licence)
    name = licence.get("license_name") or licence.get("license", "")
    link = f" ({printable(licence['license_link'])})" if licence.get("license_link") else ""
    return f"Inherited from the base model, {markdown(base)}: {markdown(name)}{link}."


def _pair(group: Mapping[str, Any]) -> tuple[float, float]:
    moved, cosine = (value if _is_figure(value := group.get(key)) else math.nan for key in ("moved", "cosine"))
    return moved, cosine


def _is_figure(value: Any) -> TypeGuard[float]:
    """A number that prints; JSON has longer ones."""
    return isinstance(value, int | float) and abs(value) < 1e300


def _cell(value: Any) -> str:
    return "" if value is None else markdown(value)


def _code(text: str) -> str:
    """Text that cannot end the code it stands in."""
    return printable(text, limit=LONGEST).replace("`", "'")


def _literal(text: str) -> str:
    """A name as it stands in Python code; only ASCII, so that nothing in it is other than it looks."""
    return json.dumps(printable(text)).replace("`", "'")
