"""Words that a text encoder reads as vectors of our own, and learning them from pictures (textual inversion)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from erasure.backbone import Backbone
from erasure.backbone.text import Text
from erasure.methods.vocabulary import words_of
from erasure.train import Draw, Run, Training, trainable


class LearntWords:
    """Vectors that stand in prompts. Each is spelled as a rare word of the vocabulary, and replaces its embedding while
    :meth:`read` is open; the tokenizer and the encoder's weights stay as they are.

    Args:
        backbone: a model with one text encoder whose tokenizer has whole words (Stable Diffusion 1.x and 2.x).
        count: how many vectors there will be.
        besides: prompts that are read beside them. None of their tokens is taken.

    Attributes:
        words: how the vectors are spelled.
        vectors: ``(d,)`` for each word that has one by now.

    Raises:
        ValueError: the vocabulary has too few other words.
    """

    def __init__(self, backbone: Backbone, count: int, *, besides: Sequence[str]) -> None:
        self.encoder, tokenizer = backbone.pipe.text_encoder, backbone.pipe.tokenizer
        used = {token for ids in tokenizer(list(besides), add_special_tokens=False).input_ids for token in ids}
        self.tokens: dict[str, int] = {}
        for word, token in reversed(words_of(tokenizer.get_vocab()).items()):
            if len(self.tokens) == count:
                break
            if token not in used and tokenizer(word, add_special_tokens=False).input_ids == [token]:
                self.tokens[word] = token
        if len(self.tokens) < count:
            raise ValueError(
                f"{count} words of the vocabulary have to stand for what is learnt; it has {len(self.tokens)} beside "
                "those of the prompts; learn fewer, in fewer rounds"
            )
        self.vectors: dict[str, Tensor] = {}

    @property
    def words(self) -> list[str]:
        return list(self.tokens)

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """The encoder reads every word that has a vector as this vector inside the block."""

        def put(module: Any, args: Any, embedded: Tensor) -> Tensor:
            ids = args[0]
            for word, vector in self.vectors.items():
                embedded = torch.where((ids == self.tokens[word])[..., None], vector.to(embedded), embedded)
            return embedded

        handle = self.encoder.get_input_embeddings().register_forward_hook(put)
        try:
            yield
        finally:
            handle.remove()

    def embedding(self, tokenizer: Any, phrase: str) -> Tensor:
        """``(d,)`` float32: the mean embedding of a phrase's tokens, to start from."""
        ids = tokenizer(phrase, add_special_tokens=False).input_ids
        table: Tensor = self.encoder.get_input_embeddings().weight.detach()
        return table[torch.tensor(ids, device=table.device)].float().mean(0)


def learn_word(
    backbone: Backbone,
    learnt: LearntWords,
    word: str,
    pictures: Tensor,
    sentences: Sequence[str],
    *,
    start: Tensor,
    training: Training,
    progress: bool = True,
) -> None:
    """Textual inversion (Gal et al. 2023): the vector by which the model as it is denoises some pictures best,

        argmin_v  mean | e(x_t, t, sentence with v) - eps |^2    (or the velocity, or v, where that is predicted)

    over pictures, times and noise. Weights are frozen. The vector is then in ``learnt.vectors``.

    Args:
        pictures: clean latents ``(n, ...)``.
        sentences: with ``{}`` for the word; picture i shows sentence ``i % len(sentences)``.
        start: ``(d,)``.
    """
    v = torch.nn.Parameter(start.clone())
    learnt.vectors[word] = v
    asked = [sentence.replace("{}", word) for sentence in sentences]

    def loss(draw: Draw) -> Tensor:
        with learnt.read():
            text = backbone.encode(asked, grad=True).text
        return inversion_error(backbone, pictures, text, training.batch_size, draw.generator)

    with trainable({}, backbone.components.values()):
        run = Run(
            {word: v}, loss, training=training, modules=backbone.components.values(), progress=progress, title="attack"
        )
        for _ in run:
            pass
    learnt.vectors[word] = v.detach()


def inversion_error(
    backbone: Backbone, pictures: Tensor, text: Text, batch_size: int, generator: torch.Generator
) -> Tensor:
    """The mean error of the model on a random batch of pictures mixed with noise; text has a row for each sentence."""
    chosen = torch.randint(len(pictures), (batch_size,), generator=generator)
    t = backbone.noise.times(torch.rand(batch_size, generator=generator)).to(backbone.device)
    x0 = pictures[chosen]
    eps = torch.randn(x0.shape, generator=generator)
    rows = text[(chosen % len(text)).to(text.hidden.device)]
    return backbone.losses(x0.to(backbone.device), t, eps.to(backbone.device), rows).mean()


__all__ = ["LearntWords", "inversion_error", "learn_word"]
