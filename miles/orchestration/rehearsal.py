"""`miles train --rehearse`: a run on GPUs, three steps of it, on the CPUs of this machine with a small model.

>>> resolved, changes = rehearse(resolve("qwen3-moe-fp8"))
"""

from __future__ import annotations

import hashlib
import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

from miles import environment
from miles.arch import ArchSpec
from miles.arch.checkpoint import read_json, spec_from_hf_config
from miles.arch.hf_config import HF_DTYPE_NAMES
from miles.arch.shrink import small_config
from miles.arch.specs import shipped_names, shipped_spec
from miles.config import ResolvedConfig, RunConfig
from miles.config.resolve import with_changes
from miles.data.tasks import resolve_builtin, sort
from miles.errors import ConfigError, MilesError
from miles.orchestration.small_model import make_small_model
from miles.planning import collect_facts
from miles.planning.facts.checkpoint import read_checkpoint
from miles.planning.rehearsal import Change, sizes
from miles.planning.rehearsal_limits import unusable
from miles.planning.subject import Subject

RECIPE_VERSION = 1
"""Goes up with every change of what is made, so that a cache never mixes recipes."""
MOST_PROCESSES = 8
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def rehearse(resolved: ResolvedConfig) -> tuple[ResolvedConfig, tuple[Change, ...]]:
    """The run as it can be rehearsed here, and every difference from the one on GPUs.

    Makes the small model on first use. Raises: ConfigError for a run that needs no GPU, or no model is named.
    """
    config = resolved.config
    if not config.cluster.actor_num_gpus_per_node:
        problem = MilesError(
            "this run needs no GPU: there is nothing to rehearse", where="--rehearse", fix="leave it out"
        )
        raise ConfigError(problem)
    source, spec = _model(config)
    directory, small = _small_checkpoint(config, source, spec)
    facts = collect_facts(with_changes(resolved, ["cluster.address=default"]).config)
    processes = min(facts.machine.cores, MOST_PROCESSES, config.cluster.actor_num_gpus_per_node)
    has_server = facts.server is not None and facts.server.version is not None
    changes = sizes(
        resolved,
        small,
        1 << (processes.bit_length() - 1),
        has_server,
        (str(directory), str(_prompts(config, directory))),
    )
    while True:
        changed = with_changes(resolved, [change.assignment for change in changes])
        more = unusable(Subject(changed, collect_facts(changed.config)))
        if not more:
            reasons = list(dict.fromkeys(change.why for change in changes))
            return changed, tuple(sorted(changes, key=lambda change: reasons.index(change.why)))
        changes = (*changes, *more)


def _model(config: RunConfig) -> tuple[Path | None, ArchSpec]:
    """The checkpoint whose tokenizer goes along, where there is one, and what is made small."""
    named = config.model.hf_checkpoint
    found = read_checkpoint(named)[0].spec if named is not None else None
    if found is not None:
        return Path(str(named)), found
    name = config.model.model_name
    if name in shipped_names():
        return None, shipped_spec(str(name))
    problem = MilesError(
        "a rehearsal needs to know the model",
        where="model.model_name",
        fix="name a shipped architecture (--model-name), or a checkpoint (--hf-checkpoint)",
    )
    raise ConfigError(problem)


def _small_checkpoint(config: RunConfig, source: Path | None, spec: ArchSpec) -> tuple[Path, ArchSpec]:
    """The small model on disk, with random weights and a tokenizer; kept in the cache."""
    vocabulary = spec.vocab_size if source else len(sort.VOCABULARY)
    dtype = config.model.dtype or spec.dtype
    made = small_config(spec, vocabulary) | _special_ids(source) | {"torch_dtype": HF_DTYPE_NAMES[dtype]}
    small = spec_from_hf_config(made, where="the rehearsal's config.json")
    digest = hashlib.sha256(json.dumps([RECIPE_VERSION, made, _digests(source)], sort_keys=True).encode())
    root = environment.cache_dir() / "rehearsal"
    target = root / f"{small.family}-{digest.hexdigest()[:12]}"
    if not target.exists():
        described = root / f".{target.name}-described"
        described.mkdir(parents=True, exist_ok=True)
        (described / "config.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        _tokenizer(source, described)
        make_small_model(described, target)
    return target, small


def _special_ids(source: Path | None) -> dict[str, Any]:
    if source is None:
        own = sort.model_config()
        return {key: own[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    ids = {
        key: value for key, value in read_json(source / "config.json").items() if key.endswith("_token_id")
    }
    return ids


def _digests(source: Path | None) -> list[str]:
    files = [source / name for name in TOKENIZER_FILES] if source else []
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()]


def _tokenizer(source: Path | None, directory: Path) -> None:
    """The checkpoint's own, else that of the built-in task with a template that says nothing of its own."""
    origin = source or resolve_builtin("builtin:sort")
    for name in TOKENIZER_FILES:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, directory / name)
    if source is None:
        settings = directory / "tokenizer_config.json"
        written = read_json(settings) | {"chat_template": CHAT_TEMPLATE}
        settings.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _prompts(config: RunConfig, directory: Path) -> Path:
    """Sums below ten, in the columns that the run reads."""
    data = config.data
    label = data.label_key or "label"
    rows = [
        {data.input_key: f"{a}+{b}=", label: str(a + b)}
        for a, b in product(range(10), repeat=2)
        if a + b < 10
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    path = directory.with_name(f"prompts-{name}.jsonl")
    if not path.exists():
        path.write_text(text, encoding="utf-8")
    return path
