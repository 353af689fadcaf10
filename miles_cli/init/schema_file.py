"""The JSON schema of a run file, where an editor finds it: in the cache, named by its content."""

from __future__ import annotations

import hashlib

from miles import environment


def write_schema() -> str:
    """Write the schema once and return its address for the `#:schema` line; empty where it cannot."""
    from miles.config.reference import schema_text

    text = schema_text()
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    path = environment.cache_dir() / "schema" / f"run-file-{digest}.json"
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError:
        # A cache that cannot be written costs completion in an editor, not the run file.
        return ""
    return path.absolute().as_uri()
