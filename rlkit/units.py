r"""Words and styled text next to mathematics: units, percent in words, and what is neither.

math-verify drops a text behind a quantity, whatever it says: ``5\text{ million}``, ``5\textbf{6}``
and ``5 less`` would all be 5. So a word counts as a unit only if it is listed here or if the gold
answer has it too. All text and font commands are treated alike.
"""

from __future__ import annotations

import re

STYLE = (
    r"\\(?:text(?:bf|it|rm|sf|tt|sc|sl|up|normal)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox"
    r"|operatorname\*?|emph|boldsymbol|bm)(?![A-Za-z])"
)
"""Commands that set their one argument in text or in another font, as a pattern."""

_UNIT_LIST = """
    mm cm dm m km in inch ft foot feet yd yard mi mile mm millimeter centimeter decimeter meter
    kilometer millimetre centimetre metre kilometre nm micrometer nanometer unit
    acre hectare ha ml cl dl l liter litre milliliter millilitre gallon gal quart pint cup ounce oz
    fl fluid tablespoon teaspoon mg g gram kg kilogram ton tonne lb lbs pound
    s sec second ms min minute h hr hour day week month year decade century centuries am pm old
    cent dollar usd euro pound yuan rupee ruble peso pence penny pennies nickel dime quarter coin
    degree deg rad radian celsius fahrenheit kelvin mph kph kmh per hz hertz
    newton joule kj watt kw volt amp ampere ohm pa pascal atm mol mole rpm bit byte
    people person student boy girl man men woman women child children adult player team member
    way time point vote vertex vertices side edge face triangle rectangle circle diagonal line
    solution term set subset pair arrangement permutation combination
    outcome path route step move game match matches page book word letter item object piece part
    ball marble card tile block box boxes bag car bus buses bike wheel train trip lap ticket
    apple orange banana pear peach cookie cake candy candies egg flower tree plant seed fish dog cat
    cow horse sheep goose geese duck chicken rabbit bird pen pencil chair table shirt sock shoe
    house room floor stair worker job song film movie
    long wide tall high deep of the each"""
_UNITS = frozenset(_UNIT_LIST.split())
"""Singular or irregular forms, in small letters. A word may have an s or es behind it."""
_POWERS = frozenset({"square", "sq", "cubic", "cu"})
"""Only in front of a unit: by itself such a word is an operation."""
_SCALE_LIST = """
    half hundred hundredth thousand thousandth million millionth billion billionth trillion
    dozen score tenth lakh crore squared cubed factorial"""
_SCALES = frozenset(_SCALE_LIST.split())
"""Words that change the value: both answers have them or none."""
_FUNCTION_LIST = """
    sqrt frac dfrac tfrac sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan log ln exp
    lcm gcd max min det deg pi theta alpha beta gamma delta lambda infty cdot times left right
    and or"""
_FUNCTIONS = frozenset(_FUNCTION_LIST.split())
_GROUP = re.compile(rf"{STYLE}\s*+\{{([^{{}}]*+)\}}")
_COMMAND = re.compile(r"\\(?:begin|end)\{[a-z]*\*?\}|\\[A-Za-z]+")
_PLAIN_WORD = re.compile(r"[A-Za-z]{4,}|\b(?:to|not|but|if|at|no|is)\b")
_QUANTITY = re.compile(r"[0-9)}\]%]|(?<![A-Za-z])[A-Za-z](?![A-Za-z])")
_TEXT_WORDS = re.compile(r"[A-Za-z .,/-]*")
_SPACE = r"(?:\s|~|\\[,;:! ])*+"
_PER_CENT = re.compile(
    rf"(?<=[0-9}}]){_SPACE}(?:{STYLE}\s*+\{{{_SPACE}per\s?cent{_SPACE}\}}|per\s?cent(?![A-Za-z]))"
)

_UNIT = re.compile(
    rf"(?<=[0-9}})])(?:\s|~|\\[,;! ])*+(?:{STYLE}\s*\{{\s*(?P<text>[A-Za-z][A-Za-z ./-]*)\}}"
    r"|(?P<plain>cm|mm|km|kg|mg|ml|ft|in|mi|lbs?|oz|hr|min|sec|(?<=\s)[mgsl]|[A-Za-z]{4,}))"
    r"\s*(?:\^\s*(?:\{\s*(?P<power>[0-9])\s*\}|(?P<p>[0-9])))?\Z"
)


def percent_sign(text: str) -> str:
    r"""``text`` with ``\%`` for the words percent and per cent behind a number."""
    return _PER_CENT.sub(r"\\%", text)


def has_unit(text: str) -> bool:
    """Whether a quantity with something like a unit ends ``text``."""
    return _UNIT.search(text) is not None


def unit(text: str) -> str:
    """The unit behind a quantity, empty without one. Two texts that name different ones differ."""
    match = _UNIT.search(text)
    if match is None:
        return ""
    name = (match["text"] or match["plain"]).casefold().strip().rstrip(".").removesuffix("s")
    return " ".join(name.split()) + (match["power"] or match["p"] or "")


def reads_as_units(answer: str, gold: str) -> bool:
    """Whether each word and styled group of ``answer`` is a unit or one of the gold's own words."""
    if answer == gold:
        return True
    words: list[str] = []
    for group in _GROUP.finditer(answer):
        if not _TEXT_WORDS.fullmatch(group[1]):
            return False
        found = _split(group[1])
        if group.end() == len(answer) and not _FUNCTIONS.isdisjoint(found):
            return False
        words += found
    rest = _GROUP.sub(" ", answer)
    if re.search(STYLE, rest):
        return False  # braces inside, or none at all: no plain words
    quantity = _QUANTITY.search(_COMMAND.sub("0", answer))
    if quantity is not None:
        start = _QUANTITY.search(_COMMAND.sub(lambda match: "0" * len(match[0]), rest))
        behind = rest[start.start() :] if start is not None else ""
        words += [word.casefold() for word in _PLAIN_WORD.findall(_COMMAND.sub(" ", behind))]
    if words and words[-1] in _POWERS:
        return False
    own = set(_split(gold))
    letters = {letter for letter in gold.casefold() if letter.isalpha()}
    return all(
        word in _POWERS
        or _is_unit(word)
        or word in own
        or word in _FUNCTIONS
        or (len(word) == 1 and word in letters)
        for word in words
    )


def scale(text: str) -> list[str]:
    """The words in ``text`` that change its value, sorted: ``million``, ``dozen``, ``squared``."""
    return sorted(word.removesuffix("s") for word in _split(text) if _is_in(word, _SCALES))


def _split(text: str) -> list[str]:
    return re.findall(r"[a-z]+", _COMMAND.sub(" ", text).replace(".", "").casefold())


def _is_unit(word: str) -> bool:
    return _is_in(word, _UNITS)


def _is_in(word: str, names: frozenset[str]) -> bool:
    return word in names or (len(word) > 3 and word.removesuffix("s") in names)
