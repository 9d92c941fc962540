"""A model hub on loopback, with just the routes that huggingface_hub uses to list and fetch a repository."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PUSHED_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"

Files = dict[str, bytes]  # the contents by path


class HubServer(ThreadingHTTPServer):
    """Serves the files of `folder` as the repository `org/model`.

    Attributes:
        files: of the first commit, which is `COMMIT` and the tag `v1`.
        pushed: of the second commit, which is `PUSHED_COMMIT`; None before it is pushed.
        push_after: a path and the files that are pushed as soon as that path has been fetched.
        fetched: paths of the files whose content was asked for, in order.
        gated: whether to refuse everybody.
        has_tree: whether it lists files with their sizes; mirrors do not.
        cut_off: how many answers to break off half way.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: Files = {
            str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()
        }
        self.pushed: Files | None = None
        self.push_after: tuple[str, Files] | None = None
        self.fetched: list[str] = []
        self.gated = False
        self.has_tree = True
        self.cut_off = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, revision: str) -> tuple[str, Files] | None:
        """The commit that a revision names, and its files; None for an unknown revision."""
        if self.pushed is not None and revision in ("main", PUSHED_COMMIT):
            return PUSHED_COMMIT, self.pushed
        return (COMMIT, self.files) if revision in ("main", "v1", COMMIT) else None


@contextmanager
def running_hub(folder: Path) -> Iterator[HubServer]:
    """A hub that serves `folder` as `org/model` until the block ends."""
    with HubServer(folder) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _answer(self, with_body: bool) -> None:
        match urlsplit(self.path).path.strip("/").split("/"):
            case ["api", "models", "org", "model"]:
                self._answer_at("main", with_body, "info")
            case ["api", "models", "org", "model", "tree", _] if not self.server.has_tree:
                self._send(404, b"<html>Not Found</html>", {"Content-Type": "text/html"})
            case ["api", "models", "org", "model", ("revision" | "tree") as kind, revision]:
                self._answer_at(revision, with_body, kind)
            case ["org", "model", "resolve", revision, *path]:
                self._answer_at(revision, with_body, "file", "/".join(path))
            case _:
                self._send_error(404, "RepoNotFound")

    def _answer_at(self, revision: str, with_body: bool, kind: str, path: str = "") -> None:
        found = self.server.commit(revision)
        if found is None:
            return self._send_error(404, "RevisionNotFound")
        commit, files = found
        if kind == "file":
            return self._send_file(commit, files, path, with_body)
        if kind == "tree":
            return self._send_json([self._entry(path, content) for path, content in files.items()])
        siblings = [{"rfilename": path} for path in files]
        self._send_json({"id": "org/model", "modelId": "org/model", "sha": commit, "siblings": siblings})

    @staticmethod
    def _entry(path: str, content: bytes) -> dict[str, object]:
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_file(self, commit: str, files: Files, path: str, with_body: bool) -> None:
        if self.server.gated:
            self._send_error(403, "GatedRepo")
        elif path not in files:
            self._send_error(404, "EntryNotFound")
        else:
            content = files[path]
            headers = {
                "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                "X-Repo-Commit": commit,
                "Accept-Ranges": "bytes",
            }
            if with_body:
                self.server.fetched.append(path)
                self._push_after(path)
            self._send(200, content, headers, with_body)

    def _push_after(self, path: str) -> None:
        if self.server.push_after is not None and self.server.push_after[0] == path:
            self.server.pushed = self.server.push_after[1]

    def _send_error(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code, "X-Repo-Commit": COMMIT})

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool = True) -> None:
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0]) if status == 200 else 0
        self.send_response(206 if first else status)
        for name, value in headers.items():
            self.send_header(name, value)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        if not with_body:
            return
        if self.server.cut_off and headers.get("Accept-Ranges") and len(body) > 100_000:
            self.server.cut_off -= 1
            self.wfile.write(body[first : first + len(body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(body[first:])
