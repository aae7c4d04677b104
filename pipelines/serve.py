"""An example server: one base model, many attached erasures, and each request names its own.

It is small on purpose: read it, take it over, put it behind your own front end, which does TLS, identities and a
limit on the size of a body. What it shows is the part that is easy to get wrong: a choice of erasures for each request,
calls in several threads, refusal of every number and name that is none.

    erasure serve emoji-world --erasure hero=superhero-uce --erasure cat=cat-uce
    curl localhost:8000/v1/images/generations -H 'content-type: application/json' \\
        -d '{"prompt": "a superhero", "erasures": ["hero"], "seed": 1}'
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import inspect
import io
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from erasure.artifact import Erasure
from erasure.artifact.base import Allow
from erasure.artifact.record import base_name
from erasure.artifact.stack import LARGEST_SCALE
from erasure.io import is_whole, meant
from erasure.pictures import LARGEST_SEED, called, pictures_of, usual_settings
from erasure.pipelines.attach import attach_erasures
from erasure.pipelines.per_call import erasures

log = logging.getLogger(__name__)
Scale = Annotated[float, Field(ge=0, le=LARGEST_SCALE, allow_inf_nan=False)]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many there may be.

    Attributes:
        prompt: characters.
        steps, side, pictures: sampler steps, pixels of a side, pictures of a request.
        at_once: requests that draw at the same time, each in a thread of its own. One keeps a GPU busy; more on CPUs.
        waiting: requests that may wait for their turn; further ones are answered with 503.
    """

    prompt: int = 1000
    steps: int = 50
    side: int = 1024
    pictures: int = 4
    at_once: int = 1
    waiting: int = 64

    def __post_init__(self) -> None:
        for name, number in dataclasses.asdict(self).items():
            if not is_whole(number, least := int(name != "waiting")):
                raise ValueError(f"{name} is a whole number from {least} on; got {number!r}; change it")


class Asked(BaseModel):
    """A request, in the fields of OpenAI's images API and a few of its own. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1)]
    erasures: list[str] | dict[str, Scale] | None = None  # all of them where it is left out; [] for none
    n: PositiveInt = 1
    size: Annotated[str, Field(pattern=r"^[1-9]\d{0,4}x[1-9]\d{0,4}$")] | None = None
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED - 1000)] | None = None
    steps: PositiveInt | None = None
    guidance: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    negative_prompt: str | None = None
    model: str | None = None
    user: str | None = None
    response_format: Literal["b64_json"] = "b64_json"


class Refused(Exception):
    """An answer other than pictures."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """A pipeline with attached erasures, and the threads that draw with it.

    Args:
        pipe: the pipeline, as it should stay: set its scheduler, precision and device before. No offloading, which
            moves models while other threads use them.
        edits: the erasures by the names that requests give.
        limits: of a request.
        allow: as of :func:`~erasure.pipelines.attach_erasures`.
    """

    def __init__(
        self, pipe: Any, edits: Mapping[str, Erasure], *, limits: Limits | None = None, allow: Allow | None = None
    ) -> None:
        self.pipe, self.limits, self.base = pipe, limits or Limits(), base_name(pipe)
        named = [dataclasses.replace(edit, name=name) for name, edit in edits.items()]
        pipe.set_progress_bar_config(disable=True)
        self.usual = usual_settings(self.base, pipe)
        self.attached = attach_erasures(pipe, named, allow=allow)
        self.threads = ThreadPoolExecutor(self.limits.at_once, thread_name_prefix="draw")
        self.open = 0  # requests; counted by the event loop alone

    def close(self) -> None:
        """Wait for requests that draw, and take the erasures off."""
        self.threads.shutdown()
        self.attached.remove()

    def call_of(self, asked: Asked) -> dict[str, Any]:
        """What a request says about the pipeline's call.

        Raises:
            Refused: an unknown erasure, or more than the limits allow.
        """
        if unknown := sorted(set(asked.erasures or ()) - set(self.attached.edits)):
            raise Refused(404, f"unknown erasures {unknown}; known are {list(self.attached.edits)}")
        if isinstance(asked.erasures, list) and len(set(asked.erasures)) < len(asked.erasures):
            raise Refused(422, f"erasures: one is named twice; got {asked.erasures}")
        most = self.limits
        steps = self.usual["num_inference_steps"] if asked.steps is None else asked.steps
        sides = [int(side) for side in re.findall(r"\d+", asked.size or "")]
        for field, number, limit, unit in (
            ("prompt", len(asked.prompt), most.prompt, " characters"),
            ("negative_prompt", len(asked.negative_prompt or ""), most.prompt, " characters"),
            ("steps", steps, most.steps, ""),
            ("size", max(sides, default=0), most.side, " pixels a side"),
            ("n", asked.n, most.pictures, " pictures"),
        ):
            if number > limit:
                raise Refused(422, f"{field}: at most {limit}{unit}; got {number}")
        guidance = self.usual["guidance_scale"] if asked.guidance is None else asked.guidance
        call = {"num_inference_steps": steps, "guidance_scale": guidance}
        if sides:
            call |= {"width": sides[0], "height": sides[1]}
        if asked.negative_prompt is not None:
            if "negative_prompt" not in inspect.signature(self.pipe.__call__).parameters:
                raise Refused(422, f"negative_prompt: {type(self.pipe).__name__} takes none")
            call["negative_prompt"] = [asked.negative_prompt] * asked.n
        return call

    def draw(self, asked: Asked, call: Mapping[str, Any], seeds: list[int]) -> list[str]:
        """The pictures of a request, as PNG in base64. Runs in a thread."""
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        given = {"generator": generators, "output_type": "pil"}
        answer = called(erasures(self.pipe, asked.erasures), [asked.prompt] * asked.n, given, **call)
        return [_encoded(picture) for picture in pictures_of(answer)]

    async def answer(self, asked: Asked) -> dict[str, Any]:
        """Draw a request in its turn."""
        call = self.call_of(asked)
        if self.open >= self.limits.at_once + self.limits.waiting:
            raise Refused(503, "too many requests are waiting; try again later")
        first = secrets.randbelow(2**31) if asked.seed is None else asked.seed
        seeds = [first + i for i in range(asked.n)]
        self.open += 1
        try:
            loop = asyncio.get_running_loop()
            pictures = await loop.run_in_executor(self.threads, self.draw, asked, call, seeds)
        except ValueError as error:  # of the pipeline: sides that its model cannot draw
            raise Refused(422, str(error)) from None
        finally:
            self.open -= 1
        chosen = self.attached.scales if asked.erasures is None else asked.erasures
        scales = dict(chosen) if isinstance(chosen, Mapping) else {name: self.attached.scales[name] for name in chosen}
        data = [{"b64_json": one, "seed": seed} for one, seed in zip(pictures, seeds, strict=True)]
        return {"created": int(time.time()), "data": data, "erasures": scales}

    def facts(self) -> list[dict[str, Any]]:
        """What is attached."""
        return [
            {"name": name, "method": edit.config["method"], "concepts": [c["name"] for c in edit.config["concepts"]]}
            for name, edit in self.attached.edits.items()
        ]


NEEDED = 'the body is a JSON object, sent as application/json: {"prompt": "a superhero"}'
FORMS = {  # of fields that are more than a text or a number
    "erasures": 'a list of names, or an object of names and scales: ["hero"], {"hero": 0.8}',
    "size": "WIDTHxHEIGHT in pixels: 512x512",
}


def _fault(error: Mapping[str, Any]) -> str:
    """One of pydantic's faults for whoever wrote the request."""
    field = str(error["loc"][1]) if len(error["loc"]) > 1 else ""
    if error["type"] == "json_invalid":
        return "the body is not JSON"
    if error["type"] == "extra_forbidden":
        return f"{field}: no such field{meant(field, Asked.model_fields)}; fields are {', '.join(Asked.model_fields)}"
    if not field:
        return NEEDED
    return f"{field}: {FORMS.get(field, error['msg'])}"


PATHS = "POST /v1/images/generations, GET /health and GET /erasures"


def create_app(
    pipe: Any, edits: Mapping[str, Erasure], *, limits: Limits | None = None, allow: Allow | None = None
) -> Any:
    """A FastAPI application that draws with attached erasures; see :class:`Server` for the arguments.

    ``POST /v1/images/generations`` takes :class:`Asked`; ``GET /health`` and ``GET /erasures`` say what is there.

    Raises:
        ImportError: FastAPI is not installed.
        ValueError: an erasure that cannot be attached, or is not this model's.
    """
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    server = Server(pipe, edits, limits=limits, allow=allow)

    @contextlib.asynccontextmanager
    async def life(app: Any) -> AsyncIterator[None]:
        try:
            yield
        finally:
            server.close()

    app = FastAPI(title="erasure serve", lifespan=life)
    app.state.server = server

    def answer(status: int, message: str, headers: Mapping[str, str] | None = None, **more: Any) -> Any:
        return JSONResponse({"error": {"message": message, **more}}, status, headers=headers)

    @app.exception_handler(Refused)
    async def refused(_: Any, error: Refused) -> Any:
        known = {"known": list(server.attached.edits)} if error.status == 404 else {}
        return answer(error.status, str(error), {"Retry-After": "1"} if error.status == 503 else None, **known)

    @app.exception_handler(HTTPException)
    async def elsewhere(request: Any, error: HTTPException) -> Any:  # another path or verb, a body that cannot be read
        elsewhere = f"{request.method} {request.url.path}: {error.detail}; there are {PATHS}"
        broken = f"the body cannot be read; {NEEDED}"
        return answer(error.status_code, broken if error.status_code == 400 else elsewhere, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Any, error: RequestValidationError) -> Any:  # without the input: NaN is no JSON
        return answer(422, "; ".join(dict.fromkeys(map(_fault, error.errors()))))

    @app.exception_handler(Exception)
    async def failed(_: Any, error: Exception) -> Any:
        log.error("a request failed", exc_info=error)
        return answer(500, "drawing failed; the server's log says why")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "base": server.base, "erasures": len(server.attached.edits), "open": server.open}

    @app.get("/erasures")
    async def listed() -> list[dict[str, Any]]:
        return server.facts()

    @app.post("/v1/images/generations")
    async def generate(asked: Asked) -> dict[str, Any]:
        return await server.answer(asked)

    return app


def _encoded(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


__all__ = ["Asked", "Limits", "Server", "create_app"]
