"""Texts that end a response, for models without an end token for a turn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase


def holding(
    texts: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> NDArray[np.bool_]:
    """Which tokens hold one of ``texts`` [vocabulary]."""
    # Decoded after another token: alone, some tokenizers drop a token's leading space.
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    before = str(tokenizer.decode(anchor))
    pairs = tokenizer.batch_decode([[*anchor, i] for i in range(vocabulary)])
    pieces = [str(pair).removeprefix(before) for pair in pairs]
    return np.array([any(text in piece for text in texts) for piece in pieces], dtype=np.bool_)


class StopTexts:
    """Finds texts that end a response, also when they are spread over several tokens.

    Decoding each row at each step would cost more than the model does. A row is decoded only when
    its newest token holds the last character of a text, and then only a few tokens of it.

    Args:
        stop: the texts.
        tokenizer: decodes ids.
        vocabulary: number of ids.
    """

    def __init__(
        self, stop: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, vocabulary: int
    ) -> None:
        self.stop = stop
        self.tokenizer = tokenizer
        # A token spells at least one byte; one more character in front may be cut in two.
        self.window = max(len(text.encode()) for text in stop) + 4
        # U+FFFD: part of a character, so it may complete any.
        last = {text[-1] for text in stop} | {"\ufffd"}
        self.may_end = holding(tuple(last), tokenizer, vocabulary)

    def found(self, tail: Sequence[int]) -> bool:
        """Whether the newest tokens of a row hold one of the texts."""
        # The first character may be cut in two, and some decoders then give up the whole run of
        # bytes that it begins: look from later starts, too. UTF-8 has at most four bytes.
        texts = (str(self.tokenizer.decode(list(tail[skip:]))) for skip in range(4))
        return any(stop in text for text in texts for stop in self.stop)
