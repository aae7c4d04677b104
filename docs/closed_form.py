"""Put tables, pictures and reports of finished comparisons of the closed forms into docs/closed_form.md and results.

for suite in superhero cat twemoji twenty; do
    erasure evaluate --suite $suite -m uce -m time -m rece -m speed -m mace-cfr --out closed-forms/$suite
done
python docs/closed_form.py closed-forms
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from figures import picture, replace_block, table  # beside this file

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


if __name__ == "__main__":
    main(*sys.argv[1:])
