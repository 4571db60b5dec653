"""A loopback stand-in for the Hub: repositories with branches and pull requests, large files, downloads.

``huggingface_hub`` reads its settings when it is imported, so clients run in processes of their own, with the variables
of :meth:`HubServer.environment`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

USER, TOKEN = "me", "hf_CanaryOfTheTokenX"
LARGE_SUFFIXES = (".safetensors", ".bin")


class HubError(Exception):
    """A refusal, with the code that the client maps to its own exceptions."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


@dataclass
class Repository:
    """Commits (id -> path -> content) and what branches and pull requests point to."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    heads: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})

    def resolve(self, revision: str) -> str:
        commit = self.heads.get(revision, revision)
        if commit not in self.commits:
            raise HubError(404, "RevisionNotFound")
        return commit

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.resolve(revision)]

    def add(self, revision: str, changes: dict[str, bytes]) -> str:
        """A commit on top of ``revision``; its id. A head moves along."""
        parent = self.resolve(revision)
        commit = hashlib.sha1(f"{parent} {len(self.commits)}".encode()).hexdigest()
        self.commits[commit] = self.commits[parent] | changes
        if revision in self.heads:
            self.heads[revision] = commit
        return commit


class HubServer:
    """Serve in a thread, from ``with`` to its end.

    Attributes:
        repositories: Name -> repository; may be filled with :meth:`add_folder` beforehand.
        log: ``(method, path)`` of every request.
        unhandled: Requests that no route knows. A test should find none.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.unhandled: list[tuple[str, str]] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables for a client process that keeps its files in ``home`` and talks to nothing but this server."""
        return {
            **os.environ,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def add_folder(self, name: str, folder: Path) -> None:
        """A repository that holds the files of ``folder``."""
        repository = self.repositories[name] = Repository()
        files = [path for path in folder.rglob("*") if path.is_file()]
        repository.add("main", {path.relative_to(folder).as_posix(): path.read_bytes() for path in files})

    def find(self, name: str) -> Repository:
        if name not in self.repositories:
            raise HubError(404, "RepoNotFound")
        return self.repositories[name]


@dataclass(frozen=True)
class Request:
    """What a route gets to see."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Answer:
    """A status, a body (anything but bytes is sent as JSON) and headers."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def _whoami(hub: HubServer, request: Request) -> Answer:
    return Answer({"name": USER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})


def _create(hub: HubServer, request: Request) -> Answer:
    name = f"{request.json.get('organization') or USER}/{request.json['name']}"
    status = 409 if name in hub.repositories else 200
    hub.repositories.setdefault(name, Repository())
    return Answer({"url": f"{hub.url}/{name}", "id": name, "name": name}, status)


def _validate_card(hub: HubServer, request: Request) -> Answer:
    return Answer({"errors": [], "warnings": []})


def _create_branch(hub: HubServer, request: Request, name: str, branch: str) -> Answer:
    repository = hub.find(name)
    status = 409 if branch in repository.heads else 200
    repository.heads.setdefault(branch, repository.heads["main"])
    return Answer({}, status)


def _preupload(hub: HubServer, request: Request, name: str, revision: str) -> Answer:
    hub.find(name).resolve(revision)
    paths = [file["path"] for file in request.json["files"]]
    modes = {path: "lfs" if path.endswith(LARGE_SUFFIXES) else "regular" for path in paths}
    return Answer({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]})


def _large_file_batch(hub: HubServer, request: Request, name: str) -> Answer:
    objects = [
        {"oid": item["oid"], "size": item["size"], "actions": {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}}
        for item in request.json["objects"]
    ]
    return Answer({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})


def _large_file(hub: HubServer, request: Request, oid: str) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, "HashMismatch")
    hub.large_files[oid] = request.body
    return Answer()


def _commit(hub: HubServer, request: Request, name: str, revision: str) -> Answer:
    repository = hub.find(name)
    changes = {}
    for line in request.body.splitlines():
        operation = json.loads(line)
        value = operation["value"]
        if operation["key"] == "file":
            changes[value["path"]] = base64.b64decode(value["content"])
        elif operation["key"] == "lfsFile":
            changes[value["path"]] = hub.large_files[value["oid"]]
        elif operation["key"] != "header":
            raise HubError(501, f"Operation{operation['key']}")
    answer = {}
    if request.query.get("create_pr") == ["1"]:
        number = sum(head.startswith("refs/pr/") for head in repository.heads) + 1
        repository.heads[f"refs/pr/{number}"] = repository.resolve(revision)
        revision = f"refs/pr/{number}"
        answer = {"pullRequestUrl": f"{hub.url}/{name}/discussions/{number}"}
    commit = repository.add(revision, changes)
    return Answer({"commitOid": commit, "commitUrl": f"{hub.url}/{name}/commit/{commit}", "hookOutput": "", **answer})


def _download(hub: HubServer, request: Request, name: str, revision: str, path: str) -> Answer:
    repository = hub.find(name)
    commit = repository.resolve(revision)
    headers = {"X-Repo-Commit": commit, "Content-Type": "application/octet-stream"}
    content = repository.commits[commit].get(path)
    if content is None:
        return Answer(status=404, headers={**headers, "X-Error-Code": "EntryNotFound"})
    return Answer(content, headers={**headers, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'})


def _tree(hub: HubServer, request: Request, name: str, revision: str, folder: str | None) -> Answer:
    start = f"{folder.rstrip('/')}/" if folder else ""
    files = {path: content for path, content in hub.find(name).files(revision).items() if path.startswith(start)}
    if start and not files:
        raise HubError(404, "EntryNotFound")
    rows = [{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in files.items()]
    return Answer(rows)


def _model_info(hub: HubServer, request: Request, name: str, revision: str | None) -> Answer:
    repository = hub.find(name)
    siblings = [{"rfilename": path} for path in repository.files(revision or "main")]
    info = {"id": name, "modelId": name, "private": False, "tags": [], "pipeline_tag": "text-generation"}
    return Answer({**info, "sha": repository.resolve(revision or "main"), "siblings": siblings})


_NAME = "([^/]+/[^/]+)"
ROUTES = [
    (("GET",), "/api/whoami-v2", _whoami),
    (("POST",), "/api/repos/create", _create),
    (("POST",), "/api/validate-yaml", _validate_card),
    (("POST",), f"/api/models/{_NAME}/branch/(.+)", _create_branch),
    (("POST",), f"/api/models/{_NAME}/preupload/(.+)", _preupload),
    (("POST",), f"/{_NAME}.git/info/lfs/objects/batch", _large_file_batch),
    (("PUT",), "/lfs/([0-9a-f]{64})", _large_file),
    (("POST",), f"/api/models/{_NAME}/commit/(.+)", _commit),
    (("GET", "HEAD"), f"/(?:api/resolve-cache/models/)?{_NAME}/(?:resolve|raw)/([^/]+)/(.+)", _download),
    (("GET",), f"/api/models/{_NAME}/tree/([^/]+)(?:/(.*))?", _tree),
    (("GET",), f"/api/models/{_NAME}(?:/revision/([^/]+))?", _model_info),
]


def _answer(hub: HubServer, request: Request) -> Answer:
    # Everything that writes needs the token, but for large files, whose address is signed.
    if request.method == "POST" and request.headers["Authorization"] != f"Bearer {TOKEN}":
        return Answer({"error": "unauthorized"}, 401)
    for methods, pattern, route in ROUTES:
        match = re.fullmatch(pattern, request.path)
        if match and request.method in methods:
            try:
                return route(hub, request, *(group and unquote(group) for group in match.groups()))
            except HubError as error:
                return Answer({"error": error.code}, error.status, {"X-Error-Code": error.code})
    hub.unhandled.append((request.method, request.path))
    return Answer({"error": "no such route"}, 501)


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            split = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.log.append((self.command, split.path))
            answer = _answer(hub, Request(self.command, split.path, parse_qs(split.query), self.headers, body))
            content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self.send_response(answer.status)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **answer.headers}
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler
