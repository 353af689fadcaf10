"""The child process that runs math-verify: one JSON object per line in, one out.

Request: {"response", "label"}. Reply: {"correct"}, or {"bad_label": true} for a label that math-verify cannot
read. It runs as a file of its own and imports nothing of miles, so that it starts fast.
"""

from __future__ import annotations

import json
import logging
import os
import sys


def as_latex(label: str) -> str:
    """Labels are bare answers (`\\frac{1}{2}`); math-verify reads LaTeX only inside a math environment."""
    return label if "\\boxed" in label or "$" in label else f"\\boxed{{{label}}}"


def judge(response: str, label: str) -> dict[str, bool]:
    """Whether the response's final answer equals the label, by math-verify's comparison."""
    from math_verify import parse, verify

    # No timeouts of its own: they need signals; the parent ends a process that takes too long.
    gold = parse(as_latex(label), parsing_timeout=None)
    if not gold:
        return {"bad_label": True}
    answer = parse(response, parsing_timeout=None)
    return {"correct": bool(verify(gold, answer, timeout_seconds=None))}


def main() -> None:
    # What a library prints must not get between the replies.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    for line in sys.stdin:
        request = json.loads(line)
        replies.write(json.dumps(judge(request["response"], request["label"])) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
