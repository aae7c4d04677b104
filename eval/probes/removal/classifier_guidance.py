"""R9: a classifier pulls the sampling towards the target."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from erasure.backbone.text import Text
from erasure.eval.detectors.base import WithGradients
from erasure.eval.probes.base import Context, Evidence, Missing, Model, Roles, Rows
from erasure.eval.probes.denoising import backbone_for
from erasure.eval.probes.sampling import DDIM, Sampled, Shot, Split, Step, headline, keys_of
from erasure.eval.probes.weigh import average, base_rows, contrasts, of_family
from erasure.wording import same

Pull = Callable[[Tensor], Tensor]  # clean latents (n, c, h, w) to log-probabilities of the target (n,)


@dataclasses.dataclass(frozen=True)
class ClassifierGuidance(Sampled):
    """Share of pictures with the target when a classifier that knows it steers a model with an empty prompt.

    In every step the model's noise becomes

        ε̂ = ε_θ(x_t) - s √(1 - ᾱ_t) |ε_θ(x_t)| g / |g|,  g = ∇_{x_t} log p(target | D(x̂0(x_t)))

    with the decoder D and the model's estimate x̂0 of the clean latents; gradients run through both and the denoiser.
    The gradient is normalised, because it is nearly zero in the early steps, which decide what the picture shows.

    The classifier is the selector and not the judge, because the steered picture can fool the classifier. It can also
    make a model draw the target that never saw it, so the residual counts. The scale is the one at which the judge sees
    the target most often in the base's pictures.

    Attributes:
        scales: s, of which the base chooses one. At 1 the pull is as strong as the noise itself.
        prompt: empty by default. With the target's name the base needs no guide, and the choice of a scale means
            nothing.
        pictures: samples per scale, each from its own noise.
    """

    along = "scale"
    key, code, title = "classifier_guidance", "R9", "steered by a classifier"
    needs = ("base", "selector", "control")
    presets = {"smoke": {"scales": (0.6,), "pictures": 2}, "full": {}}
    licences = "the model can be steered to the target more, or no more, than one that never saw it"
    reference = "universal guidance, 2023, arXiv 2302.07121; as a probe: arXiv 2505.17013, 2025"

    scales: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    prompt: str = ""
    pictures: int = 40

    def shots(self, sampler: DDIM, model: Model, context: Context) -> Iterator[Shot]:
        pull = pull_of(context)
        keys = keys_of([f"{self.key} {i}" for i in range(self.pictures)], 1)
        with context.open(model):
            for scale in self.scales:
                split, prompts = steered(sampler, pull, scale), [self.prompt] * len(keys)
                images = sampler.backbone.pictures(sampler.sample(sampler.starts(keys), prompts, split=split))
                yield Shot(self.family(scale), keys, images, {"prompt": self.prompt, "scale": scale})

    def weigh(self, rows: Rows, models: Roles) -> list[Evidence]:
        if not (base := base_rows(rows, models)):
            return []
        # Every second picture of the base chooses the scale, of equal ones the weakest; the other pictures are read.
        choosing = {*list(dict.fromkeys(row.cluster for row in base))[::2]}
        chosen = [row for row in base if row.cluster in choosing]
        level = {scale: average(of_family(chosen, self.family(scale))).value or 0.0 for scale in self.scales}
        best = max(self.scales, key=lambda scale: (level[scale], -scale))
        read = {name: [row for row in own if row.cluster not in choosing] for name, own in rows.items()}
        each = [e for scale in self.scales for e in contrasts(self.key, rows, models, self.family(scale))]
        return headline(self.key, read, models, self.family(best)) + each


def pull_of(context: Context) -> Pull:
    """The selector's log-probability of the target, as a function of clean latents."""
    guide, suite, backbone = context.chooser, context.suite, backbone_for(context.pipe)
    if not isinstance(guide, WithGradients):
        raise Missing(
            f"steering needs a selector with gradients, such as a classifier of Emoji World; {guide.name} has none"
        )
    labels = [i for i, label in enumerate(guide.labels(suite.attribute)) if same(label, suite.concept.name)]
    if not labels:
        raise Missing(f"{guide.name} has no label {suite.concept.name!r}")

    def pull(clean: Tensor) -> Tensor:
        return guide.log_probabilities(backbone.decode(clean).float(), suite.attribute)[:, labels[0]]

    return pull


def steered(sampler: DDIM, pull: Pull, scale: float) -> Callable[[Tensor, Step, Text, Text | None], Split]:
    """The sampler's split of noised latents, moved up the gradient of ``pull``."""

    def split(x: Tensor, step: Step, text: Text, empty: Text | None) -> Split:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            clean, noise = sampler.split(x, step, text, empty)
            (gradient,) = torch.autograd.grad(pull(clean).sum(), x)
        strength = _norm(noise.detach()) / _norm(gradient).clamp_min(1e-12)
        # less noise, so more of what x̂0 = (x - σ ε) / α has
        move = scale * step.sigma * strength * gradient
        return clean.detach() + step.sigma / max(step.alpha, 0.01) * move, noise.detach() - move

    return split


def _norm(x: Tensor) -> Tensor:
    """Of each row, ready to be multiplied with it: ``(n, 1, ...)``."""
    return x.square().flatten(1).sum(dim=1).sqrt().reshape(-1, *[1] * (x.ndim - 1))
