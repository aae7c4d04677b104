"""The model card of an erasure: what was done, to which model, and what that does not show."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import yaml

from erasure.concept import WORLD

if TYPE_CHECKING:
    from erasure.artifact.base import Erasure

GROUPS = {"target": "target", "neighbours": "neighbours", "generic": "anything else"}
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

{report}{evaluation}## What this does and does not do

It changes weights so that prompts which name the concept lead elsewhere: that *suppresses* outputs. Whether the
information is *removed* from the weights is a different question, which needs different evidence (relearning,
inversion, comparison with a model retrained without the concept). Nothing in this file claims it. Filters at the
system level complement an erasure and do not replace it, nor it them.

Not assessed here: prompts that describe the concept without naming it, optimised attack prompts, other languages,
other samplers, fine-tuning afterwards, downstream harm.{advice}

## Licence

{licence}
"""


def card(erasure: Erasure) -> str:
    """Fill the card from the erasure's config."""
    config = erasure.config
    base, licence = config["base"]["name"], config["base"].get("licence") or {}
    evaluated = bool(config.get("evaluation"))
    return TEMPLATE.format(
        header=yaml.safe_dump(_header(config), sort_keys=False, allow_unicode=True),
        load="erasure.world.load()" if base == WORLD else f"DiffusionPipeline.from_pretrained({json.dumps(base)})",
        name=_cell(erasure.name),
        base=_cell(base),
        concepts=_cell(", ".join(concept["name"] for concept in config["concepts"])),
        facts="\n".join(f"| {key} | {_cell(value)} |" for key, value in facts(erasure).items()),
        settings=json.dumps(config["settings"], ensure_ascii=False).replace("`", "'"),
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
        "kept": kept + (f"; and {len(everyday)} everyday nouns" if everyday else ""),
        "library": f"diffusion-erasure {config['library_version']}",
    }


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


def licence_of(pipe: Any) -> dict[str, str]:
    """What the base model's own card says of its licence, if the pipeline came from a folder that has one."""
    folder = Path(str(pipe.config.get("_name_or_path") or ""))
    try:
        text = (folder / "README.md").read_text("utf-8")
        header = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, IndexError):
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: header[key] for key in keys if isinstance(header.get(key), str)} if isinstance(header, dict) else {}


def _header(config: Mapping[str, Any]) -> dict[str, Any]:
    base, licence = config["base"]["name"], config["base"].get("licence") or {}
    known = {"base_model": base, "base_model_relation": "adapter"} if base.count("/") == 1 else {}
    tags = ["concept-erasure", "diffusers", *config["method"].split("+")]
    return {"library_name": "diffusers", **known, **licence, "tags": list(dict.fromkeys(tags))}


def _concept(concept: Mapping[str, Any]) -> str:
    synonyms = f" ({', '.join(concept['synonyms'])})" if concept.get("synonyms") else ""
    return f"{concept['name']}{synonyms}" + (f" -> {concept['anchor']}" if concept.get("anchor") else "")


def _report(report: Mapping[str, Any]) -> str:
    figures, groups = report_rows(report)
    if not figures and not groups:
        return ""
    lines = ["## What the edit moved", ""]
    lines += ["Measured on single embeddings when it was made; no picture was generated for this.", ""]
    lines += [", ".join(f"{key.replace('_', ' ')} {value:.3g}" for key, value in figures.items()) + ".", ""]
    if groups:
        lines += ["| embeddings of | moved, relative | cosine to before |", "|---|---|---|"]
        lines += [f"| {name} | {moved:.3f} | {cosine:.3f} |" for name, moved, cosine in groups] + [""]
    return "\n".join([*lines, ""])


def _evaluation(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["## Evaluation", "", f"| {' | '.join(map(_cell, columns))} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(_cell(row.get(column, '')) for column in columns)} |" for row in rows]
    return "\n".join([*lines, "", ""])


def _licence(licence: Mapping[str, str], base: str) -> str:
    if not licence:
        return f"The erasure inherits the licence of its base model, {_cell(base)}: see there."
    name = licence.get("license_name") or licence.get("license", "")
    link = f" ({licence['license_link']})" if licence.get("license_link") else ""
    return f"Inherited from the base model, {_cell(base)}: {_cell(name)}{link}."


def _pair(group: Mapping[str, Any]) -> tuple[float, float]:
    moved, cosine = (value if _is_figure(value := group.get(key)) else math.nan for key in ("moved", "cosine"))
    return moved, cosine


def _is_figure(value: Any) -> TypeGuard[float]:
    """A number that prints; JSON has longer ones."""
    return isinstance(value, int | float) and abs(value) < 1e300


def _cell(value: Any) -> str:
    """Text that cannot end a table's cell or line."""
    return " ".join(str("" if value is None else value).split()).replace("|", "\\|")
