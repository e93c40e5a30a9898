"""What an evaluation says: rows per sample, the quantities computed from them, and their files.

Needs no model and no torch, so figures and notebooks read evaluations anywhere.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rlkit import runs, stats
from rlkit.stats import Estimate, Paired

KEYWORDS: dict[str, tuple[str, ...]] = {
    "verification": ("verify", "double check", "confirm"),
    "reflection": ("however", "reflect", "wait"),
    "correction": ("correct", "revise", "adjust"),
}
"""The study's three categories (section 3.2, Figure 4). It prints these words as examples only."""
_PATTERNS = {
    name: re.compile(r"\b(?:" + "|".join(w.replace(" ", r"[\s-]+") for w in words) + r")\b", re.I)
    for name, words in KEYWORDS.items()
}


@dataclass(frozen=True)
class EvalResult:
    """One evaluation.

    Attributes:
        rows: one row per sample: problem_id, decoding ("greedy" or "sampled"), sample, text,
            answer, gold, correct, stop, n_tokens, reasoning; where code was run also the columns of
            ``tool_metrics.call_columns``. ``text`` and ``n_tokens`` include tool output.
        summary: quantity name to estimate, see :func:`summarise`.
        info: how it was made: problems, samples, seed, purpose, step, sampling, prefill, infra.
    """

    rows: pd.DataFrame
    summary: dict[str, Estimate]
    info: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Estimate:
        if name not in self.summary:
            raise KeyError(f"no {name!r} in this evaluation; it has {', '.join(self.summary)}")
        return self.summary[name]


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... up to n."""
    return [1 << i for i in range(n.bit_length()) if 1 << i <= n]


def check_ks(ks: Sequence[int] | None, n: int) -> list[int]:
    """Budgets in order; default powers of two up to n. Raises ValueError for k outside 1..n."""
    if ks is None:
        return powers_of_two(n)
    wrong = [k for k in ks if not 1 <= k <= n]
    if wrong:
        raise ValueError(f"ks holds {wrong}: each k must be within 1..n={n} samples per problem")
    return sorted(set(ks))


def summarise(
    rows: pd.DataFrame, *, ks: Sequence[int] | None = None, seed: int = 0, level: float = 0.95
) -> dict[str, Estimate]:
    """All summary quantities of an evaluation frame, intervals by bootstrap over problems.

    Keys: ``greedy`` (accuracy of the greedy responses, Wilson interval); from the sampled rows
    ``avg@n``, ``pass@k`` and ``maj@k`` (k from 2). From the sampled rows, or the greedy ones if
    there are no others: ``completion_ratio`` (share that ended by itself), ``reasoning_rate``,
    ``accuracy_reasoning``, ``accuracy_direct``, ``length``, ``length_right``, ``length_wrong``
    (tokens, end token and tool output included), ``keywords_verification``,
    ``keywords_reflection``, ``keywords_correction`` and ``keywords_any``. Where code was run:
    ``call_rate`` (share of responses with a call), ``calls`` per response, ``call_failures`` (share
    of calls that failed) and ``tool_tokens``.

    A keyword ratio is the share of responses that hold at least one word of the category, whole
    words, any case, counted once per response (the study does not publish its denominator). On the
    embedded models these ratios are circular: the words were put into the pretraining corpus, so
    they say how often a known pattern is used and nothing about reflection having emerged.

    Correct always means an equivalent answer with the end reached. Only such answers vote in maj@k,
    as written. Rows with stop ``infra`` (the machinery failed) are left out of every quantity;
    pass@k and maj@k then exist up to the smallest number of valid samples of any problem.
    """
    valid = rows[rows["stop"] != "infra"]
    lost = set(rows["problem_id"]) - set(valid["problem_id"])
    if lost:
        raise ValueError(
            f"{len(lost)} problem(s) have no valid sample (stop 'infra'), for example "
            f"{min(lost)!r}: repeat the evaluation"
        )
    out: dict[str, Estimate] = {}
    greedy = valid[valid["decoding"] == "greedy"]
    sampled = valid[valid["decoding"] == "sampled"]
    if len(greedy):
        out["greedy"] = stats.wilson(int(greedy["correct"].sum()), len(greedy), level)
    if len(sampled):
        out |= _sampled(sampled, ks, seed, level)
    return out | _shares(sampled if len(sampled) else greedy, seed, level)


def _sampled(
    rows: pd.DataFrame, ks: Sequence[int] | None, seed: int, level: float
) -> dict[str, Estimate]:
    ballots = _ballots(rows)
    drawn = [len(right) for _, right in ballots.values()]
    wins = [sum(right) for _, right in ballots.values()]
    rates = [c / n for c, n in zip(wins, drawn, strict=True)]
    out = {f"avg@{max(drawn)}": stats.rate(rates, seed=seed, level=level)}
    budgets = [k for k in check_ks(ks, max(drawn)) if k <= min(drawn)]
    for k in budgets:
        chances = [stats.pass_at_k(n, c, k) for n, c in zip(drawn, wins, strict=True)]
        out[f"pass@{k}"] = stats.rate(chances, seed=seed, level=level)
    for k in budgets:
        if k > 1:
            chances = [_majority(ballot, k) for ballot in ballots.values()]
            out[f"maj@{k}"] = stats.rate(chances, seed=seed, level=level)
    return out


Ballot = tuple[list[str | None], list[bool]]


def _ballots(rows: pd.DataFrame) -> dict[str, Ballot]:
    """Per problem, in order of id: the vote of each sample (None unless it ended) and its truth."""
    out: dict[str, Ballot] = {i: ([], []) for i in sorted(set(rows["problem_id"]))}
    columns = (rows["problem_id"], rows["answer"], rows["stop"], rows["correct"])
    for i, answer, stop, right in zip(*columns, strict=True):
        votes, truth = out[i]
        # a missing answer comes back from a parquet file as nan
        votes.append(answer.strip() if isinstance(answer, str) and stop == "eos" else None)
        truth.append(bool(right))
    return out


def _majority(ballot: Ballot, k: int) -> float:
    votes, truth = ballot
    # A verifier that timed out once may judge equal answers differently; right once is right.
    right = {vote for vote, ok in zip(votes, truth, strict=True) if ok}
    return stats.majority_at_k(votes, [vote in right for vote in votes], k)


def _shares(rows: pd.DataFrame, seed: int, level: float) -> dict[str, Estimate]:
    right, thinks = rows["correct"].astype(bool), rows["reasoning"].astype(bool)
    tokens, one = rows["n_tokens"], pd.Series(True, index=rows.index)
    hits = keyword_hits(rows["text"])
    ratios = {
        "completion_ratio": (rows["stop"] == "eos", one),
        "reasoning_rate": (thinks, one),
        "accuracy_reasoning": (right & thinks, thinks),
        "accuracy_direct": (right & ~thinks, ~thinks),
        "length": (tokens, one),
        "length_right": (tokens * right, right),
        "length_wrong": (tokens * ~right, ~right),
        **{f"keywords_{name}": (hits[name], one) for name in hits},
    }
    counts = ["length", "length_right", "length_wrong"]
    if "calls" in rows:
        ratios |= {
            "call_rate": (rows["calls"] > 0, one),
            "calls": (rows["calls"], one),
            "call_failures": (rows["failed_calls"], rows["calls"]),
            "tool_tokens": (rows["tool_tokens"], one),
        }
        counts += ["calls", "tool_tokens"]
    out = {}
    for name, (top, bottom) in ratios.items():
        sums = pd.DataFrame({"top": top, "bottom": bottom}).astype(float)
        sums = sums.groupby(rows["problem_id"], sort=True).sum()
        interval = stats.bootstrap if name in counts else stats.rate
        out[name] = interval(
            sums["top"].to_numpy(), sums["bottom"].to_numpy(), seed=seed, level=level
        )
    return out


def keyword_hits(texts: pd.Series[str]) -> pd.DataFrame:
    """Which responses hold a word of each category of ``KEYWORDS``; plus the column ``any``."""
    hits = pd.DataFrame(
        {name: [bool(p.search(t)) for t in texts] for name, p in _PATTERNS.items()},
        index=texts.index,
        dtype=bool,
    )
    return hits.assign(any=hits.any(axis=1))


# --- comparison -----------------------------------------------------------------------------------


def per_problem(rows: pd.DataFrame, metric: str) -> pd.Series[float]:
    """One value per problem, indexed by problem_id.

    ``metric``: "greedy", "avg" (mean over samples), "pass@k", "maj@k", "length",
    "completion_ratio", "reasoning_rate" or, where code was run, "call_rate", "calls".
    """
    decoding = "greedy" if metric == "greedy" else "sampled"
    valid = rows[(rows["stop"] != "infra") & (rows["decoding"] == decoding)]
    if not len(valid):
        raise ValueError(f"metric {metric!r} needs {decoding} rows; this evaluation has none")
    name, _, budget = metric.partition("@")
    if budget and name in ("pass", "maj"):
        k, ballots = int(budget), _ballots(valid)
        if name == "maj":
            return pd.Series({i: _majority(b, k) for i, b in ballots.items()})
        return pd.Series({i: stats.pass_at_k(len(t), sum(t), k) for i, (_, t) in ballots.items()})
    columns = {
        "greedy": valid["correct"],
        "avg": valid["correct"],
        "length": valid["n_tokens"],
        "completion_ratio": valid["stop"] == "eos",
        "reasoning_rate": valid["reasoning"],
    }
    if "calls" in valid:
        columns |= {"call_rate": valid["calls"] > 0, "calls": valid["calls"]}
    if name not in columns:
        raise ValueError(f"metric={metric!r}: expected pass@k, maj@k or one of {list(columns)}")
    return columns[name].astype(float).groupby(valid["problem_id"], sort=True).mean()


def compare(a: EvalResult, b: EvalResult, metric: str = "avg", *, seed: int = 0) -> Paired:
    """Paired difference b - a over the same problems (metrics: see :func:`per_problem`).

    Raises ValueError if the two evaluations do not hold the same problems.
    """
    first, second = per_problem(a.rows, metric), per_problem(b.rows, metric)
    only_a, only_b = set(first.index) - set(second.index), set(second.index) - set(first.index)
    if only_a or only_b:
        raise ValueError(
            f"the problem sets differ: {len(only_a)} only in a, {len(only_b)} only in b, "
            f"{len(set(first.index) & set(second.index))} shared. A paired comparison needs the "
            "same problems; evaluate both on one split."
        )
    return stats.paired(first.to_numpy(), second.loc[first.index].to_numpy(), seed=seed)


# --- files ----------------------------------------------------------------------------------------


def save(result: EvalResult, run_dir: Path | str, name: str) -> Path:
    """Write ``eval/<name>.parquet`` and ``eval/<name>.json``; returns the JSON's path.

    Each is written aside, synced and renamed, the JSON last: where it exists, the rows do too.
    """
    folder = runs.folder(run_dir) / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    rows, summary = folder / f"{name}.parquet", folder / f"{name}.json"
    aside = rows.with_suffix(".parquet.tmp")
    result.rows.to_parquet(aside, index=False)
    with aside.open("rb") as handle:
        os.fsync(handle.fileno())
    aside.replace(rows)
    estimates = {
        key: {k: None if v != v else v for k, v in asdict(e).items()}
        for key, e in result.summary.items()
    }
    text = json.dumps({"info": result.info, "summary": estimates}, indent=1, allow_nan=False)
    runs.write_atomic(summary, text + "\n", sync=True)
    return summary


def load(run_dir: Path | str, name: str) -> EvalResult:
    """Read what :func:`save` wrote. Raises FileNotFoundError naming the evaluations that exist."""
    folder = runs.folder(run_dir) / "eval"
    if not (folder / f"{name}.json").is_file():
        found = ", ".join(names(run_dir)) or "none"
        raise FileNotFoundError(
            f"no evaluation {name!r} in run {folder.parent.name!r}; found: {found}"
        )
    data = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    summary = {}
    for key, raw in data["summary"].items():
        bounds = {k: float("nan") if raw[k] is None else raw[k] for k in ("value", "low", "high")}
        summary[key] = Estimate(**{**raw, **bounds})
    return EvalResult(pd.read_parquet(folder / f"{name}.parquet"), summary, data["info"])


def names(run_dir: Path | str) -> list[str]:
    """Names of the finished evaluations of a run folder."""
    return sorted(p.stem for p in (runs.folder(run_dir) / "eval").glob("*.json"))


def curve(run_dir: Path | str, split: str = "validation") -> pd.DataFrame:
    """Evaluations over training, from ``eval/<split>-<step>.json``, in order of step.

    Columns: step, metric, value, low, high. Empty if the run was never evaluated on ``split``.
    """
    out = []
    for path in (runs.folder(run_dir) / "eval").glob(f"{split}-*.json"):
        tail = path.stem.removeprefix(f"{split}-")
        if not tail.isdigit():
            continue
        for metric, raw in json.loads(path.read_text(encoding="utf-8"))["summary"].items():
            bounds = {k: np.nan if raw[k] is None else raw[k] for k in ("value", "low", "high")}
            out.append({"step": int(tail), "metric": metric, **bounds})
    frame = pd.DataFrame(out, columns=["step", "metric", "value", "low", "high"])
    return frame.sort_values(["step", "metric"], kind="stable", ignore_index=True)
