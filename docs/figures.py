"""Put the table and the picture of a finished demo into the README.

erasure demo && python docs/figures.py erasure-demo
"""

from __future__ import annotations

import base64
import io
import re
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from erasure.eval import Evaluation

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the programs beside this one that use studies/


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


def picture(evaluation: Evaluation, *, size: int = 96, margin: int = 64) -> Image.Image:
    """The report's grid: a row for every model, a column for every prompt."""
    arms = [arm.name for arm in evaluation.arms]
    columns = list(dict.fromkeys((p.prompt, p.seed) for p in evaluation.pictures))
    sheet = Image.new("RGB", (margin + size * len(columns), size * len(arms)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, arm in enumerate(arms):
        draw.text((6, y * size + size // 2 - 6), arm, fill="black")
        for item in evaluation.pictures:
            if item.arm == arm:
                image = Image.open(io.BytesIO(base64.b64decode(item.png))).resize(
                    (size - 4, size - 4), Image.Resampling.NEAREST
                )
                sheet.paste(image, (margin + columns.index((item.prompt, item.seed)) * size, y * size))
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


def main(folder: str) -> None:
    evaluation = Evaluation.from_json(folder)
    images = ROOT / "docs" / "images"
    images.mkdir(exist_ok=True)
    picture(evaluation).save(images / "before-after.png", optimize=True)
    readme = ROOT / "README.md"
    readme.write_text(replace_block(readme.read_text("utf-8"), "demo", table(evaluation)), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
