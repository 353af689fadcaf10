"""The OpenMetrics text of a run under http://127.0.0.1:<port>/metrics, for as long as the run lasts."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from miles.errors import Unavailable
from miles.exporters.openmetrics import CONTENT_TYPE, Latest

HOST = "127.0.0.1"
PATH = "/metrics"


class PrometheusPage(Latest):
    """Serves the latest values; `port` 0 takes any free one. Raises Unavailable when the port is taken."""

    def __init__(self, run: str, port: int) -> None:
        super().__init__(run)
        self._published = self.text()
        try:
            self._server = ThreadingHTTPServer((HOST, port), self._handler())
        except OSError as error:
            raise Unavailable(
                "the page for Prometheus cannot be served",
                where=f"{HOST}:{port}",
                why=str(error.strerror),
                fix="choose another port with --prometheus-port",
            ) from error
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True)
        self._thread.start()

    def flush(self) -> None:
        self._published = self.text()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        page = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path != PATH:
                    self.send_error(404)
                    return
                body = page._published.encode()
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Requests are not news."""

        return Handler
