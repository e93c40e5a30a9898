"""Draw the held-out splits in data/problems once; run only to change them (all results change too).

Problems come from reasoning-gym (``pip install -e .[tasks]``) where it has the form, so that they
are not this project's own: `chain_sum` for chain, edge and edge-long, `products` and `chain_sum`
for large. chain-long is drawn here, since fewer than one in 100,000 chain_sum items fit it.
reasoning-gym draws item i from ``Random(seed + i)``: one seed and disjoint index ranges keep the
splits apart; expressions are compared besides.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import reasoning_gym

from rlkit.paths import data_dir
from rlkit.tasks import CHAINS, Chain, ChainSpec, Row, draw_chain, make_row

SEED = 2503_04548
SIZES = {
    "chain": {"validation": 128, "test": 256},
    "edge": {"validation": 128, "test": 256},
    "edge-long": {"test": 128},
    "chain-long": {"test": 128},
    "large": {"validation": 64, "test": 200},
}


def parse(expression: str) -> Chain:
    parts = expression.split()
    return Chain(tuple(int(p) for p in parts[::2]), tuple(parts[1::2]))


def chain_sums(task: str) -> Iterator[tuple[str, int]]:
    """Items of chain_sum that fit the task, each number of terms in turn.

    Without the turns nearly all would have the fewest terms, since short items fit most easily.
    """
    spec = CHAINS[task]
    lengths = range(spec.terms[0], spec.terms[1] + 1)
    # Items of one index share their numbers at every length. Edge accepts so many that the lengths
    # would repeat each other; chain accepts about one in 1,000 and no two coincide.
    starts = [0 if task == "chain" else n * 10**7 for n in lengths]
    streams = [of_length(spec, n, start) for n, start in zip(lengths, starts, strict=True)]
    return (item for turn in zip(*streams, strict=True) for item in turn)


def of_length(spec: ChainSpec, terms: int, start: int) -> Iterator[tuple[str, int]]:
    data = reasoning_gym.create_dataset(
        "chain_sum",
        min_terms=terms,
        max_terms=terms,
        min_digits=2,
        max_digits=2,
        seed=SEED,
        size=10**9,
    )
    for index in range(start, 10**9):
        entry = data[index]
        chain = parse(entry["metadata"]["expression"])
        if chain.fits(spec):
            if str(chain.totals[-1]) != entry["answer"]:
                raise ValueError(f"item {index}: {entry} disagrees with {chain.totals[-1]}")
            yield chain.expression, chain.totals[-1]


def large() -> Iterator[tuple[str, int]]:
    products = reasoning_gym.create_dataset(
        "products", min_terms=2, max_terms=2, min_digits=3, max_digits=4, seed=SEED, size=10**6
    )
    sums = reasoning_gym.create_dataset(
        "chain_sum", min_terms=3, max_terms=4, min_digits=5, max_digits=6, seed=SEED, size=10**6
    )
    for index in range(10**6):
        for entry in (products[index], sums[index]):
            expression = entry["metadata"]["expression"].replace(" ", "")
            yield expression, int(entry["answer"])


def own(task: str) -> Iterator[tuple[str, int]]:
    rng = random.Random(f"{task}/held-out/{SEED}")
    while True:
        chain = draw_chain(rng, CHAINS[task])
        yield chain.expression, chain.totals[-1]


def main() -> None:
    folder = data_dir() / "problems"
    folder.mkdir(parents=True, exist_ok=True)
    for task, sizes in SIZES.items():
        gym = task != "chain-long"
        stream = large() if task == "large" else chain_sums(task) if gym else own(task)
        source = f"reasoning-gym {reasoning_gym.__version__}" if gym else "rlkit:held-out"
        seen: set[str] = set()
        for split, size in sizes.items():
            rows: list[Row] = []
            while len(rows) < size:
                expression, value = next(stream)
                if expression not in seen:
                    seen.add(expression)
                    rows.append(make_row(task, expression, value, source))
            text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
            (folder / f"{task}-{split}.jsonl").write_text(text)
            print(f"{task}-{split}: {size} problems, for example {rows[0]['prompt'][0]['content']}")


if __name__ == "__main__":
    main()
