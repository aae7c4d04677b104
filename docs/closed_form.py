"""Put tables, pictures and reports of finished comparisons of the closed forms into docs/closed_form.md and results.

for suite in superhero cat twemoji twenty; do
    erasure evaluate --suite $suite -m uce -m time -m rece -m speed -m mace-cfr --out closed-forms/$suite
done
python docs/closed_form.py closed-forms
"""

from __future__ import annotations

import base64
import io
import shutil
import sys
from pathlib import Path

from figures import replace_block, table  # beside this file
from PIL import Image, ImageDraw

from erasure.eval import Evaluation

DOCS = Path(__file__).resolve().parent
SUITES = ("superhero", "cat", "twemoji", "twenty")


def main(folder: str) -> None:
    text = (DOCS / "closed_form.md").read_text("utf-8")
    for name in SUITES:
        evaluation = Evaluation.from_json(Path(folder) / name)
        picture(evaluation).save(DOCS / "images" / f"closed-form-{name}.png", optimize=True)
        text = replace_block(text, name, table(evaluation))
        (DOCS / "results" / "closed_form").mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(folder) / name / "report.html", DOCS / "results" / "closed_form" / f"{name}.html")
    (DOCS / "closed_form.md").write_text(text, "utf-8")


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


if __name__ == "__main__":
    main(*sys.argv[1:])
