"""A small HTTP/1.1 client for one server: JSON out, bytes in, one connection per request.

A request that a server is working on ends with the connection, so cancelling the caller cancels the request.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import orjson

from miles.errors import ConfigError, MilesError


class ConnectionLost(MilesError):
    """The server could not be reached, or went away before it had answered."""


@dataclass(frozen=True)
class Response:
    """Status code and body of one answer."""

    status: int
    body: bytes

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    def json(self) -> Any:
        """The body read as JSON; None where it is empty."""
        return orjson.loads(self.body) if self.body else None

    def complaint(self) -> str:
        """What the server says is wrong, in one line."""
        try:
            said = self.json()
        except orjson.JSONDecodeError:
            said = None
        while isinstance(said, dict):
            said = said.get("error") or said.get("message") or said.get("detail")
        text = str(said) if said else self.body.decode("utf-8", "replace")
        return " ".join(text.split())[:400] or f"HTTP status {self.status}"


class HttpClient:
    """Requests to one base address, such as `http://127.0.0.1:30000`."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Raises ConfigError when the address is not one of an HTTP server."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            problem = MilesError(f"{url!r} is no address of a server", fix="write http://host:port")
            raise ConfigError(problem)
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._host, self._path = parts.hostname, parts.path.rstrip("/")
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._headers = f"Host: {parts.netloc}\r\n{key}Connection: close\r\n"

    async def get(self, path: str, timeout: float | None = None) -> Response:
        return await self._ask("GET", path, b"", timeout)

    async def post(self, path: str, body: Any, timeout: float | None = None) -> Response:
        """Send `body` as JSON (numpy arrays of numbers are lists)."""
        raw = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        return await self._ask("POST", path, raw, timeout)

    async def _ask(self, method: str, path: str, body: bytes, timeout: float | None) -> Response:
        """One exchange. Raises: ConnectionLost, also when it takes longer than `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                return await self._exchange(method, path, body)
        except TimeoutError as late:
            raise ConnectionLost(
                f"{self.url} did not answer {method} {path} within {timeout:g} s", why="it hangs or is busy"
            ) from late
        except (OSError, EOFError, asyncio.IncompleteReadError) as lost:
            reason = str(lost) or type(lost).__name__
            raise ConnectionLost(f"{self.url} did not answer {method} {path}", why=reason) from lost

    async def _exchange(self, method: str, path: str, body: bytes) -> Response:
        async with self._connection() as (reader, writer):
            head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._headers}"
            if method == "POST":
                head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            writer.write(f"{head}\r\n".encode() + body)
            await writer.drain()
            status = int((await _line(reader)).split(" ", 2)[1])
            headers = {}
            while line := await _line(reader):
                name, _, value = line.partition(":")
                headers[name.strip().lower()] = value.strip()
            return Response(status, await _body(reader, headers))

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        try:
            yield reader, writer
        finally:
            writer.close()


async def _line(reader: asyncio.StreamReader) -> str:
    raw = await reader.readline()
    if not raw.endswith(b"\n"):
        raise EOFError("the connection ended in the middle of an answer")
    return raw.decode("latin-1").rstrip("\r\n")


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        chunks = []
        while size := int((await _line(reader)).partition(";")[0], 16):
            chunks.append(await reader.readexactly(size))
            await _line(reader)
        return b"".join(chunks)
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    return await reader.read()
