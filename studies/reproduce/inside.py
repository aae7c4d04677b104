"""Measures that look inside a model: a word learnt for the target, noise found for its pictures, membership."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import UNet2DModel
from PIL import Image
from torch import Tensor

from erasure.backbone.noise import diffusion_of
from erasure.eval.core.models import opened
from erasure.eval.probes.base import Missing
from erasure.eval.probes.denoising import backbone_for
from erasure.eval.probes.embedding import MARK, FreeWords
from erasure.eval.probes.removal.latent_inversion import LatentInversion
from erasure.eval.probes.removal.membership import t_error
from erasure.eval.probes.sampling import DDIM
from erasure.eval.probes.tuning import Lesson, learn, tuned
from erasure.eval.stats import Estimate, auc, rate
from erasure.runtime import autocast_for
from studies.reproduce.measures import Estimates, Job, Tally, batches, drawn

CAPTION = f"a photo of a {MARK}"  # of the pictures that a word is learnt from


def inversion(job: Job) -> Tally:
    """``hit``: share of pictures that show the target, drawn by prompts with a learnt word in the place of its name.

    The word is learnt on pictures of the user's that go by the target's name, or else on what the base draws of the
    prompts, as the paper's repository does.
    """
    rows, told = job.rows(job.target), job.step.settings
    if job.target is None:
        raise Missing("a word is learnt for one target on the model that lacks it; give --erasure TARGET=FOLDER")
    job.judged([], [])  # nobody to judge is known before anything is drawn or learnt
    sentences = [_with_word(row.text, job.target) for row in rows]
    own = job.inputs.pictures.get(job.target)
    images = list((own or job.draw(rows[: told["pictures"]], erased=False))[: told["pictures"]])
    job.facts |= {"learnt_on": len(images), "pictures": "given" if own else "drawn by the base"}
    seen = dict[int, float | None]()
    with opened(job.pipe, job.change), tuned(job.pipe):
        backbone = backbone_for(job.pipe)
        caption = FreeWords(job.pipe, [CAPTION], count=1)
        start = job.pipe.tokenizer(told["start"], add_special_tokens=False).input_ids
        word = caption.table[start].float().mean(0, keepdim=True).requires_grad_()
        lesson = Lesson(
            backbone, backbone.latents(images), lambda chosen: caption.text(word, [0] * len(chosen)), told["batch_size"]
        )
        for _ in learn(
            {"word": word}, lesson.loss, pipe=job.pipe, marks=(told["steps"],), lr=told["lr"], seed=0,
            autocast=autocast_for(job.pipe),
        ):  # fmt: skip
            pass  # the only mark is the end
        free = FreeWords(job.pipe, sentences, count=1)
        for part in batches(range(len(rows)), rows, job.inputs.batch_size):
            with torch.no_grad():
                text = free.text(word, part)
            pictures = drawn(job.pipe, [rows[i] for i in part], job.steps, prompt_embeds=text.hidden)
            seen |= zip(part, job.judged(pictures, [job.target] * len(part)), strict=True)
    return {"hit": [(seen[i], row.text) for i, row in enumerate(rows)]}


def noise(job: Job) -> Estimates:
    """Share of the user's pictures that are still what they are called after DDIM inversion and sampling, by name.

    Nothing is said to the model: noise is found with the empty prompt (one evaluation per step), and sampled with it.
    The fact ``likely`` counts those whose latents on the way look like noised pictures (|r_t| of at most 10; see
    :class:`~erasure.eval.probes.removal.latent_inversion.LatentInversion`): noise that no sampler would have started
    from brings any picture back.
    """
    job.judged([], [])
    found, search = Estimates(), LatentInversion(refinements=1)
    for name in job.step.settings["folders"]:
        try:
            images = job.given(name)
        except Missing as missing:
            found[name] = Estimate.missing(str(missing))
            continue
        with opened(job.pipe, job.change):
            sampler = DDIM(backbone_for(job.pipe), job.steps, 1.0, job.inputs.batch_size)
            start, energies = search.invert(sampler, sampler.backbone.latents(images))
            back = sampler.backbone.pictures(sampler.sample(start, [""] * len(images)))
        known = torch.isfinite(energies).tolist()
        seen = [v if ok else None for v, ok in zip(job.judged(back, [name] * len(back)), known, strict=True)]
        job.facts[name] = {"pictures": len(images), "likely": int((energies <= search.energy).sum())}
        found[name] = rate(seen, list(range(len(seen))))
    return found


@torch.no_grad()
def secmi(job: Job) -> Estimates:
    """``auc`` of SecMI's t-error on an unconditional model: members of its training set from others like them."""
    unet, scheduler = getattr(job.pipe, "unet", None), job.pipe.scheduler
    kind = scheduler.config.get("prediction_type")
    if not isinstance(unet, UNet2DModel) or kind != "epsilon":
        raise Missing(
            f"SecMI is measured on an unconditional model that predicts noise; got {type(job.pipe).__name__}, {kind}; "
            "load a DDPMPipeline"
        )
    noise = diffusion_of(scheduler, device=unet.device)

    def predicted(x: Tensor, t: int) -> Tensor:
        return unet(x.to(unet.dtype), t).sample.float()

    scores = []
    for name in job.step.settings["folders"]:
        images, own = job.given(name), list[float]()
        for i in range(0, len(images), job.inputs.batch_size):
            x = _pixels(images[i : i + job.inputs.batch_size], unet.config.sample_size).to(unet.device)
            own += (-t_error(predicted, noise, x, **job.step.settings["secmi"])).tolist()
        scores.append(own)
        job.facts[name] = len(own)
    return {"auc": auc(*scores)}


def _pixels(images: Sequence[Image.Image], side: int) -> Tensor:
    """Pictures as the model was trained on them, ``(n, 3, side, side)`` from -1 to 1; never resized."""
    if other := next((image.size for image in images if image.size != (side, side)), None):
        raise ValueError(f"the model's pictures are {side} pixels square; got {other}; give the training set's own")
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def _with_word(text: str, target: str) -> str:
    found, times = re.subn(rf"\b{re.escape(target)}\b", MARK, text, flags=re.IGNORECASE)
    if times != 1:
        raise ValueError(
            f"a prompt must name its target once, for a learnt word to stand there; got {text!r} for {target!r}; "
            "write the name into the prompt as it stands in the class column"
        )
    return found
