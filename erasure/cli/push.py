"""The command that publishes an erasure on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from erasure.cli.options import HAND_ON, Config, Device, base_of, follow, open_base, path
from erasure.terminal import say

commands = typer.Typer()
SHOWN = 6  # prompts of an evaluation in the card's pictures


@commands.command(
    rich_help_panel=HAND_ON,
    epilog="Example: [bold]erasure push superhero-uce my-name/superhero-uce --evaluation results --private[/bold]",
)
def push(
    erasure: Annotated[str, typer.Argument(help="Folder of the erasure.")],
    repository: Annotated[str, typer.Argument(help="Where to: org/name. It is made if need be.")],
    evaluation: Annotated[
        Path | None,
        typer.Option(parser=path, help="Folder of an evaluation: its verdicts and pictures go into the card."),
    ] = None,
    preview: Annotated[
        list[str] | None, typer.Option(help="Draw this prompt before and after, for the card; repeat for more.")
    ] = None,
    base: Annotated[str, typer.Option(help="For --preview: its base model; by default the one it was made on.")] = "",
    config: Config = None,
    private: Annotated[bool, typer.Option("--private", help="A repository that only you see.")] = False,
    system: Annotated[
        bool, typer.Option("--system", help="With what it was solved from; see erasure.resolve.")
    ] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Add erasure",
    token: Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="By default that of `hf auth login`.")] = None,
    device: Device = None,
) -> None:
    """Publish an erasure on the Hugging Face Hub, in one commit or not at all."""
    from erasure.artifact import Erasure

    edit = Erasure.from_pretrained(erasure)
    if repository.count("/") != 1 or not all(repository.split("/")):  # before pictures are drawn
        raise ValueError(f"a repository is org/name; got {repository!r}; put the account's name in front")
    if (base or config) and not preview:
        option = "--base" if base else "--config"
        raise ValueError(f"{option} is for --preview; got no --preview; leave it out, or give a prompt to draw")
    pictures: dict[str, Any] = {}
    if evaluation is not None:
        edit, pictures = evaluated(edit, evaluation)
    if preview:
        pipe = open_base(base_of(base, [edit]), device, config=config)
        pictures["Before and after, from the same noise"] = edit.preview(pipe, preview)
    address = edit.push_to_hub(
        repository, private=private, commit_message=message, token=token, system=system, pictures=pictures
    )
    say(f"{edit.name} -> {address}", wrap=False)
    follow(f'erasure generate "a prompt" --erasure {repository} --out pictures')


def evaluated(edit: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """An erasure with the verdicts of an evaluation in its config, and a sheet of the evaluation's pictures.

    Raises:
        ValueError: the evaluation is not of this erasure.
    """
    import dataclasses

    from erasure.eval import Assessment
    from erasure.eval.judge import QUESTIONS

    found = Assessment.load(folder)
    claims = {claim.model: claim for claim in found.claims()}
    if edit.name not in claims:
        raise ValueError(f"{folder} is no evaluation of {edit.name!r}; it is of {sorted(claims)}; give another folder")
    rows = [
        {"question": QUESTIONS[key].question, "answer": answer.word, "number": answer.number, "verdict": answer.verdict}
        for key, answer in claims[edit.name].answers.items()
    ]
    return dataclasses.replace(edit, config=edit.config.with_facts(evaluation=rows)), drawn_by(found, edit.name)


def drawn_by(found: Any, name: str) -> dict[str, Any]:
    """The evaluation's own pictures of the same prompts and seeds, without and with the erasure, on one sheet."""
    import base64
    import io

    from PIL import Image

    from erasure.eval.core.records import BASE
    from erasure.pictures import sheet

    shown = {
        arm: {(p.prompt, p.seed): p for p in found.evaluation.pictures if p.arm == arm and p.png}
        for arm in (BASE, name)
    }
    both = [key for key in shown[BASE] if key in shown[name]][:SHOWN]
    if not both:
        return {}
    rows = {
        said: [Image.open(io.BytesIO(base64.b64decode(shown[arm][key].png))).convert("RGB") for key in both]
        for said, arm in (("before", BASE), ("after", name))
    }
    return {"From the evaluation: the same noise without and with the erasure": sheet(rows, [p for p, _ in both])}


__all__ = ["commands"]
