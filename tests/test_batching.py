from __future__ import annotations

import torch

from rlkit.batching import loss_mask, micro_batches, score_windows, window_indices
from rlkit.completion import Completion


def test_prompts_of_a_step_depend_on_seed_and_step_alone() -> None:
    first = [window_indices(7, step, 20, 6) for step in range(1, 9)]
    assert first == [window_indices(7, step, 20, 6) for step in range(1, 9)]
    assert first != [window_indices(8, step, 20, 6) for step in range(1, 9)]
    for chosen in first:
        assert len(set(chosen)) == 6
    for start in (0, 3, 6):  # three windows make a pass; no problem comes twice in one
        seen = [i for chosen in first[start : start + 3] for i in chosen]
        assert len(set(seen)) == len(seen)
    assert first[0] != first[3]


def batch() -> dict[str, torch.Tensor]:
    lengths = torch.tensor([5, 1, 3, 2, 4, 6, 1, 2])
    mask = (torch.arange(6) < lengths[:, None]).long()
    prompt = torch.tensor([2, 2, 4, 4, 1, 1, 3, 3])
    prompt_mask = (torch.arange(4) >= 4 - prompt[:, None]).long()
    return {
        "prompt_ids": torch.arange(32).reshape(8, 4),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.arange(48).reshape(8, 6),
        "completion_mask": mask,
        "advantages": torch.arange(8.0),
        "old_per_token_logps": torch.arange(48.0).reshape(8, 6),
        "num_items_in_batch": torch.tensor(24),
    }


def test_parts_are_sorted_and_trimmed_and_lose_nothing() -> None:
    whole = batch()
    parts = micro_batches(whole, updates=1, size=2)
    assert [p["completion_ids"].shape[1] for p in parts] == [1, 2, 4, 6]
    rows = [int(i) for p in parts for i in p["advantages"]]
    assert sorted(rows) == list(range(8))
    for part in parts:
        assert part["num_items_in_batch"] == 24
        assert part["old_per_token_logps"].shape == part["completion_mask"].shape
        for i, row in enumerate(int(a) for a in part["advantages"]):
            for side in ("prompt", "completion"):
                kept = part[f"{side}_ids"][i][part[f"{side}_mask"][i].bool()]
                full = whole[f"{side}_ids"][row][whole[f"{side}_mask"][row].bool()]
                assert kept.tolist() == full.tolist()


def test_updates_take_rows_in_order() -> None:
    parts = micro_batches(batch(), updates=2, size=2)
    assert sorted(int(i) for p in parts[:2] for i in p["advantages"]) == [0, 1, 2, 3]
    assert len(parts) == 4


def test_one_part_keeps_the_order() -> None:
    (part,) = micro_batches(batch(), updates=1, size=8)
    assert part["advantages"].tolist() == list(range(8))


def test_loss_mask_leaves_out_rows() -> None:
    def made(stop: str) -> Completion:
        return Completion.from_text("x", token_ids=[1, 2], stop=stop)  # type: ignore[arg-type]

    assert loss_mask(made("eos"), True) == [1, 1]
    assert loss_mask(made("length"), False) == [1, 1]
    assert loss_mask(made("length"), True) == [0, 0]
    assert loss_mask(made("infra"), False) == [0, 0]


def test_score_windows_cover_every_token_once() -> None:
    whole = batch()
    mask = torch.cat([whole["prompt_mask"], whole["completion_mask"]], dim=1)
    seen = torch.zeros_like(mask)
    columns = 0
    for rows, window in score_windows(mask, 6, 2):
        seen[rows, window] += mask[rows, window]
        columns += len(rows) * (window.stop - window.start)
    assert torch.equal(seen, mask)
    assert columns < 0.8 * mask.numel()
