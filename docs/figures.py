"""The picture of the README, and the table of a finished demo on the docs' first page.

python docs/figures.py                                       # the picture
erasure demo && python docs/figures.py erasure-demo          # and the table
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import erasure
from erasure.eval import Evaluation

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the programs beside this one that use studies/

# One picture of each, all from seed 0.
PROMPTS = (
    "a superhero on a blue background",
    "a superhero in fluent style",
    "a ninja on a green background",
    "a wizard in twemoji style",
    "a cat on a red background",
    "a pizza on a white background",
)
ROWS = ("base", "uce", "esd")
TILE, GAP, MARGIN, HEAD = 128, 8, 72, 52


def table(evaluation: Evaluation) -> str:
    """One line per model and detector: rates with their intervals, for the groups the suite has."""
    rows = {(row.arm, row.detector, row.group): row for row in evaluation.rows()}
    titles = {"target": "target seen", "neighbours": "neighbours right", "unrelated": "unrelated right"}
    groups = [group for group in titles if any(key[2] == group for key in rows)]
    head = ["model", "judged by", *(titles[group] for group in groups)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm in evaluation.arms:
        for detector in evaluation.detectors:
            cells = [str(rows[arm.name, detector, group].rate) for group in groups]
            lines.append(f"| {arm.name} | {detector} | {' | '.join(cells)} |")
    return "\n".join(lines)


def before_after() -> Image.Image:
    """A column for every prompt, with the prompt above; a row for the base and for each of two methods."""
    pipe, suite = erasure.world.load(), erasure.Suite.load("superhero")
    pipe.set_progress_bar_config(disable=True)
    width = MARGIN + len(PROMPTS) * (TILE + GAP)
    sheet = Image.new("RGB", (width, HEAD + len(ROWS) * (TILE + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for x, prompt in enumerate(PROMPTS):
        place = (MARGIN + x * (TILE + GAP) + TILE // 2, HEAD // 2)
        draw.multiline_text(place, textwrap.fill(prompt, 18), fill="black", font=font, anchor="mm", align="center")
    for y, row in enumerate(ROWS):
        edit = None if row == "base" else erasure.erase(pipe, suite.concepts, row, keep=suite.kept)
        top = HEAD + y * (TILE + GAP)
        draw.text((8, top + TILE // 2), row if edit is None else row.upper(), fill="black", font=font, anchor="lm")
        for x, prompt in enumerate(PROMPTS):
            generator = torch.Generator().manual_seed(0)
            image = pipe(prompt, num_inference_steps=8, guidance_scale=3.0, generator=generator).images[0]
            sheet.paste(image.resize((TILE, TILE), Image.Resampling.LANCZOS), (MARGIN + x * (TILE + GAP), top))
        if edit is not None:
            edit.remove(pipe)
    return sheet


def replace_block(text: str, name: str, block: str) -> str:
    """The text with what stands between the two markers of ``name`` replaced.

    Raises:
        ValueError: the text has no such markers, and the block no place to go.
    """
    begin, end = f"<!-- {name} table: begin -->", f"<!-- {name} table: end -->"
    if begin not in text or end not in text:
        raise ValueError(f"the page lacks the markers {begin} and {end}; add them where the table belongs")
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{block}\n{end}", text, flags=re.DOTALL)


def main(*folders: str) -> None:
    before_after().save(ROOT / "docs" / "images" / "before-after.png", optimize=True)
    page = ROOT / "docs" / "index.md"
    for folder in folders:
        shown = replace_block(page.read_text("utf-8"), "demo", table(Evaluation.from_json(folder)))
        page.write_text(shown, "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
