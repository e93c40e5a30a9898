"""Every conclusion against every direction."""

import pytest

from rlkit.claims import agreement, combined

TABLE = {
    ("BETTER", "up"): "AGREES",
    ("BETTER", "down"): "DISAGREES",
    ("BETTER", "not down"): "AGREES",
    ("WORSE", "up"): "DISAGREES",
    ("WORSE", "down"): "AGREES",
    ("WORSE", "not down"): "DISAGREES",
    ("EQUIVALENT", "up"): "EQUIVALENT",
    ("EQUIVALENT", "down"): "EQUIVALENT",
    ("EQUIVALENT", "not down"): "AGREES",
    ("INCONCLUSIVE", "up"): "INCONCLUSIVE",
    ("INCONCLUSIVE", "down"): "INCONCLUSIVE",
    ("INCONCLUSIVE", "not down"): "INCONCLUSIVE",
}


@pytest.mark.parametrize(("conclusion", "direction"), TABLE)
def test_agreement(conclusion, direction):
    assert agreement(conclusion, direction) == TABLE[conclusion, direction]


def test_an_unknown_direction_is_told():
    with pytest.raises(ValueError, match="direction='longer': expected 'up'"):
        agreement("BETTER", "longer")


A, D, E, I = "AGREES", "DISAGREES", "EQUIVALENT", "INCONCLUSIVE"  # noqa: E741


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        ([A], A), ([A, A], A), ([A, E], E), ([E, E], E), ([A, I], I), ([E, I], I),
        ([D], D), ([A, D], D), ([D, I], D), ([E, D, A], D),
    ],
)  # fmt: skip
def test_a_claim_of_several_parts(parts, whole):
    assert combined(parts) == combined(parts[::-1]) == whole


def test_a_claim_without_parts_is_told():
    with pytest.raises(ValueError, match="at least one part"):
        combined([])
