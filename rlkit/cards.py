"""Model cards of the embedded models, written from the recipe and the measured gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlkit.corpus import Mixture
    from rlkit.gate import Check
    from rlkit.pretrain import Recipe

PURPOSE = {
    "tiny-base": "The base model: it imitates a mixture in which most documents answer at once, "
    "some reason, and few reason carefully. What RL from a base model starts from.",
    "tiny-sft": "The fine-tuned model: tiny-base after a cold start on demonstrations that always "
    "reason, at mixed granularity. What RL after SFT starts from.",
    "tiny-padded": "What notebook 08 starts from: tiny-sft after more demonstrations, of which one "
    "in twenty ends in empty phrases and reflection words that make no answer better.",
    "tiny-tool": "The tool model: tiny-base after demonstrations that write a python block, read "
    "its output and answer, of mixed quality: code also where none is needed and none where it is; "
    "a quarter of the blocks fail, after which the writer tries again or gives up. Output carries "
    "no loss. What notebooks 09 and 10 start from.",
}


def card(
    recipe: Recipe, *, seed: int, documents: int, parameters: int, gate: Sequence[Check]
) -> str:
    """The card's markdown. ``documents`` is the number per chunk."""
    parts = [
        f"# {recipe.name}",
        PURPOSE[recipe.name],
        f"Qwen2 architecture, {parameters:,} parameters, one token per character, trained "
        "by this project on synthetic arithmetic only. It can do nothing else, and says nothing "
        "about real language models beyond the mechanism it shows. Licence: Apache-2.0.",
        "## How it was made",
        f"```\npython -m rlkit pretrain {recipe.name} --seed {seed}\n```",
        f"Seed {seed}; the shipped weights were made on two CPU cores, and another thread count or "
        "machine gives weights that differ in the last digits. "
        + (f"Continues from {recipe.start}. " if recipe.start else "From random weights. ")
        + f"Batches of {recipe.batch_tokens} tokens, AdamW (0.9, 0.98), weight decay 0.01, loss on "
        "the response only. Documents are drawn anew, none uses a problem of data/problems.",
        "| stage | documents | peak rate | tasks | styles |\n|---|---|---|---|---|\n"
        + "\n".join(
            f"| {number} | {stage.chunks * documents:,} | {stage.peak_rate:g} "
            f"| {_shares(stage.mixture.tasks)} | {_styles(stage.mixture)} |"
            for number, stage in enumerate(recipe.stages, 1)
        ),
    ]
    if gate:
        parts += [
            "## Entry gate",
            "Measured on validation problems at temperature 1 (`rlkit/gate.py`).",
            "| quantity | value | wanted |\n|---|---|---|\n"
            + "\n".join(f"| {c.name} | {c.value:.3f} | {c.bounds} |" for c in gate),
        ]
    return "\n\n".join(parts) + "\n"


def _shares(weights: dict[str, float]) -> str:
    total = sum(weights.values())
    return ", ".join(f"{name} {weight / total:.0%}" for name, weight in weights.items())


def _styles(mixture: Mixture) -> str:
    styles = [f"{task}: {_shares(mixture.styles[task])}" for task in mixture.tasks]
    if mixture.atoms:
        styles.append(f"{mixture.atoms:.0%} of chains have 2 to 4 numbers")
    return "; ".join(styles)
