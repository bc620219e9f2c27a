"""The report of a run that goes on, served to this machine alone and made anew for every request.

There are no files to ask for: the page stands at "/" and is made in memory. The server listens on the loopback address,
and answers only requests that name it so: a page from elsewhere whose name was made to mean 127.0.0.1 (DNS rebinding)
sends its own name as Host and is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ..errors import SievitError, UsageError

LOOPBACK = "127.0.0.1"
EVERY = 5  # seconds between two looks at the run
PAUSED = "/?paused"  # the page that does not refresh itself
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",  # the page's own policy stands in it
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
# paused -> the page, and whether its run still goes on
Page = Callable[[bool], tuple[str, bool]]


class Server(ThreadingHTTPServer):
    """Serves one page. Port 0 takes any that is free. Raises UsageError for one that is not."""

    daemon_threads = True  # a browser that keeps a connection open must not keep the server from ending
    allow_reuse_address = True

    def __init__(self, page: Page, port: int) -> None:
        self.page = page
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise UsageError(
                f"port {port} cannot be listened on: {error.strerror or error}", hint="--port 0 takes one that is free"
            ) from error

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}/"

    def names(self) -> frozenset[str]:
        """What a Host header may say."""
        return frozenset(f"{name}:{self.server_port}" for name in (LOOPBACK, "localhost"))


def serve(server: Server) -> None:
    """Until Ctrl-C, which ends it as it is meant to be ended."""
    try:
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version = "sievit"
    sys_version = ""
    timeout = 30  # seconds that a connection may stay silent

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the terminal belongs to the command."""

    def _answer(self) -> None:
        hosts = self.headers.get_all("Host") or []
        if [host.strip().lower() in self.server.names() for host in hosts] != [True]:
            self._send(403, f"This page is served to this machine alone, at {self.server.url}\n")
        elif self.path not in ("/", PAUSED):
            self._send(404, f"There is one page here: {self.server.url}\n")
        else:
            self._send_page(paused=self.path == PAUSED)

    def _send_page(self, *, paused: bool) -> None:
        try:
            page, goes_on = self.server.page(paused)
        except (SievitError, OSError) as error:
            self._send(503, f"{error}\n", refresh=not paused)
            return
        self._send(200, page, kind="text/html", refresh=goes_on and not paused)

    def _send(self, code: int, content: str, *, kind: str = "text/plain", refresh: bool = False) -> None:
        body = content.encode()
        self.send_response(code)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if refresh:
            self.send_header("Refresh", str(EVERY))
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
