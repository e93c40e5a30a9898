"""Processes of ``rlkit.verify_pool``: a nursery that forks, workers that compare expressions.

Run by path, never imported by the package: it must start without rlkit and without the caller's
``__main__`` (which multiprocessing's spawn would execute again).

The nursery imports math-verify once and warms it up, so that a worker is forked in milliseconds.
It has one thread. It reads commands from the socket on descriptor 0 and ends, with its whole
process group, when the other side closes it or when the host is no longer its parent:

- ``fork``, with a socket attached: fork a worker that serves this socket; reply its process id,
  or minus the error number if there is no process left;
- ``end <process id>``: kill that worker if it still runs; reply the CPU seconds that it had.

A worker reads lines ``[seconds, gold, answer]`` in JSON and answers each with a line of three
words: right, wrong, unparsable or gold (the gold cannot be parsed); its CPU seconds so far; its
largest memory in KiB. The kernel's SIGALRM ends it when an item runs over its seconds: that also
stops C code, which a Python signal handler cannot.

Argument: process id of the host.
"""

import contextlib
import errno
import functools
import gc
import json
import logging
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable

MEMORY_BYTES = 3 * 2**30
GOLDS = 512
"""Parsed gold answers that a worker keeps: each meets many answers."""
SECONDS_BETWEEN_LOOKS = 2.0
WARM_UP = (
    (r"\frac{1}{2}", "0.5"),
    (r"2\sqrt{3}", r"3\sqrt{2}"),
    (r"1+2\sqrt{3}", r"\frac{1-\sqrt{5}}{2}"),
    (r"\frac{\pi}{4}", r"\frac{2\pi}{3}"),
    ("x^2+3x-1", "2x^2-3x+1"),
    ("x^2+3x-1", "e^{x}"),
    ("(1,2)", r"\left(2,1\right)"),
    ("(1,2)", r"\{1,2,3\}"),
    ("[0,1)", r"x \in [-2,7]"),
    ("x=3", r"y=90^\circ"),
    ("x", "3 or 5"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}2\\1\end{bmatrix}"),
)
"""Common forms: what is imported and cached on their way need not be done again after a fork."""

Judge = Callable[[str, str], str]


def parse_in_two_stages() -> None:
    """Let the LaTeX parser try ANTLR's SLL prediction first: most of its time is LL prediction.

    By ANTLR's documentation (PredictionMode.SLL) that gives the parse tree of LL prediction or a
    syntax error; on an error the text is parsed again as before.
    """
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended.latex2sympy2 import PSParser

    whole = PSParser.math

    def math(self: PSParser) -> PSParser.MathContext:
        self._interp.predictionMode = PredictionMode.SLL
        try:
            return whole(self)
        except Exception:  # the error listener of latex2sympy raises nothing narrower
            self.reset()
            self._interp.predictionMode = PredictionMode.LL
            return whole(self)

    PSParser.math = math


def read_digits_at_once() -> None:
    """Let the LaTeX parser make an Integer of digits; sympy.Number(text) starts a parser for it."""
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
    from sympy import Integer

    general = _Latex2Sympy.parse_number

    def parse_number(self: _Latex2Sympy, text: str) -> object:
        if text.isascii() and text.isdigit():
            return Integer(int(text))
        return general(self, text)

    _Latex2Sympy.parse_number = parse_number


def simplify_only_in_doubt() -> None:
    """Spare math-verify's last resort, ``simplify(a - b)``, where the difference is surely not 0.

    That is a polynomial with rational coefficients that do not all cancel, or a number made of
    sums, products, rational powers, pi and e whose value is far from 0 within its precision.
    Simplifying could only confirm it.
    """
    from math_verify import grader
    from sympy import Add, Expr, Mul, Number, NumberSymbol, Pow, Rational, preorder_traversal

    whole = grader.sympy_symbolic_eq

    def polynomial_differs(difference: Expr) -> bool:
        terms: dict[frozenset, Rational] = {}
        for term in Add.make_args(difference):
            coefficient, rest = term.as_coeff_Mul()
            powers: dict[Expr, int] = {}
            for base, power in (f.as_base_exp() for f in Mul.make_args(rest) if f != 1):
                if not (base.is_Symbol and power.is_Integer and power > 0):
                    return False
                powers[base] = powers.get(base, 0) + int(power)
            if not coefficient.is_Rational:
                return False
            key = frozenset(powers.items())
            terms[key] = terms.get(key, 0) + coefficient
        return any(terms.values())

    def number_differs(difference: Expr) -> bool:
        for node in preorder_traversal(difference):
            if not isinstance(node, (Number, NumberSymbol, Add, Mul, Pow)):
                return False
            if isinstance(node, Pow) and not (node.exp.is_Rational and abs(node.exp) <= 100):
                return False
        value = difference.evalf(15)
        return bool(value.is_Float and value._prec > 1 and abs(value) > 1e-6)

    def symbolic_eq(a: object, b: object) -> bool:
        if isinstance(a, Expr) and isinstance(b, Expr):
            difference = a - b
            differs = polynomial_differs if difference.free_symbols else number_differs
            if differs(difference):
                return False
        return whole(a, b)

    grader.sympy_symbolic_eq = symbolic_eq


def load_judge() -> Judge:
    """Import math-verify; the comparison of (gold, answer) texts."""
    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig

    parse_in_two_stages()
    read_digits_at_once()
    simplify_only_in_doubt()
    # The whole box has to parse: the plain-expression fallback would pick a number out of a text.
    config = [LatexExtractionConfig(boxed_match_priority=0)]

    def read(text: str) -> list:
        boxed = r"\boxed{" + text + "}"
        return parse(boxed, config, fallback_mode="no_fallback", parsing_timeout=None)

    read_gold = functools.lru_cache(maxsize=GOLDS)(read)

    def judge(gold_text: str, answer_text: str) -> str:
        gold = read_gold(gold_text)
        if not gold:
            return "gold"
        answer = gold if answer_text == gold_text else read(answer_text)
        if not answer:
            return "unparsable"
        # At its 15 digits math-verify drops what is below 1e-15, so 1.6e-19 pi would be 1.7e-19 pi.
        equal = verify(
            gold, answer, numeric_precision=60, allow_set_relation_comp=True, timeout_seconds=None
        )
        return "right" if equal else "wrong"

    for pair in WARM_UP:
        judge(*pair)
    read_gold.cache_clear()
    return judge


def serve(channel: socket.socket, judge: Judge) -> None:
    """Compare what comes from ``channel`` until it closes."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the host may have had it ignored or blocked
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    with channel.makefile("r", encoding="ascii") as lines:
        for line in lines:
            seconds, gold_text, answer_text = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            verdict = "unparsable"
            # Model text can raise anything in the parsers, RecursionError and MemoryError included.
            with contextlib.suppress(Exception):
                verdict = judge(gold_text, answer_text)
            signal.setitimer(signal.ITIMER_REAL, 0)
            largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            channel.sendall(f"{verdict} {time.process_time():.3f} {largest}\n".encode())


def nurse(control: socket.socket, judge: Judge, host: int) -> None:
    """Fork and end workers as told, until the host is gone; does not return."""
    while True:
        if not select.select([control], [], [], SECONDS_BETWEEN_LOOKS)[0]:
            if os.getppid() == host:
                continue
            break  # a copy of the host's socket lives on somewhere
        message, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        if not message:
            break
        if descriptors:
            try:
                pid = os.fork()
            except OSError as error:  # the workers that run need not end for it
                pid = -(error.errno or errno.EAGAIN)
            if pid == 0:
                try:
                    control.close()
                    serve(socket.socket(fileno=descriptors[0]), judge)
                finally:
                    os._exit(0)
            # With a copy here, or in a sibling, the host would never see this worker's end.
            os.close(descriptors[0])
            control.sendall(b"%d\n" % pid)
        else:
            pid = int(message.split()[1])
            os.kill(pid, signal.SIGKILL)  # not waited for yet, so the number is still its own
            used = os.wait4(pid, 0)[2]
            control.sendall(b"%.3f\n" % (used.ru_utime + used.ru_stime))
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Start the nursery; a failure to import math-verify ends on stderr."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    judge = load_judge()
    gc.collect()
    gc.freeze()  # or the first collection in a worker would copy every page
    control = socket.socket(fileno=os.dup(0))
    # Replies have sockets of their own: nothing that a parser prints can become a verdict.
    silent = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(silent, standard)
    control.sendall(b"ready\n")
    nurse(control, judge, int(sys.argv[1]))


if __name__ == "__main__":
    main()
