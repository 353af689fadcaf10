"""The dashboard in a browser: loopback only, no foreign stylesheet, no foreign page, no orphan."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from frames import RUN

from miles.errors import Unavailable
from miles.rollout.sglang.server import free_ports
from miles_cli.dashboard.app import serve_dashboard

aiohttp = pytest.importorskip("aiohttp")
pytest.importorskip("textual_serve")

SERVE = """
import sys
from pathlib import Path
from miles_cli.dashboard.app import serve_dashboard
serve_dashboard([Path(sys.argv[1])], port=int(sys.argv[2]))
"""


def test_a_tab_shows_the_run_and_everything_ends_with_the_server() -> None:
    (port,) = free_ports(1)
    server = subprocess.Popen([sys.executable, "-c", SERVE, str(RUN), str(port)], stderr=subprocess.DEVNULL)
    try:
        page, refused, seen = asyncio.run(visit(f"http://127.0.0.1:{port}"))
        bound = {
            c.laddr.ip for c in psutil.Process(server.pid).net_connections("tcp") if c.status == "LISTEN"
        }
        children = psutil.Process(server.pid).children(recursive=True)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=300)
    assert "https://" not in page
    assert refused == 403
    assert b"sort-moe" in seen
    assert bound == {"127.0.0.1"}
    _, alive = psutil.wait_procs(children, timeout=300)
    assert not alive


def test_a_port_that_is_taken_is_told_with_another_one() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        with pytest.raises(Unavailable, match="the port cannot be had") as error:
            serve_dashboard([RUN], port=holder.getsockname()[1])
    assert "miles watch --web --port" in error.value.fix


async def visit(url: str) -> tuple[str, int, bytes]:
    """The page, the status a foreign site gets, and what a tab of our own is sent."""
    async with aiohttp.ClientSession() as session:
        page = await until_up(session, url)
        socket_url = f"{url}/ws?width=120&height=40"
        foreign = await session.get(socket_url, headers={"Origin": "http://example.com"})
        seen = b""
        async with session.ws_connect(socket_url, origin=url) as tab:
            while b"sort-moe" not in seen:
                message = await tab.receive(timeout=300)
                seen += message.data if isinstance(message.data, bytes) else b""
        return page, foreign.status, seen


async def until_up(session, url: str) -> str:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 300
    while True:
        try:
            async with session.get(url) as answer:
                return await answer.text()
        except aiohttp.ClientConnectorError:
            assert time.monotonic() < deadline, "the server did not come up"
            await asyncio.sleep(0.1)
