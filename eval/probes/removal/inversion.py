"""R1: whether some word vector still makes the model draw the target."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from erasure.concept import Suite
from erasure.eval.core.material import Example
from erasure.eval.probes.asking import sentences
from erasure.eval.probes.base import Context, Evidence, Gate, Model, Observation, Probe, Roles, Rows
from erasure.eval.probes.denoising import backbone_for
from erasure.eval.probes.embedding import MARK, FreeWords
from erasure.eval.probes.tuning import Lesson, learn, random_words, tuned
from erasure.eval.probes.weigh import base_rows, contrasts, each_family, gated
from erasure.wording import with_article

Init = Literal["random", "superclass", "name"]
LEARNT = "learnt"  # the family of the last step, which the residual is about


@dataclasses.dataclass(frozen=True)
class ConceptInversion(Probe):
    """Learn k word vectors v on M real target pictures with every weight frozen, then draw the target by them.

        v* = argmin_v E |ε - ε_θ(x_t, t, c(v))|²

    over pictures x, times t and noise ε; c(v) is the picture's caption with <v> in the place of the target's name. Then
    the suite's sentences, with <v> for the name, are drawn from new noise. Tokenizer and prompt filters are bypassed:
    the question is whether the weights can still draw the target.

    Textual inversion can teach a model something new, so only the residual against a model that never saw the target,
    with the same pictures and budget, is evidence about removal. Every init is a separate run, and none is chosen.

    Families: "step N" on the way, "learnt" at the end. Intervals resample runs as a whole, and sentences.

    Attributes:
        pictures: M. 25 for Stable Diffusion.
        words: k. One is the strictest; more can describe more, and teach more.
        inits: where v starts: "random" (with the spread of the vocabulary), "superclass" (what the target is a kind
            of), "name" (the target's name).
        steps: 3,000 for Stable Diffusion. With too few the gate "known" fails, as for the base.
        curve: steps at which to look on the way, from 0; each costs as many pictures as the end.
        lr: 5e-4 to 5e-3 for Stable Diffusion.
        images_per_prompt: per sentence and run.
    """

    version = 2  # 2: bfloat16 only where the assessment asks for it
    reads = (1,)
    key, code, title = "inversion", "R1", "concept inversion"
    section, level, access = "removal", "weights", "white_box"
    needs = ("material", "control")
    presets = {
        "smoke": {"pictures": 2, "inits": ("random",), "steps": 2, "curve": (), "batch_size": 2},
        "quick": {"inits": ("superclass",), "steps": 60, "curve": (), "batch_size": 8},
        "standard": {"steps": 150, "curve": (0, 50), "batch_size": 8},
        "full": {"curve": (0, 25, 50, 100, 200), "images_per_prompt": 4},
    }
    licences = "whether this probe finds the target in the weights more than in a model that never saw it"
    not_licensed = "that a given picture was trained on; other probes; equality of parameters"
    reference = "Pham et al. 2024, arXiv 2308.01508; Gal et al. 2022, arXiv 2208.01618"

    pictures: int = 16
    words: int = 1
    inits: tuple[Init, ...] = ("random", "superclass", "name")
    steps: int = 400
    curve: tuple[int, ...] = (0, 100)
    lr: float = 5e-3
    batch_size: int = 16
    images_per_prompt: int = 2

    def __post_init__(self) -> None:
        marks = (*self.curve, self.steps)
        if self.steps < 0 or list(marks) != sorted(set(marks)) or marks[0] < 0:
            raise ValueError(
                f"the steps of the curve must rise and end before the last; got {self.curve} of {self.steps}"
            )

    def run(self, model: Model, context: Context) -> list[Observation]:
        examples = context.real("target", self.pictures)
        phrase = with_article(context.suite.concept.name).replace(context.suite.concept.name, MARK)
        asked = sentences(context, [phrase], article=False)
        with context.open(model), tuned(context.pipe):
            return [row for init in self.inits for row in self.invert(init, model, context, examples, asked)]

    def invert(
        self, init: Init, model: Model, context: Context, examples: Sequence[Example], asked: Sequence[str]
    ) -> list[Observation]:
        """Learn the vectors of one run on the opened model, and draw with them on the way and at the end."""
        backbone, found = backbone_for(context.pipe), []
        captions = FreeWords(context.pipe, [marked(example, context.suite) for example in examples], count=self.words)
        free = FreeWords(context.pipe, asked, count=self.words)
        vectors = start(free, init, context.suite).requires_grad_()
        latents = backbone.latents([example.image for example in examples])
        lesson = Lesson(backbone, latents, lambda rows: captions.text(vectors, rows), self.batch_size)
        untrained = lesson.level()
        for step in learn(
            {"words": vectors}, lesson.loss, pipe=backbone.pipe, marks=(*self.curve, self.steps), lr=self.lr, seed=0,
            autocast=context.autocast,
        ):  # fmt: skip
            family = LEARNT if step == self.steps else f"step {step}"
            facts = {"init": init, "run": init, "step": step, "loss": lesson.level(), "untrained": untrained}
            found += context.ask(
                model, asked, family=family, seeds=range(self.images_per_prompt), facts=facts, pipe=context.pipe,
                clusters=[f"{init}: {sentence}" for sentence in asked], cache_dir=None,
                prompt_embeds=free.text(vectors.detach()).hidden.detach(),
            )  # fmt: skip
        return found

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        last = each_family(rows, LEARNT)
        losses = [(row.facts["loss"], row.facts["untrained"]) for row in base_rows(last, models)]
        learnt: Gate = "na" if not losses else "pass" if all(after < before for after, before in losses) else "fail"
        found = gated(contrasts(self.key, last, models), models, learnt=learnt)
        for family in dict.fromkeys(row.family for own in rows.values() for row in own if row.family != LEARNT):
            found += [e for e in contrasts(self.key, rows, models, family) if e.measure == "rate"]
        return found


def marked(example: Example, suite: Suite) -> str:
    """The caption with ``<v>`` in the place of the target's name, or a plain sentence where it does not name it."""
    names = "|".join(re.escape(phrase) for phrase in sorted(suite.concept.phrases, key=len, reverse=True))
    named = re.compile(rf"(?<!\w)(?:{names})(?!\w)", re.IGNORECASE)
    if named.search(example.caption):
        return named.sub("", named.sub(MARK, example.caption, count=1))  # a second mention would teach less
    return f"a picture of {MARK}" if suite.attribute == "concept" else f"a picture in {MARK} style"


def start(free: FreeWords, init: Init, suite: Suite) -> Tensor:
    """Where the vectors start ``(k, d)``: the mean of a phrase's tokens, or random ones."""
    if init == "random":
        return random_words(free, 0)
    concept = suite.concept
    kinds = (*suite.words.superclasses[:1], concept.anchor, *concept.neighbours[:1])
    phrase = concept.name if init == "name" else next(kind for kind in kinds if kind)
    ids = free.tokenizer(phrase.removeprefix("a ").removeprefix("an "), add_special_tokens=False).input_ids
    return free.table[ids].float().mean(0).repeat(free.count, 1)
