"""The entry gate: whether an embedded base model holds something for RL to amplify, before any RL.

Four probes showed what happens otherwise: with the reasoning mode no better than the short one RL
removes it or collapses. Measured on validation problems; test problems choose nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from rlkit.evaluate import EvalResult
from rlkit.measure import measure
from rlkit.tools import Mode

BUDGET = {"chain": 100, "edge": 200, "large": 200}
"""Token budget per task: longer than any well-formed document of the corpus but checked ones."""


@dataclass(frozen=True)
class Check:
    """One line of the gate: ``low <= value <= high``."""

    name: str
    value: float
    low: float = -math.inf
    high: float = math.inf

    @property
    def passed(self) -> bool:
        return self.low <= self.value <= self.high

    @property
    def bounds(self) -> str:
        parts = [f">= {self.low}"] * (self.low > -math.inf)
        return ", ".join(parts + [f"<= {self.high}"] * (self.high < math.inf))

    def __str__(self) -> str:
        mark = "pass" if self.passed else "FAIL"
        return f"{mark}  {self.name:<44} {self.value:7.3f}  ({self.bounds})"


def check_base(model: str, *, problems: int = 128, samples: int = 128) -> list[Check]:
    """Measure a base model (name or folder) on ``chain`` and ``edge`` validation problems."""
    chain = _measure(model, "chain", problems, samples)
    edge = _measure(model, "edge", problems, samples)
    forced = _measure(model, "edge", problems, min(16, samples), forced=True)
    reasoned, direct = chain["accuracy_reasoning"].value, chain["accuracy_direct"].value
    widest = edge[f"pass@{samples}"].value - edge["pass@1"].value
    return [
        Check("chain: accuracy when it reasons", reasoned, low=0.8),
        Check("chain: that minus accuracy of direct answers", reasoned - direct, low=0.3),
        Check("chain: share of samples that reason", chain["reasoning_rate"].value, 0.1, 0.5),
        Check("chain: pass@1", chain["pass@1"].value, 0.15, 0.6),
        Check("chain: pass@8", chain["pass@8"].value, low=0.7),
        Check("chain: greedy", chain["greedy"].value, high=0.3),
        Check("edge: pass@1", edge["pass@1"].value, 0.05, 0.3),
        Check(f"edge: pass@{samples} - pass@1", widest, low=0.4),
        Check("edge: pass@1 with a forced <think>", forced["pass@1"].value, high=0.7),
    ]


def check_sft(model: str, *, problems: int = 128, samples: int = 16) -> list[Check]:
    """The SFT model's place on ``edge``: better than base, with room above."""
    edge = _measure(model, "edge", problems, samples)
    return [Check("edge: pass@1 of the SFT model", edge["pass@1"].value, 0.3, 0.75)]


def check_tool(model: str, *, problems: int = 64, samples: int = 16) -> list[Check]:
    """The tool model: code decides on ``large``, and how it is used leaves room for RL."""
    none, written, run = (
        _measure(model, "large", problems, samples, mode=mode) for mode in get_args(Mode)
    )
    easy = _measure(model, "chain", problems, samples, mode="run")
    alone = _measure(model, "chain", problems, samples, mode="none")
    return [
        Check("large: greedy, code run", run["greedy"].value, low=0.6),
        Check("large: that minus no code", run["greedy"].value - none["greedy"].value, 0.4),
        Check("large: that minus code not run", run["greedy"].value - written["greedy"].value, 0.4),
        Check("large: pass@1, code run", run["pass@1"].value, 0.2, 0.8),
        Check("large: share of samples with a call", run["call_rate"].value, 0.4, 0.85),
        Check("large: share of calls that fail", run["call_failures"].value, 0.1, 0.4),
        Check("chain: share of samples with a call", easy["call_rate"].value, low=0.15),
        Check("chain: pass@1 without code", alone["pass@1"].value, low=0.8),
    ]


CHECKS: dict[str, Callable[[str], list[Check]]] = {
    "tiny-base": check_base,
    "tiny-sft": check_sft,
    "tiny-tool": check_tool,
}
"""Which gate belongs to which shipped model."""


def _measure(
    model: str,
    task: str,
    problems: int,
    samples: int,
    forced: bool = False,
    mode: Mode = "written",
) -> EvalResult:
    return measure(
        model,
        task,
        split="validation",
        problems=problems,
        samples=samples,
        greedy=not forced,
        max_completion_length=BUDGET[task],
        force_reasoning=forced,
        mode=mode,
    )


def write(checks: list[Check], folder: Path) -> None:
    """Keep the numbers beside the model as gate.json."""
    rows = [
        {key: value for key, value in asdict(check).items() if not _infinite(value)}
        for check in checks
    ]
    (folder / "gate.json").write_text(json.dumps(rows, indent=1) + "\n")


def _infinite(value: object) -> bool:
    return isinstance(value, float) and math.isinf(value)
