"""EraseFlow: give the concept's prompt the trajectories that its anchor has, by trajectory balance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from erasure.artifact import Erasure
from erasure.artifact.config import Config
from erasure.backbone import Backbone
from erasure.backbone.noise import Diffusion, NoiseModel
from erasure.backbone.text import Text
from erasure.methods.base import Reference, Request, check_anchors, check_supported, with_anchors
from erasure.methods.finetune import SMALL_BANK, FineTune, Loss
from erasure.methods.students import LowRank, Student
from erasure.train import Checkpoint, Draw, Training


@dataclasses.dataclass(frozen=True, kw_only=True)
class EraseFlow(FineTune):
    """Sample x_T ... x_0 with the anchor's prompt, and make the concept's prompt as likely to go the same way
    (trajectory balance, Kusumba et al. 2025):

        S = z - log_beta + sum_i [ log p(x_{i-1} | x_i, c) - log q(x_i | x_{i-1}) ]        loss = S^2
        p(x_{i-1} | x_i, c) = N( sqrt(b) x0 + sqrt(1 - b - s^2) eps, s^2 ),     s^2 = (1 - b) / (1 - a) (1 - a / b)
        q(x_i | x_{i-1})    = N( sqrt(a / b) x_{i-1}, 1 - a / b )

    with c the concept, a and b the cumulative alphas of x_i and x_{i-1}, and x0 and eps what the student's prediction
    for c, under guidance, stands for: the step of DDIM with eta 1. Each log density is the mean over the numbers of a
    picture. z is one learnt number. The trajectory comes from the student as it is, with the anchor's prompt; the sum
    is over ``early`` random steps before the last ``late`` ones and those. Guidance compares with the empty prompt.

    Each step of the sum is computed again in the backward pass, so that one graph is held at a time, not twenty. Every
    concept needs an anchor. Models of velocities (SD3, FLUX) have no such density and are refused. The settings it
    shares with other fine-tunes are those of :class:`~erasure.methods.finetune.FineTune`; ``trajectories`` and
    ``keep_steps`` are of what is held by ``retain``, which the paper does not have.

    Attributes:
        fresh: steps that sample a trajectory of their own; the one after them samples another, which all later ones
            use. 0 trains on a single one, which is enough for styles.
        early, late: terms of the sum. Fewer are cheaper, and the loss is noisier.
        log_beta: the reward's logarithm.
        z: where the learnt number starts.
        guidance_scale: of the sampling, and of the prediction that is trained.
        clip: largest norm of the adapter's gradient, and of that of z.
    """

    fresh: NonNegativeInt = 10
    early: PositiveInt = 10
    late: PositiveInt = 10
    log_beta: float = 2.5
    z: float = -0.1953
    iterations: PositiveInt = 20
    lr: float = 3e-4
    guidance_scale: float = 5.0
    adapter: Literal["auto", "weights", "lora"] = "lora"
    rank: PositiveInt = 4
    optimizer: Literal["adam", "adamw", "sgd", "adamw8bit"] = "adamw"
    clip: float | None = 1.0
    null: Literal["sampled", "empty"] = "empty"

    architectures: ClassVar[tuple[str, ...]] = ("sd-unet", "sdxl", "kolors", "pixart", "cogvideox")
    key: ClassVar[str] = "eraseflow"
    summary: ClassVar[str] = "LoRA that gives the concept its anchor's trajectories; minutes; needs an anchor"
    reference: ClassVar[Reference] = Reference(
        "EraseFlow: Learning Concept Erasure Policies via GFlowNet-Driven Alignment",
        "Kusumba et al., NeurIPS 2025",
        "2511.00804",
        "Abhiramkns/EraseFlow",
    )
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # Chosen on Emoji World's cat, of 1, 10 and 100 for `retain`: the target is seen in no picture with any of them,
        # neighbours are right in 81, 92 and 94 %, unrelated things in 86, 97 and 97 %.
        "recommended": {
            **SMALL_BANK,
            "iterations": 40,
            "lr": 3e-3,
            "batch_size": 2,
            "early": 5,
            "late": 5,
            "retain": 100.0,
        },
        # The script calls log_beta "beta". Its rate of z is that of the adapter.
        "official-2025-object": {},
        "official-2025-style": {"fresh": 0, "lr": 5e-4},
        "official-2025-nudity": {"fresh": 20},
    }

    @property
    def selector(self) -> str:
        return "attention"

    def validate(self, backbone: Backbone, request: Request) -> None:
        if self.robust or self.adapter == "weights" or self.null == "sampled":
            raise ValueError(
                "EraseFlow trains an adapter, compares no two predictions and samples by itself with the empty prompt; "
                f"got adapter {self.adapter!r}, robust={self.robust} and null={self.null!r}; leave them out"
            )
        check_supported(self, backbone)
        if backbone.guidance != "cfg" or not isinstance(backbone.noise, Diffusion):
            raise ValueError(
                f"EraseFlow needs a diffusion model with classifier-free guidance; got {backbone.pipelines} with "
                f"guidance {backbone.guidance!r} and {backbone.noise.prediction_type}; choose another, such as esd"
            )
        timetable(backbone.noise, self.num_inference_steps)  # refuses more steps than there are times
        check_anchors(self.key, request.concepts)
        super().validate(backbone, request)

    def pairs(self, backbone: Backbone, request: Request) -> list[tuple[str, str]]:
        """Every name of the concepts with its anchor."""
        return with_anchors(backbone, request.concepts, synonyms=self.synonyms, articles=self.articles)

    def prompts(self, backbone: Backbone, request: Request) -> list[str]:
        return [concept for concept, _ in self.pairs(backbone, request)]

    def student(self, backbone: Backbone) -> Balanced:
        return Balanced(backbone, self.selector, rank=self.rank, alpha=self.alpha, seed=self.seed, z=self.z)

    def training(self) -> Training:
        """As every fine-tune's, but that the gradient of z is clipped apart from the adapter's."""
        plain = super().training()
        if plain.clip is None:
            return plain
        unclipped = dataclasses.replace(plain, clip=None)

        def build(parameters: Sequence[Tensor], **settings: Any) -> torch.optim.Optimizer:
            optimizer = unclipped.build(parameters)
            optimizer.register_step_pre_hook(lambda *_: clip_apart(parameters, plain.clip or math.inf))
            return optimizer

        return dataclasses.replace(unclipped, optimizer=build)

    def objective(self, backbone: Backbone, student: Student, request: Request, checkpoint: Checkpoint | None) -> Loss:
        concepts, anchors = (list(part) for part in zip(*self.pairs(backbone, request), strict=True))
        text, anchor, empty = (backbone.encode(prompts).text for prompts in (concepts, anchors, [""]))
        empty = empty.repeat(self.batch_size)
        z, last = student.parameters["z"], dict[int, dict[str, Tensor]]()
        t = timetable(backbone.noise, self.num_inference_steps)
        hold = self.holding(backbone, request, checkpoint)

        def trajectory(draw: Draw) -> dict[str, Tensor]:
            if draw.step < self.fresh:
                return self.sampled(backbone, student, anchor, empty, t, draw)
            if draw.part not in last:  # kept on disk: a resumed run has another student

                def make() -> dict[str, Tensor]:
                    return self.sampled(backbone, student, anchor, empty, t, draw)

                last[draw.part] = make() if checkpoint is None else checkpoint.keep(f"last-{draw.part}", make)
            return last[draw.part]

        def loss(draw: Draw) -> Tensor:
            taken = trajectory(draw)
            x, both = taken["x"], empty + text[taken["prompt"].to(text.hidden.device)]
            total: Tensor = z - self.log_beta
            for i in self.chosen(draw.generator):
                step = (x[i].to(z.device), x[i + 1].to(z.device), t[i], t[i + 1])
                total = total + self.balance(backbone, student, both, *step)
            value = total.square().mean()
            with student.active():
                return value + hold(draw)

        return loss

    def chosen(self, generator: torch.Generator) -> list[int]:
        """The steps that are in the sum: some of the early ones at random, and the last ones."""
        split = max(self.num_inference_steps - self.late, 0)
        early = torch.randperm(split, generator=generator)[: self.early].sort().values.tolist()
        return [*early, *range(split, self.num_inference_steps)]

    @torch.no_grad()
    def sampled(
        self, backbone: Backbone, student: Student, anchor: Text, empty: Text, t: list[int], draw: Draw
    ) -> dict[str, Tensor]:
        """``x (steps + 1, n, ...)`` from noise on, that the student samples for anchors, and which ``prompt (n,)``."""
        chosen = torch.randint(len(anchor), (self.batch_size,), generator=draw.generator)
        both, shape = empty + anchor[chosen.to(anchor.hidden.device)], (self.batch_size, *backbone.latent_shape)
        x = [torch.randn(shape, generator=draw.generator)]
        for now, after in zip(t[:-1], t[1:], strict=True):
            here, times = x[-1].to(backbone.device), torch.full((self.batch_size,), now, device=backbone.device)
            with student.active():
                prediction = self.guided(backbone, both, here, times)
            mean, deviation = transition(backbone.noise, prediction, here, times, after)
            x.append(mean.cpu() + deviation * torch.randn(shape, generator=draw.generator))
        return {"x": torch.stack(x), "prompt": chosen}

    def balance(
        self, backbone: Backbone, student: Student, both: Text, x: Tensor, after: Tensor, t: int, t_after: int
    ) -> Tensor:
        """``(n,)``: log p - log q of one step from x to after, under the student."""
        times = torch.full((len(x),), t, device=x.device)

        def predict(x: Tensor) -> Tensor:
            with student.active():  # here, since the backward pass calls this again
                return self.guided(backbone, both, x, times)

        prediction = recomputed(predict, x, use_reentrant=False)
        kept = alpha(backbone.noise, t) / alpha(backbone.noise, t_after)
        forward = log_density(after, *transition(backbone.noise, prediction, x, times, t_after))
        return forward - log_density(x, math.sqrt(kept) * after, math.sqrt(1 - kept))

    def guided(self, backbone: Backbone, both: Text, x: Tensor, times: Tensor) -> Tensor:
        """The prediction under guidance, of whatever predicts now.

        Args:
            both: ``2 n`` rows, the empty prompt's and then the prompts'.
        """
        none, prompted = backbone.predict_float(torch.cat([x, x]), torch.cat([times, times]), both).chunk(2)
        return none + self.guidance_scale * (prompted - none)


class Balanced(LowRank):
    """A low-rank adapter whose A starts as ``N(0, 1 / rank^2)``, and the learnt number beside it, which is no part of
    the erasure."""

    def __init__(self, backbone: Backbone, selector: str, *, rank: int, alpha: float | None, seed: int, z: float):
        super().__init__(backbone, selector, rank=rank, alpha=alpha, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.parameters.items():
            if name.endswith(".lora_A"):
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / rank)
        self.parameters["z"] = nn.Parameter(torch.tensor(z, device=backbone.device))

    def erasure(
        self, name: str, config: Config, result: Mapping[str, Tensor], originals: Mapping[str, Tensor]
    ) -> Erasure:
        adapter = {key: tensor for key, tensor in result.items() if key != "z"}
        return super().erasure(name, config, adapter, originals)


def timetable(noise: NoiseModel, steps: int) -> list[int]:
    """``steps + 1`` falling times, evenly over a diffusion's range; the last is 0.

    Raises:
        ValueError: there are not twice as many times as steps.
    """
    total = len(noise.alphas) if isinstance(noise, Diffusion) else 0
    if 2 * steps > total:
        raise ValueError(f"num_inference_steps is at most half of the model's {total} times; got {steps}; give less")
    return [*(i * (total // steps) + 1 for i in reversed(range(steps))), 0]


def alpha(noise: Any, t: int) -> float:
    """The cumulative alpha of a diffusion at a time; a float, since differences of it are small."""
    return float(noise.alphas[t])


def transition(noise: NoiseModel, prediction: Tensor, x: Tensor, times: Tensor, t_after: int) -> tuple[Tensor, float]:
    """Mean ``(n, ...)`` and deviation of DDIM's step with eta 1 from x at times ``(n,)``, all the same."""
    x0, eps = noise.split(prediction, x, times)
    a, b = alpha(noise, int(times[0])), alpha(noise, t_after)
    variance = (1 - b) / (1 - a) * (1 - a / b)
    return math.sqrt(b) * x0 + math.sqrt(max(1 - b - variance, 0.0)) * eps, math.sqrt(variance)


def log_density(x: Tensor, mean: Tensor, deviation: float) -> Tensor:
    """``(n,)``: log N(x; mean, deviation^2), the mean over the numbers of each row."""
    square = (x - mean).square().flatten(1).mean(1)
    return -square / (2 * deviation**2) - math.log(deviation) - math.log(math.sqrt(2 * math.pi))


def clip_apart(parameters: Sequence[Tensor], largest: float) -> None:
    """Clip the gradient's norm of scalars, and apart from it that of all else."""
    for scalars in (True, False):
        own = [p for p in parameters if (p.dim() == 0) == scalars]
        nn.utils.clip_grad_norm_(own, largest)


__all__ = ["Balanced", "EraseFlow", "alpha", "clip_apart", "log_density", "timetable", "transition"]
