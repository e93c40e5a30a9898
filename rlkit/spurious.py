"""Rewards that are wrong on purpose: what does a policy learn from a bad signal?

The panel of Spurious Rewards (arXiv 2506.10947): format, random, inverted and majority reward
beside the true one; a verifier that errs at a known rate; and the naive check that pays any box.
All pay completions that ended by themselves only, where not said otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, Literal

from rlkit.completion import Completion
from rlkit.correct import Problem, Values, all_correct, without_infra
from rlkit.extract import boxes
from rlkit.formats import FormatName, well_formed
from rlkit.literals import canonical_number
from rlkit.verify import Verdict, verify_all

Noise = Literal["independent", "structured"]


def format_reward(
    completions: Sequence[Completion],
    problems: Sequence[Problem],
    /,
    *,
    format: FormatName = "boxed",
    **info: Any,
) -> Values:
    """``R = 1[well formed] * 1[end reached]``, right or wrong: exploitable on purpose.

    DeepSeek-R1 (arXiv 2501.12948, section 2.2.2) adds such a term; alone it pays any boxed answer.
    """
    return without_infra(
        completions, [c.reached_end and well_formed(c, format) for c in completions]
    )


def random_reward(
    completions: Sequence[Completion],
    problems: Sequence[Problem],
    /,
    *,
    seed: int = 0,
    step: int = 0,
    **info: Any,
) -> Values:
    """``R ~ Bernoulli(1/2)``, mean 0.5, independent of the text: the null test of an RL pipeline.

    Spurious Rewards (arXiv 2506.10947). The coin of a row is the lowest bit of a hash of (seed,
    step, row number, problem_id): repeatable, and never a function of what the policy wrote.
    Pass ``seed`` and ``step``, or every step tosses the same coins.
    """
    coins = [
        _hash(1, seed, step, row, problem["problem_id"]) & 1 for row, problem in enumerate(problems)
    ]
    return without_infra(completions, coins)


def inverted(
    completions: Sequence[Completion],
    problems: Sequence[Problem],
    /,
    *,
    format: FormatName = "boxed",
    **info: Any,
) -> Values:
    """``R = 1[well formed, answered, end reached] * 1[answer wrong]``: pays errors in good form.

    The counterpart of the incorrect-label reward of Spurious Rewards (arXiv 2506.10947).
    """
    right = all_correct(completions, problems)
    return without_infra(
        completions,
        [_judged(c, format) and not ok for c, ok in zip(completions, right, strict=True)],
    )


def majority(
    completions: Sequence[Completion],
    problems: Sequence[Problem],
    /,
    *,
    format: FormatName = "boxed",
    **info: Any,
) -> Values:
    """``R = 1[answer = most frequent answer of the group]``: no gold answer is read.

    Test-time RL (TTRL, arXiv 2504.16084); the majority reward of arXiv 2506.10947. A group is all
    completions of one ``problem_id`` in the call; well-formed answers with the end reached vote.
    Numbers are equal by value, other answers by text. Of equally frequent answers the one that was
    given first counts.
    """
    votes: dict[str, Counter[str]] = {}
    keys = []
    for completion, problem in zip(completions, problems, strict=True):
        key = _spelling(completion) if _judged(completion, format) else None
        keys.append(key)
        if key is not None:
            votes.setdefault(problem["problem_id"], Counter())[key] += 1
    winners = {name: count.most_common(1)[0][0] for name, count in votes.items()}
    return without_infra(
        completions,
        [
            key is not None and key == winners[problem["problem_id"]]
            for key, problem in zip(keys, problems, strict=True)
        ],
    )


def noisy_accuracy(
    completions: Sequence[Completion],
    problems: Sequence[Problem],
    /,
    *,
    false_positive: float = 0.0,
    false_negative: float = 0.0,
    noise: Noise = "independent",
    format: FormatName = "boxed",
    seed: int = 0,
    step: int = 0,
    **info: Any,
) -> Values:
    """Accuracy by a verifier that errs: ``P(paid | wrong) = fp``, ``P(not paid | right) = fn``.

    Only a well-formed answer with the end reached comes before the verifier at all; anything else
    scores 0.

    Args:
        false_positive, false_negative: error rates in [0, 1].
        noise: ``independent``: each judgement errs on its own, by a hash of (seed, step, row,
            problem_id). ``structured``: the error is a function of what is written, by a hash of
            (seed, answer): some answers are always accepted and some right ones never, whatever
            the problem, as with a bug in a parser. Only this kind can be searched for and found.
    """
    right = all_correct(completions, problems)
    values = []
    for row, (c, problem, ok) in enumerate(zip(completions, problems, right, strict=True)):
        if not _judged(c, format):
            values.append(False)
            continue
        where = (step, row, problem["problem_id"]) if noise == "independent" else (_spelling(c),)
        draw = _hash(8, seed, *where) / 2**64
        values.append(draw >= false_negative if ok else draw < false_positive)
    return without_infra(completions, values)


def any_box(
    completions: Sequence[Completion], problems: Sequence[Problem], /, **info: Any
) -> Values:
    r"""``R = 1[some \boxed{} of the response holds the gold answer]``: a naive, common check.

    Reasoning and truncated responses count too. Pays many boxes, one of which is right.
    """
    found = [list(dict.fromkeys(boxes(c.text))) for c in completions]
    verdicts = iter(
        verify_all(
            [
                (box, problem["answer"], problem["answer_type"])
                for each, problem in zip(found, problems, strict=True)
                for box in each
            ]
        )
    )
    return without_infra(
        completions,
        [any([next(verdicts) is Verdict.RIGHT for _ in each]) for each in found],  # noqa: C419
    )


def _judged(completion: Completion, format: FormatName) -> bool:
    ended = completion.reached_end and completion.answer is not None
    return ended and well_formed(completion, format)


def _spelling(completion: Completion) -> str:
    answer = completion.answer or ""
    return canonical_number(answer) or answer


def _hash(size: int, *parts: object) -> int:
    """``size`` bytes of a hash of ``parts`` as a number: the same on every machine."""
    digest = blake2b("/".join(map(str, parts)).encode(), digest_size=size).digest()
    return int.from_bytes(digest, "little")
