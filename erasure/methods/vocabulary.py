"""Everything else, from the model itself: words of its tokenizer's vocabulary, for whatever base it is.

An edit of padding tokens reaches every prompt, so something has to stand for all that nobody named. A fixed list fits
one model better than another (21 of ninety everyday nouns are in Emoji World's vocabulary); every model has a
vocabulary, and an embedding for each word of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from erasure.backbone import Backbone
from erasure.concept import Concept
from erasure.wording import naming

MARKS = ("▁", "Ġ")  # in front of a word
SHORTEST = 3  # letters of a word
TYPICAL = (0.5, 2.0)  # embedding norms, in units of their median: pieces that no text trained keep what they began with
NEAR = 0.01  # share of the words nearest to targets and anchors that is left out


def words_of(pieces: dict[str, int]) -> dict[str, int]:
    """The whole words of a vocabulary by their ids, in the order of these, which is that of frequency in most.

    A word is lower-case ASCII letters with its tokenizer's mark: ``</w>`` behind it (CLIP), ``▁`` (SentencePiece) or
    ``Ġ`` (byte-level) in front of it. In a vocabulary without such marks it has none (whole words, WordPiece).
    """
    found: dict[str, int] = {}
    marked = any(piece.endswith("</w>") or piece[:1] in MARKS for piece in pieces)
    for piece, token in sorted(pieces.items(), key=lambda item: item[1]):
        word = piece.removesuffix("</w>") if piece.endswith("</w>") else piece[1:] if piece[:1] in MARKS else ""
        word = word if marked else piece
        if len(word) >= SHORTEST and word.isascii() and word.isalpha() and word.islower():
            found.setdefault(word, token)
    return found


@torch.no_grad()
def vocabulary(backbone: Backbone, concepts: Iterable[Concept], n: int) -> list[str]:
    """``n`` words of the vocabulary of a model's first tokenizer that has some, at all distances from the concepts.

    Words that name a target or stand in one, and those whose embeddings lie nearest to targets and anchors, are left
    out: kept, they would hold on to it. So are pieces that were never trained as words, by their norms. Of the others
    every k-th is taken in the order of distance. The same model and request give the same words; none where no
    tokenizer has words in its vocabulary.
    """
    concepts = list(concepts)
    for name, (tokenizer, _) in backbone.tokenizers().items():
        encoder = backbone.components[name.replace("tokenizer", "text_encoder")]
        table: Tensor = encoder.get_input_embeddings().weight.detach()  # type: ignore[operator]
        if order := _by_distance(tokenizer, table, concepts):
            return spaced(order, n)
    return []


def spaced(texts: Sequence[str], n: int) -> list[str]:
    """``n`` of the texts at most, at equal distances in their order."""
    count = min(n, len(texts))
    return [texts[i * len(texts) // count] for i in range(count)]


def known(backbone: Backbone, texts: list[str]) -> list[str]:
    """The texts that a tokenizer of the model can read without its unknown word, which stands for all that it lacks."""
    read: set[str] = set()
    for tokenizer, _ in backbone.tokenizers().values() if texts else ():
        for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False).input_ids, strict=True):
            if tokenizer.unk_token_id not in ids:
                read.add(text)
    return [text for text in texts if text in read]


def _by_distance(tokenizer: Any, table: Tensor, concepts: list[Concept]) -> list[str]:
    """The words of a tokenizer that may be kept, the nearest to targets and anchors first."""
    phrases = [phrase for concept in concepts for phrase in concept.phrases]
    anchors = [concept.anchor for concept in concepts if concept.anchor]
    ids = tokenizer([*phrases, *anchors], add_special_tokens=False).input_ids
    own = {token for pieces in ids[: len(phrases)] for token in pieces}
    words = words_of(tokenizer.get_vocab())
    named = {*naming(words, phrases)}
    words = {w: token for w, token in words.items() if w not in named and token not in own and token < len(table)}
    if not words:
        return []
    rows = table[torch.tensor(list(words.values()), device=table.device)].float().cpu()
    near = table[torch.tensor(sorted({t for pieces in ids for t in pieces}), device=table.device)].float().cpu()
    norms, similar = rows.norm(dim=1), (F.normalize(rows, dim=1) @ F.normalize(near, dim=1).T).max(dim=1).values
    low, high = (bound * float(norms.median()) for bound in TYPICAL)
    order = [i for i in similar.argsort(descending=True, stable=True).tolist() if low <= norms[i] <= high]
    every = list(words)
    return [every[i] for i in order[int(NEAR * len(order)) :]]


__all__ = ["known", "spaced", "vocabulary", "words_of"]
