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
REVISIONS = ("main", "v1", COMMIT)


class HubServer(ThreadingHTTPServer):
    """Serves the files of `folder` as the repository `org/model`.

    Attributes:
        fetched: paths of the files whose content was asked for, in order.
        gated: whether to refuse everybody.
        cut_off: how many answers to break off half way.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        self.fetched: list[str] = []
        self.gated = False
        self.cut_off = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


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
                self._send_json(self._info())
            case ["api", "models", "org", "model", "revision", revision] if revision in REVISIONS:
                self._send_json(self._info())
            case ["api", "models", "org", "model", "tree", revision] if revision in REVISIONS:
                self._send_json([self._entry(path) for path in self.server.files])
            case ["org", "model", "resolve", revision, *path] if revision in REVISIONS:
                self._send_file("/".join(path), with_body)
            case ["api", "models", "org", "model", *_]:
                self._send_error(404, "RevisionNotFound")
            case _:
                self._send_error(404, "RepoNotFound")

    def _info(self) -> dict[str, object]:
        siblings = [{"rfilename": path} for path in self.server.files]
        return {"id": "org/model", "modelId": "org/model", "sha": COMMIT, "private": False, "siblings": siblings}

    def _entry(self, path: str) -> dict[str, object]:
        content = self.server.files[path]
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_file(self, path: str, with_body: bool) -> None:
        if self.server.gated:
            self._send_error(403, "GatedRepo")
        elif path not in self.server.files:
            self._send_error(404, "EntryNotFound")
        else:
            content = self.server.files[path]
            headers = {
                "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            if with_body:
                self.server.fetched.append(path)
            self._send(200, content, headers, with_body)

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
