"""The assessment that docs/assessment.md shows: five arms on Emoji World, every probe of a preset, the report.

    python docs/assessment.py quick runs/assessment
    python docs/assessment.py standard runs/standard direct paraphrase ...   # some probes; the report names the others

Erasures and every finished cell stay in the folder, so an interrupted run goes on. The report goes to docs/results/,
and beside it an archive of the records that it links to.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

from figures import replace_block  # beside this file

import erasure
from erasure.eval import Assessment, assess, meta, write_report
from erasure.eval.controls import controls_for, held_out
from erasure.eval.detectors import world as detectors
from erasure.eval.material import material_for
from erasure.pipelines.guardrails import Guard

DOCS = Path(__file__).parent
METHODS = ("uce", "esd", "rece")


def main(preset: str, out: Path, *probes: str) -> None:
    pipe, suite = erasure.world.load(), erasure.Suite.load("superhero")
    pipe.set_progress_bar_config(disable=True)
    arms: dict[str, Any] = {name.upper(): made(pipe, suite, name, out / "erasures" / name) for name in METHODS}
    arms["prompt filter"] = Guard.of_words(suite.phrases)
    controls = controls_for(suite, pipe, preset)
    if sum(model.role == "gold" for model in controls) > 1:
        arms["retrained"] = held_out(controls)
    found = assess(
        pipe,
        arms,
        suite,
        preset=preset,
        detectors=detectors.detectors(),
        controls=controls,
        clip=detectors.load("clip"),
        material=material_for(suite),
        probes=probes or None,
        out=out,
    )
    results = DOCS / "results"
    records = archive(out, results / f"superhero-{preset}.records.zip")
    write_report(found, results / f"superhero-{preset}.html", title=f"Superhero, preset {preset}", records=records.name)
    page = DOCS / "assessment.md"
    text = replace_block(page.read_text("utf-8"), preset, table(found))
    told = meta.table(meta.faithfulness(*meta.trials(found)))
    page.write_text(replace_block(text, f"{preset} meta", told), "utf-8")


def made(pipe: Any, suite: erasure.Suite, method: str, folder: Path) -> erasure.Erasure:
    """The erasure in ``folder``, made now if there is none."""
    if not folder.exists():
        edit = erasure.erase(pipe, suite.concepts, method, keep=suite.kept, apply=False, name=method.upper())
        edit.save_pretrained(folder)
    return erasure.Erasure.from_pretrained(folder)


def archive(out: Path, file: Path) -> Path:
    """Every record behind the numbers of a report, in one file that is the same for the same records."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        for one in [out / "records.jsonl", *sorted((out / "probes").rglob("*.jsonl"))]:
            made.writestr(zipfile.ZipInfo(str(one.relative_to(out))), one.read_bytes(), zipfile.ZIP_DEFLATED)
    return file


def table(found: Assessment) -> str:
    """Two columns that are never merged, with what stands behind each."""
    rates = {e.model: e.estimate for e in found.evidence if (e.probe, e.measure, e.family) == ("direct", "rate", "")}
    lines = ["| model | asked by name | suppression | removal | neighbours | unrelated |", "|---|---|---|---|---|---|"]
    base = next(iter(found.roles))
    lines.append(f"| {base} | {rates[base]} | | | | |")
    for claim in found.claims():
        kept = " | ".join(claim.utility[group] for group in ("neighbours", "unrelated"))
        lines.append(f"| {claim.model} | {rates[claim.model]} | {claim.suppression} | {claim.removal} | {kept} |")
    for model, role in found.roles.items():
        if role in ("gold", "null") and model not in found.twins.values():
            lines.append(f"| {model} (control) | {rates[model]} | | | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
