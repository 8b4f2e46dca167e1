"""A small Hub on localhost: repositories, branches, pull requests, LFS uploads, downloads.

It speaks as much of the Hub's HTTP API as pushing and loading a model takes, and can be told to
refuse or to break off.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import yaml

TOKENS = {"hf_mine": "me", "hf_other": "somebody"}
FILE = r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)"
LARGE = (".safetensors", ".png")
REPO = r"/api/models/(?P<repo>[^/]+/[^/]+)"


@dataclass
class Repo:
    """Revision -> path -> content. `gated`: only its owner reads files."""

    owner: str
    private: bool = False
    gated: bool = False
    revisions: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})

    @property
    def files(self) -> dict[str, bytes]:
        return self.revisions["main"]

    def sha(self, revision: str) -> str:
        files = self.revisions[revision]
        text = "".join(f"{n}{hashlib.sha1(c).hexdigest()}" for n, c in sorted(files.items()))
        return hashlib.sha1(f"{revision}{text}".encode()).hexdigest()

    def resolve(self, revision: str) -> str | None:
        """The name of a branch, given that or a commit; None if there is none."""
        if revision in self.revisions:
            return revision
        return next((name for name in self.revisions if self.sha(name) == revision), None)


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str, url: str = ""):
        self.status, self.code, self.message, self.url = status, code, message, url


class HubServer:
    """`with HubServer() as hub:`; `hub.url` is the endpoint.

    requests: (method, path) of all that came. fail: called with both before an answer; what it
    raises as `Refused` is the answer, and "break" breaks the connection off. cut: called with the
    path of an upload; after as many bytes as it says its connection is reset (None: after none).
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.fail: Callable[[str, str], str | None] = lambda method, path: None
        self.cut: Callable[[str], int | None] = lambda path: None
        self._routes = [
            ("GET", "/api/whoami-v2", self._whoami),
            ("POST", "/api/repos/create", self._create),
            ("POST", "/api/validate-yaml", self._validate),
            ("POST", f"{REPO}/preupload/(?P<revision>.+)", self._preupload),
            ("POST", f"{REPO}/branch/(?P<revision>.+)", self._branch),
            ("POST", f"{REPO}/commit/(?P<revision>.+)", self._commit),
            ("GET", f"{REPO}/tree/(?P<revision>[^/]+).*", self._tree),
            ("GET", f"{REPO}(/revision/(?P<revision>.+))?", self._info),
            ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", "/objects/(?P<oid>[0-9a-f]{64})", self._put),
        ]

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def answer(self) -> None:
                hub._answer(self)

            do_GET = do_POST = do_PUT = do_HEAD = answer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # -- HTTP ---------------------------------------------------------------------------

    def _answer(self, request: Any) -> None:
        url = urlparse(request.path)
        path, method = unquote(url.path), request.command
        if method == "PUT" and (part := self.cut(path)) is not None:
            self.requests.append((method, path))
            request.rfile.read(part)
            return self._reset(request)
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.headers.get("Transfer-Encoding") == "chunked":
            body = _chunks(request.rfile)
        self.requests.append((method, path))
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        user = TOKENS.get(token)
        try:
            if self.fail(method, path) == "break":
                request.close_connection = True
                request.connection.close()
                return None
            found = re.fullmatch(
                r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", path
            )
            if found and method in ("GET", "HEAD"):
                return self._file(request, user, **found.groupdict())
            for wanted, pattern, route in self._routes:
                match = re.fullmatch(pattern, path)
                if match and method == wanted:
                    query = {k: v[0] for k, v in parse_qs(url.query).items()}
                    result = route(user, body, query, **match.groupdict())
                    return self._send(request, 200, json.dumps(result).encode())
            raise Refused(404, "EntryNotFound", f"no route for {method} {path}")
        except Refused as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            # the client reads "url" of repositories that exist, and "errors" of cards
            content: dict[str, Any] = {"error": refusal.message, "url": refusal.url}
            content["errors"] = [{"message": refusal.message}]
            text = json.dumps(content).encode()
            self._send(request, refusal.status, text, headers)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def _reset(self, request: Any) -> None:
        """Close the connection as a machine that goes down does: the other side gets a reset."""
        linger = struct.pack("ii", 1, 0)
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        request.close_connection = True
        request.connection.close()

    def _send(
        self, request: Any, status: int, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            if value:
                request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    def _file(self, request: Any, user: str | None, repo: str, revision: str, file: str) -> None:
        found = self._repo(repo, user)
        if found.gated and user != found.owner:
            raise Refused(403, "GatedRepo", f"Access to model {repo} is restricted")
        name = found.resolve(revision)
        if name is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if file not in found.revisions[name]:
            raise Refused(404, "EntryNotFound", f"Entry not found: {file}")
        content = found.revisions[name][file]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._send(request, 200, content, {"X-Repo-Commit": found.sha(name), "ETag": etag})

    # -- the API ------------------------------------------------------------------------

    def _repo(self, name: str, user: str | None, write: bool = False) -> Repo:
        repo = self.repos.get(name)
        if repo is None or (repo.private and user != repo.owner):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user is None:
            raise Refused(401, "", "Invalid username or password.")
        return repo

    def _whoami(self, user: str | None, body: bytes, query: dict) -> Any:
        if user is None:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return {"type": "user", "name": user, "orgs": []}

    def _create(self, user: str | None, body: bytes, query: dict) -> Any:
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        wanted = json.loads(body)
        owner = wanted.get("organization") or user
        name = f"{owner}/{wanted['name']}"
        answer = {"url": f"{self.url}/{name}", "name": name, "id": "1"}
        if owner != user:
            raise Refused(403, "", f'You don\'t have the rights to create a model under "{owner}"')
        if name in self.repos:
            raise Refused(409, "", "You already created this model repo", answer["url"])
        # the client of Transformers 5.17 says private, that of 5.23 visibility
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.repos[name] = Repo(user, private)
        return answer

    def _validate(self, user: str | None, body: bytes, query: dict) -> Any:
        problem = metadata_problem(json.loads(body)["content"])
        if problem:
            raise Refused(400, "", problem)
        return {"errors": [], "warnings": []}

    def _preupload(
        self, user: str | None, body: bytes, query: dict, repo: str, revision: str
    ) -> Any:
        self._may_write(user, repo, query)
        files = json.loads(body)["files"]
        return {
            "files": [
                {
                    "path": f["path"],
                    "uploadMode": "lfs"
                    if f["path"].endswith((".safetensors", ".png"))
                    else "regular",
                    "shouldIgnore": False,
                }
                for f in files
            ]
        }

    def _may_write(self, user: str | None, repo: str, query: dict) -> Repo:
        found = self._repo(repo, user, write=True)
        if found.owner != user and query.get("create_pr") != "1":
            raise Refused(403, "", "You are not authorized to write to this repository")
        return found

    def _branch(self, user: str | None, body: bytes, query: dict, repo: str, revision: str) -> Any:
        found = self._may_write(user, repo, query)
        if revision in found.revisions:
            raise Refused(409, "", "Reference already exists")
        found.revisions[revision] = dict(found.files)
        return {}

    def _batch(self, user: str | None, body: bytes, query: dict, repo: str) -> Any:
        self._repo(repo, user, write=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.objects:
                entry["actions"] = {"upload": {"href": f"{self.url}/objects/{wanted['oid']}"}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def _put(self, user: str | None, body: bytes, query: dict, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "", "the content is not what was announced")
        self.objects[oid] = body
        return {}

    def _commit(self, user: str | None, body: bytes, query: dict, repo: str, revision: str) -> Any:
        found = self._may_write(user, repo, query)
        if revision not in found.revisions:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = dict(found.revisions[revision])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        request = None
        if query.get("create_pr") == "1":
            number = 1 + sum(name.startswith("refs/pr/") for name in found.revisions)
            revision = f"refs/pr/{number}"
            request = f"{self.url}/{repo}/discussions/{number}"
        found.revisions[revision] = files
        sha = found.sha(revision)
        return {
            "commitUrl": f"{self.url}/{repo}/commit/{sha}",
            "commitOid": sha,
            "pullRequestUrl": request,
            "success": True,
        }

    def _info(
        self, user: str | None, body: bytes, query: dict, repo: str, revision: str | None = None
    ) -> Any:
        found = self._repo(repo, user)
        name = found.resolve(revision or "main")
        if name is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return {
            "id": repo,
            "modelId": repo,
            "sha": found.sha(name),
            "private": found.private,
            "tags": [],
            "siblings": [{"rfilename": path} for path in found.revisions[name]],
        }

    def _tree(self, user: str | None, body: bytes, query: dict, repo: str, revision: str) -> Any:
        found = self._repo(repo, user)
        files = found.revisions[found.resolve(revision) or "main"]
        return [
            {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
            for p, c in files.items()
        ]


def metadata_problem(card: str) -> str | None:
    """Why the Hub would refuse a card's metadata (after its documentation), or None."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if not found:
        return "no metadata"
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return f"invalid YAML: {error}"
    relation = data.get("base_model_relation")
    if relation not in (None, "adapter", "merge", "quantized", "finetune"):
        return f'"base_model_relation" must not be {relation}'
    base = data.get("base_model")
    if base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        return f'"base_model" with value "{base}" is not valid'
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        return '"tags" must be strings'
    for model in data.get("model-index", []):
        for result in model["results"]:
            metrics = result["metrics"]
            known = {"type", "name"} <= result["dataset"].keys() and "type" in result["task"]
            named = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(result["dataset"].get("type")))
            if not (known and named and all({"type", "value"} <= m.keys() for m in metrics)):
                return f'"model-index" has an invalid result: {result}'
    return None


def _chunks(stream: Any) -> bytes:
    parts = []
    while size := int(stream.readline().split(b";")[0], 16):
        parts.append(stream.read(size))
        stream.readline()
    stream.readline()
    return b"".join(parts)
