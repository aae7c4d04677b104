"""The commands that measure: paired pictures, every probe of a preset, reports."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from erasure.cli_options import Device, Dtype, Limit, open_base
from erasure.terminal import PlainTable, console, lines, say

FILTER, RETRAINED = "prompt filter", "retrained"  # what tables call them


def evaluate(
    suite: Annotated[str, typer.Option(help="A shipped suite's name or a YAML file.")],
    out: Annotated[Path, typer.Option(help="Folder for figures and report; run again to go on.")] = Path(
        "erasure-results"
    ),
    erasure: Annotated[list[str] | None, typer.Option(help="Folder or hub id; repeat to compare.")] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="Or make one now with this method.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Put every probe of quick, standard or full (or smoke: a trial) as well.")
    ] = None,
    probe: Annotated[list[str] | None, typer.Option(help="Of the preset only this probe; repeat for more.")] = None,
    prompt_filter: Annotated[
        bool, typer.Option("--prompt-filter", help="Compare with a filter of prompts: it changes no weight.")
    ] = False,
    retrained: Annotated[
        bool, typer.Option("--retrained", help="Compare with a model retrained without the target, as one more arm.")
    ] = False,
    gold: Annotated[
        list[str] | None, typer.Option(help="Pipeline retrained without the target, as a control; repeat for more.")
    ] = None,
    material: Annotated[
        Path | None, typer.Option(help="Folder of real pictures with metadata.jsonl, for probes that need them.")
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="YAML: what is required, why, who decided.")] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Exit with 3 when something the policy requires is not assessed or spoken against."
        ),
    ] = False,
    base: Annotated[str | None, typer.Option(help="Base model; the suite's own by default.")] = None,
    limit: Limit = None,
    clip: Annotated[
        list[str] | None,
        typer.Option(
            help="open_clip model/weights that judges real checkpoints; ViT-B-32/openai by default. A second one lets "
            "attacks choose by another eye than the one that scores."
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Compare a model before and after: target, neighbours, unrelated, with intervals. Writes the report.

    With a preset also: paraphrases, attacks, what is left in the weights compared with models that never saw the
    target, filters, and the claims that all this licences.
    """
    from erasure.concept import Suite
    from erasure.eval.claims.policy import STRICT_EXIT, Policy
    from erasure.eval.controls import controls_for, held_out
    from erasure.eval.detectors.choice import CLIP, detectors_for
    from erasure.eval.material import material_for
    from erasure.eval.probes import probes_of
    from erasure.methods import method_class
    from erasure.pipelines.guardrails import Guard

    plan = Suite.load(suite)
    needs_preset = {
        "--probe": probe, "--prompt-filter": prompt_filter, "--retrained": retrained, "--gold": gold,
        "--material": material, "--policy": policy, "--strict": strict,
    }  # fmt: skip
    if preset is None and (given := [name for name, value in needs_preset.items() if value]):
        raise ValueError(f"{given[0]} belongs to an assessment; add --preset quick, or leave it out")
    if preset is not None and limit is not None:
        raise ValueError("a preset has its own sizes; leave --limit out, or use --preset smoke for a trial")
    if strict and policy is None:
        raise ValueError("--strict compares with a policy; got none; add --policy FILE")
    # Slips are found before a model is loaded.
    rules = None if policy is None else Policy.load(policy)
    if preset is not None:
        probes_of(preset, tuple(probe) if probe else None)
    real = material_for(plan, material)
    edits = read_erasures(erasure or [])
    check_names([*edits, *map(str.upper, method or []), *[FILTER] * prompt_filter, *[RETRAINED] * retrained])
    for name in method or []:
        method_class(name)
    pipe = open_base(base or plan.base, device, dtype)
    detectors, judge = detectors_for(plan, clip=clip or CLIP, device=str(pipe.device))
    controls = [] if preset is None else controls_for(plan, pipe, preset, golds=gold or [])
    swapped = held_out(controls) if retrained else None
    edits |= make_erasures(pipe, plan, method or [], out / "erasures")
    if prompt_filter:
        edits[FILTER] = Guard.of_words(plan.phrases)
    if swapped is not None:
        edits[RETRAINED] = swapped
    if preset is None:
        compare(pipe, edits, plan, out, limit=limit, detectors=detectors, clip=judge)
        return
    objections = assess_all(
        pipe, edits, plan, out, preset=preset, probes=probe or None, detectors=detectors, controls=controls,
        clip=judge, material=real, policy=rules,
    )  # fmt: skip
    if strict and objections:
        raise typer.Exit(STRICT_EXIT)


def report(
    evaluation: Annotated[Path, typer.Argument(help="Folder of an evaluation or assessment, or its evaluation.json.")],
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
) -> None:
    """Write the HTML report of a finished evaluation."""
    from erasure.eval import Assessment, Evaluation, write_report
    from erasure.eval.assessment import FILE

    folder = evaluation.parent if evaluation.name == FILE else evaluation
    whole = folder.is_dir() and (folder / FILE).exists()
    found = Assessment.load(folder) if whole else Evaluation.from_json(evaluation)
    say(f"report -> {write_report(found, out, records=folder if folder.is_dir() else folder.parent)}")


def probes() -> None:
    """List the probes: what each asks, what it is evidence about, and which presets run it."""
    from erasure.eval.probes import HOMES, PRESETS, probe_class

    table = PlainTable("probe", "", "what it asks", "evidence about", "access", "presets")
    section = ""
    for name in HOMES:
        kind = probe_class(name)
        if kind.section != section:
            table.add_section()
            section = kind.section
        ran = ", ".join(preset for preset in PRESETS if preset in kind.presets)
        table.add_row(name, kind.code, kind.title, f"{kind.section}, {kind.level}", kind.access.replace("_", " "), ran)
    console.print(table)


def reproduce(
    row: Annotated[str | None, typer.Argument(help="Which row; see --list.")] = None,
    list_rows: Annotated[
        bool, typer.Option("--list", help="List the rows, their published numbers, what lacks.")
    ] = False,
    arm: Annotated[str, typer.Option(help="Which published model this is.")] = "original",
    prompts: Annotated[list[str] | None, typer.Option(help="kind=FILE, your own copy; repeat for more.")] = None,
    unchecked: Annotated[bool, typer.Option("--unchecked", help="Take files with another number of rows.")] = False,
    base: Annotated[str | None, typer.Option(help="Base model; the row's own by default.")] = None,
    erasure: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder or hub id: what makes the arm of the base. TARGET=FOLDER, repeated, where a row is the mean "
            "of models that lack one target each."
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="FILE.py:FUNCTION of pictures and what each should show, for rows that have no judge here."),
    ] = None,
    pictures: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER of your pictures, for rows that begin with some; repeat.")
    ] = None,
    real: Annotated[Path | None, typer.Option(help="Folder of real pictures, one per prompt, for distances.")] = None,
    inception: Annotated[Path | None, typer.Option(help="File of Inception's weights; downloaded without.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures and results; run again to go on.")] = Path(
        "reproduction"
    ),
    batch_size: Annotated[int, typer.Option(help="Pictures per call.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows of each file: a trial.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Other sampler steps than the row's: a trial.")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure a published number again, with your own weights and prompt files. Base rows first."""
    from erasure.artifact import Erasure
    from erasure.eval.detectors.imagenet import ImageNet
    from erasure.eval.prompt_files import load
    from erasure.eval.reproduce import RECIPES, Inputs, Pictures
    from erasure.eval.reproduce import reproduce as measure
    from erasure.runtime import pick_device

    if list_rows or row is None:
        console.print(rows_table(RECIPES))
        return
    if row not in RECIPES:
        raise ValueError(f"unknown row {row!r}; choose one of {list(RECIPES)}")
    if arm not in RECIPES[row].arms:
        raise ValueError(f"row {row} has no published model {arm!r}; choose one of {list(RECIPES[row].arms)}")
    reads = f"row {row} reads {list(RECIPES[row].files)}"
    files = {
        kind: load(file, kind, expected=None if unchecked else "published")
        for kind, file in pairs("--prompts", "kind=FILE", prompts, reads).items()
    }
    inputs = Inputs(
        files=files, real=None if real is None else Pictures.of(real), clip=open_clip_model(device),
        judge=None if judge is None else function_of(judge),
        imagenet=lambda weights: ImageNet(weights, device=pick_device(device)),
        pictures={name: Pictures.of(Path(at)) for name, at in pairs("--pictures", "NAME=FOLDER", pictures).items()},
        inception=inception, batch_size=batch_size, limit=limit, num_inference_steps=steps,
    )  # fmt: skip
    change: Any = None
    if erasure and RECIPES[row].models == 1:
        if len(erasure) > 1:
            raise ValueError(f"row {row} is about one model; got {len(erasure)} erasures; give one --erasure")
        change = Erasure.from_pretrained(erasure[0])
    elif erasure:
        named = pairs("--erasure", "TARGET=FOLDER", erasure, f"row {row} is the mean of models that lack one each")
        change = {target: Erasure.from_pretrained(at) for target, at in named.items()}
    pipe = open_base(base or RECIPES[row].base, device, dtype)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
        say("The safety checker is off: what the model draws is measured, not what a filter lets through.")
    found = measure(row, pipe, inputs, out, arm=arm, change=change)
    table = PlainTable("metric", "measured, 95 % interval", "published", "band", "verdict")
    for one in found.results:
        low, high = one.band
        measured = one.estimate.reason if one.estimate.value is None else f"{one.estimate:.4g}"
        table.add_row(one.metric, measured, f"{one.published:g}", f"{low:.4g} to {high:.4g}", one.verdict)
    console.print(table)
    for warning in found.warnings:
        say(f"! {warning}")
    say(f"results -> {out}")


def pairs(option: str, form: str, given: Sequence[str] | None, why: str = "") -> dict[str, str]:
    """What an option of the form NAME=VALUE says.

    Raises:
        ValueError: no name, or one name twice.
    """
    found: dict[str, str] = {}
    for one in given or []:
        name, equals, value = one.partition("=")
        if not equals or name in found:
            raise ValueError(f"{option} needs {form}, each name once; got {one!r}" + (f"; {why}" if why else ""))
        found[name] = value
    return found


def function_of(source: str) -> Any:
    """FUNCTION of FILE.py, which is run.

    Raises:
        ValueError: no such file, or none of that name in it.
    """
    file, _, name = source.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"--judge needs FILE.py:FUNCTION; got {source!r}; give a file that is there")
    found = runpy.run_path(file).get(name)
    if not callable(found):
        raise ValueError(f"{file} has no function {name!r}; --judge needs FILE.py:FUNCTION")
    return found


def rows_table(recipes: Mapping[str, Any]) -> PlainTable:
    """The rows of published numbers."""
    table = PlainTable("row", "setting", "", "published", "prompt files", "lacks")
    for recipe in recipes.values():
        arms = (
            f"{arm}: " + ", ".join(f"{name} {known.value:g}" for name, known in numbers.items())
            for arm, numbers in recipe.arms.items()
        )
        table.add_row(
            recipe.row, recipe.setting, recipe.confidence, lines(*arms), ", ".join(recipe.files), recipe.lacks
        )
    return table


def open_clip_model(device: str | None) -> Callable[[str], Any]:
    """Opens "model/weights", when it is asked for."""
    from erasure.eval.detectors.clip import ClipDetector
    from erasure.runtime import pick_device

    def opened(name: str) -> ClipDetector:
        model, _, weights = name.partition("/")
        return ClipDetector.load(model, weights, device=pick_device(device))

    return opened


def read_erasures(sources: list[str]) -> dict[str, Any]:
    """Erasures by name.

    Raises:
        ValueError: two share one.
    """
    from erasure.artifact import Erasure

    edits: dict[str, Any] = {}
    for edit in map(Erasure.from_pretrained, sources):
        if edit.name in edits:
            raise ValueError(f"two of the erasures are called {edit.name!r}; compare them one at a time, or rename one")
        edits[edit.name] = edit
    return edits


def check_names(named: list[str]) -> None:
    """Raise unless there is something to compare, and each has a name of its own."""
    if not named:
        raise ValueError("nothing to evaluate; give --erasure FOLDER or --method NAME")
    if twice := [name for name in dict.fromkeys(named) if named.count(name) > 1]:
        raise ValueError(f"two of what is compared would be called {twice[0]!r}; compare them one at a time")


def make_erasures(pipe: Any, plan: Any, methods: list[str], folder: Path) -> dict[str, Any]:
    """Erasures of a suite's target, named after their methods and kept in ``folder``; fine-tunes resume there."""
    from erasure.api import erase

    edits: dict[str, Any] = {}
    for method in methods:
        training = folder / f"{method}-training"
        edit = erase(pipe, plan.concepts, method, keep=plan.kept, checkpoint=training, apply=False)
        edit.save_pretrained(folder / method)
        edits[method.upper()] = edit
    return edits


def compare(
    pipe: Any, edits: dict[str, Any], plan: Any, out: Path, *, limit: int | None, detectors: Sequence[Any], clip: Any
) -> None:
    """Evaluate, print the table, write the report."""
    from erasure.eval import evaluate as measure
    from erasure.eval import write_report

    found = measure(pipe, edits, plan, detectors=detectors, clip=clip, limit=limit, cache_dir=out / "cache")
    found.save(out)
    path = write_report(found, out / "report.html", records=out)
    table = PlainTable("model", "detector", "group", "seen, 95 % interval", "change")
    for row in found.rows():
        table.add_row(row.arm, row.detector, row.group, str(row.rate), str(row.change or ""))
    console.print(table)
    for sentence in found.sentences():
        say(f"- {sentence}")
    say(f"report -> {path.resolve()}")


def assess_all(pipe: Any, edits: dict[str, Any], plan: Any, out: Path, **settings: Any) -> list[str]:
    """Assess, print the claims in two columns, write the report; returns the policy's objections."""
    from erasure.eval import assess, write_report

    found = assess(pipe, edits, plan, out=out, **settings)
    path = write_report(found, out / "report.html", records=out)
    table = PlainTable("model", "suppression", "removal", "neighbours", "unrelated")
    for claim in found.claims():
        table.add_row(
            claim.model, claim.suppression, claim.removal, *(claim.utility[g] for g in ("neighbours", "unrelated"))
        )
    console.print(table)
    for claim in found.claims():
        for sentence in claim.sentences:
            say(f"- {sentence}")
    objections = found.objections()
    for objection in objections:
        say(f"! {objection}")
    say(f"report -> {path.resolve()}")
    return objections
