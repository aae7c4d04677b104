"""R21: whether the published erasure tells its target."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from erasure.backbone import Backbone, backbone_of
from erasure.concept import same
from erasure.eval.core.models import Model, Role
from erasure.eval.detectors.base import NOTHING
from erasure.eval.probes.base import Context, Evidence, Missing, Observation, Probe
from erasure.eval.stats import Estimate
from erasure.methods.closed_form import rows as embeddings
from erasure.methods.vocabulary import vocabulary

TARGET, OTHERS = "target", "others"
TOLD = 5  # words named in a note
EVEN = "counted, no interval"


@dataclasses.dataclass(frozen=True)
class DeltaSideChannel(Probe):
    """The place of the target among many words, by how far the change moves what the denoiser reads of each.

    With x the embeddings of a word and of what stands behind it to the prompt's end, where text enters, and W the
    layers that receive them (keys and values of the cross-attentions, or the entry of the text),

        moved(word) = max_x sum_W |W' x' - W x|^2 / sum_W |W x|^2

    Whoever has the base and the published file can compute it: nothing is drawn and no picture is needed. If the target
    comes first, the file says what it erases, which matters where the list of what was erased must not be public: of
    persons, say, or of content whose very names are looked for. The words are the suite's and the judge's labels, and
    ``words`` more of the tokenizer's vocabulary. Neighbours that an edit reaches stand high as well.

    Measures: "rank" of the target's name or synonym that moves most, 1 where nothing else moves as far; "below", the
    share of the other words that move less, one half for a file that tells nothing. Of a retrained model the same
    numbers say what a difference tells that no edit made. Changes of other layers are not read, nor what an
    adapter does beside the weights; where none of these layers nor the text encoder differs there is no number.

    Descriptive: a high rank is a fact about this way of looking, and no claim is made of it.

    Attributes:
        words: of the vocabulary beside the labels. More make a rank of 1 say more.
    """

    key: ClassVar = "delta_side_channel"
    code: ClassVar = "R21"
    title: ClassVar = "whether the file tells its target"
    section: ClassVar = "removal"
    level: ClassVar = "weights"
    access: ClassVar = "white_box"
    needs: ClassVar = ("base",)
    controls: ClassVar = 1
    presets: ClassVar = {
        "smoke": {"words": 20},
        "no-draw": {},
        "quick": {"words": 100},
        "standard": {},
        "full": {"words": 1000},
    }
    descriptive: ClassVar = True
    measures: ClassVar = {"rank": "rank of the target by how far it moved", "below": "other words that moved less"}
    licences: ClassVar = "whether the target stands out among these words, for whoever has the base and the file"
    not_licensed: ClassVar = "that the file hides its target: other layers, words and ways to look may tell"
    reference: ClassVar = "Roots Beneath the Cut, CVPR 2026, arXiv 2603.06640 (there of pruned weights)"

    words: int = 300

    def concerns(self, model: Model) -> bool:
        return model.role != "base" and model.kind != "filter"

    def run(self, model: Model, context: Context) -> list[Observation]:
        with context.open(context.base):
            backbone = backbone_for(context)
            asked = self.asked(context, backbone)
            before = Reading.of(backbone, asked)
        with context.open(model):
            moved = before.moved(Reading.of(backbone_for(context), asked))
        phrases = context.suite.concept.phrases
        found = []
        for word, value in zip(asked, moved, strict=True):
            family = TARGET if any(same(word, phrase) for phrase in phrases) else OTHERS
            found.append(Observation(model.name, family, word, 0, float(f"{value:.5g}")))
        return found

    def asked(self, context: Context, backbone: Backbone) -> list[str]:
        """The words: the target's first, then labels, then the vocabulary's."""
        suite = context.suite
        labels = [label for label in context.judge.labels(suite.attribute) if label != NOTHING]
        words = [*suite.concept.phrases, *suite.neighbours, *suite.unrelated, *labels]
        try:
            words += vocabulary(backbone, suite.concepts, self.words) if self.words else []
        except ValueError:  # a tokenizer that only spells
            pass
        return list({word.casefold(): word for word in words}.values())

    def weigh(self, rows: Mapping[str, Sequence[Observation]], models: Mapping[str, Role]) -> list[Evidence]:
        found = []
        for name, own in rows.items():
            if not any(row.value for row in own):
                none = Estimate.missing("nothing that reads or encodes the text differs from the base's")
                found += [Evidence(self.key, name, measure, none, unit="number") for measure in ("rank", "below")]
                continue
            order = sorted(own, key=lambda row: -float(row.value or 0.0))
            others = [float(row.value or 0.0) for row in own if row.family == OTHERS]
            best = max(float(row.value or 0.0) for row in own if row.family == TARGET)
            note = f"of {len(others) + 1}; moved most: {', '.join(row.cluster for row in order[:TOLD])}"
            rank, below = 1 + sum(x >= best for x in others), sum(x < best for x in others) / max(len(others), 1)
            for measure, value in (("rank", float(rank)), ("below", below)):
                number = Estimate(value, None, None, "counted", len(own), len(own), 0, EVEN)
                unit: Literal["number", "share"] = "number" if measure == "rank" else "share"
                found.append(Evidence(self.key, name, measure, number, unit=unit, note=note))
        return found


def backbone_for(context: Context) -> Backbone:
    """The backbone of the opened pipeline, which here may have any latents.

    Raises:
        Missing: an architecture that is not supported.
    """
    try:
        found: Backbone = backbone_of(context.pipe)
    except ValueError as reason:
        raise Missing(str(reason)) from None
    return found


class Reading(NamedTuple):
    """Words as a model reads them.

    Attributes:
        tokens: of each word, from its last piece to the end, ``(tokens, d)`` float32.
        weights: of the layers that receive them, ``(out, d)``, copied: an edit in place would change them.
    """

    tokens: list[Tensor]
    weights: list[Tensor]

    @classmethod
    def of(cls, backbone: Backbone, words: Sequence[str]) -> Reading:
        with torch.no_grad():
            tokens = [x.float() for x in embeddings(backbone, words, "subject_to_end")]
        return cls(tokens, [site.weight.clone() for site in backbone.text_sites().values()])

    def moved(self, other: Reading) -> list[float]:
        """How far each word is in another reading: its token that moved most, relative to where that was."""
        x, y = torch.cat(self.tokens), torch.cat(other.tokens)
        gap, whole = torch.zeros(len(x), device=x.device), torch.zeros(len(x), device=x.device)
        for ours, theirs in zip(self.weights, other.weights, strict=True):
            was = x @ ours.float().T.to(x.device)
            gap += (y @ theirs.float().T.to(x.device) - was).square().sum(dim=1)
            whole += was.square().sum(dim=1)
        parts = (gap / whole).split([len(tokens) for tokens in self.tokens])
        return [float(part.max()) for part in parts]
