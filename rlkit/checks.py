"""Checks of configuration values: errors name the value, what was expected and how to fix it."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable
from typing import Literal


class ConfigError(ValueError):
    """A configuration value that cannot work; the text names the value, the rule and the fix."""


def require(ok: bool, name: str, value: object, expected: str, fix: str = "") -> None:
    """Unless ``ok``, raise ConfigError that names the value, what was expected and the fix."""
    if not ok:
        raise ConfigError(f"{name}={value!r}: expected {expected}." + (f" {fix}" if fix else ""))


def check_types(config: object) -> None:
    """Check every field against its annotation; an int given for a float becomes a float.

    Raises:
        ConfigError: names the field, the value and the expected type.
    """
    for name, kind in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if typing.get_origin(kind) is Literal:
            options = typing.get_args(kind)
            require(isinstance(value, str) and value in options, name, value, f"one of {options}")
        elif kind is float and type(value) is int:
            object.__setattr__(config, name, float(value))  # the one place a frozen field is set
        else:
            # type() rather than isinstance: True is an int to Python, but never meant as one here.
            require(
                type(value) is kind,
                name,
                value,
                f"type {kind.__name__}, got {type(value).__name__}",
            )


def require_known(keys: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise ConfigError for the first key that is not known, with the nearest names.

    ``what`` says what a key is, for example ``parameter``.
    """
    options = set(known)
    for key in keys:
        require(key in options, what, key, f"a known {what}", did_you_mean(key, options))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence with the closest known names, or with all of them if none is close."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.6)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Known: {', '.join(options)}."
