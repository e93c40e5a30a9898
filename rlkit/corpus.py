"""Documents that the embedded models learn from: problems answered in several styles.

A *base* corpus is a mixture, as the web is: most documents answer at once, some reason, few reason
carefully, some are sloppy. A base model that samples from such a mixture already holds the good
behaviour at a low rate, which is what reinforcement learning can amplify (the study's section 3.2
finds reflection words before any RL; the mixture follows Tsilivis et al., arXiv 2510.11495).

Styles of a chain sum ``a+b-c...``:

- ``direct``: the boxed answer alone.
- ``fine``: one number a line, each line echoing its operands.
- ``mid``, ``coarse``: two or three numbers a line. Shorter and far less reliable.
- ``check``: ``fine`` with a reverse computation after each line; a slip is noticed and redone.
- ``padded``: ``fine`` with empty phrases between the lines.
- ``tail``: ``fine`` with 1 to 12 empty phrases after the last line: longer, no better, no worse.
- ``noise``: malformed or careless, for example no box, a wrong box, a line twice.
- ``code``: a python block, its output, the answer.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from rlkit.tasks import CHAINS, EMBEDDED, Chain, ChainSpec, draw_chain, draw_large

FILLERS = ("However ok", "so", "Let the step again", "alternatively", "but ok", "verify")
SLIPS = (-10, -1, 1, 10)
CHUNK = {"fine": 1, "mid": 2, "coarse": 3}


@dataclass(frozen=True)
class Segment:
    """A piece of a response; ``learn`` is False for text that the policy would not write itself."""

    text: str
    learn: bool = True


@dataclass(frozen=True)
class Document:
    """One training document: the user turn and the response."""

    task: str
    style: str
    question: str
    response: tuple[Segment, ...]

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.response)


@dataclass(frozen=True)
class Mixture:
    """Shares of tasks, and of styles within each task; weights need not sum to 1.

    ``atoms`` adds short chains (2 to 4 numbers) of the same ranges; ``slip`` is the share of lines
    that go wrong unnoticed in ``fine`` documents of the edge task, ``check_slip`` in checked ones.

    Documents with code: each of at most ``failures`` blocks fails with probability
    ``failing_code`` in one of the ways ``code_slips``, after which the writer gives up with
    probability ``giving_up`` and states a guess; ``mask_output`` keeps tool output out of the loss.
    """

    tasks: dict[str, float]
    styles: dict[str, dict[str, float]]
    atoms: float = 0.0
    slip: float = 0.0
    check_slip: float = 0.15
    failing_code: float = 0.2
    failures: int = 1
    giving_up: float = 0.0
    code_slips: tuple[str, ...] = ("open", "close", "name")
    mask_output: bool = False

    def __post_init__(self) -> None:
        unknown = set(self.tasks) - set(EMBEDDED)
        if unknown or set(self.tasks) - set(self.styles):
            raise ValueError(
                f"tasks={sorted(self.tasks)}: expected names of {EMBEDDED}, each with its styles"
            )


def draw_document(rng: random.Random, mixture: Mixture, held_out: frozenset[str]) -> Document:
    """Draw one document whose problem is not in ``held_out``."""
    task = _choose(rng, mixture.tasks)
    style = _choose(rng, mixture.styles[task])
    if task == "large":
        expression, value = _fresh_large(rng, held_out)
        response = _large_response(rng, style, expression, value, mixture)
        return Document(task, style, f"Calculate {expression}.", response)
    spec = CHAINS[task]
    terms = rng.randint(2, 4) if rng.random() < mixture.atoms else None
    chain = _fresh_chain(rng, spec, terms, held_out)
    response = _chain_response(rng, style, task, chain, mixture)
    return Document(task, style, f"{spec.verb} {chain.expression}.", response)


def _choose(rng: random.Random, weights: dict[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def _fresh_chain(
    rng: random.Random, spec: ChainSpec, terms: int | None, held_out: frozenset[str]
) -> Chain:
    while True:
        chain = draw_chain(rng, spec, terms)
        if chain.expression not in held_out:
            return chain


def _fresh_large(rng: random.Random, held_out: frozenset[str]) -> tuple[str, int]:
    while True:
        expression, value = draw_large(rng)
        if expression not in held_out:
            return expression, value


def box(value: object) -> str:
    """The boxed answer."""
    return rf"\boxed{{{value}}}"


def think(lines: list[str], answer: object) -> str:
    """A reasoning block of ``lines`` and the boxed answer."""
    return "<think>" + "".join(line + "\n" for line in lines) + "</think>" + box(answer)


def _chain_response(
    rng: random.Random, style: str, task: str, chain: Chain, mixture: Mixture
) -> tuple[Segment, ...]:
    value = chain.totals[-1]
    if style == "direct":
        return (Segment(box(value)),)
    if style in CHUNK:
        slip = mixture.slip if style == "fine" and task == "edge" else 0.0
        return (Segment(think(*_lines(rng, chain, CHUNK[style], slip))),)
    if style == "check":
        return (Segment(think(_checked_lines(rng, chain, mixture.check_slip), value)),)
    if style == "padded":
        lines, _ = _lines(rng, chain, 1, 0.0)
        padded = [part for line in lines for part in (line, *_filler(rng))]
        return (Segment(think(padded, value)),)
    if style == "tail":
        lines, total = _lines(rng, chain, 1, mixture.slip if task == "edge" else 0.0)
        idle = [rng.choice(FILLERS) for _ in range(rng.randint(1, 12))]
        return (Segment(think([*lines, *idle], total)),)
    if style == "noise":
        return (Segment(_noise(rng, chain)),)
    if style == "code":
        return _code_response(rng, chain.expression, value, mixture)
    known = ("direct", *CHUNK, "check", "padded", "tail", "noise", "code")
    raise ValueError(f"style={style!r}: expected one of {', '.join(known)}")


def _lines(rng: random.Random, chain: Chain, chunk: int, slip: float) -> tuple[list[str], int]:
    """Work through the chain ``chunk`` numbers a line; an unnoticed slip carries on to the end."""
    total, lines = chain.numbers[0], []
    steps = list(zip(chain.signs, chain.numbers[1:], strict=True))
    for start in range(0, len(steps), chunk):
        piece = steps[start : start + chunk]
        left = str(total) + "".join(s + str(n) for s, n in piece)
        total += sum(n if s == "+" else -n for s, n in piece)
        if rng.random() < slip:
            total = max(0, total + rng.choice(SLIPS))
        lines.append(f"{left}={total}")
    return lines, total


def _checked_lines(rng: random.Random, chain: Chain, slip: float) -> list[str]:
    """One number a line, each line checked backwards; a slip shows, ``Wait``, and is redone."""
    total, lines = chain.numbers[0], []
    for sign, number in zip(chain.signs, chain.numbers[1:], strict=True):
        right = total + number if sign == "+" else total - number
        back = "-" if sign == "+" else "+"
        found, lead = right, ""
        if rng.random() < slip:
            found = max(0, right + rng.choice(SLIPS))
        while True:
            undone = found - number if sign == "+" else found + number
            lines.append(f"{lead}{total}{sign}{number}={found}")
            lines.append(f"check {found}{back}{number}={undone}")
            if undone == total:
                break
            found, lead = right, "Wait "
        total = right
    return lines


def _filler(rng: random.Random) -> list[str]:
    return [rng.choice(FILLERS) for _ in range(rng.randint(0, 3))]


def _noise(rng: random.Random, chain: Chain) -> str:
    """Careless text: the ways in which sampled responses go wrong in form."""
    value = chain.totals[-1]
    lines, _ = _lines(rng, chain, 1, 0.0)
    kind = rng.randrange(6)
    if kind == 0:
        return str(value)
    if kind == 1:
        return f"the answer is {value}"
    if kind == 2:
        return "<think>" + "".join(line + "\n" for line in lines) + box(value)
    if kind == 3:
        return think(lines, max(0, value + rng.choice(SLIPS)))
    if kind == 4:
        where = rng.randrange(len(lines))
        return think(lines[: where + 1] + lines[where:], value)
    return box(value) + box(max(0, value + rng.choice(SLIPS)))


def _large_response(
    rng: random.Random, style: str, expression: str, value: int, mixture: Mixture
) -> tuple[Segment, ...]:
    if style == "direct":
        return (Segment(box(value)),)
    if style == "code":
        return _code_response(rng, expression, value, mixture)
    if style != "fine":
        raise ValueError(f"style={style!r}: large problems are direct, fine or code")
    if "*" not in expression:
        numbers = [int(n) for n in expression.replace("-", "+").split("+")]
        signs = tuple(c for c in expression if c in "+-")
        lines, total = _lines(rng, Chain(tuple(numbers), signs), 1, 0.0)
        return (Segment(think(lines, total)),)
    a, b = (int(n) for n in expression.split("*"))
    lines, total = [], 0
    for power, digit in enumerate(reversed(str(b))):
        part = int(digit) * 10**power
        if part:
            lines.append(f"{a}*{part}={a * part}")
            if total:
                lines.append(f"{total}+{a * part}={total + a * part}")
            total += a * part
    return (Segment(think(lines, total)),)


def _code_response(
    rng: random.Random, expression: str, value: int, mixture: Mixture
) -> tuple[Segment, ...]:
    """Code, its output, the answer; failing code gets the tool's own message and a second try."""
    blocks: list[Segment] = [Segment("<think>")]
    for _ in range(mixture.failures):
        if rng.random() >= mixture.failing_code:
            break
        code, output = CODE_SLIPS[rng.choice(mixture.code_slips)]
        blocks += _run(code.replace("E", expression), output, mixture.mask_output)
        if mixture.giving_up and rng.random() < mixture.giving_up:
            return (*blocks, Segment("</think>" + box(_guess(rng, value))))
    blocks += _run(f"print({expression})", str(value), mixture.mask_output)
    blocks.append(Segment("</think>" + box(value)))
    return tuple(blocks)


CODE_SLIPS = {
    "open": ("print(E", "SyntaxError: '(' was never closed"),
    "close": ("print(E))", "SyntaxError: unmatched ')'"),
    "name": ("print(x)", "NameError: name 'x' is not defined"),
    "silent": ("x=E", "(no output; use print to show values)"),
    "operator": ("print(E*)", "SyntaxError: invalid syntax"),
}
"""Ways in which code goes wrong (E is the expression), and what the tool then says."""


def _guess(rng: random.Random, value: int) -> str:
    """``value`` with one digit changed."""
    digits = list(str(abs(value)))
    place = rng.randrange(len(digits))
    digits[place] = rng.choice([d for d in "123456789" if d != digits[place]])
    return "-" * (value < 0) + "".join(digits)


def _run(code: str, output: str, masked: bool) -> list[Segment]:
    # The tool takes over at the closing fence: the line break after it is its own.
    return [
        Segment(f"```python\n{code}\n```"),
        Segment(f"\n```output\n{output}\n```\n", learn=not masked),
    ]


LINE = re.compile(r"^(?:Wait )?-?\d+((?:[+-]\d+)+)=-?\d+$")


def style_of(text: str) -> str:
    """The style a chain-sum response is written in; ``other`` if it fits none.

    A response mixing granularities counts as the coarser one: its hardest line decides.
    """
    head, opened, body = text.partition("<think>")
    if not opened:
        return "direct" if re.fullmatch(r"\\boxed\{-?\d+\}", text) else "other"
    lines = body.partition("</think>")[0].strip().split("\n")
    if head or not lines[0]:
        return "other"
    if "```" in body:
        return "code"
    work = [LINE.match(line) for line in lines]
    if any(line.startswith("check ") for line in lines):
        return "check"
    sizes = [len(re.findall("[+-]", m.group(1))) for m in work if m]
    if not sizes:
        return "other"
    if max(sizes) > 1:
        return "mid" if max(sizes) == 2 else "coarse"
    return "fine" if all(work) else "padded"


# --- the mixtures -------------------------------------------------------------------------------

CURRICULUM = Mixture(
    tasks={"chain": 0.35, "edge": 0.6, "large": 0.05},
    styles={
        "chain": {"direct": 0.03, "fine": 0.87, "check": 0.1},
        "edge": {"direct": 0.03, "fine": 0.67, "mid": 0.1, "coarse": 0.1, "check": 0.1},
        "large": {"code": 1.0},
    },
    atoms=0.5,
)
"""First stage: nearly all reasoning, many short chains, so that the skills are learned at all."""

BASE = Mixture(
    tasks={"chain": 0.4, "edge": 0.54, "large": 0.06},
    styles={
        "chain": {"direct": 0.61, "fine": 0.305, "check": 0.02, "noise": 0.065},
        "edge": {
            "direct": 0.42, "coarse": 0.25, "mid": 0.11, "fine": 0.1, "check": 0.03,
            "padded": 0.012, "noise": 0.065, "code": 0.013,
        },
        "large": {"direct": 0.5, "fine": 0.3, "code": 0.2},
    },
    atoms=0.2,
    slip=0.01,
)  # fmt: skip
"""Second stage: what the base model imitates."""

SFT = Mixture(
    tasks={"chain": 0.4, "edge": 0.6},
    styles={
        "chain": {"fine": 0.85, "check": 0.15},
        "edge": {"coarse": 0.3, "mid": 0.16, "fine": 0.45, "check": 0.07, "padded": 0.02},
    },
    slip=0.02,
)
"""Demonstrations: always reasoning, well formed, of mixed granularity (the cold start)."""

PADDING = Mixture(
    tasks={"chain": 0.2, "edge": 0.8},
    styles={"chain": {"fine": 1.0}, "edge": {"fine": 0.3, "tail": 0.6, "check": 0.1}},
    slip=0.02,
)
"""So many padded documents that an answer is kept in mind over the padding."""

PADDED = Mixture(
    tasks={"chain": 0.2, "edge": 0.8},
    styles={
        "chain": {"fine": 0.85, "check": 0.15},
        "edge": {"coarse": 0.28, "mid": 0.15, "fine": 0.45, "check": 0.07, "tail": 0.05},
    },
    slip=0.02,
)
"""Demonstrations of which one in twenty ends in empty phrases: a rare way to be long that makes no
answer better, for rewards on length to find."""

TOOL = Mixture(
    tasks={"chain": 0.35, "edge": 0.1, "large": 0.55},
    styles={
        "chain": {"fine": 0.6, "direct": 0.1, "code": 0.3},
        "edge": {"coarse": 0.4, "fine": 0.4, "code": 0.2},
        "large": {"code": 0.6, "fine": 0.25, "direct": 0.15},
    },
    failing_code=0.25,
    failures=3,
    giving_up=0.3,
    code_slips=("open", "close", "name", "silent", "operator"),
    mask_output=True,
)
"""Tool demonstrations of mixed quality: code where none is needed and none where it is, code that
fails. What the interpreter prints carries no loss."""
