"""`miles data`: prompt files as a run will read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from miles.errors import ConfigError, MilesError

if TYPE_CHECKING:
    from miles.data.prompts import PromptFormat
    from miles.data.survey import Survey, SurveyedPrompt

app = typer.Typer(help="Show prompt data as a run will read it.", no_args_is_help=True)

BAR_WIDTH = 40
BUCKETS = 8
LISTED_PROBLEMS = 20
QUANTILES = ((0, "min"), (50, "median"), (90, "p90"), (99, "p99"), (100, "max"))


@app.callback()
def group() -> None:
    """Show prompt data as a run will read it."""


@app.command("show")
def show(
    path: Annotated[
        str, typer.Argument(help="JSON lines or Parquet, `path@[a:b]` for a slice, or builtin:sort/train.")
    ],
    n: Annotated[int, typer.Option("--n", min=0, help="Prompts to print.")] = 5,
    input_key: Annotated[str, typer.Option(help="Column of the prompt.")] = "input",
    label_key: Annotated[str | None, typer.Option(help="Column of the expected answer.")] = None,
    metadata_key: Annotated[str, typer.Option(help="Column of free data.")] = "metadata",
    tool_key: Annotated[str, typer.Option(help="Column of tool definitions.")] = "tools",
    tokenizer: Annotated[
        str | None, typer.Option(help="Checkpoint directory whose tokenizer and template the run uses.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Render prompts with the chat template.")
    ] = False,
    apply_chat_template_kwargs: Annotated[
        str, typer.Option(help="JSON object of arguments for the chat template.")
    ] = "{}",
    chat_template_path: Annotated[
        Path | None, typer.Option(help="Jinja file in place of the checkpoint's template.")
    ] = None,
    rollout_max_prompt_len: Annotated[
        int | None, typer.Option(min=1, help="Longest prompt in tokens; longer ones are left out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Print the first prompts, how long all of them are, and every row that is left out, with its line."""
    from miles.data.prompts import PromptKeys
    from miles.data.rows import parse_data_path
    from miles.data.survey import survey

    if tokenizer is None:
        _require_tokenizer(
            {
                "--apply-chat-template": apply_chat_template,
                "--chat-template-path": chat_template_path,
                "--rollout-max-prompt-len": rollout_max_prompt_len,
            }
        )
    prompt_format = None
    if tokenizer is not None:
        kwargs = _json_object(apply_chat_template_kwargs)
        prompt_format = _prompt_format(tokenizer, chat_template_path, apply_chat_template, kwargs)
    found = survey(
        parse_data_path(path),
        PromptKeys(input_key, label_key, metadata_key, tool_key),
        prompt_format,
        n,
        rollout_max_prompt_len,
    )
    if as_json:
        typer.echo(json.dumps(_as_dict(found), ensure_ascii=False, default=str))
        return
    for line in _report(found):
        typer.echo(line)
    if tokenizer is None:
        typer.echo("Lengths are in characters; give --tokenizer DIR for tokens.", err=True)


def _prompt_format(
    tokenizer: str, template: Path | None, apply_chat_template: bool, kwargs: dict[str, Any]
) -> PromptFormat:
    from miles.data import tasks
    from miles.data.prompts import PromptFormat
    from miles.data.tokenizer import CheckpointTokenizer

    checkpoint = tasks.resolve_builtin(tokenizer) if tasks.is_builtin(tokenizer) else Path(tokenizer)
    return PromptFormat(CheckpointTokenizer(checkpoint, template), apply_chat_template, kwargs)


def _require_tokenizer(options: dict[str, object]) -> None:
    given = [flag for flag, value in options.items() if value]
    if given:
        raise ConfigError(
            MilesError(f"{', '.join(given)} without a tokenizer", fix="add --tokenizer CHECKPOINT_DIR")
        )


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise _not_an_object(f"not JSON: {error.msg}") from error
    if not isinstance(value, dict):
        raise _not_an_object("not a JSON object")
    return value


def _not_an_object(what: str) -> ConfigError:
    fix = "--apply-chat-template-kwargs '{\"enable_thinking\": false}'"
    return ConfigError(MilesError(what, where="--apply-chat-template-kwargs", fix=fix))


def _as_dict(found: Survey) -> dict[str, Any]:
    return {
        "path": found.path,
        "rows": found.num_rows,
        "usable": found.num_usable,
        "unit": found.unit,
        "measured": len(found.lengths),
        "lengths": _quantiles(found),
        "problems": [{"line": p.line, "kind": p.kind, "reason": p.reason} for p in found.problems],
        "prompts": [
            {
                "line": prompt.line,
                "text": prompt.text,
                "token_ids": prompt.token_ids,
                "label": prompt.row.label,
                "metadata": prompt.row.metadata,
                "tools": prompt.row.tools,
            }
            for prompt in found.first
        ],
    }


def _quantiles(found: Survey) -> dict[str, int]:
    import numpy as np

    if not len(found.lengths):
        return {}
    return {name: round(float(np.percentile(found.lengths, q))) for q, name in QUANTILES}


def _report(found: Survey) -> list[str]:
    lines = [f"{found.path}: {found.num_rows:,} rows, {found.num_usable:,} usable", *_length_lines(found)]
    if found.problems:
        lines += ["", f"left out: {len(found.problems):,} rows"]
        lines += [f"  {_printable(str(problem))}" for problem in found.problems[:LISTED_PROBLEMS]]
        more = len(found.problems) - LISTED_PROBLEMS
        lines += [f"  and {more:,} more (--json lists all)"] if more > 0 else []
    for prompt in found.first:
        lines += ["", *_prompt_lines(prompt, found.unit)]
    return lines


def _length_lines(found: Survey) -> list[str]:
    """Quantiles and a histogram of equal steps."""
    import numpy as np

    if not len(found.lengths):
        return []
    quantiles = "  ".join(f"{name} {value:,}" for name, value in _quantiles(found).items())
    lines = [f"prompt {found.unit} of {len(found.lengths):,} rows: {quantiles}"]
    low, high = int(found.lengths.min()), int(found.lengths.max())
    step = max(1, -(-(high - low + 1) // BUCKETS))
    counts = np.bincount((found.lengths - low) // step)
    for i, count in enumerate(counts.tolist()):
        start, end = low + i * step, min(low + (i + 1) * step - 1, high)
        label = f"{start:,}" if start == end else f"{start:,}-{end:,}"
        bar = "#" * max(round(count * BAR_WIDTH / int(counts.max())), int(count > 0))
        lines.append(f"  {label:>15} {bar:<{BAR_WIDTH}} {count:,}")
    return lines


def _prompt_lines(prompt: SurveyedPrompt, unit: str) -> list[str]:
    head = f"line {prompt.line} · {prompt.length:,} {unit}"
    if prompt.row.label is not None:
        head += f" · label {_printable(prompt.row.label)}"
    if prompt.row.metadata:
        head += f" · metadata {_printable(json.dumps(prompt.row.metadata, ensure_ascii=False, default=str))}"
    if prompt.row.tools is not None:
        head += f" · {len(prompt.row.tools)} tools"
    lines = [head, *(f"  {line}" for line in _printable(prompt.text).split("\n"))]
    if prompt.token_ids is not None:
        lines.append(f"  ids {' '.join(map(str, prompt.token_ids))}")
    return lines


def _printable(text: str) -> str:
    """Control characters but line ends made visible: data must not drive the terminal."""
    return "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in text)
