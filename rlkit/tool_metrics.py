"""Tool calls as figures: columns of rollouts and evaluations, and the averages of a step.

A call fails if its code did (status other than ``ok``). ``infra`` is a failure of the machinery,
which says nothing about the policy and is no call here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rlkit.completion import Completion


def call_columns(completions: Sequence[Completion]) -> dict[str, list[Any]]:
    """Per completion: ``calls``, ``failed_calls``, ``tool_tokens``, ``tool_seconds`` (wall time in
    the tool), and ``tool_calls``, a JSON list of what ran (``read_calls``).
    """
    statuses = [[k.status for k in c.tool_calls if k.status != "infra"] for c in completions]
    return {
        "calls": [len(each) for each in statuses],
        "failed_calls": [len(each) - each.count("ok") for each in statuses],
        "tool_tokens": [len(c.loss_mask) - sum(c.loss_mask) for c in completions],
        "tool_seconds": [sum(k.wall_seconds for k in c.tool_calls) for c in completions],
        "tool_calls": [json.dumps([asdict(k) for k in c.tool_calls]) for c in completions],
    }


def read_calls(text: str) -> list[dict[str, Any]]:
    """The calls of one row, as dictionaries with the fields of ``completion.ToolCall``."""
    calls: list[dict[str, Any]] = json.loads(text)
    return calls


def call_figures(completions: Sequence[Completion]) -> dict[str, float | None]:
    """Averages of one step; None where there is nothing to average.

    ``call_rate``: share of responses with a call; ``calls_mean``: calls per response;
    ``call_failures``: share of calls that failed; ``calls_ended``: share of responses that ran out
    of calls; ``tool_tokens_mean``: forced tokens per response; ``seconds_tool``: wall time in the
    tool, over all calls (they run beside each other).
    """
    columns = call_columns(completions)
    calls, n = sum(columns["calls"]), len(completions)
    return {
        "call_rate": sum(c > 0 for c in columns["calls"]) / n,
        "calls_mean": calls / n,
        "call_failures": sum(columns["failed_calls"]) / calls if calls else None,
        "calls_ended": sum(c.stop == "calls" for c in completions) / n,
        "tool_tokens_mean": sum(columns["tool_tokens"]) / n,
        "seconds_tool": float(sum(columns["tool_seconds"])),
    }
