"""The command that asks a served model whether an erasure is really on; see docs/serving.md."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from erasure.cli.options import KEEP, Config, Device, Dtype, OwnBase, Variant, base_of, follow, open_base, path
from erasure.io import shown
from erasure.terminal import PlainTable, console, say

commands = typer.Typer()


@commands.command(
    rich_help_panel=KEEP,
    epilog="Examples:\n\n[bold]erasure verify superhero-uce --engine http://localhost:8000[/bold]\n\n"
    "[bold]erasure verify hero --engine http://localhost:8188 --workflow workflow.json --base model.safetensors[/bold]",
)
def verify(
    erasure: Annotated[str, typer.Argument(help="Folder or hub id of the erasure that should be on.")],
    engine: Annotated[str, typer.Option(help="Address of the served model.")],
    workflow: Annotated[
        Path | None,
        typer.Option(parser=path, help="ComfyUI: its workflow in API form, with %prompt% and %seed% in it."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Ask for the target with this; repeat. Eight sentences by default.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Pictures of each prompt.")] = 2,
    field: Annotated[
        list[str] | None,
        typer.Option(help="One more field of the request: size=512x512; repeat for more."),
    ] = None,
    key: Annotated[str | None, typer.Option(envvar="ENGINE_KEY", help="Bearer token of the engine.")] = None,
    base: OwnBase = "",
    variant: Variant = None,
    config: Config = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Sampler steps, here and there.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, max=100, help="Guidance, here and there.")] = None,
    clip: Annotated[str, typer.Option(help="open_clip model/weights that compares pictures.")] = "ViT-B-32/openai",
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Draw with a served model and say whether an erasure is on there. Exits with 1 unless it is."""
    from erasure.artifact import Erasure
    from erasure.concept import WORLD
    from erasure.pictures import usual_settings
    from erasure.pipelines import OpenClipEmbedder
    from erasure.pipelines.engines import ComfyUI, OpenAI, verify_engine

    edit = Erasure.from_pretrained(erasure)
    base = base_of(base, [edit])
    comfy = None if workflow is None else ComfyUI(engine, workflow.read_text("utf-8"))  # slips come before the model
    more = _fields(field or [])
    pipe = open_base(base, device, dtype, variant=variant, config=config)
    chosen = {"num_inference_steps": steps, "guidance_scale": guidance}
    sampler = {**usual_settings(base, pipe), **{name: value for name, value in chosen.items() if value is not None}}
    same = {"steps": sampler["num_inference_steps"], "guidance": sampler["guidance_scale"]}
    asked: Any = comfy or OpenAI(engine, {**same, **more}, key=key)
    if base == WORLD:
        from erasure.eval.worldkit import detectors

        judge: Any = detectors.clip()
    else:
        name, _, weights = clip.partition("/")
        judge = OpenClipEmbedder.load(name, weights or None, device=str(pipe.device))
    found = verify_engine(pipe, edit, asked, judge, prompts=prompt or (), seeds=range(seeds), **sampler)
    table = PlainTable("prompt", "nearer to", "by")
    for text, margin in found.margins.items():
        table.add_row(text, "the erased model" if margin > 0 else "the base", f"{abs(margin):.3f}")
    console.print(table)
    say("nearer to: which picture drawn here the engine's is more like; by: the difference of the two cosines (CLIP).")
    say(str(found))
    if found.verdict != "on":
        follow("switch the erasure on in the engine, and run this again")
        raise typer.Exit(1)
    follow(f"erasure evaluate --suite SUITE --erasure {shlex.quote(erasure)}")


def _fields(given: list[str]) -> dict[str, Any]:
    """Fields of the request: their values as JSON, or as text where they are none."""
    found: dict[str, Any] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not name:
            raise ValueError(f"--field is key=value; got {shown(one)}; give steps=8, say")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


__all__ = ["commands"]
