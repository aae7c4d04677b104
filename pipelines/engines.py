"""Is an erasure really on in a served model? Pictures from the engine are held against pictures drawn here.

Engines drop parts of files in silence: a LoRA whose names they do not know, a rank they round, an adapter that another
one replaces. What the engine draws is the only evidence.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from erasure.artifact import Erasure
from erasure.artifact.stack import applied
from erasure.io import shown
from erasure.pictures import drawn
from erasure.pipelines.embedders import Embedder

Verdict = Literal["on", "off", "undecided"]
LARGEST = 64 * 2**20  # bytes of an answer
ALIKE = 0.98  # cosine from which base and erased pictures of a prompt are too alike to tell an engine by
LEVEL = 0.05  # of the test
SENTENCES = (
    "a photo of {}", "a drawing of {}", "a painting of {}", "{} at night", "a picture of {}", "{} in a park",
    "a portrait of {}", "{} in the snow",
)  # fmt: skip


class Engine(Protocol):
    """Something that draws elsewhere."""

    def draw(self, prompt: str, seed: int) -> Image.Image: ...


@dataclasses.dataclass(frozen=True)
class OpenAI:
    """An engine with OpenAI's images API: vLLM-Omni, SGLang, LocalAI, ``erasure serve``.

    Attributes:
        url: up to the port, ``http://localhost:8000``.
        fields: more of the request: ``{"steps": 8, "size": "512x512"}``, as the engine calls them.
        key: sent as a bearer token.
        timeout: seconds for one picture.
    """

    url: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    key: str | None = dataclasses.field(default=None, repr=False)
    timeout: float = 300.0

    def draw(self, prompt: str, seed: int) -> Image.Image:
        body = {"prompt": prompt, "n": 1, "seed": seed, "response_format": "b64_json", **self.fields}
        answer = ask(f"{self.url.rstrip('/')}/v1/images/generations", body, key=self.key, timeout=self.timeout)
        try:
            content = base64.b64decode(json.loads(answer)["data"][0]["b64_json"], validate=True)
        except (ValueError, KeyError, IndexError, TypeError, binascii.Error):
            raise ValueError(
                f"{self.url} answered without a picture in data[0].b64_json; is it an images API?"
            ) from None
        return opened(content, self.url)


@dataclasses.dataclass(frozen=True)
class ComfyUI:
    """ComfyUI, with a workflow that was exported for its API.

    Attributes:
        url: up to the port, ``http://localhost:8188``.
        workflow: JSON in which the texts ``%prompt%`` and ``%seed%`` stand for the two.
        timeout: seconds for one picture.
        poll: seconds between looks.
    """

    url: str
    workflow: str
    timeout: float = 300.0
    poll: float = 0.5

    def __post_init__(self) -> None:
        if "%prompt%" not in self.workflow or "%seed%" not in self.workflow:
            raise ValueError(
                "the workflow needs %prompt% and %seed% where they go; export it for the API and put them in"
            )
        self.filled("a prompt", 0)  # refuses what is no JSON

    def filled(self, prompt: str, seed: int) -> Any:
        """The workflow for one picture."""

        def fill(node: Any) -> Any:
            if isinstance(node, dict):
                return {key: fill(value) for key, value in node.items()}
            if isinstance(node, list):
                return [fill(value) for value in node]
            if node == "%seed%":
                return seed
            return node.replace("%prompt%", prompt).replace("%seed%", str(seed)) if isinstance(node, str) else node

        try:
            return fill(json.loads(self.workflow))
        except ValueError as error:
            raise ValueError(f"the workflow is no JSON ({error}); export it for the API") from None

    def draw(self, prompt: str, seed: int) -> Image.Image:
        place, until = self.url.rstrip("/"), time.monotonic() + self.timeout
        answer = json.loads(ask(f"{place}/prompt", {"prompt": self.filled(prompt, seed)}, timeout=self.timeout))
        name = str(answer.get("prompt_id", ""))
        while time.monotonic() < until:
            history = json.loads(ask(f"{place}/history/{urllib.parse.quote(name)}", timeout=self.timeout)).get(name)
            if history:
                outputs = history.get("outputs", {}).values()
                file = next((one for node in outputs for one in node.get("images", ())), None)
                if file is None:
                    raise ValueError(f"{self.url} ran the workflow and saved no picture; add a SaveImage node")
                query = urllib.parse.urlencode({key: file.get(key, "") for key in ("filename", "subfolder", "type")})
                return opened(ask(f"{place}/view?{query}", timeout=self.timeout), self.url)
            time.sleep(self.poll)
        raise TimeoutError(f"{self.url} had no picture after {self.timeout:g} seconds; give it more time")


@dataclasses.dataclass(frozen=True)
class Served:
    """What was found about an engine.

    Attributes:
        verdict: *on*: its pictures are nearer to those of the erased model. *off*: nearer to the base's. Otherwise
            *undecided*: too few prompts, or neither.
        identical: pictures that are those of the erased model to the last bit.
        pictures: how many were drawn by the engine.
        margins: prompt to how far its pictures are from the middle between base and erased model, towards the erased
            one (above 0) or the base (below), along the mean difference of their embeddings. Prompts on which the
            erasure changes nothing are left out.
        probability: of margins so far to one side if the engine drew neither, by Wilcoxon's signed-rank test.
    """

    verdict: Verdict
    identical: int
    pictures: int
    margins: dict[str, float]
    probability: float

    def __str__(self) -> str:
        near = sum(margin > 0 for margin in self.margins.values())
        return (
            f"{self.verdict}: {near} of {len(self.margins)} prompts nearer to the erased model (p = "
            f"{self.probability:.3g}); {self.identical} of {self.pictures} pictures are its own to the last bit"
        )


def verify_engine(
    pipe: Any,
    edit: Erasure,
    engine: Engine,
    embedder: Embedder,
    *,
    prompts: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1),
    **call: Any,
) -> Served:
    """Whether an engine draws with an erasure.

    Every prompt is drawn three times with every seed: by the base here, by the base under the erasure here, and by the
    engine. Where the engine takes the same noise, pictures can be equal; where it does not, their embeddings still tell
    whose they are. The pipeline is as it was afterwards.

    Args:
        pipe: the base model, with the settings that the engine has.
        prompts: that ask for the target. By default the target's name in eight sentences. Six are the fewest of which
            the test can say anything; more prompts say more than more seeds.
        **call: of the pipeline: ``num_inference_steps``, ``guidance_scale``, ``height`` ...

    Raises:
        ValueError: the engine's answer holds no picture, or the erasure changes none of the prompts.
        OSError: it cannot be reached.
    """
    prompts = list(prompts) or [s.replace("{}", c["name"]) for c in edit.config["concepts"] for s in SENTENCES]
    base = [drawn(pipe, prompts, seed, **call) for seed in seeds]
    with applied(edit, pipe):
        erased = [drawn(pipe, prompts, seed, **call) for seed in seeds]
    served = [[engine.draw(prompt, seed) for prompt in prompts] for seed in seeds]
    ours, theirs, found = (
        torch.stack([unit(embedder.image_features(row)) for row in rows]) for rows in (erased, base, served)
    )
    changed = (ours * theirs).sum(2).mean(0) < ALIKE  # (prompts,)
    if not changed.any():
        raise ValueError(
            f"{edit.name!r} changes none of {len(prompts)} prompts, so they tell nothing; ask for the target"
        )
    away = unit((ours - theirs)[:, changed].mean((0, 1))[None])[0]  # from the base's pictures to the erased ones
    middle = (ours + theirs).mean(0) / 2
    nearer = (found.mean(0) - middle) @ away
    margins = {prompt: float(nearer[i]) for i, prompt in enumerate(prompts) if changed[i]}
    identical = sum(
        same(a, b) for drew, own in zip(served, erased, strict=True) for a, b in zip(drew, own, strict=True)
    )
    verdict, probability = decided(list(margins.values()))
    return Served(verdict, identical, len(prompts) * len(seeds), margins, probability)


def decided(margins: Sequence[float]) -> tuple[Verdict, float]:
    """The verdict of Wilcoxon's signed-rank test on margins, one a prompt, from both sides."""
    from scipy.stats import wilcoxon

    probability = float(wilcoxon(margins).pvalue) if any(margins) else 1.0
    if probability >= LEVEL:
        return "undecided", probability
    return ("on" if sum(margins) > 0 else "off"), probability


def unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float().cpu(), dim=1)


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and np.array_equal(np.asarray(a.convert("RGB")), np.asarray(b.convert("RGB")))


def opened(content: bytes, source: str) -> Image.Image:
    """A picture that somebody else encoded."""
    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        raise ValueError(f"{source} answered with something that is no picture") from None


def ask(url: str, body: Any = None, *, key: str | None = None, timeout: float) -> bytes:
    """The answer to a GET, or to a POST of JSON.

    Raises:
        ValueError: no http(s) address, an answer that is too large, or one that refuses; with the engine's reason.
        OSError: nobody answers.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"an engine has an address such as http://localhost:8000; got {shown(url)}")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=timeout) as answer:
            content: bytes = answer.read(LARGEST + 1)
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url} answered {error.code}: {shown(error.read(500).decode(errors='replace'))}") from None
    except urllib.error.URLError as error:
        raise OSError(f"{url} cannot be reached ({error.reason}); is the engine up?") from None
    if len(content) > LARGEST:
        raise ValueError(f"{url} answered with more than {LARGEST // 2**20} MB")
    return content


__all__ = ["ComfyUI", "Engine", "OpenAI", "Served", "Verdict", "verify_engine"]
