"""The run file: typed sections, profiles, layering, provenance, and the flag table."""

from __future__ import annotations

from miles.config.assignments import Assignment
from miles.config.dump import config_hash, dump_toml, from_json, json_schema, to_json
from miles.config.fields import FieldInfo, Kind, fields
from miles.config.flags import parse_flags, parse_sets
from miles.config.lookup import find_flag, find_key
from miles.config.origin import Origin, OriginKind
from miles.config.resolve import resolve, with_changes
from miles.config.resolved import ResolvedConfig
from miles.config.sections import RunConfig
from miles.config.shipped import shipped_names, shipped_root

__all__ = [
    "Assignment",
    "FieldInfo",
    "Kind",
    "Origin",
    "OriginKind",
    "ResolvedConfig",
    "RunConfig",
    "config_hash",
    "dump_toml",
    "fields",
    "find_flag",
    "find_key",
    "from_json",
    "json_schema",
    "parse_flags",
    "parse_sets",
    "resolve",
    "shipped_names",
    "shipped_root",
    "to_json",
    "with_changes",
]
