r"""What can be read off the text of an answer without computer algebra: numbers, words, form.

math-verify is lenient where the reward of a policy must not be. It rounds to six digits, reads
``50\%`` as 50 or as 0.5, drops units and the base of ``2516_8``, ignores case, takes the right side
of ``9=5`` for the answer and a set for a point. ``settle`` decides such pairs beforehand and
exactly; ``pair_for_parser`` words the rest so that the parser cannot confuse it.
"""

from __future__ import annotations

import re
from fractions import Fraction

from rlkit.units import STYLE, has_unit, percent_sign, scale, unit

MAX_ANSWER_CHARS = 1000
"""Longer answers are unparsable: no gold comes near, and parsers are superlinear."""
_MAX_EXPONENT = 400
"""Powers of ten beyond this are left to the parser and its time limit."""

_NUMBER = re.compile(r"([+-]?)\s*([0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.([0-9]*))?")
_SEPARATOR = r"(?:\{,\}|,\\!\s*+|\\,)"
_THOUSANDS = re.compile(
    rf"(?<![0-9.,}}!])[0-9]{{1,3}}(?:{_SEPARATOR}[0-9]{{3}})++(?!{_SEPARATOR}?[0-9])"
)
"""Digits in groups of three alone: 1{,}5 is 1.5 to some and (1, 5) to others, never 15."""
_WRAPPED = re.compile(
    rf"\$\$(.*)\$\$|\$(.*)\$|\\\((.*)\\\)|\\\[(.*)\\\]|{STYLE}\s*\{{([^{{}}]*)\}}", re.DOTALL
)
_SPACE = r"(?:\s|~|\\[,;:! ]|\\q?quad(?![A-Za-z]))++"
_LEADING_SPACE = re.compile(_SPACE)
# Run by run from the left, so that no run is tried again from each of its characters.
_SPACE_OR_ESCAPE = re.compile(rf"(?P<space>{_SPACE})|\\.", re.DOTALL)
_BEFORE_FRACTION = re.compile(rf"(?<=[0-9]){_SPACE}(?=[0-9]++\s*+/|\\[dt]?frac)")

# A number without its sign as TeX and plain text write it.
_WHOLE = r"[0-9]+"
_DECIMAL = r"[0-9]++(?:\.[0-9]*+)?|\.[0-9]++"
_FRACTION = (
    rf"(?:\\[dt]?frac\s*(?:\{{\s*(?P<a>-?{_WHOLE})\s*\}}|(?P<b>[0-9]))"
    rf"\s*(?:\{{\s*(?P<d>-?{_WHOLE})\s*\}}|(?P<e>[0-9]))"
    rf"|(?P<f>{_WHOLE})\s*/\s*(?P<g>-?{_WHOLE}))"
)
_RATIONAL = re.compile(
    rf"(?P<sign>[+-]?)\s*+(?:(?P<whole>{_WHOLE}(?=\\|\s))?\s*{_FRACTION}"
    rf"|(?P<decimal>{_DECIMAL})"
    rf"|(?P<start>[0-9]*\.[0-9]*)\\overline\{{(?P<period>[0-9]+)\}})"
    r"(?:\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*(?P<power>[+-]?[0-9]+)\s*\}|(?P<p>[0-9])))?"
    r"\s*(?P<percent>\\?%)?"
)
_POINT = re.compile(r"(?<![0-9.])([0-9]*)\.([0-9]+)(?![0-9.])")
_PERCENT = re.compile(r"(?<![0-9.])([0-9]+(?:\.[0-9]+)?)\s*\\?%")
_BASED = re.compile(r"\(?([0-9A-F]+)\)?_(?:\{\s*([0-9]+)\s*\}|([0-9]))")
_TWO_DIGIT_FRACTION = re.compile(r"\\[dt]?frac\s*[0-9]\s*[0-9][0-9]")
_PLAIN_PI = re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])")
_GROUPED = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")

_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{.*\}", re.DOTALL)
_WORDS = re.compile(r"\(?([A-Za-z][A-Za-z ]*)\)?\.?")
_SHORT_WORDS = frozenset({"yes", "no", "true", "none", "even", "odd", "both", "all"})
_NUMBER_LIST = re.compile(rf"(?<!\\log_)[0-9](?:{_SPACE}|\{{,\}}|,\\!\s*+)[0-9]")
_LAST_TEXT = re.compile(
    rf"(?<=[0-9A-Za-z}})])\\s*+{STYLE}\\s*\\{{[^{{}}]*\\}}(?:\\s*\\^[0-9{{}}]*)?[\\s.,;:]*\\Z"
)
_NO_UNIT = re.compile(r"\b(?:or|and|not|no|is|if|at|than|more|less|but|about|approx)\b")
_LAST_LETTERS = re.compile(r"(?<=[0-9}\s])((?!i\s*\Z)[a-z]{1,3})\s*\Z")
_DROPPED = re.compile(r"\\[lcv]?dots|\.\.\.|\\[pb]?mod|\\approx|\\sim|[0-9}]\\circ|'")
"""What math-verify leaves out without a word: "5 \\mod 7" and "5, \\ldots" would be 5."""
_TIME = re.compile(r"[0-9]{1,2}:[0-5][0-9]")
_BOMB = re.compile(r"!{3}|\^\{?\s*[0-9]{5}|\^\s*\{[^{}]*\^\s*\{[^{}]*\^\s*\{[^{}]*\^")
_MAX_DEPTH = 40
_PARTS = re.compile(r",|;|\\text\s*\{[^{}]*\}|\b(?:or|and)\b")
_SYMBOLS = {
    "\u2212": "-", "\u221e": r"\infty ", "\u03c0": r"\pi ", "\u00d7": r"\times ",
    "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u00f7": "/", "\u00b0": r"^\circ ",
    "\u2264": r"\le ", "\u2265": r"\ge ", "\u222a": r"\cup ", "\u2229": r"\cap ",
    "\u00b1": r"\pm ", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
}  # fmt: skip
"""Signs outside ASCII that have one meaning, as TeX. At any other math-verify stops reading, and so
it does at the characters of ``_STOPS``: what follows would not count."""
_STOPS = re.compile(r"[@#?`]|&(?!.*\\end)", re.DOTALL)
_EQUALS = re.compile(r"(?<![<>!=\\])=(?!=)")
_SUBSCRIPT = re.compile(r"_(?:\{[^{}]*\}|[A-Za-z0-9])")
_COMMAND = re.compile(r"\\(?:begin|end|text|mathrm|mathbb)\s*\{[^{}]*\}|\\[A-Za-z]+|[A-Za-z]{4,}")
_CAPITAL = re.compile(rf"{_COMMAND.pattern}|([A-Z])(?!\s*_)")


def unwrap(text: str) -> str:
    r"""Strip space, math delimiters and text and font commands from around ``text``.

    Percent in words becomes its sign.
    """
    text = _strip(text)
    while (match := _WRAPPED.fullmatch(text)) is not None:
        inner = next(group for group in match.groups() if group is not None)
        if "$" in inner.replace(r"\$", ""):
            break
        text = _strip(inner)
    return percent_sign(text)


def _strip(text: str) -> str:
    """``text`` without space around it, TeX's spacing commands included."""
    leading = _LEADING_SPACE.match(text)
    text = text[leading.end() :] if leading else text
    end = len(text)
    for match in _SPACE_OR_ESCAPE.finditer(text):
        if match["space"] and match.end() == len(text):
            end = match.start()
    return text[:end]


def _join_thousands(text: str) -> str:
    """``text`` without the separators of numbers in groups of three."""
    return _THOUSANDS.sub(lambda match: re.sub(_SEPARATOR, "", match[0]), text)


def canonical_number(text: str) -> str | None:
    r"""Canonical decimal text of a plain number, None if ``text`` is anything else.

    Two plain numbers are equal if and only if their canonical texts are: ``"1{,}234.50"`` gives
    ``"1234.5"``, ``"-0"`` gives ``"0"``. Accepted:

    - surrounding space, TeX's included, one sign (``-5``, ``+5``, also U+2212), leading zeros
      (``025`` is 25, as AIME writes it);
    - thousands separators in groups of three (``1,234``, ``1{,}234``, ``1\,234``);
    - a final point or zeros behind it (``12.``, ``12.0``);
    - math delimiters (``$12$``), ``\text{12}`` and a leading dollar sign (``\$12``, ``$12``).
    """
    if len(text) > MAX_ANSWER_CHARS:
        return None
    plain = unwrap(text).removeprefix(r"\$").removeprefix("$").strip()
    plain = _join_thousands(plain).replace("\u2212", "-")
    match = _NUMBER.fullmatch(plain)
    if match is None or not (match[2] or match[3]):
        return None
    whole = match[2].replace(",", "").lstrip("0") or "0"
    decimals = (match[3] or "").rstrip("0")
    value = f"{whole}.{decimals}" if decimals else whole
    return f"-{value}" if match[1] == "-" and value != "0" else value


def exact_value(text: str) -> Fraction | None:
    r"""The rational number that ``text`` writes down, None if it is anything else.

    Beyond plain numbers: ``3/4``, ``\frac{3}{4}``, ``\frac34``, mixed numbers (``1\frac{2}{3}`` and
    ``1 2/3`` are 5/3), ``1.5\times 10^{-3}``, ``0.1\overline{6}`` and percentages, where the sign
    means one hundredth: ``50\%`` is 1/2. Nothing is computed: ``2+3`` is no number here.
    """
    number = canonical_number(text)
    if number is not None:
        return _decimal(number)
    match = _RATIONAL.fullmatch(
        _join_thousands(_BEFORE_FRACTION.sub(" ", unwrap(text))).replace("\u2212", "-")
    )
    if match is None:
        return None
    value = Fraction(0)
    if match["decimal"]:
        value = _decimal(match["decimal"])
    elif match["period"]:
        start = match["start"]
        shift = 10 ** len(start.partition(".")[2])
        value = _decimal(start) if start.strip(".") else Fraction(0)
        value += Fraction(int(match["period"]), (10 ** len(match["period"]) - 1) * shift)
    else:
        above = int(match["a"] or match["b"] or match["f"])
        below = int(match["d"] or match["e"] or match["g"])
        if below == 0 or (match["whole"] and (above < 0 or below < 0)):
            return None
        value = int(match["whole"] or 0) + Fraction(above, below)
    power = int(match["power"] or match["p"] or 0)
    if abs(power) > _MAX_EXPONENT:
        return None
    value *= Fraction(10) ** power
    if match["percent"]:
        value /= 100
    return -value if match["sign"] == "-" else value


def _decimal(number: str) -> Fraction:
    whole, _, decimals = number.partition(".")
    # By digits, not Fraction(number): that would limit the length by the interpreter's settings.
    return Fraction(int(whole + decimals or "0"), 10 ** len(decimals))


def settle(gold: str, answer: str) -> bool | None:
    """Whether ``answer`` equals ``gold``, as far as their texts decide it; None otherwise.

    Args:
        gold: gold answer of an expression problem.
        answer: a text that ``is_one_expression``.
    """
    gold_words = words_of_gold(gold)
    words = _words(unwrap(answer))
    if gold_words is not None and (words is not None or len(gold_words) > 1):
        return words == gold_words
    gold_value, value = exact_value(gold), exact_value(answer)
    if gold_value is not None and value is not None:
        return value == gold_value
    gold, answer = unwrap(gold), unwrap(answer)
    if words is not None and " " not in words and re.fullmatch(r"[A-Za-z]{3,}", gold):
        return words == gold.casefold()
    if _TIME.fullmatch(gold) and _TIME.fullmatch(answer):
        return gold == answer  # as a quotient, 4:40 would be 3:30
    if scale(gold) != scale(answer):
        return False  # 5 million is not 5
    if _DROPPED.search(answer) and not _DROPPED.search(gold):
        return False
    if _BASED.fullmatch(gold) or _BASED.fullmatch(answer):
        # The base belongs to what is asked: neither the bare digits nor another base will do.
        return _base_and_digits(gold) == _base_and_digits(answer)
    kinds = {_brackets(gold), _brackets(answer)} - {""}
    gold_unit, answer_unit = unit(gold), unit(answer)
    if len(kinds) > 1 or (gold_unit and answer_unit and gold_unit != answer_unit):
        return False
    if "=" not in gold and not _names_its_value(answer):
        return False
    return None


def is_one_expression(text: str) -> bool:
    """False if ``text`` is surely no single expression, or one that the parser misreads."""
    text = unwrap(text)
    depth = deepest = 0
    for token in re.findall(r"\\.|[{}]", text, re.DOTALL):
        depth += (token == "{") - (token == "}")
        deepest = max(deepest, depth)
        if depth < 0:
            return False
    strange = any(not c.isascii() and c not in _SYMBOLS for c in text) or _STOPS.search(text)
    single = "$" not in text.replace(r"\$", "") and r"\boxed" not in text and '"' not in text
    if not text or depth or strange or not single:
        return False
    if exact_value(text) is not None:
        return True
    # No gold answer looks like that, and the parser would spend its whole time limit on it.
    if max(deepest, text.count("(")) > _MAX_DEPTH or _BOMB.search(text):
        return False
    # math-verify drops a text at the end, whatever it says: "5 \text{ (or 7)}" would be 5.
    if _LAST_TEXT.search(text) and (not has_unit(text) or _NO_UNIT.search(text)):
        return False
    # math-verify adds up numbers that stand side by side: it would take "1 2 3" for 6. And it reads
    # \frac123, which is (1/2)3 in TeX, as 1/23.
    return not (_NUMBER_LIST.search(_join_thousands(text)) or _TWO_DIGIT_FRACTION.search(text))


def pair_for_parser(gold: str, answer: str) -> tuple[str, str]:
    """Both texts in the form that math-verify reads exactly; see ``for_parser``.

    math-verify folds case, so R - r would be 0: where the two texts hold some letter in both cases,
    capitals get a subscript. Words of four letters and more are left alone.
    """
    gold, answer = for_parser(gold), for_parser(answer)
    symbols = set(_COMMAND.sub("", f"{gold} {answer}"))
    if any(c.lower() in symbols for c in symbols if "A" <= c <= "Z"):
        return _CAPITAL.sub(_mark, gold), _CAPITAL.sub(_mark, answer)
    return gold, answer


def for_parser(text: str) -> str:
    r"""``text`` unwrapped, with exact fractions for decimals and percentages, ``\pi`` for ``pi``.

    math-verify rounds decimals to six digits, so 0.3333333 would be 1/3.
    """
    text = unwrap(text)
    value = exact_value(text)
    if value is not None:
        whole = str(value.numerator)
        return whole if value.denominator == 1 else rf"\frac{{{whole}}}{{{value.denominator}}}"
    text = _join_thousands(text)
    if not re.search(r"[(\[;]|\\\{|,\s", text):  # not in a list, a point or an interval
        text = _GROUPED.sub(lambda match: match[0].replace(",", ""), text)
    text = _PERCENT.sub(lambda match: _as_fraction(_decimal(match[1]) / 100), text)
    text = _POINT.sub(lambda match: _as_fraction(_decimal(match[0])), text)
    text = _PLAIN_PI.sub(r"\\pi ", text)
    for sign, command in _SYMBOLS.items():
        text = text.replace(sign, command)
    text = text.replace("~", " ")
    # math-verify drops letters at the end that may be units, so 5t would be 5: brackets keep them.
    return text if has_unit(text) else _LAST_LETTERS.sub(r"(\1)", text)


def _as_fraction(value: Fraction) -> str:
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _mark(match: re.Match[str]) -> str:
    return f"{match[1]}_{{0}}" if match[1] else match[0]


def _words(text: str) -> str | None:
    """Folded words of a text without any mathematics, None otherwise; ``(C)`` gives ``c``."""
    match = _WORDS.fullmatch(text)
    return " ".join(match[1].casefold().split()) if match else None


def words_of_gold(gold: str) -> str | None:
    r"""Words of a gold answer that is a word, None otherwise.

    That is ``\text{}``, a choice (``C``), ``yes`` and its like, and all of five letters or more.

    math-verify reads letters as a product of symbols, so an anagram would be equal.
    """
    text = unwrap(gold)
    words = _words(text)
    if words is None:
        return None
    is_choice = len(words) == 1 and text != words
    is_text = _TEXT.fullmatch(gold.strip()) or len(words) >= 5 or words in _SHORT_WORDS
    return words if is_text or is_choice else None


def _base_and_digits(text: str) -> tuple[int, str] | None:
    """Base and digits of an integer such as ``2516_8``; 10 without a subscript."""
    match = _BASED.fullmatch(text)
    if match is not None:
        return int(match[2] or match[3]), match[1].lstrip("0")
    number = canonical_number(text)
    return None if number is None else (10, number)


def _brackets(text: str) -> str:
    r"""Which brackets hold a whole list: ``{``, ``(`` or ``[``; empty for anything else.

    A set has no order and a point is no set, but math-verify takes one for the other.
    """
    text = re.sub(r"\\(?:left|right)", "", text).strip()
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return "{" if text.count(r"\{") == 1 else ""
    listed = "," in text and text[0] in "([" and text[-1] in ")]"
    return "(" if listed and sum(map(text.count, "([")) == 1 else ""


def _names_its_value(text: str) -> bool:
    """Whether each equation in ``text`` has a name in front: ``x=5``, but not ``2+3=5``.

    math-verify takes the right side of any equation, true or not, so ``9=5`` would be 5.
    """
    for part in _PARTS.split(text):
        for left in _EQUALS.split(part)[:-1]:
            if re.search(r"[0-9]", _SUBSCRIPT.sub("", left)) or not left.strip():
                return False
    return True
