"""The command that opens the app in a browser; see docs/howto/app.md."""

from __future__ import annotations

import contextlib
import socket
from typing import Annotated

import typer

from erasure.cli.options import MAKE, Base, Config, Device, Dtype, Variant, note
from erasure.terminal import say

commands = typer.Typer()
LOCAL = ("127.0.0.1", "localhost", "::1")


@commands.command(
    rich_help_panel=MAKE,
    epilog="Examples:\n\n[bold]erasure app[/bold]\n\n[bold]erasure app --base model.safetensors --port 8080[/bold]",
)
def app(
    base: Base = "emoji-world",
    host: Annotated[
        str, typer.Option(help="Where to listen; whoever reaches another address than this one may use the machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port.")] = 7860,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open a browser.")] = False,
    variant: Variant = None,
    config: Config = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Erase in a browser: choose, erase, look at pictures before and after, take the file and a report along."""
    try:
        import gradio  # noqa: F401  # before a model is opened
    except ImportError:
        raise ImportError("the app needs gradio: pip install 'diffusion-erasure[app]'") from None
    from erasure.opening import configs_of
    from erasure.pipelines.app.page import launch
    from erasure.pipelines.app.studio import Studio

    check_free(host, port)
    configs_of([base], config)  # refused before the app starts
    if host not in LOCAL:
        note(
            f"the app listens on {host}, without a password: whoever reaches port {port} can use this machine's "
            "processor and open any model file on it. Put it behind a login, or leave --host out"
        )
    studio = Studio(device=device, dtype=dtype, variant=variant, config=config)
    try:
        say(f"opening {base} ...", wrap=False)
        blocks = launch(
            studio, base, server_name=host, server_port=port, inbrowser=show, prevent_thread_lock=True
        )  # fmt: skip
        say(f"app on http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}; Ctrl-C ends it", wrap=False)
        with contextlib.suppress(KeyboardInterrupt):
            blocks.block_thread()
    finally:
        studio.close()


def check_free(host: str, port: int) -> None:
    """Try the address before a model is opened.

    Raises:
        ValueError: it is not this machine's, or something listens there.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"cannot listen on {host}:{port}: {reason}; give another --port, or another --host") from None


__all__ = ["commands"]
