"""What tells one function from another in any process: source, settings, what it closes over.

A run trained with rewards of one's own may be found finished, or resumed, only with the same ones.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np

from rlkit.checks import ConfigError

_PLAIN = (type(None), bool, int, str, bytes)


def described(value: Any, name: str = "value") -> Any:
    """``value`` as JSON that is equal in every process for the same code and settings.

    Functions count by module, name, source text, defaults and what they close over; methods and
    callable objects also by the attributes of their object. What a function calls is not followed.

    Args:
        value: a function, a partial, a callable object, or a setting of one: None, a number, a
            text, a sequence, a set, a mapping, a dataclass or an array.
        name: what error messages call it.

    Raises:
        ConfigError: something whose content cannot be read off, or that holds itself.
    """
    return _described(value, name, ())


def _described(value: Any, name: str, above: tuple[int, ...]) -> Any:
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, float):
        return value.hex() if math.isfinite(value) else repr(value)
    if id(value) in above:
        raise ConfigError(f"{name} holds itself: expected settings without a circle")
    inner = (*above, id(value))

    def each(part: Any, label: object) -> Any:
        return _described(part, f"{name}.{label}", inner)

    if isinstance(value, partial):
        return ["partial", each(value.func, "func"), each(value.args, "args"),
                each(value.keywords, "keywords")]  # fmt: skip
    if isinstance(value, Mapping):
        pairs = [[each(key, "key"), each(item, key)] for key, item in value.items()]
        return ["mapping", sorted(pairs, key=repr)]
    if isinstance(value, (set, frozenset)):
        return ["set", sorted((each(item, "item") for item in value), key=repr)]
    if isinstance(value, Sequence):
        return ["sequence", [each(item, number) for number, item in enumerate(value)]]
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        digest = blake2b(np.ascontiguousarray(value).tobytes(), digest_size=16).hexdigest()
        return ["array", str(value.dtype), list(value.shape), digest]
    if inspect.isclass(value):
        return [value.__module__, value.__qualname__, _source(value, name)]
    if inspect.ismethod(value):
        return ["method", each(value.__func__, "function"), each(value.__self__, "self")]
    if inspect.isfunction(value):
        cells = value.__closure__ or ()
        closed = {
            n: c.cell_contents for n, c in zip(value.__code__.co_freevars, cells, strict=True)
        }
        return ["function", value.__module__, value.__qualname__, _source(value, name),
                each(value.__defaults__, "defaults"), each(value.__kwdefaults__, "defaults"),
                each(closed, "closure")]  # fmt: skip
    if inspect.isbuiltin(value):
        return ["built in", value.__module__, value.__qualname__]
    if is_dataclass(value):
        held = {field.name: getattr(value, field.name) for field in fields(value)}
        return ["object", each(type(value), "class"), each(held, "fields")]
    if callable(value) and type(value).__dictoffset__:
        return ["object", each(type(value), "class"), each(vars(value), "attributes")]
    raise ConfigError(
        f"{name} is a {type(value).__name__}: expected a function, or settings made of "
        "numbers, texts, sequences, mappings, dataclasses and arrays, so that the run can be told "
        "from others"
    )


def _source(value: Callable[..., Any] | type, name: str) -> str:
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):  # typed into a plain prompt, or made by exec
        code = value.__code__ if inspect.isfunction(value) else None
    if code is None:
        raise ConfigError(
            f"{name} has no source text: define {value.__qualname__} in a file or cell"
        )
    # Constants may hold code objects, whose repr has an address.
    constants = [c for c in code.co_consts if isinstance(c, (*_PLAIN, float))]
    return repr((code.co_code, constants, code.co_names))
