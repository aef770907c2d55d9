"""A local fake of the Hub's HTTP API: repositories are dictionaries of files."""

from __future__ import annotations

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "a" * 40


class FakeHub(ThreadingHTTPServer):
    """Repositories as dictionaries of files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.tokens: set[str | None] = set()
        self.refuse_commits = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        return

    def answer(
        self, body: object, status: int = 200, headers: dict[str, str] | None = None, raw: bytes | None = None
    ) -> None:
        data = json.dumps(body).encode() if raw is None else raw
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(data)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("authorization"))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.repos.setdefault(name, {})
            self.server.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.answer({"url": f"{self.server.url}/{name}", "id": name})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            self.commit(body)
        elif self.path.startswith("/api/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        else:
            self.answer({"error": self.path}, 404)

    def commit(self, body: bytes) -> None:
        if self.server.refuse_commits > 0:
            self.server.refuse_commits -= 1
            self.answer({"error": "the hub has hiccups"}, 500)
            return
        repo = self.path.removeprefix("/api/models/").split("/commit/")[0]
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
        self.answer(
            {"commitUrl": f"{self.server.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT, "pullRequestUrl": None}
        )

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            repo, _, rest = self.path[1:].partition("/resolve/")
            content = self.server.repos[repo][rest.partition("/")[2]]
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.answer(None, 200, headers, raw=content)
            return
        repo = self.path.removeprefix("/api/models/").split("/revision/")[0].split("?")[0].split("/tree/")[0]
        files = self.server.repos.get(repo)
        if files is None:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in self.path:
            self.answer(
                [
                    {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for p, c in files.items()
                ]
            )
        else:
            self.answer(
                {
                    "id": repo,
                    "sha": COMMIT,
                    "siblings": [{"rfilename": path} for path in files],
                    "private": False,
                    "tags": [],
                }
            )
