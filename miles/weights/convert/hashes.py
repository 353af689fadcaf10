"""SHA-256 of files, and what the files of a source should have: as their publisher or converter says."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from miles.errors import CheckpointError

MANIFEST = "miles_convert.json"
"""What a conversion leaves beside the weights that it wrote."""

_CHUNK_BYTES = 1 << 22
_SHA256 = re.compile(r"[0-9a-f]{64}")


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def verified_sha256(path: Path) -> str:
    """The digest of a source's file. Raises CheckpointError where it is known to be another one."""
    expected, found = expected_sha256(path), sha256_of(path)
    if expected is not None and found != expected:
        raise CheckpointError(
            "the file is corrupted: its SHA-256 is not the one it was published with",
            where=str(path),
            why=f"{found[:16]}… instead of {expected[:16]}…",
            fix="copy or download the file again",
        )
    return found


def expected_sha256(path: Path) -> str | None:
    """The digest that a file should have, where something beside it says so: the manifest of a conversion,
    the Hugging Face cache (its blobs are named by digest), or the metadata of `hf download --local-dir`.
    """
    for directory in path.parents[:3]:
        manifest = directory / MANIFEST
        if manifest.is_file():
            files = json.loads(manifest.read_text(encoding="utf-8")).get("files", {})
            known = files.get(path.relative_to(directory).as_posix())
            if known is not None:
                return str(known["sha256"])
    blob = path.resolve()
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    metadata = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    if metadata.is_file():
        etag = metadata.read_text(encoding="utf-8").splitlines()[1:2]
        if etag and _SHA256.fullmatch(etag[0].strip()):
            return etag[0].strip()
    return None
