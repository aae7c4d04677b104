"""Put the table of an evaluation of methods of every kind into docs/kinds.md.

erasure evaluate --suite superhero -m uce -m esd -m spm -m adv-unlearn -m sld -m double-projections -m cure --out kinds
python docs/kinds.py kinds
"""

from __future__ import annotations

import sys

from figures import ROOT, replace_block, table  # beside this file

from erasure.eval import Evaluation

PAGE = ROOT / "docs" / "kinds.md"


def main(folder: str) -> None:
    text = PAGE.read_text("utf-8")
    PAGE.write_text(replace_block(text, "kinds", table(Evaluation.from_json(folder))), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
