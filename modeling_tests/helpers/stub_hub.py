# SPDX-License-Identifier: Apache-2.0
"""A Hub in miniature on the loopback interface: repositories with commits, tokens, large files, failures on demand."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit


COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_stub"  # of the user `someone`, who writes for `org` as well
OWNERS = {"someone", "org"}


@dataclass
class Repository:
    """Commits by hash (files by path), branches by name."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        content = repr((len(self.commits), branch, sorted(files.items())))
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def sha(self, revision: str = "main") -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[str(self.sha(revision))]


class StubHub(ThreadingHTTPServer):
    """The server: `repositories`, stored large files, and what is to go wrong."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.drop_uploads = False  # connections break in the middle of a large file
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> str:
        """Makes a repository with one commit; returns its hash."""
        self.repositories[repo_id] = Repository(private)
        return self.repositories[repo_id].commit(files)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are part of the tests."""

    def run(self, code: str, home: Path, *arguments: str, token: str | None = TOKEN, check: bool = True) -> Any:
        """Runs Python code in a process of its own, whose Hub this is; returns what `subprocess.run` does."""
        dropped = ("HF_", "HUGGING_FACE", "TRANSFORMERS_OFFLINE")
        env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        env |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home / "hf_home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
            "NO_PROXY": "*",
            **({} if token is None else {"HF_TOKEN": token}),
        }
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            cwd=home,
            env=env,
            stdin=subprocess.DEVNULL,
        )
        assert not check or done.returncode == 0, done.stderr[-4000:]
        return done


@contextmanager
def stub_hub() -> Iterator[StubHub]:
    server = StubHub()
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def cached_repository(cache: Path, repo_id: str) -> Path:
    """The folder of the files of a repository at `COMMIT`, its `main`, in the cache of the Hub's client."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    return repository / "snapshots" / COMMIT


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StubHub

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def _send(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _fail(self, status: int, code: str = "", message: str = "") -> None:
        self._send(status, {"error": message or code}, {"X-Error-Code": code, "X-Error-Message": message or code})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def _signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, repo_id: str, write: bool = False) -> Repository | None:
        """The repository, or `None` after the answer that refuses it."""
        repository = self.server.repositories.get(repo_id)
        if write and not self._signed_in:
            self._fail(401, message="Invalid username or password.")
        elif repository is None or (repository.private and not self._signed_in):
            self._fail(404 if self._signed_in else 401, "RepoNotFound", "Repository not found")
        elif write and repo_id.split("/")[0] not in OWNERS:
            self._fail(403, message="You don't have the rights to write to this repository.")
        else:
            return repository
        return None

    def _dispatch(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if self.command in method.split() and match:
                answer(self, **match.groupdict())
                return
        self._body()
        self._fail(404, "EntryNotFound", f"no route for {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _dispatch

    def set_failure(self, state: str) -> None:
        self.server.drop_uploads = state == "on"
        self._send(200)

    def create(self) -> None:
        body = json.loads(self._body())
        owner = body.get("organization") or "someone"
        name = body["name"] if "/" in body["name"] else f"{owner}/{body['name']}"
        if not self._signed_in:
            self._fail(401, message="Invalid username or password.")
        elif name.split("/")[0] not in OWNERS:
            self._fail(403, message=f"You don't have the rights to create a model under {owner}.")
        elif name in self.server.repositories:
            self._send(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"})
        else:
            self.server.add(name, {}, body.get("visibility") == "private")
            self._send(200, {"url": f"{self.server.url}/{name}", "id": name})

    def info(self, repo: str, revision: str = "main") -> None:
        repository = self._repository(repo)
        if repository is None:
            return
        sha = repository.sha(revision or "main")
        if sha is None:
            self._fail(404, "RevisionNotFound")
            return
        siblings = [{"rfilename": name} for name in repository.commits[sha]]
        repo = repo.removeprefix("datasets/")
        self._send(200, {"id": repo, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []})

    def tree(self, repo: str, revision: str, folder: str | None) -> None:
        repository = self._repository(repo)
        if repository is None:
            return
        sha = repository.sha(revision)
        if sha is None:
            self._fail(404, "RevisionNotFound")
            return
        prefix = f"{folder}/" if folder else ""
        found = {name: data for name, data in repository.commits[sha].items() if name.startswith(prefix)}
        if folder and not found:
            self._fail(404, "EntryNotFound")
            return
        entries = [{"type": "file", "path": name, "size": len(d), "oid": _oid(d)} for name, d in found.items()]
        if "recursive=true" not in urlsplit(self.path).query.lower():
            inner = {prefix + name[len(prefix) :].split("/")[0] for name in found if "/" in name[len(prefix) :]}
            entries = [entry for entry in entries if "/" not in str(entry["path"])[len(prefix) :]]
            entries += [{"type": "directory", "path": name, "size": 0, "oid": _oid(name.encode())} for name in inner]
        self._send(200, entries)

    def paths_info(self, repo: str, revision: str) -> None:
        paths = [path for name, path in parse_qsl(self._body().decode()) if name == "paths"]
        repository = self._repository(repo)
        if repository is None:
            return
        files = repository.files(revision)
        found = [(path, files[path]) for path in paths if path in files]
        entries = [{"type": "file", "path": name, "size": len(data), "oid": _oid(data)} for name, data in found]
        folders = [p for p in paths if any(name.startswith(f"{p}/") for name in files)]
        self._send(200, entries + [{"type": "directory", "path": p, "oid": _oid(p.encode())} for p in folders])

    def resolve(self, repo: str, revision: str, file: str) -> None:
        repository = self._repository(repo)
        if repository is None:
            return
        sha = repository.sha(revision)
        if sha is None:
            self._fail(404, "RevisionNotFound")
            return
        data = repository.commits[sha].get(file)
        if data is None:
            self._send(404, None, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        self._send(200, data, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": sha})

    def validate(self) -> None:
        self._body()
        self._send(200, {"errors": [], "warnings": []})

    def branch(self, repo: str, branch: str) -> None:
        self._body()
        repository = self._repository(repo, write=True)
        if repository is None:
            return
        repository.branches.setdefault(branch, str(repository.sha()))
        self._send(200)

    def preupload(self, repo: str, revision: str) -> None:
        files = json.loads(self._body())["files"]
        if self._repository(repo, write=True) is None:
            return
        answers = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".bin", ".pt")) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in files
        ]
        self._send(200, {"files": answers})

    def batch(self, repo: str) -> None:
        objects = json.loads(self._body())["objects"]
        answers: list[dict[str, Any]] = []
        for item in objects:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server.large_files:
                answer["actions"] = {"upload": {"href": f"{self.server.url}/large/{item['oid']}"}}
            answers.append(answer)
        self._send(200, {"transfer": "basic", "objects": answers}, {"Content-Type": "application/vnd.git-lfs+json"})

    def large(self, oid: str) -> None:
        if self.server.drop_uploads:
            self.rfile.read(100)
            self.close_connection = True
            self.connection.close()
            return
        data = self._body()
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.large_files[oid] = data
        self._send(200)

    def commit(self, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self._body().splitlines() if line]
        repository = self._repository(repo, write=True)
        if repository is None:
            return
        sha = repository.sha(revision)
        if sha is None:
            self._fail(404, "RevisionNotFound")
            return
        files, message = dict(repository.commits[sha]), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        new = repository.commit(files, revision, message)
        self._send(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{new}", "commitOid": new, "success": True})


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_DATASET = r"(?P<repo>datasets/[^/]+/[^/]+)"  # kept under this name beside the models
_ROUTES: list[tuple[str, str, Any]] = [
    ("GET", r"/test/drop_uploads/(?P<state>on|off)", _Handler.set_failure),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<branch>.+)", _Handler.branch),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", rf"/api/models/{_REPO}", _Handler.info),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/large/(?P<oid>[0-9a-f]+)", _Handler.large),
    ("GET", rf"/api/{_DATASET}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("GET", rf"/api/{_DATASET}/revision/(?P<revision>.+)", _Handler.info),
    ("POST", rf"/api/{_DATASET}/paths-info/(?P<revision>.+)", _Handler.paths_info),
    ("GET", rf"/api/{_DATASET}", _Handler.info),
    ("GET HEAD", rf"/{_DATASET}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
    ("GET HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
]
