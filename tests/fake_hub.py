"""A hub on this machine: as much of its API as pushing, looking up and loading need, with faults on demand.

It keeps what the real one keeps (repositories, commits, large files by hash), wants a token for writing, and answers
with the headers that huggingface_hub reads.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

TOKEN = "hf_" + "a" * 34  # of the one account


@dataclass
class Fault:
    """What happens to a request instead of its answer, or after it.

    Attributes:
        where: of "METHOD path", as a regular expression.
        status: answered; 0 to close the connection half way through the answer, and to do nothing of what was asked.
        times: how often; then requests are answered again.
        late: do what was asked first, and lose the answer.
    """

    where: str
    status: int
    times: int = 1_000_000
    late: bool = False


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, bytes]


@dataclass
class Hub:
    """The state of the hub, which a test may look at."""

    url: str = ""
    repositories: dict[str, list[Commit]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    large: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    lock: Any = field(default_factory=threading.RLock)

    def fault_for(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.where, request):
                    fault.times -= 1
                    return fault
        return None

    def files(self, repository: str) -> dict[str, bytes]:
        """What it holds now."""
        return self.repositories[repository][-1].files

    def pushed(self, repository: str) -> list[Commit]:
        """Every commit but the first, which a new repository has."""
        return self.repositories.get(repository, [])[1:]


class Answer(Exception):
    """An answer other than 200 with JSON."""

    def __init__(self, status: int, body: Any = b"", **headers: str) -> None:
        super().__init__(status)
        self.status, self.body, self.headers = status, body, headers


class Connection(BaseHTTPRequestHandler):
    """A request and its answer, or the fault in its place."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.asked.append(request)
        fault = self.hub.fault_for(request)
        if fault is not None and not fault.late and (fault.status or self.command in ("POST", "PUT")):
            self.send(Answer(fault.status or 200, {"error": f"fault {fault.status}"}), broken=not fault.status)
            return
        try:
            with self.hub.lock:
                body = self.answer(path, raw)
            answer = Answer(200, body)
        except Answer as other:
            answer = other
        if fault is None:
            self.send(answer)
        elif fault.status:  # late
            self.send(Answer(fault.status, {"error": "lost"}))
        else:
            self.send(answer, broken=True)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def send(self, answer: Answer, *, broken: bool = False) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name.replace("_", "-"), value)
        length = answer.headers.get("Content_Length", str(len(body)))
        if "Content_Length" not in answer.headers:
            self.send_header("Content-Length", length)
        with contextlib.suppress(OSError):
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if broken else body)
        if broken:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(2)

    def answer(self, path: str, raw: bytes) -> Any:
        raise NotImplementedError


class Account(Connection):
    """Who may read and write."""

    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def write(self) -> None:
        if not self.known():
            raise Answer(401, {"error": "Invalid username or password."})

    def read(self, repository: str) -> Commit:
        missing = repository not in self.hub.repositories
        if (missing or repository in self.hub.private) and not self.known():
            raise Answer(401, {"error": "Invalid username or password."}, X_Error_Code="RepoNotFound")
        if missing:
            raise Answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return self.hub.repositories[repository][-1]


class Writing(Account):
    """Repositories, files and commits that are made."""

    def create(self, raw: bytes) -> Any:
        self.write()
        asked = json.loads(raw)
        repository = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        if repository in self.hub.repositories:
            raise Answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repository}"})
        self.hub.repositories[repository] = [Commit("0" * 40, "initial commit", {".gitattributes": b""})]
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repository)
        return {"url": f"{self.hub.url}/{repository}", "id": repository}

    def modes(self, raw: bytes, repository: str) -> Any:
        self.write()
        files = json.loads(raw)["files"]
        return {"files": [
            {"path": f["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".png")) else "regular"}
            for f in files
        ]}  # fmt: skip

    def batch(self, raw: bytes, repository: str) -> Any:
        self.write()
        objects = json.loads(raw)["objects"]
        return {"transfer": "basic", "objects": [
            {"oid": o["oid"], "size": o["size"], "authenticated": True,
             "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}}
            for o in objects
        ]}  # fmt: skip

    def put(self, raw: bytes, oid: str) -> Any:
        if hashlib.sha256(raw).hexdigest() != oid:
            raise Answer(400, {"error": "not what was announced"})
        self.hub.large[oid] = raw
        return {}

    def commit(self, raw: bytes, repository: str) -> Any:
        self.write()
        lines = [json.loads(line) for line in raw.splitlines() if line]
        title = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        before = self.hub.repositories[repository]
        files = dict(before[-1].files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        oid = hashlib.sha1(repr(sorted(files.items())).encode() + str(len(before)).encode()).hexdigest()
        before.append(Commit(oid, title, files))
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repository}/commit/{oid}"}


class Reading(Account):
    """What is there."""

    def info(self, raw: bytes, repository: str) -> Any:
        commit = self.read(repository)
        siblings = [{"rfilename": name} for name in commit.files]
        return {"_id": "1", "id": repository, "sha": commit.oid, "private": False, "siblings": siblings}

    def tree(self, raw: bytes, repository: str) -> Any:
        commit = self.read(repository)
        return [
            {"type": "file", "path": name, "size": len(raw), "oid": hashlib.sha1(raw).hexdigest()}
            for name, raw in commit.files.items()
        ]

    def file(self, raw: bytes, repository: str, name: str) -> Any:
        commit = self.read(repository)
        if name not in commit.files:
            raise Answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit.oid)
        content, total = commit.files[name], len(commit.files[name])
        facts = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": commit.oid}
        if part := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(part[1])
            raise Answer(206, content[start:], Content_Range=f"bytes {start}-{total - 1}/{total}", **facts)
        length = {"Content_Length": str(total)} if self.command == "HEAD" else {}
        raise Answer(200, content, **length, **facts)


class Handler(Writing, Reading):
    def answer(self, path: str, raw: bytes) -> Any:
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return method(self, raw, **found.groupdict())
        raise Answer(404, {"error": "no such page"})


REPOSITORY = r"(?P<repository>[^/]+/[^/]+)"
ROUTES: list[tuple[str, Any]] = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", lambda self, raw: {"errors": [], "warnings": []}),
    (rf"POST /api/models/{REPOSITORY}/preupload/[^/]+", Handler.modes),
    (rf"POST /{REPOSITORY}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(?P<oid>\w+)", Handler.put),
    (rf"POST /api/models/{REPOSITORY}/commit/[^/]+", Handler.commit),
    (rf"GET /api/models/{REPOSITORY}(?:/revision/[^/]+)?", Handler.info),
    (rf"GET /api/models/{REPOSITORY}/tree/[^/]+", Handler.tree),
    (rf"(?:GET|HEAD) /{REPOSITORY}/resolve/[^/]+/(?P<name>.+)", Handler.file),
]


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfThis", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Hub]:
    """A hub that huggingface_hub speaks to instead of the real one, with a cache of its own and nobody logged in.

    huggingface_hub's own waits between two tries take no time.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    with running() as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
        yield made
