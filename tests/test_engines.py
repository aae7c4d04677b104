"""Is an erasure on in a served model? Against local servers that keep it, drop it, refuse, or answer nonsense."""

import base64
import contextlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import erasure
from erasure.cli import app
from erasure.eval.worldkit import detectors
from erasure.pictures import drawn
from erasure.pipelines.engines import ComfyUI, OpenAI, decided, verify_engine
from tests.tiny import identical, weights

CALL = {"num_inference_steps": 4, "guidance_scale": 3.0}
PROMPTS = [
    f"a superhero on a {colour} background"
    for colour in ("red", "blue", "green", "white", "pink", "black", "grey", "yellow")
]
WORKFLOW = json.dumps({"1": {"inputs": {"text": "%prompt%", "seed": "%seed%"}}})


@pytest.fixture(scope="module")
def pipe():
    return erasure.world.load()


@pytest.fixture(scope="module")
def edit(pipe):
    return erasure.erase(pipe, "superhero", keep=["ninja"], apply=False, progress=False)


class Drawer:
    """Draws as a served model does, with the erasure or without it, and from the same noise or other."""

    def __init__(self, pipe, edit, *, on, shift=0):
        self.pipe, self.edit, self.on, self.shift = pipe, edit, on, shift

    def draw(self, prompt, seed):
        if self.on:
            self.edit.apply(self.pipe)
        try:
            return drawn(self.pipe, [prompt], seed + self.shift, **CALL)[0]
        finally:
            if self.on:
                self.edit.remove(self.pipe)


@contextlib.contextmanager
def serving(answer):
    """A server on this machine; ``answer(path, body)`` returns status and content."""

    class Handler(BaseHTTPRequestHandler):
        def reply(self):
            length = int(self.headers.get("Content-Length", 0))
            status, content = answer(self.path, json.loads(self.rfile.read(length) or b"null"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = reply

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def images_api(drawer):
    def answer(path, body):
        picture = png(drawer.draw(body["prompt"], body["seed"]))
        return 200, json.dumps({"data": [{"b64_json": base64.b64encode(picture).decode()}]}).encode()

    return answer


@pytest.mark.slow
@pytest.mark.parametrize(("on", "shift"), [(True, 0), (True, 100), (False, 0), (False, 100)])
def test_an_engine_that_drops_the_erasure_is_found(on, shift, pipe, edit):
    before = {name: tensor.clone() for name, tensor in weights(pipe).items()}
    with serving(images_api(Drawer(pipe, edit, on=on, shift=shift))) as url:
        found = verify_engine(pipe, edit, OpenAI(url), detectors.clip(), prompts=PROMPTS, seeds=(0,), **CALL)
    if on and shift:  # eight prompts may leave it open
        assert found.verdict != "off" and sum(found.margins.values()) > 1
    else:
        assert found.verdict == ("on" if on else "off")
    assert found.identical == (len(PROMPTS) if on and not shift else 0)
    assert identical(before, weights(pipe))


def test_comfyui_is_asked_with_its_own_workflow():
    red, asked = Image.new("RGB", (8, 8), "red"), []

    def answer(path, body):
        if path == "/prompt":
            asked.append(body["prompt"]["1"]["inputs"])
            return 200, b'{"prompt_id": "a b"}'
        if path.startswith("/history/"):
            image = {"filename": "x.png", "subfolder": "", "type": "output"}
            return 200, json.dumps({"a b": {"outputs": {"9": {"images": [image]}}}}).encode()
        assert path.startswith("/view?filename=x.png")
        return 200, png(red)

    with serving(answer) as url:
        found = ComfyUI(url, WORKFLOW).draw('a "hero"', 7)
    assert asked == [{"text": 'a "hero"', "seed": 7}]  # a number where the node wants one
    assert np.array_equal(np.asarray(found), np.asarray(red))


def test_a_workflow_without_places_or_that_is_no_json_is_refused():
    with pytest.raises(ValueError, match="%prompt% and %seed%"):
        ComfyUI("http://x", "{}")
    with pytest.raises(ValueError, match="no JSON"):
        ComfyUI("http://x", "%prompt% %seed%")


@pytest.mark.parametrize(
    ("status", "content", "fault"),
    [
        (500, b"out of memory\x1b[31m", "answered 500: .*out of memory"),
        (200, b"{}", "without a picture"),
        (200, b"<html>", "without a picture"),
        (200, json.dumps({"data": [{"b64_json": base64.b64encode(b"no picture").decode()}]}).encode(), "no picture"),
    ],
)
def test_an_engine_that_answers_nonsense_is_said_to(status, content, fault):
    with serving(lambda path, body: (status, content)) as url, pytest.raises(ValueError, match=fault) as caught:
        OpenAI(url).draw("a cat", 0)
    assert "\x1b" not in str(caught.value)


def test_an_engine_that_is_not_there_or_has_no_address_is_said_to():
    with pytest.raises(OSError, match="cannot be reached"):
        OpenAI("http://127.0.0.1:9").draw("a cat", 0)
    with pytest.raises(ValueError, match="an address such as"):
        OpenAI("file:///etc/passwd").draw("a cat", 0)
    assert "secret" not in repr(OpenAI("http://x", key="secret"))


def test_prompts_that_the_erasure_does_not_change_say_nothing(pipe, edit):
    class Nothing:
        name = "blind"

        def image_features(self, images):
            return torch.ones(len(images), 4)

    with pytest.raises(ValueError, match="changes none of 1 prompts"):
        verify_engine(pipe, edit, Drawer(pipe, edit, on=True), Nothing(), prompts=["a superhero"], seeds=(0,), **CALL)


@pytest.mark.parametrize(
    ("margins", "verdict"),
    [([0.1] * 6, "on"), ([-0.1] * 6, "off"), ([0.1] * 5, "undecided"), ([0.1, -0.1] * 10, "undecided")],
)
def test_the_verdict_is_that_of_a_test_over_prompts(margins, verdict):
    assert decided(margins)[0] == verdict


def test_the_command_exits_with_1_where_it_is_off(pipe, edit, tmp_path):
    edit.save_pretrained(tmp_path / "hero")
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    with serving(images_api(Drawer(pipe, edit, on=False))) as url:
        command = ["verify", str(tmp_path / "hero"), "--engine", url, "--seeds", "1", "--steps", "4", *prompts]
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 1 and "off: 0 of 8" in result.output
