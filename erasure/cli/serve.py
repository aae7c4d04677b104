"""The command that serves a model with many erasures; see docs/serving.md."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from erasure.cli.options import KEEP, Config, Device, Dtype, Variant, base_of, follow, open_base, path
from erasure.io import beside, shown
from erasure.terminal import say

commands = typer.Typer()


@commands.command(
    rich_help_panel=KEEP,
    epilog="Example: [bold]erasure serve emoji-world --erasure hero=superhero-uce --erasure cat=cat-uce[/bold]",
)
def serve(
    base: Annotated[
        str,
        typer.Argument(
            help="emoji-world, a diffusers folder, a .safetensors file, or a hub id; by default the one that the "
            "erasures were made on."
        ),
    ] = "",
    base_option: Annotated[str, typer.Option("--base", help="The same as BASE, as other commands take it.")] = "",
    erasure: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER or NAME=hub/id; repeat for more. Without NAME=, its own name.")
    ] = None,
    erasures: Annotated[
        Path | None, typer.Option(parser=path, help="A folder of erasures; each goes by the name of its own folder.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port.")] = 8000,
    at_once: Annotated[int, typer.Option(min=1, max=256, help="Requests drawn at the same time.")] = 1,
    waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; further ones get 503.")] = 64,
    max_steps: Annotated[int, typer.Option(min=1, max=1000, help="Sampler steps of a request, at most.")] = 50,
    max_side: Annotated[int, typer.Option(min=8, help="Pixels of a side, at most.")] = 1024,
    max_pictures: Annotated[int, typer.Option(min=1, max=256, help="Pictures of a request, at most.")] = 4,
    variant: Variant = None,
    config: Config = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Serve a model over HTTP; every request names the erasures it is drawn with."""
    try:
        import fastapi  # noqa: F401  # before a model is opened
        import uvicorn
    except ImportError:
        raise ImportError("serving needs FastAPI and uvicorn: pip install 'diffusion-erasure[serve]'") from None
    from erasure.cli.browser import check_free
    from erasure.pipelines.serve import Limits, create_app

    if base and base_option:
        raise ValueError(f"two bases, {base!r} and --base {base_option!r}; give one")
    edits = _named(erasure or [], erasures)
    base = base_of(base or base_option, edits.values())
    limits = Limits(steps=max_steps, side=max_side, pictures=max_pictures, at_once=at_once, waiting=waiting)
    check_free(host, port)
    app = create_app(open_base(base, device, dtype, variant=variant, config=config), edits, limits=limits)
    address = f"http://{host}:{port}"
    say(
        f"{base} with {', '.join(map(repr, edits))} on {address}; /health, /erasures, /docs; Ctrl-C ends it", wrap=False
    )
    body = json.dumps({"prompt": "a prompt", "erasures": [next(iter(edits))], "seed": 1})
    follow(f"curl {address}/v1/images/generations -H 'content-type: application/json' -d {shlex.quote(body)}")
    uvicorn.run(app, host=host, port=port)


def _named(given: list[str], folder: Path | None) -> dict[str, Any]:
    """Erasures by the names that requests use.

    Raises:
        ValueError: there is none, or two have one name.
    """
    from erasure.artifact import Erasure
    from erasure.artifact.files import CONFIG

    pairs = [tuple(one.split("=", 1)) if "=" in one else ("", one) for one in given]
    if folder is not None:
        if not folder.is_dir():
            raise FileNotFoundError(f"--erasures {folder}: no such folder{beside(folder)}")
        if not any(folder.glob(f"*/{CONFIG}")):
            one = (
                f"it is an erasure itself: --erasure {folder}" if (folder / CONFIG).exists() else "name another folder"
            )
            raise ValueError(f"--erasures {folder} holds no folder with an erasure{beside(folder)}; {one}")
        pairs += [(file.parent.name, str(file.parent)) for file in sorted(folder.glob(f"*/{CONFIG}"))]
    found: dict[str, Any] = {}
    for name, source in pairs:
        if not source.strip():
            raise ValueError(f"--erasure takes NAME=FOLDER; got {shown(f'{name}={source}')}; name the folder")
        edit = Erasure.from_pretrained(source)
        name = name.strip() or edit.name
        if name in found:
            raise ValueError(f"two erasures are called {shown(name)}; give one another name: --erasure NAME={source}")
        found[name] = edit
    if not found:
        raise ValueError("nothing to serve: no erasure was given; add --erasure NAME=FOLDER, or --erasures FOLDER")
    return found
