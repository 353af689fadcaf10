"""The dashboard in a browser: textual-serve on loopback, without a stylesheet from elsewhere.

There is no password, so it never binds beyond loopback, and it refuses a web socket that another site opens.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import aiohttp_jinja2
import jinja2
from aiohttp import web
from textual_serve.server import Server

LOOPBACK = "127.0.0.1"
_FOREIGN_STYLE = re.compile(r"<link\s[^>]*href=\"https?://[^>]*>")


class DashboardServer(Server):
    """Starts one dashboard process per browser tab."""

    def __init__(self, run_dirs: Sequence[Path], port: int, symbols: str | None = None) -> None:
        words = [
            sys.executable,
            "-m",
            "miles_cli.dashboard.web_child",
            *(str(path.resolve()) for path in run_dirs),
        ]
        if symbols is not None:
            words += ["--symbols", symbols]
        super().__init__(shlex.join(words), host=LOOPBACK, port=port, title="miles watch")
        self._origins = {f"http://{host}:{port}" for host in (LOOPBACK, "localhost")}

    async def _make_app(self) -> web.Application:
        app = await super()._make_app()
        page = (Path(self.templates_path) / "app_index.html").read_text()
        loader = jinja2.DictLoader({"app_index.html": _FOREIGN_STYLE.sub("", page)})
        aiohttp_jinja2.setup(app, loader=loader)
        return app

    async def on_startup(self, app: web.Application) -> None:
        print(f"miles watch: {self.public_url} (this machine only; ctrl+c ends it)", file=sys.stderr)

    async def handle_websocket(self, request: web.Request) -> web.WebSocketResponse:
        if request.headers.get("Origin") not in self._origins:
            raise web.HTTPForbidden(text="this page was not served from here")
        return await super().handle_websocket(request)
