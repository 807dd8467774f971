"""A Hub on loopback: enough of its HTTP API for the real client to create repositories, push to them and read them.

Large files go by Git LFS's basic transfer. Faults can be planted: a status, or a connection that is cut.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from linearize.hub.licence import front_matter

TOKEN = "hf_" + "LocalHubTestToken" * 2  # of the user `me`
READ_TOKEN = "hf_" + "LocalHubReadsOnly" * 2


@dataclass
class Commit:
    """A commit: its files are bytes, or for LFS the SHA-256 of a blob."""

    oid: str
    message: str
    files: dict[str, bytes | str]


@dataclass
class Repo:
    private: bool
    commits: list[Commit] = field(default_factory=list)

    def commit(self, message: str, files: dict[str, bytes | str]) -> Commit:
        oid = hashlib.sha256(f"{len(self.commits)} {message}".encode()).hexdigest()[:40]
        self.commits.append(Commit(oid, message, files))
        return self.commits[-1]

    @property
    def head(self) -> Commit:
        return self.commits[-1]


@dataclass
class Fault:
    """What to do instead of answering requests of this method whose path matches.

    Attributes:
        how: a status; `cut`, which closes the connection after the first bytes of the body; or `lose`, which does what
            was asked and closes the connection before the answer.
        times: how often; then requests are answered again.
    """

    method: str
    path: str
    how: int | str
    times: int = 1


class LocalHub:
    """The server's state, and where it listens."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.users = {TOKEN: ("me", True), READ_TOKEN: ("me", False)}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, token
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method: str, path: str, how: int | str, times: int = 1) -> None:
        """Plants a fault."""
        self.faults.append(Fault(method, path, how, times))

    def create(self, name: str, *, private: bool = True) -> Repo:
        """A new repository, with the first commit that the Hub makes itself."""
        repo = self.repos[name] = Repo(private)
        repo.commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return repo

    def pushed(self, name: str) -> list[Commit]:
        """The commits after the first."""
        return self.repos[name].commits[1:]

    def seen(self, method: str, path: str = "") -> list[str]:
        """Paths of the requests of this method that match."""
        return [where for how, where, _ in self.requests if how == method and re.search(path, where)]


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr: it belongs to the command under test."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    # What is asked.

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        with self.hub.lock:
            self.hub.requests.append((self.command, path, token))
            fault = next((f for f in self.hub.faults if self._meets(f, path)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.how == "cut":
            self.rfile.read(min(1024, int(self.headers.get("content-length") or 0)))
            return self._hang_up()
        self.body = self._read()
        if fault is not None and isinstance(fault.how, int):
            return self._json({"error": "planted", "errors": [{"message": "planted"}]}, fault.how)
        self.lost = fault is not None
        with self.hub.lock:
            self._route(path, token)

    def _meets(self, fault: Fault, path: str) -> bool:
        return fault.times > 0 and fault.method == self.command and re.search(fault.path, path) is not None

    def _read(self) -> bytes:
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _route(self, path: str, token: str | None) -> None:
        user = self.hub.users.get(token or "")
        if token is not None and user is None:
            return self._error(401, "", "Invalid credentials in Authorization header")
        if found := re.fullmatch(r"/lfs/(\w+)", path):
            return self._blob(found[1])
        if path == "/api/whoami-v2":
            return self._json({"type": "user", "name": user[0], "orgs": []}) if user else self._error(401)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(user)
        for pattern, answer in (
            (r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self._info),
            (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self._commit),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", self._tree),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ):
            if found := re.fullmatch(pattern, path):
                repo = self.hub.repos.get(found[1])
                if repo is None or (repo.private and user is None):
                    return self._error(404 if user else 401, "RepoNotFound")
                if self.command == "POST" and not (user and user[1]):
                    return self._error(403, "", "you need a token with write access")
                return answer(repo, *(part or "" for part in found.groups()))
        self._error(404)

    # What is answered.

    def _create(self, user: tuple[str, bool] | None) -> None:
        asked = json.loads(self.body)
        if user is None or not user[1]:
            return self._error(401 if user is None else 403, "", "no right to create a repository")
        name = f"{asked.get('organization') or user[0]}/{asked['name']}"
        if name in self.hub.repos:
            return self._json({"error": "You already created this model repo", "url": self._url(name)}, 409)
        if not name.startswith(f"{user[0]}/"):
            return self._error(403, "", f"no rights in the namespace {name.split('/')[0]}")
        self.hub.create(name, private=asked.get("visibility") == "private" or asked.get("private") is True)
        self._json({"url": self._url(name), "name": name})

    def _info(self, repo: Repo, name: str, _: str) -> None:
        self._json(
            {
                "id": name,
                "modelId": name,
                "sha": repo.head.oid,
                "private": repo.private,
                "tags": [],
                "cardData": front_matter(_text(repo.head.files.get("README.md", b""))),
                "siblings": [{"rfilename": path} for path in sorted(repo.head.files)],
            }
        )

    def _preupload(self, repo: Repo, _: str, __: str) -> None:
        files = []
        for file in json.loads(self.body)["files"]:
            there = repo.head.files.get(file["path"])
            mode = "lfs" if file["path"].endswith(".safetensors") or file["size"] > 10 << 20 else "regular"
            oid = None if there is None else there if isinstance(there, str) else _git_oid(there)
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def _batch(self, _: Repo, __: str) -> None:
        objects = []
        for asked in json.loads(self.body)["objects"]:
            there = asked["oid"] in self.hub.blobs
            href = {"href": self._url(f"lfs/{asked['oid']}")}
            objects.append({**asked, **({} if there else {"actions": {"upload": href}})})
        self._json({"transfer": "basic", "objects": objects})

    def _blob(self, oid: str) -> None:
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                return self._error(400, "", "the content has another digest")
            self.hub.blobs[oid] = self.body
            return self._answer(200, b"")
        self._answer(200, self.hub.blobs[oid])

    def _commit(self, repo: Repo, name: str, _: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, files = lines[0]["value"], dict(repo.head.files)
        if header.get("parentCommit", repo.head.oid) != repo.head.oid:
            return self._error(412, "", "The repository has moved on")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self._error(400, "", f"{value['path']}: was not uploaded")
                files[value["path"]] = value["oid"]
            else:
                del files[value["path"]]
        made = repo.commit(header["summary"], files)
        self._json(
            {
                "success": True,
                "commitOid": made.oid,
                "commitUrl": self._url(f"{name}/commit/{made.oid}"),
                "hookOutput": "",
            }
        )

    def _tree(self, repo: Repo, _: str, __: str, under: str) -> None:
        prefix = f"{under}/" if under else ""
        paths = [path for path in sorted(repo.head.files) if path.startswith(prefix)]
        if under and not paths:
            return self._error(404, "EntryNotFound", commit=repo.head.oid)
        self._json([self._entry(path, repo.head.files[path]) for path in paths])

    def _entry(self, path: str, content: bytes | str) -> dict[str, Any]:
        if isinstance(content, bytes):
            return {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
        size = len(self.hub.blobs[content])
        lfs = {"oid": content, "size": size, "pointerSize": 134}
        return {"type": "file", "path": path, "size": size, "oid": content[:40], "lfs": lfs}

    def _resolve(self, repo: Repo, _: str, __: str, path: str) -> None:
        content = repo.head.files.get(path)
        if content is None:
            return self._error(404, "EntryNotFound", commit=repo.head.oid)
        commit = {"X-Repo-Commit": repo.head.oid}
        if isinstance(content, bytes):
            return self._answer(200, content, {**commit, "ETag": f'"{_git_oid(content)}"'})
        linked = {"X-Linked-Etag": f'"{content}"', "X-Linked-Size": str(len(self.hub.blobs[content]))}
        # Another host, as the Hub's storage is: the client leaves its token at home.
        elsewhere = self.hub.endpoint.replace("127.0.0.1", "localhost")
        self._answer(302, b"", {**commit, **linked, "Location": f"{elsewhere}/lfs/{content}"})

    # How it is sent.

    def _url(self, path: str) -> str:
        return f"{self.hub.endpoint}/{path}"

    def _error(self, status: int, code: str = "", message: str = "", commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        self._json({"error": message or code}, status, {name: value for name, value in headers.items() if value})

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        if getattr(self, "lost", False):
            return self._hang_up()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def _text(content: bytes | str) -> str:
    return content.decode() if isinstance(content, bytes) else ""


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
