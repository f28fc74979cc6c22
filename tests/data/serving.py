"""A web server of a folder that answers ranges, as object stores do."""

from __future__ import annotations

import functools
import io
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    etags = True

    def log_message(self, *_: object) -> None:
        pass

    def send_head(self) -> io.BytesIO | None:  # type: ignore[override]
        path = self.translate_path(self.path)
        if not os.path.isfile(path):
            return super().send_head()  # type: ignore[return-value]
        data = Path(path).read_bytes()
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        first, last = (int(asked[1]), int(asked[2] or len(data))) if asked else (0, len(data))
        body = data[first : last + 1]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(data)}")
        if self.etags:
            self.send_header("ETag", f'"{hash(data)}"')
        self.end_headers()
        self.server.asked.append((self.command, self.path, body))  # type: ignore[attr-defined]
        return io.BytesIO(body)


@contextmanager
def serving(folder: Path, *, etags: bool = True) -> Iterator[tuple[str, list[tuple[str, str, bytes]]]]:
    """Serve a folder; give its URL, and a list of what was asked for: (method, path, bytes)."""
    handler = type("Handler", (Handler,), {"etags": etags})
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.asked  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
