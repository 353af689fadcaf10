"""What a stranger must not read: secrets, home directories, user names."""

from __future__ import annotations

import re
from collections.abc import Iterable

HIDDEN = "<redacted>"
USER = "<user>"
_SECRET_WORDS = (
    "api[_-]?key",
    "access[_-]?key",
    "wandb[_-]key",
    "token(?!s|iz|_id|s_)",
    "secret",
    "passw(?:or)?d",
    "credential",
    "cookie",
)
_SECRET_NAME = rf"[\w.-]*(?:{'|'.join(_SECRET_WORDS)})[\w-]*"
_ASSIGNED = rf"""["']?\b{_SECRET_NAME}["']?\s*[:=]\s*"""
_FLAG = rf"--{_SECRET_NAME}\s+"
_ASSIGNMENT = re.compile(
    rf"""(?P<name>{_ASSIGNED}|{_FLAG})(?P<quote>["']?)(?P<value>[^\s"',}}]{{6,}})(?P=quote)""", re.IGNORECASE
)
_SECRETS = (
    re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    re.compile(r"\b(?:ghp|gho|ghs|ghu|github_pat)_[A-Za-z0-9_]{20,}"),
    re.compile(r"\bglpat-[A-Za-z0-9_-]{16,}"),
    re.compile(r"\bsk-[A-Za-z0-9_-]{16,}"),
    re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
    re.compile(r"\bA(?:KIA|SIA)[A-Z0-9]{16}\b"),
    re.compile(r"\bAIza[A-Za-z0-9_-]{30,}"),
    re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
)
_BEARER = re.compile(r"(\b(?:Bearer|Basic)\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
_URL_LOGIN = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@:]+:[^\s/@]+@")
_HOME = re.compile(r"/(?:home|Users)/(?P<user>[^/\s\"':]+)|/root(?=/|\b)")
_WINDOWS_HOME = re.compile(r"[A-Za-z]:\\+Users\\+(?P<user>[^\\\s\"']+)")
_SYSTEM_USERS = frozenset({"root", "user", "users", "shared", "admin", "runner", "ubuntu"})
_NAME_CHARS = 3


class Redactor:
    """Takes out secrets, puts ~ for home directories, and <user> for the names found in them.

    `users` are names known beforehand (the owner of the files); names that stand in home paths of a text
    are learned, so texts whose paths tell names should be read first.
    """

    def __init__(self, users: Iterable[str] = (), homes: Iterable[str] = ()) -> None:
        self._users: set[str] = set()
        for user in users:
            self._learn(user)
        self._homes = sorted({home.rstrip("/") for home in homes if len(home) > 1}, key=len, reverse=True)

    def text(self, text: str) -> str:
        """The text as it may be shown."""
        for secret in _SECRETS:
            text = secret.sub(HIDDEN, text)
        text = _BEARER.sub(rf"\1{HIDDEN}", text)
        text = _URL_LOGIN.sub(rf"\1{HIDDEN}@", text)
        text = _ASSIGNMENT.sub(_hide_value, text)
        for home in self._homes:
            text = re.sub(rf"{re.escape(home)}(?=/|\b)", "~", text)
        for pattern in (_HOME, _WINDOWS_HOME):
            for match in pattern.finditer(text):
                self._learn(match.groupdict().get("user") or "")
            text = pattern.sub("~", text)
        if self._users:
            names = "|".join(sorted(map(re.escape, self._users), key=len, reverse=True))
            text = re.sub(rf"(?<![A-Za-z0-9])(?:{names})(?![A-Za-z0-9])", USER, text)
        return text

    def variable(self, name: str, value: str) -> str:
        """The value of an environment variable as it may be shown."""
        return HIDDEN if re.fullmatch(_SECRET_NAME, name, re.IGNORECASE) else self.text(value)

    def _learn(self, user: str) -> None:
        if len(user) >= _NAME_CHARS and user.lower() not in _SYSTEM_USERS:
            self._users.add(user)


def _hide_value(match: re.Match[str]) -> str:
    return f"{match['name']}{match['quote']}{HIDDEN}{match['quote']}"
