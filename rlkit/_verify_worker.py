"""Child process of ``rlkit.verify``: compares expressions with math-verify, one per input line.

Run by path, never imported by the package: it must start without rlkit and without the caller's
``__main__`` (which multiprocessing's spawn would execute again).

Input line: JSON ``[gold, answer]``, answer null to ask only whether the gold can be parsed.
Output line: ``ready`` once, then one of right, wrong, unparsable, gold (the gold cannot be parsed).
Arguments: seconds per item. The kernel's SIGALRM default action ends the process when an item runs
over: that also stops C code, which a Python signal handler cannot.
"""

import contextlib
import json
import logging
import os
import resource
import signal
import sys

MEMORY_BYTES = 3 * 2**30
WARM_UP = (r"\frac{1}{2}", "0.5")


def main() -> None:
    """Serve until stdin closes."""
    limit = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig

    # The whole box has to parse: the plain-expression fallback would pick a number out of a text.
    config = [LatexExtractionConfig(boxed_match_priority=0)]

    def read(text: str) -> list:
        boxed = r"\boxed{" + text + "}"
        return parse(boxed, config, fallback_mode="no_fallback", parsing_timeout=None)

    def judge(gold_text: str, answer_text: str | None) -> str:
        gold = read(gold_text)
        if not gold:
            return "gold"
        answer = gold if answer_text is None else read(answer_text)
        if not answer:
            return "unparsable"
        # At its 15 digits math-verify drops what is below 1e-15, so 1.6e-19 pi would be 1.7e-19 pi.
        equal = verify(
            gold, answer, numeric_precision=60, allow_set_relation_comp=True, timeout_seconds=None
        )
        return "right" if equal else "wrong"

    judge(*WARM_UP)
    # Replies go to a private descriptor: anything a parser prints must not become a verdict.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    replies.write("ready\n")
    for line in sys.stdin:
        gold_text, answer_text = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, limit)
        verdict = "unparsable"
        # Model text can raise anything inside the parsers, RecursionError and MemoryError included.
        with contextlib.suppress(Exception):
            verdict = judge(gold_text, answer_text)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(verdict + "\n")


if __name__ == "__main__":
    main()
