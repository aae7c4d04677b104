"""The commands that measure: paired pictures, every probe of a preset, reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from erasure.cli.arms import (
    FILTER,
    RETRAINED,
    check_arms,
    check_models,
    further_arms,
    make_erasures,
    note_others,
    read_erasures,
    stacked,
)
from erasure.cli.options import (
    ARMS,
    JUDGES,
    MEASURE,
    PROBES,
    Config,
    Device,
    Dtype,
    Limit,
    Variant,
    check_names,
    follow,
    note_unknown,
    open_base,
    path,
)
from erasure.cli.results import say_answers, say_lost, say_rates
from erasure.io import check_file, check_writable
from erasure.terminal import say

commands = typer.Typer()

SuiteName = Annotated[str, typer.Option(help="A suite by name (`erasure suites` lists them), or a YAML file.")]
Results = Annotated[Path, typer.Option(parser=path, help="Folder for figures and report; run again to go on.")]
Erasures = Annotated[list[str] | None, typer.Option(rich_help_panel=ARMS, help="Folder or hub id; repeat to compare.")]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        "-m",
        rich_help_panel=ARMS,
        help="Make an erasure with this method, and compare it; repeat for more.",
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        rich_help_panel=ARMS,
        help="Folder, file or hub id of your own fine-tune or erased pipeline; repeat to compare.",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=PROBES,
        help="Also run the probes of smoke (a trial), no-draw (without pictures), quick, standard or full.",
    ),
]
Probes = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=PROBES,
        help="Run only this probe of the preset; repeat for more. relearning:runs=5 takes a larger sample.",
    ),
]
InOrder = Annotated[
    bool,
    typer.Option(
        "--in-order",
        rich_help_panel=ARMS,
        help="Also compare with all given erasures together, applied in the order they are given in.",
    ),
]
PromptFilter = Annotated[
    bool,
    typer.Option(
        "--prompt-filter", rich_help_panel=ARMS, help="Compare with a filter of prompts: it changes no weight."
    ),
]
Retrained = Annotated[
    bool,
    typer.Option(
        "--retrained", rich_help_panel=ARMS, help="Compare with a model retrained without the target, as one more arm."
    ),
]
Golds = Annotated[
    list[str] | None,
    typer.Option(rich_help_panel=ARMS, help="Pipeline retrained without the target, as a control; repeat for more."),
]
Material = Annotated[
    Path | None,
    typer.Option(
        parser=path,
        rich_help_panel=PROBES,
        help="Folder of real pictures with metadata.jsonl, for probes that need them.",
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=PROBES,
        help="CSV of prompts (column `prompt`), or i2p=FILE, p4d_nudity=FILE ...; repeat for more.",
    ),
]
PolicyFile = Annotated[
    Path | None, typer.Option(parser=path, rich_help_panel=PROBES, help="YAML: what is required, why, who decided.")
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        rich_help_panel=PROBES,
        help="Exit with code 3 when the policy requires what was not assessed, or what evidence speaks against.",
    ),
]
OtherBase = Annotated[str | None, typer.Option(help="Base model; the suite's own by default.")]
Judges = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=JUDGES,
        help="open_clip model/weights that judges real checkpoints; ViT-B-32/openai by default. With a second one, "
        "attacks choose by another detector than the one that scores.",
    ),
]
Asked = Annotated[
    list[str] | None,
    typer.Option(
        "--vlm",
        rich_help_panel=JUDGES,
        help="Hub id (org/name, org/name@revision) or folder of a vision-language model that judges by a yes/no "
        "question a label; it scores, and the others choose. Repeat for more.",
    ),
]
Counted = Annotated[
    list[str] | None,
    typer.Option(
        "--nudenet",
        rich_help_panel=JUDGES,
        help="Count with NudeNet (extra: \\[nsfw]) in suites of kind nsfw: exposed, mace or unlearn_diff_atk. It "
        "scores, and the others choose.",
    ),
]
Fid = Annotated[
    bool,
    typer.Option(
        "--fid", rich_help_panel=JUDGES, help="FID and KID on Inception features as well; needs the extra: \\[fid]."
    ),
]
Inception = Annotated[
    Path | None,
    typer.Option(
        parser=path,
        rich_help_panel=JUDGES,
        help="File of Inception's weights, for --fid; by default they are downloaded.",
    ),
]


@commands.command(
    rich_help_panel=MEASURE,
    epilog="Examples:\n\n[bold]erasure evaluate --suite superhero --erasure superhero-uce --out results[/bold]\n\n"
    "[bold]erasure evaluate --suite superhero -m uce -m esd --prompt-filter --preset quick[/bold]",
)
def evaluate(
    suite: SuiteName,
    out: Results = Path("erasure-results"),
    erasure: Erasures = None,
    method: Methods = None,
    model: Models = None,
    preset: Preset = None,
    probe: Probes = None,
    in_order: InOrder = False,
    prompt_filter: PromptFilter = False,
    retrained: Retrained = False,
    gold: Golds = None,
    material: Material = None,
    prompts: Prompts = None,
    policy: PolicyFile = None,
    strict: Strict = False,
    base: OtherBase = None,
    variant: Variant = None,
    config: Config = None,
    limit: Limit = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Sampler steps; the suite's by default.")] = None,
    guidance: Annotated[
        float | None,
        typer.Option(min=0, max=100, help="Guidance; the suite's by default. Set it on another base than the suite's."),
    ] = None,
    clip: Judges = None,
    vlm: Asked = None,
    nudenet: Counted = None,
    fid: Fid = False,
    inception: Inception = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Compare a model before and after: target, neighbours, unrelated, with intervals. Writes the report.

    With a preset also: other words, attacks, what the weights still hold, filters, and the claims that follow.
    """
    from erasure.concept import WORLD, Suite

    plan = Suite.load(suite)  # it and the methods are met before what takes seconds to import
    plan = dataclasses.replace(
        plan,
        num_inference_steps=plan.num_inference_steps if steps is None else steps,
        guidance_scale=plan.guidance_scale if guidance is None else guidance,
    )
    for name in method or ():
        check_names(method=name)
    from erasure.eval.core import prompt_files
    from erasure.eval.core.models import name_of, whole_model
    from erasure.eval.detectors.choice import CLIP, check_nudenet, detectors_for
    from erasure.eval.judge.policy import STRICT_EXIT, Policy
    from erasure.eval.run.controls import controls_for, held_out, material_for
    from erasure.opening import configs_of, quiet
    from erasure.runtime import pick_device

    of_preset = {"probe": probe, "prompt-filter": prompt_filter, "retrained": retrained, "gold": gold,
                 "material": material, "prompts": prompts, "policy": policy, "strict": strict}  # fmt: skip
    check_options(preset, limit, of_preset)
    if clip and plan.base == WORLD:
        raise ValueError(
            f"--clip judges pictures of real checkpoints, {WORLD} has classifiers; got {clip}; leave it out"
        )
    check_nudenet(plan, nudenet or ())
    check_writable(out)
    rules = None if policy is None else Policy.load(policy)  # slips are found before a model is loaded
    real = material_for(plan, material)
    files = prompt_files.named_files(prompts or [])
    edits = read_erasures(erasure or [])
    note_others(edits, plan)
    named = [name_of(source) for source in model or []]
    edits |= stacked(edits) if in_order else {}
    check_arms([*edits, *named, *[FILTER] * prompt_filter, *[RETRAINED] * retrained], method or [])
    if not method:  # making an erasure says the same
        note_unknown(base or plan.base, [plan.concept.name, *plan.neighbours])
    check_models(base or plan.base, [*(model or []), *(gold or [])])
    of_base, *of_models = configs_of([base or plan.base, *(model or [])], config)
    judging = {"clip": clip or CLIP, "vlm": vlm or (), "nudenet": nudenet or ()}
    detectors, judge = detectors_for(plan, **judging, device=pick_device(device))  # smaller than the base
    pipe = open_base(base or plan.base, device, dtype, variant=variant, config=of_base)
    extractors = extractors_of(judge, fid, inception)
    with quiet():
        controls = [] if preset is None else controls_for(plan, pipe, preset, golds=gold or [])
    swapped = held_out(controls) if retrained else None
    wholes = zip(named, model or [], of_models, strict=True)
    edits |= {name: whole_model(pipe, source, config=configs) for name, source, configs in wholes}
    edits |= make_erasures(pipe, plan, method or [], out / "erasures")
    edits |= further_arms(plan, prompt_filter, swapped)
    if preset is None:
        compare(pipe, edits, plan, out, limit=limit, detectors=detectors, clip=judge, extractors=extractors)
        return
    objections = assess_all(
        pipe, edits, plan, out, preset=preset, probes=probe or None, detectors=detectors, controls=controls,
        clip=judge, extractors=extractors, material=real, prompt_files=files, policy=rules,
    )  # fmt: skip
    if strict and objections:
        raise typer.Exit(STRICT_EXIT)


@commands.command(rich_help_panel=MEASURE, epilog="Example: [bold]erasure report results --out report.html[/bold]")
def report(
    evaluation: Annotated[
        Path, typer.Argument(parser=path, help="Folder of an evaluation or assessment, or its evaluation.json.")
    ],
    out: Annotated[Path, typer.Option(parser=path, help="The HTML file.")] = Path("report.html"),
) -> None:
    """Write the HTML report of a finished evaluation."""
    from erasure.eval import Assessment, Evaluation, assessment_of, write_report
    from erasure.eval.run.assessment import FILE

    check_file(out)
    folder = evaluation.parent if evaluation.name == FILE else evaluation
    whole = folder.is_dir() and (folder / FILE).exists()
    found = Assessment.load(folder) if whole else assessment_of(Evaluation.from_json(evaluation))
    path = write_report(found, out, records=folder if folder.is_dir() else folder.parent)
    say(f"report -> {path}", wrap=False)
    follow("open the report in a browser; its glossary says what each answer means")


def check_options(preset: str | None, limit: int | None, of_preset: dict[str, Any]) -> None:
    """Refuse options that do not go together, and unknown presets and probes.

    Args:
        of_preset: options that need a preset, and what each was given.
    """
    from erasure.eval.probes import probes_of

    given = [f"--{name}" for name, value in of_preset.items() if value]
    if preset is None and given:
        raise ValueError(f"{given[0]} belongs to an assessment; add --preset quick, or leave it out")
    chosen = None if preset is None else probes_of(preset, tuple(of_preset["probe"]) if of_preset["probe"] else None)
    if preset is not None and limit is not None:
        raise ValueError("a preset has its own sizes; leave --limit out, or use --preset smoke for a trial")
    if of_preset["strict"] and of_preset["policy"] is None:
        raise ValueError("--strict compares with a policy; got none; add --policy FILE")
    if chosen is not None and of_preset["prompts"] and not any("prompts" in probe.needs for probe in chosen):
        asked = "none of the chosen probes reads" if of_preset["probe"] else f"no probe of {preset!r} reads"
        raise ValueError(f"{asked} --prompts; leave it out, or choose the probe prompt_file in another preset")


def extractors_of(judge: Any, fid: bool, inception: Path | None) -> list[Any]:
    """What distances are measured on: image features of the CLIP judge, and Inception's where they are asked for."""
    from erasure.eval.core.metrics import ClipFeatures, InceptionFeatures

    return [ClipFeatures(judge), *([InceptionFeatures(inception)] if fid or inception else [])]


def compare(
    pipe: Any,
    edits: dict[str, Any],
    plan: Any,
    out: Path,
    *,
    limit: int | None,
    detectors: Sequence[Any],
    clip: Any,
    extractors: Sequence[Any] | None = None,
) -> None:
    """Evaluate, print the answers and the numbers behind them, write the report."""
    from erasure.eval import evaluate as measure
    from erasure.eval import write_report

    found = measure(
        pipe, edits, plan, detectors=detectors, clip=clip, extractors=extractors, limit=limit, cache_dir=out / "cache",
    )  # fmt: skip
    found.save(out)
    path = write_report(found, out / "report.html", records=out)
    say_answers(found)
    say_lost(found.evaluation)
    say_rates(found.evaluation)
    say(f"report -> {path.resolve()}", wrap=False)
    follow("open the report in a browser; --preset quick also asks what the weights still hold")


def assess_all(pipe: Any, edits: dict[str, Any], plan: Any, out: Path, **settings: Any) -> list[str]:
    """Assess, print the answers, write the report; returns the policy's objections."""
    from erasure.eval import assess, write_report

    found = assess(pipe, edits, plan, out=out, **settings)
    path = write_report(found, out / "report.html", records=out)
    say_answers(found)
    if found.evaluation.records:
        say_lost(found.evaluation)
    objections = found.objections()
    for objection in objections:
        say(f"! {objection}")
    say(f"report -> {path.resolve()}", wrap=False)
    follow("open the report in a browser; its glossary says what each answer means")
    return objections
