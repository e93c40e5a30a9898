"""Whether a measured difference agrees with the direction that a paper reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rlkit.seeds import Conclusion

Direction = Literal["up", "down", "not down"]
Agreement = Literal["AGREES", "DISAGREES", "EQUIVALENT", "INCONCLUSIVE"]


def agreement(conclusion: Conclusion, direction: Direction) -> Agreement:
    """Compare the conclusion about new - old with the reported ``direction`` of change.

    ``not down`` is also met by a difference too small to matter. For ``up`` and ``down`` such a
    difference is EQUIVALENT: the reported change was not seen here.

    Raises:
        ValueError: unknown direction.
    """
    if direction not in ("up", "down", "not down"):
        raise ValueError(f"direction={direction!r}: expected 'up', 'down' or 'not down'")
    if conclusion == "INCONCLUSIVE":
        return "INCONCLUSIVE"
    if conclusion == "EQUIVALENT":
        return "AGREES" if direction == "not down" else "EQUIVALENT"
    went = "up" if conclusion == "BETTER" else "down"
    return "AGREES" if went == direction or (direction, went) == ("not down", "up") else "DISAGREES"


def combined(outcomes: Sequence[Agreement]) -> Agreement:
    """One outcome for a claim of several parts.

    DISAGREES if any part does; AGREES if all do; EQUIVALENT if none is INCONCLUSIVE otherwise, so
    that some part was not seen here and none was contradicted; else INCONCLUSIVE.

    Raises:
        ValueError: no parts.
    """
    if not outcomes:
        raise ValueError("outcomes=[]: expected at least one part of the claim")
    if "DISAGREES" in outcomes:
        return "DISAGREES"
    if "INCONCLUSIVE" in outcomes:
        return "INCONCLUSIVE"
    return "AGREES" if set(outcomes) == {"AGREES"} else "EQUIVALENT"
