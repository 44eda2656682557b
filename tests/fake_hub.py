"""A hub on this machine, which only says whether it has what an id names."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

ABSENT = ("nope", "data/mine", "private")  # what ids end with that it does not have, or does not show


class Hub(BaseHTTPRequestHandler):
    """Answers 401 for what it lacks, as the hub does; for "broken", as a proxy that does not reach the hub."""

    def do_HEAD(self):
        self.send_response(503 if self.path.endswith("broken") else 401 if self.path.endswith(ABSENT) else 200)
        self.end_headers()

    def log_message(self, *_):
        """Print nothing."""


@contextmanager
def serve() -> Iterator[str]:
    """The address of a hub that lives as long as the block."""
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
