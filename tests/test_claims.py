"""Every conclusion against every direction."""

import pytest

from rlkit.claims import agreement

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
