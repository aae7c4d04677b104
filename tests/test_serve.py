"""The example server under load: no request is drawn with another one's erasures."""

import asyncio
import base64
import functools
import io
import itertools
import random
import re
import socket
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image

import erasure
from erasure import cli
from erasure.pipelines import attach_erasures
from erasure.pipelines.serve import Limits, create_app
from tests.tiny import make, tiny_pipeline

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("superhero", "ninja", "van gogh", "wizard")
PROMPTS = ("a superhero", "a ninja and a wizard, " * 7, "the cat in the style of van gogh")
PLACE = "/v1/images/generations"


def pipeline():
    """With a scheduler that counts its steps."""
    pipe = tiny_pipeline()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


@functools.cache
def edits():
    pipe = pipeline()
    return {name: make(pipe, name, "uce", preset="official-2025", keep=["spiderman"], name=name) for name in NAMES}


@pytest.fixture(scope="module")
def app():
    pipe = pipeline()
    app = create_app(pipe, edits(), limits=Limits(at_once=4, waiting=2000, side=64, steps=10))
    yield app
    app.state.server.close()


def ask(app, *bodies, at="POST", place=PLACE, raw=None):
    """Answers to requests that come all at once."""

    async def everything():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=None) as client:
            if raw is not None:
                return [await client.post(place, content=raw, headers={"content-type": "application/json"})]
            return await asyncio.gather(*(client.request(at, place, json=body) for body in bodies))

    return asyncio.run(everything())


def pixels(answer):
    assert answer.status_code == 200, answer.text
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))) for one in answer.json()["data"]]


def lone_pictures(wanted):
    """What a pipeline of its own draws with these erasures alone, for each (prompt, erasures, seed, steps)."""
    found = {}
    for chosen in {chosen for _, chosen, _, _ in wanted}:
        pipe = pipeline()
        mine = [edit for name, edit in edits().items() if name in dict(chosen)]
        with attach_erasures(pipe, mine, scales=[dict(chosen)[edit.name] for edit in mine]):
            for prompt, own, seed, steps in sorted(wanted):
                if own == chosen:
                    generator = torch.Generator().manual_seed(seed)
                    drawn = pipe(prompt, generator=generator, num_inference_steps=steps, guidance_scale=4.0)
                    found[prompt, own, seed, steps] = np.asarray(drawn.images[0])
    return found


def check_load(app, count):
    chance = random.Random(0)
    # strong, so that no two sets of erasures draw the same pixels
    sets = [tuple((name, 4.0) for name in some) for n in (0, 1, 2) for some in itertools.combinations(NAMES, n)]
    jobs = [(chance.choice(PROMPTS), chance.choice(sets[:6]), 0, chance.choice((2, 4))) for _ in range(count)]
    alone = lone_pictures(set(jobs))
    for prompt, steps in {(prompt, steps) for prompt, _, _, steps in jobs}:  # or a wrong erasure would go unseen
        some = [picture.tobytes() for (p, _, _, s), picture in alone.items() if (p, s) == (prompt, steps)]
        assert len(set(some)) == len(some)
    bodies = [
        {"prompt": p, "erasures": dict(own), "seed": seed, "steps": steps, "guidance": 4.0}
        for p, own, seed, steps in jobs
    ]
    answers = ask(app, *bodies)
    wrong = [job for job, answer in zip(jobs, answers, strict=True) if not np.array_equal(*pixels(answer), alone[job])]
    assert wrong == []
    assert all(answer.json()["erasures"] == dict(job[1]) for job, answer in zip(jobs, answers, strict=True))


def test_no_request_of_sixty_has_a_wrong_erasure(app):
    check_load(app, 60)


@pytest.mark.slow
def test_no_request_of_a_thousand_has_a_wrong_erasure(app):
    check_load(app, 1000)


def test_what_a_request_leaves_out_has_a_default_that_erases(app):
    body = {"prompt": "a superhero", "seed": 5, "steps": 2, "n": 2, "size": "16x24"}
    [everything], [nothing], [named] = (
        ask(app, body), ask(app, {**body, "erasures": []}), ask(app, {**body, "erasures": list(NAMES)})
    )  # fmt: skip
    assert everything.json()["erasures"] == dict.fromkeys(NAMES, 1.0) and nothing.json()["erasures"] == {}
    assert [one["seed"] for one in everything.json()["data"]] == [5, 6]
    assert [picture.shape for picture in pixels(everything)] == [(24, 16, 3)] * 2
    assert all(map(np.array_equal, pixels(everything), pixels(named)))
    assert not np.array_equal(pixels(everything)[0], pixels(nothing)[0])
    [a], [b] = ask(app, {"prompt": "a cat", "steps": 1}), ask(app, {"prompt": "a cat", "steps": 1})
    assert a.json()["data"][0]["seed"] != b.json()["data"][0]["seed"]


@pytest.mark.parametrize(
    ("change", "status", "fault"),
    [
        (
            {"erasures": ["cat"]},
            404,
            "unknown erasures ['cat']; known are ['superhero', 'ninja', 'van gogh', 'wizard']",
        ),
        ({"erasures": {"cat": 1.0}}, 404, "unknown erasures"),
        ({"erasures": ["ninja", "ninja"]}, 422, "named twice"),
        ({"erasures": {"ninja": -1.0}}, 422, "erasures"),
        ({"erasures": {"ninja": 1e9}}, 422, "erasures"),
        ({"erasures": "ninja"}, 422, "erasures: a list of names"),
        ({"erasure": ["ninja"]}, 422, "erasure: no such field (did you mean 'erasures'?)"),
        ({"prompt": ""}, 422, "prompt"),
        ({"prompt": "x" * 1001}, 422, "prompt: at most 1000"),
        ({"steps": 0}, 422, "steps"),
        ({"steps": 11}, 422, "steps: at most 10"),
        ({"steps": True}, 422, "steps"),
        ({"n": 5}, 422, "n: at most 4 pictures; got 5"),
        ({"negative_prompt": "x" * 1001}, 422, "negative_prompt: at most 1000 characters"),
        ({"seed": -1}, 422, "seed"),
        ({"seed": 2**63}, 422, "seed"),
        ({"guidance": 101}, 422, "guidance"),
        ({"size": "128x16"}, 422, "size: at most 64 pixels a side; got 128"),
        ({"size": "9x9"}, 422, "divisible by 8"),
        ({"size": "-8x8"}, 422, "size: WIDTHxHEIGHT"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_reason(app, change, status, fault):
    [answer] = ask(app, {"prompt": "a cat", "steps": 1, **change})
    assert answer.status_code == status and fault in answer.json()["error"]["message"]
    assert ("known" in answer.json()["error"]) == (status == 404)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ['"guidance": {}', '"erasures": {{"ninja": {}}}'])
def test_numbers_that_are_none_are_refused(app, field, number):
    [answer] = ask(app, raw='{"prompt": "a cat", ' + field.format(number) + "}")
    assert answer.status_code == 422 and answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("verb", "path", "status", "fault"),
    [
        ("POST", "/v1/images", 404, "POST /v1/images: Not Found; there are POST /v1/images/generations, GET /health"),
        ("GET", "/v1/images/generations", 405, "GET /v1/images/generations: Method Not Allowed"),
    ],
)
def test_another_path_or_verb_is_told_what_there_is(app, verb, path, status, fault):
    [answer] = ask(app, {}, at=verb, place=path)
    assert answer.status_code == status and fault in answer.json()["error"]["message"]
    assert answer.headers.get("allow") == ("POST" if status == 405 else None)


@pytest.mark.parametrize("raw", ["", "null", "[1]", '"a cat"'])
def test_a_body_that_is_no_object_is_told_what_it_should_be(app, raw):
    [answer] = ask(app, raw=raw)
    assert answer.status_code == 422 and "the body is a JSON object" in answer.json()["error"]["message"]


@pytest.mark.parametrize("raw", [b"\xff\xfe", b'{"prompt": "\xff"}', b"{"])
def test_a_body_that_cannot_be_read_is_told_so_and_not_where_to_go(app, raw):
    [answer] = ask(app, raw=raw)
    said = answer.json()["error"]["message"]
    assert answer.status_code in (400, 422) and said.startswith("the body") and "there are POST" not in said


def test_no_more_wait_than_may_and_a_fault_inside_is_an_answer(tmp_path):
    pipe = tiny_pipeline()
    some = {"hero": edits()["superhero"]}
    app = create_app(pipe, some, limits=Limits(at_once=1, waiting=1))
    answers = ask(app, *[{"prompt": "a cat", "steps": 1}] * 5)
    assert sorted(answer.status_code for answer in answers) == [200, 200, 503, 503, 503]
    assert [a.headers.get("retry-after") for a in answers if a.status_code == 503] == ["1"] * 3
    broken, pipe.vae = pipe.vae, None
    [answer] = ask(app, {"prompt": "a cat", "steps": 1})
    assert answer.status_code == 500 and "log says why" in answer.json()["error"]["message"]
    pipe.vae = broken
    [health], [listed] = ask(app, None, at="GET", place="/health"), ask(app, None, at="GET", place="/erasures")
    assert health.json() == {"status": "ok", "base": "StableDiffusionPipeline", "erasures": 1, "open": 0}
    assert listed.json() == [{"name": "hero", "method": "uce", "concepts": ["superhero"]}]
    app.state.server.close()
    pipe.save_pretrained(tmp_path)  # nothing is attached any more


@pytest.mark.parametrize("limits", [{"steps": 0}, {"at_once": 0}, {"waiting": -1}, {"side": 0.5}])
def test_limits_are_numbers(limits):
    with pytest.raises(ValueError, match="is a whole number from"):
        Limits(**limits)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_serves_erasures_by_their_names(tmp_path, monkeypatch, capsys):
    import uvicorn

    pipe, served = tiny_pipeline(), []
    pipe.save_pretrained(tmp_path / "base")
    for name, edit in list(edits().items())[:3]:
        edit.save_pretrained(tmp_path / "many" / name)
    monkeypatch.setattr(uvicorn, "run", lambda app, **given: served.append((app, given)))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["erasure", "serve", str(tmp_path / "base"), *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code or 0, " ".join(capsys.readouterr().err.split())

    capsys.readouterr()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    hero = f"hero={tmp_path / 'many' / 'superhero'}"
    assert run("--erasure", hero, "--erasures", tmp_path / "many", "--port", port) == (0, "")
    [(app, given)] = served
    assert [one["name"] for one in app.state.server.facts()] == ["hero", "ninja", "superhero", "van gogh"]
    assert given == {"host": "127.0.0.1", "port": port}
    app.state.server.close()
    code, said = run("--erasure", tmp_path / "many" / "ninja", "--erasures", tmp_path / "many")
    assert code == 2 and "two erasures are called 'ninja'" in said
    code, said = run()
    assert code == 2 and "nothing to serve" in said
    code, said = run("--erasure", "hero=")
    assert code == 2 and "NAME=FOLDER" in said and len(served) == 1
    monkeypatch.setattr("erasure.cli.serve.open_base", lambda *_, **__: pytest.fail("a model was opened"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, said = run("--erasure", hero, "--port", taken.getsockname()[1])
    assert code == 2 and "cannot listen on 127.0.0.1" in said and "give another --port" in said


def test_the_python_of_the_page_on_serving_runs(tmp_path, monkeypatch):
    """On a tiny model: what is drawn with what is held by tests/test_per_call.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(erasure.world, "load", tiny_pipeline)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text("utf-8"), flags=re.DOTALL):
        if "hero.apply" in block:  # not beside what is attached
            names["pipe"] = tiny_pipeline()
        exec(block.replace("num_inference_steps=8", "num_inference_steps=1"), names)
    assert len(names["pictures"]) == 4 and (tmp_path / "erased" / "model_index.json").exists()
