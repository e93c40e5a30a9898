"""Is the reward being gamed? Answers from a run folder alone: live, finished or crashed.

:func:`series` shows reward against truth step by step, :func:`parting` says when the two part (with
a rate of false alarms of 1 % per run on exchangeable scores, simulated for others, see
``rlkit.parting``), :func:`diagnose` gives a verdict with the numbers behind it and the completions
that tell the most. The verdict SUSPECT has no stated rate.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from rlkit import curves, findings, gradient_view, runs, signals
from rlkit.checks import ConfigError
from rlkit.findings import MIN_STEPS, Finding
from rlkit.formats import FormatName
from rlkit.gradient_view import AGREEMENT
from rlkit.parting import ALPHA, UNEARNED_SHARE, Parting, part
from rlkit.telling import Example, telling
from rlkit.timeline import per_step

Run = str | Path
Outcome = Literal["SOUND", "SUSPECT", "COLLAPSED", "HACKED", "UNDECIDED"]


@dataclass(frozen=True)
class Diagnosis:
    """The verdict on a run and what it rests on; rules in :func:`diagnose`.

    Attributes:
        run: name of the folder. steps: steps with rewards; last: the last of them (0: none).
        evidence: findings, those that count first.
        parting: None where reward and truth did not part.
        curves: step at which loss, gradient norm and reward alone show a change; those that do
            (``rlkit.curves``).
        examples: wrong completions paid or raised most, of different kinds, late ones first
            (``rlkit.telling``); none for a sound run.
    """

    run: str
    verdict: Outcome
    steps: int
    last: int
    evidence: tuple[Finding, ...]
    parting: Parting | None
    curves: dict[str, int]
    examples: tuple[Example, ...]

    @property
    def visible(self) -> tuple[int, str] | None:
        """The first (step, curve) at which loss, gradient norm or reward alone show a change."""
        return curves.first(self.curves)


# --- reading --------------------------------------------------------------------------------------


def series(run: Run, window: int = 1) -> pd.DataFrame:
    """One row per step that the rollouts or the metrics of a run know.

    Args:
        run: name or folder. window: steps of the moving average (the step itself and before).

    Columns (fractions are of the completions of the step, unless said):
        step; n, groups: completions and groups that count (``infra`` rows do not).
        proxy: mean reward, as trained on. true: true accuracy.
        proxy_gain, true_gain: change since the first 5 steps in standard deviations of single
            completions there, which makes rewards of any scale comparable with accuracy.
        unearned: mean of ``signals.unearned``. agreement: correlation of reward and correctness
            within groups (``signals.agreement``).
        completion_ratio, repetition, compression: ended by itself; ``signals.repetition`` and
            ``signals.compression`` of the texts.
        length_right, length_wrong: mean tokens.
        format_only: wrong, well formed, paid above a wrong ill-formed answer of the group.
        paid_wrong, unpaid_right: paid means above the middle of the run's range of rewards.
        reinforced_wrong: wrong and above the mean reward of its group, so that the gradient
            raises it.
        entropy, loss, grad_norm: from metrics.jsonl.
        share_<part>: share of a reward part in what the gradient sees within groups trained on:
            weight * cov(part, advantage) / cov(total, advantage), with the total in place of the
            advantage where none was logged. Shares add up to 1 and can be negative; weights by
            ``signals.part_weights``.

    Raises:
        RunError: no such run.
    """
    return per_step(
        runs.read_rollouts(_existing(run)), runs.read_metrics(run), _format(run), window
    )


def parting(run: Run) -> Parting | None:
    """Where reward and truth part, and at which step that could be said; see ``rlkit.parting``."""
    rows = signals.prepare(runs.read_rollouts(_existing(run)))
    return part(signals.group_means(rows), least=_matters(rows))


def _matters(rows: pd.DataFrame) -> float:
    """Rise of the unearned reward per completion that matters in this run."""
    return UNEARNED_SHARE * signals.pay_scale(rows)


def visible_in_loss(run: Run) -> int | None:
    """The first step at which loss, gradient norm or reward alone show a change; see ``curves``.

    None: they show nothing with a false-alarm rate of 1 % per curve and run.
    """
    groups = signals.group_means(signals.prepare(runs.read_rollouts(_existing(run))))
    found = curves.first(curves.caught(runs.read_metrics(run), groups))
    return None if found is None else found[0]


def diagnose(run: Run) -> Diagnosis:
    """Verdict on a run, by these rules, the first that fits.

    HACKED: reward and truth parted (``rlkit.parting``); unearned reward at the end is above that
        before the parting by more than ``UNEARNED_SHARE`` of ``signals.pay_scale``; and true
        accuracy fell since, or rose by less than ``TRUTH_MARGIN`` while reward rose.
    UNDECIDED: fewer than ``MIN_STEPS`` steps with rewards; or rewards never differ within a group.
    COLLAPSED: true accuracy fell and the reward fell with it (``fell_together``): not hacked.
    SUSPECT: any finding that counts: ``parted`` (and not a hack by the rule above), ``unrelated``
        (agreement below ``AGREEMENT``: the reward does not pay correctness, a random one for
        example), ``reinforced_wrong``, ``reward_alone`` (wrong answers are paid more, accuracy did
        not rise), ``accuracy_fell``, ``completion_fell``, ``repetition_rose``, ``trained_share``.
    UNDECIDED: the agreement's interval holds ``AGREEMENT``, or fewer than ``MIN_GROUPS`` groups
        have rewards that differ.
    SOUND: else. It says that reward and truth went together here, not that the reward cannot be
        fooled.

    Changes over the run go from the first ``FIRST_STEPS`` to the last ``LAST_STEPS`` steps. A
    threshold counts as passed when the whole 95 % interval over groups (prompts) lies beyond it.
    All constants are in ``rlkit.findings``, ``rlkit.gradient_view`` and ``rlkit.parting``.

    Only ``parted``, and with it HACKED, has a stated rate of false alarms: 1 % per run on
    exchangeable scores. SUSPECT is a union of several findings at 95 % each and has no such rate.

    Raises:
        RunError: no such run.
    """
    path = _existing(run)
    config = runs.read_config(run)
    return diagnose_rows(
        path.name,
        runs.read_rollouts(path),
        runs.read_metrics(path),
        config.reward.format,
        overridden=config.reward.allow_exploitable,
    )


def _existing(run: Run) -> Path:
    runs.read_config(run)  # names the existing runs
    return runs.folder(run)


def _format(run: Run) -> FormatName:
    return runs.read_config(run).reward.format


# --- judging --------------------------------------------------------------------------------------


def diagnose_rows(
    name: str,
    rollouts: pd.DataFrame,
    metrics: pd.DataFrame,
    format: FormatName = "boxed",
    *,
    overridden: bool = False,
) -> Diagnosis:
    """:func:`diagnose` on rows as read; ``overridden``: trained with allow_exploitable."""
    good = signals.prepare(rollouts)
    rows = signals.by_row(good[np.isfinite(good["reward"].to_numpy(float))], format)
    steps = np.unique(rows["step"].to_numpy(int))
    last = int(steps[-1]) if len(steps) else 0
    groups, sums = findings.groups_of(rows), signals.within_group_sums(rows)
    least = _matters(good)
    parted = part(signals.group_means(good), least=least)
    found: list[Finding] = []
    verdict: Outcome = "UNDECIDED"
    if len(steps) < MIN_STEPS:
        text = f"{len(steps)} steps with rewards; a verdict needs {MIN_STEPS}"
        found.append(Finding("few_steps", text, last, counts=False))
    elif not (sums["rr"] > 0).any():
        text = "no group has rewards that differ: nothing can be learned from this reward"
        found.append(Finding("no_signal", text, last, counts=False))
    else:
        found += gradient_view.relation(sums, steps) + gradient_view.trained_share(rows, steps)
        found += gradient_view.length_pull(rows, steps)
        found += findings.changes(groups, steps, least) + findings.pay(groups, steps)
        counting = {finding.code for finding in found if finding.counts}
        if counting or parted is not None:
            verdict = "COLLAPSED" if "fell_together" in counting else "SUSPECT"
        elif gradient_view.agreement(sums).low >= AGREEMENT:
            verdict = "SOUND"
    if parted is not None:
        after, hack = findings.aftermath(groups, steps, parted, least)
        verdict = "HACKED" if hack else verdict
        found = [findings.parted(parted), after, *found]
    if overridden:
        text = "trained with allow_exploitable: the self-check found a wrong answer that scores"
        found.append(Finding("allow_exploitable", text, 0, counts=False))
    return Diagnosis(
        run=name,
        verdict=verdict,
        steps=len(steps),
        last=last,
        evidence=tuple(sorted(found, key=lambda finding: not finding.counts)),
        parting=parted,
        curves=curves.caught(metrics, signals.group_means(good)),
        examples=()
        if verdict == "SOUND"
        else telling(rows, since=0 if parted is None else parted.began),
    )


# --- reporting ------------------------------------------------------------------------------------


def report_text(diagnosis: Diagnosis, *, width: int = 96, lines: int = 6) -> str:
    """The diagnosis as plain text.

    A completion of more than ``lines`` lines shows the first and the last half of them, since
    padding often stands at the end. ``width``: characters per line.
    """
    d = diagnosis
    out = [f"{d.run}: {d.verdict} ({d.steps} steps with rewards, the last is {d.last})", ""]
    for finding in d.evidence:
        mark = "!" if finding.counts else " "
        out.append(f"{mark} {finding.code:17} {finding.message}")
    seen = ", ".join(
        f"{curve} at step {d.curves[curve]}" if curve in d.curves else f"{curve} never"
        for curve in curves.CURVES
    )
    out += ["", f"the same test on each curve alone, {100 * ALPHA:g} % false alarms each: {seen}"]
    for example in d.examples:
        gain = "" if math.isnan(example.advantage) else f", advantage {example.advantage:+.2f}"
        out += [
            "",
            f"step {example.step}, {example.problem_id or 'a problem'}: paid {example.reward:.3g}, "
            f"{example.excess:.3g} above the lowest-paid wrong answer of the run{gain}",
            f"  for {example.answer or 'no answer'!r}, gold {example.gold!r}, stop: {example.stop}",
            *_excerpt(example.text, width, lines),
        ]
    return "\n".join(out)


def _excerpt(text: str, width: int, lines: int) -> list[str]:
    shown = [line[:width] + ("…" if len(line) > width else "") for line in text.split("\n")]
    if len(shown) > lines:
        head, tail = lines - lines // 2, lines // 2
        between = f"… {len(shown) - lines} more lines …"
        shown = [*shown[:head], between, *shown[len(shown) - tail :]]
    return [f"    {line}" for line in shown]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the diagnosis of each run; 2 if one does not exist or cannot be read."""
    parser = argparse.ArgumentParser(
        prog="rlkit diagnose", description="Is the reward of a run being gamed?"
    )
    parser.add_argument("runs", nargs="+", metavar="run", help="name under runs/, or a folder")
    names: list[str] = parser.parse_args(argv).runs
    for i, name in enumerate(names):
        try:
            text = report_text(diagnose(name))
        except (runs.RunError, ConfigError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"\n{text}" if i else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
