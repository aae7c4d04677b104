"""What the closed forms share: from words to embeddings, from a solution to an erasure.

The mathematics is in :mod:`erasure.methods.ridge`: one matrix T = I + U V^T for every layer that reads the text.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Tensor

from erasure.artifact import Erasure, OperatorErasure
from erasure.artifact.operator import space_config
from erasure.backbone import Backbone, Site, Space
from erasure.backbone.text import PADDED, Conditioning, Span
from erasure.concept import Concept
from erasure.methods.base import Method, Request, expanded
from erasure.methods.gram import Gram
from erasure.methods.gram_cache import gram_with
from erasure.methods.kept import Kept
from erasure.methods.quick_report import quick_report
from erasure.methods.ridge import Problem, Solution, gathered, solve
from erasure.methods.vocabulary import known, vocabulary
from erasure.wording import same, with_article

TokenSpan = Literal["last_subject", "eos", "tail", "subject_to_end", "content_to_end", "content", "all"]
CHUNK = 256  # prompts encoded at a time, so that memory does not grow with their number

# A sample of what prompts are about. An edit of padding tokens reaches every prompt, so something has to stand for
# "everything else": on Emoji World these words keep unrelated things as they were, where neighbours alone halve them.
EVERYDAY = tuple(
    """
    person bicycle car motorcycle airplane bus train truck boat bird cat dog horse sheep cow elephant bear zebra
    giraffe backpack umbrella ball kite skateboard bottle cup fork knife spoon bowl banana apple sandwich orange
    broccoli carrot pizza donut cake chair couch bed table laptop phone clock book vase scissors toy house tree
    flower mountain river beach city street sky sun moon fish insect fruit food drink hat shirt shoe window door
    bridge tower ship rocket computer guitar piano drum painting statue robot child woman man king castle garden
    forest island
    """.split()
)


# --- from words to rows ----------------------------------------------------------------------------------------------


def encoded(backbone: Backbone, prompts: Sequence[str], span: Span = "all") -> Iterator[Conditioning]:
    """Prompts as conditioning, a chunk at a time; without padding where the span has none."""
    for i in range(0, len(prompts), CHUNK):
        yield backbone.read(prompts[i : i + CHUNK], padded=span in PADDED)


def rows(backbone: Backbone, prompts: Sequence[str], span: Span, space: Space = "hidden") -> list[Tensor]:
    """The embeddings of a span of each prompt, ``(tokens, d)`` each; in the pooled space one row a prompt."""
    parts = [c.take(span) if space == "hidden" else c.pooled_rows() for c in encoded(backbone, prompts, span)]
    return [row.clone() for part in parts for row in part]  # copies: a view would keep the whole chunk alive


def segment_rows(backbone: Backbone, prompts: Sequence[str], span: Span) -> list[list[Tensor]]:
    """The token embeddings of a span, segment by segment: ``(tokens, d)`` for each prompt."""
    parts = [[segment.take(span) for segment in c.segments] for c in encoded(backbone, prompts, span)]
    return [[row.clone() for chunk in chunks for row in chunk] for chunks in zip(*parts, strict=True)]


def aligned(target: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a target and its anchor ``(n, d)``, matched from the first on; the longer's far end is cut."""
    n = min(len(target), len(anchor))
    return target[:n], anchor[:n]


def joined(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Rows of several targets and anchors as one pair of matrices."""
    targets, anchors = zip(*pairs, strict=True)
    return torch.cat(targets), torch.cat(anchors)


def stretched(anchor: Tensor, n: int) -> Tensor:
    """``n`` rows aligned with the anchor's at their ends; where the anchor is shorter, its first row repeats."""
    return anchor[(torch.arange(n) + len(anchor) - n).clamp(min=0)]


# --- the method the closed forms share -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClosedForm(Method):
    """Settings and steps that closed forms share; a method overrides the steps in which it differs.

    Attributes:
        token_span: which tokens of a prompt stand for the concept. ``last_subject`` (the last word piece) is the
            official codes': exact for prompts that end with the concept, weak elsewhere, because end and padding tokens
            carry the concept too. ``subject_to_end`` edits those as well: it erases in whole sentences, and needs a
            keep list. ``eos`` edits the first end token, ``tail`` end and padding, ``content`` every word piece,
            ``content_to_end`` these and all behind them, ``all`` every token, start included.
        empty_anchor: what the empty prompt puts in the place of a word when there is no anchor: ``bos`` its start
            token (official), ``eos`` its first end token, ``mean_pad`` the mean of all that follow the start.
        lamb: ridge towards the original weights. Raise it when neighbours suffer, lower it when the target survives.
        erase_scale: weight of each erased embedding. Raise it when the target survives.
        preserve_scale: weight of each kept one. Raise it when neighbours suffer.
        articles: also edit "a superhero" beside "superhero", and keep "a ninja" beside "ninja".
        synonyms: edit the concept's synonyms as well as its name.
        keep_span: which tokens of a kept prompt must not change; ``all`` is the safest.
        keep_everyday: keep ninety everyday nouns (``EVERYDAY``) beside the keep list, so that the edit of padding
            tokens does not reach what nobody thought to name. Words of the vocabulary stand in for those that the
            tokenizer does not know.
        keep_vocabulary: how many words of the tokenizer's own vocabulary to keep beside those
            (:func:`erasure.methods.vocabulary.vocabulary`), on any base; 0 for none. Raise it where unlisted things
            suffer, or where the model does not know the everyday nouns.
        corpus: file of a Gram matrix over captions (:class:`erasure.methods.gram.Gram`, ``erasure gram``) that must
            not change either; "" for none. Bring one when erasing many concepts at once: twenty took three quarters of
            the unrelated things of Emoji World with them, and none with a corpus at 1,000 a concept.
        corpus_scale: how many kept embeddings the corpus counts as, whatever its length; 0 counts every one it has.
            Raise it with the number of concepts: 1,000 a concept was right on Emoji World.
        pooled: edit the pooled embedding too, where the architecture has one (SDXL, Kolors, SD3, FLUX.1). Of the
            official codes only UCE's script for FLUX does (``official-2025-flux``).
    """

    token_span: TokenSpan = "last_subject"
    empty_anchor: Literal["bos", "eos", "mean_pad"] = "bos"
    lamb: NonNegativeFloat = 0.5
    erase_scale: PositiveFloat = 1.0
    preserve_scale: NonNegativeFloat = 1.0
    articles: bool = False
    synonyms: bool = False
    keep_span: TokenSpan = "last_subject"
    keep_everyday: bool = False
    keep_vocabulary: NonNegativeInt = 0
    corpus: str = ""
    corpus_scale: NonNegativeFloat = 1000.0
    pooled: bool = False

    files: ClassVar[tuple[str, ...]] = ("corpus",)
    kind: ClassVar[str | None] = "operator"

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), **{name: os.path.basename(getattr(self, name)) for name in self.files}}

    @property
    def needs_keep(self) -> bool:
        return self.token_span not in ("last_subject", "content")

    def validate(self, backbone: Backbone, request: Request) -> None:
        super().validate(backbone, request)
        if self.pooled and "pooled" not in backbone.spaces:
            raise ValueError(f"{backbone.architecture} has no pooled text embedding; leave pooled=False")
        published = request.preset != "recommended"  # whoever takes a published preset wants that
        if "pooled" in backbone.spaces and not self.pooled and not published:
            warnings.warn(
                f"{backbone.pipelines} also reads the prompt as a pooled embedding, which is not edited and can bring "
                "some of the concept back; pass pooled=True (--set pooled=true) to edit it as well, or look at the "
                "pictures",
                stacklevel=3,
            )
        for concept in request.concepts:
            self.pairs(backbone, concept)
        if self.corpus:
            Gram.load(self.corpus).check(backbone)

    def erase(self, backbone: Backbone, request: Request) -> Erasure:
        """Solve and return the operator. Takes as long as encoding the prompts."""
        everyday = self.everyday(backbone, request.concepts)
        keep = [*request.keep, *everyday]
        tensors: dict[str, Tensor] = {}
        system: dict[str, Tensor] = {}
        spaces: dict[str, Any] = {}
        systems: dict[str, Any] = {}
        reports: dict[str, Any] = {}
        for space in self.spaces():
            solution, problem = self.solve(backbone, request.concepts, keep, space)
            sites = self.sites(backbone, space)
            spaces[space] = space_config(backbone, space, list(sites))
            tensors |= solution.tensors(space)
            if problem and problem.concept_rows:
                systems[space], part = self.system(problem, space)
                system |= part
            measured = quick_report(backbone, solution, sites, request.concepts, request.keep, space)
            reports[space] = measured | solution.notes
        config = self.record(
            backbone,
            request,
            keep_everyday=everyday,
            prompts=list(dict.fromkeys(t for c in request.concepts for t, _ in self.pairs(backbone, c))),
            spaces=spaces,
            report=reports.pop("hidden") | reports,
            **({"system": systems} if systems else {}),
            **self.facts(backbone, request),
        )
        return OperatorErasure(self.name_for(request), config, tensors, system)

    # --- the steps ----------------------------------------------------------------------------------------------------

    def facts(self, backbone: Backbone, request: Request) -> dict[str, Any]:
        """Facts of the method's own, for the record."""
        return {}

    def spaces(self) -> tuple[Space, ...]:
        """The embedding spaces to edit."""
        return ("hidden", "pooled") if self.pooled else ("hidden",)

    def sites(self, backbone: Backbone, space: Space) -> dict[str, Site]:
        """The layers to edit: every one that reads the space."""
        return backbone.text_sites(space)

    def prompt_pairs(self, concept: Concept) -> list[tuple[str, str]]:
        """Prompts to erase and where each is moved."""
        phrases = concept.phrases if self.synonyms else (concept.name,)
        pairs = [(phrase, concept.anchor) for phrase in phrases]
        if self.articles:
            with_articles = [(with_article(phrase), with_article(concept.anchor)) for phrase in phrases]
            pairs += [pair for pair, phrase in zip(with_articles, phrases, strict=True) if pair[0] != phrase]
        return pairs

    def pairs(self, backbone: Backbone, concept: Concept) -> list[tuple[str, str]]:
        """The :meth:`prompt_pairs` that the text encoders read to their end: a long name leaves room for no sentence.

        Raises:
            TooLong: they read none of them.
        """
        pairs = self.prompt_pairs(concept)
        fitting = set(backbone.fitting(dict.fromkeys(itertools.chain(*pairs))))
        fits = [pair for pair in pairs if fitting.issuperset(pair)]
        if not fits:
            backbone.check_lengths(pairs[0])
        return fits

    def problem(self, backbone: Backbone, concepts: Sequence[Concept], keep: Sequence[str], space: Space) -> Problem:
        """The ridge regression of one space."""
        return self.posed(self.concept_rows(backbone, concepts, space), self.kept(backbone, keep, space))

    def posed(self, pairs: Iterable[tuple[Tensor, Tensor]], kept: Kept) -> Problem:
        """The ridge regression of the targets and anchors of each concept, and of what is kept."""
        targets, anchors, counts = gathered(pairs)
        apart = counts if sum(counts) == len(targets) else ()
        return Problem(targets, anchors, kept, self.lamb, self.erase_scale, apart)

    def concept_rows(
        self, backbone: Backbone, concepts: Sequence[Concept], space: Space
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Embeddings to move and where to, ``(n, d)`` each, of one concept after the other.

        As many concepts are encoded at a time as have ``CHUNK`` prompts together.
        """
        pairs = [self.pairs(backbone, concept) for concept in concepts]
        totals = list(itertools.accumulate(map(len, pairs)))
        for _, group in itertools.groupby(range(len(pairs)), key=lambda i: (totals[i] - 1) // CHUNK):
            several = [pairs[i] for i in group]
            found = iter(self.moved_rows(backbone, list(itertools.chain(*several)), space))
            yield from (joined(itertools.islice(found, len(own))) for own in several)

    def solve(
        self, backbone: Backbone, concepts: Sequence[Concept], keep: Sequence[str], space: Space
    ) -> tuple[Solution, Problem | None]:
        """The edit of one space, and the regression it is the whole solution of, if it is one of one regression.

        :func:`erasure.resolve` solves such regressions jointly, unless they have so many rows that those of the
        concepts were not kept apart (:func:`~erasure.methods.ridge.gathered`).
        """
        problem = self.problem(backbone, concepts, keep, space)
        notes = {"erase_scales": list(problem.scales)} if problem.scales else {}
        return dataclasses.replace(solve(problem).smallest(), notes=notes), problem

    def system(self, problem: Problem, space: Space) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The problem as :func:`erasure.resolve` reads it."""
        weight = problem.erase_scale**0.5  # into the rows: a weighted row is a longer one
        tensors = {
            f"{space}.targets": weight * problem.targets.cpu().double(),
            f"{space}.anchors": weight * problem.anchors.cpu().double(),
            f"{space}.kept.0": Kept.of(problem.kept).smallest.data,
        }
        return {"lamb": problem.lamb, "rows": list(problem.concept_rows), "kept": 1}, tensors

    def moved_rows(
        self, backbone: Backbone, pairs: Sequence[tuple[str, str]], space: Space
    ) -> list[tuple[Tensor, Tensor]]:
        """:meth:`pair_rows` at every layer of the text encoder that is to be erased at."""
        layers = [self.pair_rows(one, pairs, space) for one in backbone.read_at(space)]
        return layers[0] if len(layers) == 1 else [joined(each) for each in zip(*layers, strict=True)]

    def pair_rows(
        self, backbone: Backbone, pairs: Sequence[tuple[str, str]], space: Space
    ) -> list[tuple[Tensor, Tensor]]:
        """Target and anchor embeddings ``(n, d)`` of every pair of prompts, aligned at the concept's last token.

        Where several encoders' tokens stand in a row (SD3), each target token is moved onto one of its own encoder's.
        """
        targets, anchors = [target for target, _ in pairs], [anchor for _, anchor in pairs]
        if space == "pooled":
            both = (rows(backbone, prompts, self.token_span, space) for prompts in (targets, anchors))
            return list(zip(*both, strict=True))
        xs, ys = (segment_rows(backbone, prompts, self.token_span) for prompts in (targets, anchors))
        if self.token_span in ("last_subject", "subject_to_end", "content", "content_to_end"):
            stand_ins = self._empty_rows(backbone)
            ys = [
                [row if anchor.strip() else empty for row, anchor in zip(y, anchors, strict=True)]
                for y, empty in zip(ys, stand_ins, strict=True)
            ]
        if self.token_span == "content":
            ys = [[stretched(b, len(a)) for a, b in zip(x, y, strict=True)] for x, y in zip(xs, ys, strict=True)]
        by_segment = [[aligned(a, b) for a, b in zip(x, y, strict=True)] for x, y in zip(xs, ys, strict=True)]
        return [joined(segments) for segments in zip(*by_segment, strict=True)]

    def _empty_rows(self, backbone: Backbone) -> list[Tensor]:
        """What stands for a missing anchor in each segment: the stand-in for its last word, and what follows words.

        ``content_to_end`` needs no stand-in: each token goes to the empty prompt's at its place.
        """
        span: dict[str, Span] = {"bos": "bos", "eos": "eos", "mean_pad": "tail"}
        parts = []
        for segment in backbone.read([""]).segments:
            word = segment.take(span[self.empty_anchor])[0].mean(dim=0, keepdim=True)
            tail = segment.take("tail") if self.token_span.endswith("_to_end") else []
            parts.append(torch.cat([*([] if self.token_span == "content_to_end" else [word]), *tail]))
        return parts

    def everyday(self, backbone: Backbone, concepts: Sequence[Concept]) -> list[str]:
        """What is kept for everything else: the everyday nouns that name no target, and words of the vocabulary.

        For nouns that the tokenizer does not know, as many words of its vocabulary stand in.

        Raises:
            ValueError: ``keep_vocabulary`` asks for words, and no tokenizer has any.
        """
        phrases = [phrase for concept in concepts for phrase in concept.phrases]
        nouns = [noun for noun in EVERYDAY if self.keep_everyday and not any(same(noun, phrase) for phrase in phrases)]
        heard = known(backbone, nouns)
        count = self.keep_vocabulary or len(nouns) - len(heard)
        words = vocabulary(backbone, concepts, count) if count else []
        if self.keep_vocabulary and not words:
            names = " and the ".join(backbone.tokenizers())
            raise ValueError(f"the vocabulary of the {names} has no words to keep; leave keep_vocabulary at 0")
        return list(dict.fromkeys([*heard, *words]))

    def gram(self, backbone: Backbone, prompts: Sequence[str], space: Space) -> Gram:
        """The Gram of prompts to keep. The everyday nouns among them are encoded once for a text encoder, not again."""
        everyday = expanded(backbone, EVERYDAY, articles=self.articles) if self.keep_everyday else []
        return gram_with(backbone, prompts, everyday, span=self.keep_span, space=space)

    def kept(self, backbone: Backbone, keep: Sequence[str], space: Space) -> Kept:
        """What must not move, weighted: the keep list and the corpus."""
        prompts = expanded(backbone, keep, articles=self.articles)
        total = self.preserve_scale * self.gram(backbone, prompts, space).kept[space]
        if self.corpus:
            corpus = Gram.load(self.corpus).check(backbone)
            weight = self.corpus_scale / corpus.counts[space] if self.corpus_scale else 1.0
            total = total + weight * corpus.kept[space]
        return total


def refuse_weights(method: ClosedForm, name: str, *, instead: str) -> None:
    """Refuse the weights of the ridge regression in a method that solves none."""
    if (method.lamb, method.erase_scale) != (ClosedForm.lamb, ClosedForm.erase_scale):
        raise ValueError(
            f"{name} weighs nothing; got lamb={method.lamb}, erase_scale={method.erase_scale}; leave them out, and set "
            f"{instead} instead"
        )
