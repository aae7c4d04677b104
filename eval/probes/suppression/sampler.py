"""S8: the target by its names, under other settings of the sampler."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from erasure.eval.probes.asking import Ask, PromptProbe, named
from erasure.eval.probes.base import Context, Missing
from erasure.eval.probes.sampling import LEAST_STEPS


@dataclasses.dataclass(frozen=True)
class Sampler(PromptProbe):
    """How often the target is seen when one setting differs from the suite's: "guidance 1", "steps 10" ...

    The prompts are the suite's, without negative prompts. The suite's own settings are left out (the direct probe has
    them), and so are schedulers that are not compatible with the pipeline's.

    Attributes:
        guidance: scales of classifier-free guidance; 1 is without any, where suppression by guidance ends.
        steps: numbers of sampling steps.
        schedulers: class names of diffusers, each with at least 25 steps. An ancestral one adds noise in every step,
            which can bring back what a deterministic one leaves suppressed.
    """

    key, code, title = "sampler", "S8", "asked for with other sampler settings"
    presets = {
        "smoke": {"images_per_prompt": 1, "limit": 1, "guidance": (1.0,), "steps": (), "schedulers": ()},
        "quick": {"images_per_prompt": 1, "limit": 6, "guidance": (1.0, 7.5), "steps": (), "schedulers": ()},
        "standard": {"images_per_prompt": 1, "limit": 24, "wide": True, "resolve": 0.2},
        "full": {
            "limit": 50,
            "wide": True,
            "resolve": 0.2,
            "steps": (10, 20, 50, 100),
            "schedulers": (
                "DDIMScheduler",
                "EulerDiscreteScheduler",
                "EulerAncestralDiscreteScheduler",
                "DPMSolverMultistepScheduler",
                "UniPCMultistepScheduler",
                "PNDMScheduler",
                "LCMScheduler",
            ),
        },
    }  # fmt: skip
    known = 0.5  # as for the direct probe: the base is asked by name
    licences = "suppression under these settings of the sampler, for the suite's prompts"
    not_licensed = "other settings and schedulers, other prompts"

    guidance: tuple[float, ...] = (1.0, 3.0, 7.5, 15.0)
    steps: tuple[int, ...] = (10, 50)
    schedulers: tuple[str, ...] = ("EulerAncestralDiscreteScheduler",)

    def asks(self, context: Context) -> list[Ask]:
        suite, own, least = context.suite, context.pipe.scheduler, context.suite.num_inference_steps
        usable = {kind.__name__ for kind in own.compatibles} - {type(own).__name__}
        settings: dict[str, dict[str, Any]] = {
            **{f"guidance {g:g}": {"guidance_scale": g} for g in self.guidance if g != suite.guidance_scale},
            **{f"steps {n}": {"num_inference_steps": n} for n in self.steps if n != suite.num_inference_steps},
            **{
                name.removesuffix("Scheduler"): {"scheduler": name, "num_inference_steps": max(least, LEAST_STEPS)}
                for name in self.schedulers
                if name in usable
            },
        }
        if not settings:
            raise Missing("every setting is the suite's own, or not for this pipeline; choose others")
        prompts = named(suite, wide=self.wide)
        return [one.ask(family, sampler=sampler) for family, sampler in settings.items() for one in prompts]

    @contextlib.contextmanager
    def sampling(self, pipe: Any, context: Context, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with scheduled(pipe, context.pipe, name=settings.pop("scheduler", None)):
            yield settings


@contextlib.contextmanager
def scheduled(*pipes: Any, name: str | None) -> Iterator[None]:
    """Pipelines with the scheduler class ``name``, made from the settings of their own, inside the block."""
    before = [(pipe, pipe.scheduler) for pipe in pipes]
    try:
        for pipe, own in before if name else ():
            kind = next(kind for kind in own.compatibles if kind.__name__ == name)
            pipe.scheduler = kind.from_config(own.config)
        yield
    finally:
        for pipe, own in before:
            pipe.scheduler = own
