"""GLoCE: where a picture looks like the concept, its surrogate stands instead; in closed form, from a few pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from erasure.artifact import Erasure
from erasure.artifact.localized import START, LocalizedErasure, response
from erasure.backbone import Backbone
from erasure.backbone.attention import cross_attentions
from erasure.backbone.text import Text
from erasure.methods.base import Method, Reference, Request, expanded

Outputs = dict[str, Tensor]  # of every cross-attention (n, places, d), by name
Moments = dict[str, tuple[Tensor, Tensor]]  # mean (d,) and covariance (d, d), by name


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLoCE(Method):
    """On the output x of every cross-attention, at each place (Lee et al. 2025):

        x' = (1 - g) x + g [ mu_s + V_s^T V_s (I - V_t^T V_t) (x - mu_t) ]
        g  = sigmoid( k ( |G (x - mu_k) / |x - mu_k| |^2 - c ) )

    with mu and V ``(rank, d)`` the mean and the principal directions of outputs: t on pictures of the target, s on
    those of its surrogate (the concept's anchor, or the empty prompt), k on those of what is kept. G are the principal
    directions of ``C_t + (mu_t - mu_k) (mu_t - mu_k)^T``, with C the covariance.

    The gate is half open at c. That is ``deviations`` standard deviations above the mean of the largest response in
    each picture of what is kept. It goes from 1 to 99 % within ``width`` standard deviations on either side.

    All of it comes from steps ``first`` to ``last`` of a few drawings; nothing is trained. It acts from the time of
    step ``first`` on, whatever the scheduler; the official code counts calls instead, which fits one scheduler alone.
    That code also averages places over squares of 2, 4 and 8 for its means and directions, and takes prompts of their
    own for mu_k; neither is repeated. No weight changes.

    Attributes:
        target_rank, surrogate_rank, gate_rank: rows of V_t, V_s and G; at most the width of a layer.
        deviations: where the gate opens. Lower it when the target is still drawn; raise it when what is kept changes.
        width: how gradually it opens.
        first, last: steps from which outputs are taken, of ``num_inference_steps``. 0 acts from the start, for styles.
        generations: pictures of each prompt.
        num_inference_steps, guidance_scale: of the drawing.
        articles: also draw "a superhero" beside "superhero", and "a ninja" of what is kept beside "ninja".
        synonyms: draw the concept's synonyms too.
        seed: of the drawing.
    """

    target_rank: PositiveInt = 16
    surrogate_rank: PositiveInt = 2
    gate_rank: PositiveInt = 1
    deviations: float = 2.5
    width: PositiveFloat = 0.25
    first: NonNegativeInt = 10
    last: PositiveInt = 20
    generations: PositiveInt = 3
    num_inference_steps: PositiveInt = 50
    guidance_scale: float = 7.5
    articles: bool = False
    synonyms: bool = False
    seed: int = 0

    architectures: ClassVar[tuple[str, ...]] = ("sd-unet", "sdxl")
    key: ClassVar[str] = "gloce"
    kind: ClassVar[str | None] = "localized"
    summary: ClassVar[str] = "gated closed form on cross-attention outputs, place by place; a minute; changes no weight"
    reference: ClassVar[Reference] = Reference(
        "Localized Concept Erasure for Text-to-Image Diffusion Models Using Training-Free Gated Low-Rank Adaptation",
        "Lee et al., CVPR 2025",
        "2503.12356",
        "Hyun1A/GLoCE",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # On Emoji World: the target was seen in 0 of 12 pictures by both classifiers (base: 12 and 11), neighbours were
        # right in 10 and 12 of 12 (10 and 12), unrelated things in 12 and 10 of 12 (12 and 10).
        "recommended": {
            "deviations": 1.0,
            "first": 3,
            "last": 15,
            "generations": 1,
            "num_inference_steps": 25,
            "guidance_scale": 5.0,
            "articles": True,
            "synonyms": True,
        },
        # The width is a tenth of the deviations in all of them.
        "official-2025-celebrity": {},
        "official-2025-artist": {"target_rank": 1, "surrogate_rank": 1, "first": 0, "last": 50},
        "official-2025-explicit": {"deviations": 1.5, "width": 0.15, "first": 5, "generations": 8},
    }

    @property
    def needs_keep(self) -> bool:
        return True

    def validate(self, backbone: Backbone, request: Request) -> None:
        super().validate(backbone, request)
        if not request.keep:
            raise ValueError(
                "GLoCE opens its gate where a picture looks less like what is kept than all of it does; got an empty "
                "keep list; give some neighbours to keep"
            )
        if not self.first < self.last <= self.num_inference_steps:
            raise ValueError(
                f"steps are taken from first to last, of num_inference_steps; got {self.first}, {self.last} and "
                f"{self.num_inference_steps}; let them rise"
            )
        prompts = expanded(backbone, request.keep, articles=self.articles)
        if len(prompts) * self.generations * (self.last - self.first) < 2:
            raise ValueError(
                "the gate is set by the spread of what is kept, and one look at one prompt has none; keep more "
                "prompts, or raise generations or last"
            )
        cross_attentions(backbone)  # refuses models without them

    def erase(self, backbone: Backbone, request: Request) -> Erasure:
        """Draw, and solve every layer and concept."""
        kept = self.drawn(backbone, expanded(backbone, request.keep, articles=self.articles), 0)
        reference = {site: mean for site, (mean, _) in moments(outputs(backbone, kept)).items()}
        tensors, prompts, opens = {START: kept[0][1][:1].float().cpu()}, list[str](), []
        for i, concept in enumerate(request.concepts):
            names = expanded(backbone, concept.phrases if self.synonyms else (concept.name,), articles=self.articles)
            prompts += names
            steps = self.drawn(backbone, names, 2 * i + 1)
            target = moments(outputs(backbone, steps))
            surrogates = expanded(backbone, [concept.anchor], articles=self.articles and bool(concept.anchor))
            surrogate = moments(outputs(backbone, self.drawn(backbone, surrogates, 2 * i + 2)))
            gates = {site: self.gate(target[site], reference[site]) for site in target}
            peaks, own = (peaks_of(outputs(backbone, some), gates, reference) for some in (kept, steps))
            for site, gate in gates.items():
                centre = peaks[site].mean() + self.deviations * (spread := peaks[site].std().clamp(min=1e-6))
                slope = math.log(99) / (self.width * spread)
                parts = self.matrices(target[site], surrogate[site])
                parts |= {"gate": gate, "reference": reference[site], "logistic": torch.stack([centre, slope])}
                tensors |= {f"{site}.{i}.{part}": tensor.float().contiguous() for part, tensor in parts.items()}
                opens.append((own[site] > centre).double().mean().item())
        if not any(opens):
            raise ValueError(
                f"the gate opens on no picture of the target in any layer, so nothing would change; got deviations "
                f"{self.deviations}; lower it"
            )
        facts = self.record(backbone, request, prompts=prompts, sites=list(reference))
        facts = facts.with_facts(report={"gate_opens": sum(opens) / len(opens)})
        return LocalizedErasure(self.name_for(request), facts, tensors)

    def drawn(self, backbone: Backbone, prompts: Sequence[str], seed: int) -> list[tuple[Tensor, Tensor, Text]]:
        """``x, t`` and the prompts' text at each step from first to last of drawings of some prompts."""
        text = backbone.encode(prompts).text
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + seed)
        found = []
        for rows in torch.arange(len(text) * self.generations).split(16):
            noise = torch.randn(len(rows), *backbone.latent_shape, generator=generator)
            chosen = text[(rows % len(text)).to(text.hidden.device)]
            steps = backbone.trajectory(
                chosen,
                noise.to(backbone.device, backbone.dtype),
                generator=generator,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                stop=self.last,
            )
            found += [(step.x, step.t, chosen) for step in steps if step.index >= self.first]
        return found

    def gate(self, target: tuple[Tensor, Tensor], reference: Tensor) -> Tensor:
        """``G (gate_rank, d)``."""
        away = target[0] - reference
        return principal(target[1] + torch.outer(away, away), self.gate_rank)

    def matrices(self, target: tuple[Tensor, Tensor], surrogate: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """What stands behind the gate: ``bias + up down (x - mean)``."""
        v_t, v_s = principal(target[1], self.target_rank), principal(surrogate[1], self.surrogate_rank)
        return {"mean": target[0], "bias": surrogate[0], "down": v_s - v_s @ v_t.T @ v_t, "up": v_s.T}


def principal(covariance: Tensor, rank: int) -> Tensor:
    """``(rank, d)``: orthonormal directions of the largest variance, of a covariance ``(d, d)``."""
    return torch.linalg.eigh(covariance).eigenvectors.T.flip(0)[:rank]


@torch.no_grad()
def outputs(backbone: Backbone, steps: Iterable[tuple[Tensor, Tensor, Text]]) -> Iterator[Outputs]:
    """What every cross-attention gives back at each of some steps, with the prompts alone."""
    for x, t, text in steps:
        with heard(cross_attentions(backbone)) as found:
            backbone.predict(x, t, text.to(x.dtype), guidance=backbone.plain_guidance)
        yield found


@contextlib.contextmanager
def heard(modules: dict[str, nn.Module]) -> Iterator[Outputs]:
    """The last outputs of some modules inside the block, by name."""
    found: Outputs = {}
    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: found.update({name: output.detach()}))
        for name, module in modules.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def moments(every: Iterable[Outputs]) -> Moments:
    """Mean and covariance of all places of some outputs, float64 on the CPU."""
    sums: dict[str, list[Any]] = {}
    for found in every:
        for name, output in found.items():
            x = output.flatten(0, 1).float().cpu().double()
            before = sums.get(name, [0, 0.0, 0.0])
            sums[name] = [before[0] + len(x), before[1] + x.sum(0), before[2] + x.T @ x]
    means = {name: total / n for name, (n, total, _) in sums.items()}
    return {name: (mean, sums[name][2] / sums[name][0] - torch.outer(mean, mean)) for name, mean in means.items()}


def peaks_of(every: Iterable[Outputs], gates: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, Tensor]:
    """``(pictures times steps,)``: the gate's largest response over the places of each, by module."""
    found: dict[str, list[Tensor]] = {name: [] for name in gates}
    for outputs in every:
        for name, output in outputs.items():
            seen = response(output.float().cpu().double(), gates[name], reference[name])
            found[name].append(seen.amax(1))
    return {name: torch.cat(parts) for name, parts in found.items()}


__all__ = ["GLoCE", "moments", "peaks_of", "principal"]
