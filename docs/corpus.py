"""Twenty concepts at once with and without a corpus of captions to keep: the last table of docs/closed_form.md.

python docs/corpus.py runs/corpus
"""

from __future__ import annotations

import sys
from pathlib import Path

from figures import replace_block, table  # beside this file

import erasure
from erasure.backbone import backbone_of
from erasure.eval import evaluate
from erasure.eval.worldkit.detectors import detectors
from erasure.methods.gram import Gram
from erasure.train import step_rng
from erasure.world.scenes import sample_caption, sample_scene
from erasure.world.spec import spec

DOCS = Path(__file__).resolve().parent
CAPTIONS = 3000


def main(folder: str) -> None:
    pipe, suite = erasure.world.load(), erasure.Suite.load("twenty")
    rng, targets = step_rng(5, 0), {concept.name for concept in suite.concepts}
    rest = [name for name in spec().concepts if name not in targets]
    scenes = (sample_scene(rng, rest, list(spec().styles), pairs=0.2) for _ in range(CAPTIONS))
    captions = (caption for scene in scenes if (caption := sample_caption(scene, rng)))
    corpus = Path(folder) / "corpus.safetensors"
    Gram.of(backbone_of(pipe), captions).save(corpus)
    arms = {}
    for name, scale in {"UCE": None, "UCE, corpus as 2,000": 2e3, "UCE, corpus as 20,000": 2e4}.items():
        kept = {} if scale is None else {"corpus": str(corpus), "corpus_scale": scale}
        arms[name] = erasure.erase(pipe, suite.concepts, "uce", keep=suite.kept, apply=False, name=name, **kept)
    found = evaluate(
        pipe,
        arms,
        suite,
        detectors=detectors(),
        wide=None,
        cache_dir=Path(folder) / "cache",
    )
    page = DOCS / "closed_form.md"
    page.write_text(replace_block(page.read_text("utf-8"), "corpus", table(found.evaluation)), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
