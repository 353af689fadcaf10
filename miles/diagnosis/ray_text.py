"""Peeling Ray off what its workers printed: line prefixes, wrappers around exceptions, notices of death."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_PREFIX = re.compile(r"^\((?P<name>[\w.:<>\[\]/ -]+?)(?: pid=(?P<pid>\d+))?(?:, ip=[\d.:a-f]+)?\) ")
_RANK = re.compile(r"^\[(?P<rank>rank\d+)\]: ?")
_REPEATED = re.compile(r" ?\[repeated \d+x across cluster\].*$")
_FIELD = re.compile(r"^\t(class_name|actor_id|pid|ip): (\S+)", re.MULTILINE)
_DETAIL = re.compile(
    r"Worker exit type: (\w+) Worker exit detail: ([^\n]+?)(?: Some common causes| There are|\n|$)"
)
_RAYLET = re.compile(
    r"Worker IP address: (\S+) Worker port: \d+ Worker PID: (\d+) (Worker exit type: [^\n]+)"
)
_WORKER = re.compile(r"ray::([\w.<>]+)\(\) \(pid=(\d+)(?:, ip=([\d.:a-f]+))?")
NOTICE = "The actor died unexpectedly before finishing this task."
NOTICE_CHARS = 3000


@dataclass(frozen=True)
class DeadActor:
    """What Ray said of a worker that is gone; what it did not tell is ""."""

    class_name: str
    pid: str
    ip: str
    reason: str

    @property
    def name(self) -> str:
        return f"{self.class_name or 'a worker'} (pid {self.pid} on {self.ip})"


def plain_line(line: str) -> str:
    """The line without escape codes."""
    return _ANSI.sub("", line)


def split_line(line: str) -> tuple[str, str]:
    """(worker, text) of one plain line of a driver's log; worker is "" for the driver's own lines."""
    if (match := _PREFIX.match(line)) is not None and (match["pid"] or match["name"] == "raylet"):
        name = match["name"] if match["pid"] is None else f"{match['name']} pid={match['pid']}"
        return name, _REPEATED.sub("", line[match.end() :])
    if (match := _RANK.match(line)) is not None:
        return match["rank"], line[match.end() :]
    return "", line


def remote_worker(text: str) -> str | None:
    """The innermost remote call that a wrapped exception names: `Engine.generate (pid 71 on 10.0.0.2)`."""
    found = _WORKER.findall(text)
    if not found:
        return None
    call, pid, ip = found[-1]
    return f"{call} (pid {pid}{f' on {ip}' if ip else ''})"


def dead_actors(text: str) -> Iterator[DeadActor]:
    """Every worker whose unexpected death the text reports, once, in the order of reports."""
    dead: dict[str, DeadActor] = {}
    for ip, pid, detail in _RAYLET.findall(text):
        dead[pid] = DeadActor("", pid, ip, _reason(detail))
    start = text.find(NOTICE)
    while start >= 0:
        notice = text[start : start + NOTICE_CHARS]
        fields = dict(_FIELD.findall(notice[:500]))
        pid = fields.get("pid", "")
        dead[pid] = DeadActor(fields.get("class_name", ""), pid, fields.get("ip", ""), _reason(notice))
        start = text.find(NOTICE, start + 1)
    yield from dead.values()


def _reason(text: str) -> str:
    detail = _DETAIL.search(text)
    return f"{detail[1]}: {detail[2].strip().rstrip('.')}" if detail else "Ray gives no reason"
