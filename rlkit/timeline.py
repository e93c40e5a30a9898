"""A run as one row per step: reward against truth, and the signs of a reward being gamed."""

from __future__ import annotations

import pandas as pd

from rlkit import signals
from rlkit.formats import FormatName
from rlkit.signals import REFERENCE

COLUMNS = (
    "step",
    "n",
    "groups",
    "proxy",
    "true",
    "proxy_gain",
    "true_gain",
    "unearned",
    "agreement",
    "completion_ratio",
    "repetition",
    "compression",
    "length_right",
    "length_wrong",
    "format_only",
    "paid_wrong",
    "unpaid_right",
    "reinforced_wrong",
    "entropy",
    "loss",
    "grad_norm",
)
_MEANS = ("repetition", "format_only", "paid_wrong", "unpaid_right", "reinforced_wrong", "unearned")
_FROM_METRICS = {
    "proxy": "reward",
    "true": "accuracy",
    "completion_ratio": "completion_ratio",
    "length_right": "length_right",
    "length_wrong": "length_wrong",
    "entropy": "entropy",
    "loss": "loss",
    "grad_norm": "grad_norm",
}


def per_step(
    rows: pd.DataFrame, metrics: pd.DataFrame, format: FormatName = "boxed", window: int = 1
) -> pd.DataFrame:
    """One row per step that rollouts or metrics know; columns as in ``diagnostics.series``.

    Args:
        rows: rollouts, as read. metrics: rows of metrics.jsonl, as read. Either may be empty; what
            only the other holds is nan.
        format: the format rule of the run.
        window: steps of the moving average (the step itself and those before).
    """
    if window < 1:
        raise ValueError(f"window={window!r}: expected an integer >= 1 (steps)")
    good = signals.prepare(rows)
    table = _with_metrics(_of_rollouts(good, format), metrics)
    shares = [c for c in table.columns if str(c).startswith("share_")]
    table = table.reindex(columns=["step", *COLUMNS[1:], *shares]).astype(float)
    table["proxy_gain"] = _gain(table, "proxy", good["reward"], good["step"])
    table["true_gain"] = _gain(table, "true", good["correct"], good["step"])
    if window > 1:
        smooth = [c for c in table.columns if c not in ("step", "n", "groups")]
        table[smooth] = table[smooth].rolling(window, min_periods=1).mean()
    return table.astype({"step": int})


def _of_rollouts(good: pd.DataFrame, format: FormatName) -> pd.DataFrame:
    if good.empty:
        return pd.DataFrame({"step": pd.Series(dtype=int)})
    rows = signals.by_row(good, format)
    steps = rows.groupby("step")
    right = rows["correct"]
    table = steps[list(_MEANS)].mean().astype(float)
    table["n"] = steps.size()
    table["groups"] = steps["group"].nunique()
    table["proxy"] = steps["reward"].mean()
    table["true"] = steps["correct"].mean()
    table["completion_ratio"] = steps["ended"].mean()
    table["compression"] = steps["text"].agg(signals.compression)
    if "n_tokens" in rows:
        table["length_right"] = rows[right].groupby("step")["n_tokens"].mean()
        table["length_wrong"] = rows[~right].groupby("step")["n_tokens"].mean()
    sums = signals.within_group_sums(rows)
    table["agreement"] = pd.Series(
        {step: signals.agreement(part) for step, part in sums.groupby("step")}, dtype=float
    )
    totals = sums.groupby("step").sum()
    varied = totals["rr"].where(totals["rr"] > 0)
    for name in (c for c in totals.columns if str(c).startswith("r_")):
        table[f"share_{str(name).removeprefix('r_')}"] = totals[name] / varied
    return table.reset_index()


def _with_metrics(table: pd.DataFrame, metrics: pd.DataFrame) -> pd.DataFrame:
    """Rows of either; a column that both have is taken from the rollouts."""
    if metrics.empty or "step" not in metrics:
        return table
    known = metrics.dropna(subset="step").drop_duplicates("step", keep="last").set_index("step")
    found = pd.DataFrame(index=known.index.astype(int))
    for ours, theirs in _FROM_METRICS.items():
        if theirs in known:
            found[ours] = pd.to_numeric(known[theirs], errors="coerce").to_numpy(float)
    return table.set_index("step").combine_first(found).rename_axis("step").reset_index()


def _gain(table: pd.DataFrame, column: str, values: pd.Series, step: pd.Series) -> pd.Series:
    """Change since the first ``REFERENCE`` steps in standard deviations of single completions.

    The deviation is that of the completions in those steps; where they are all equal, of all
    completions; where those are, or without rollouts, 1: the gain is then in the column's unit.
    """
    start = table[column].dropna()[:REFERENCE]
    early = table["step"][start.index]
    numbers = values.astype(float)
    spreads = (float(numbers[step.isin(early)].std(ddof=0)), float(numbers.std(ddof=0)))
    scale = next((s for s in spreads if s > signals.TINY), 1.0)
    return (table[column] - start.mean()) / scale
