from __future__ import annotations

import pytest

from rlkit import callbacks

ROW = {"step": 5, "reward": 0.25, "accuracy": 0.5, "length_mean": 33.25, "loss": -0.001}


def test_a_line_shows_reward_accuracy_and_length() -> None:
    assert callbacks.describe(ROW) == "reward 0.250  accuracy 0.500  length 33.2"
    assert callbacks.describe({"step": 1, "loss": 0.5}) == "loss 0.5000"
    assert "accuracy" not in callbacks.describe({"reward": 0.1, "accuracy": None})


def test_clock() -> None:
    assert [callbacks.clock(s) for s in (-1, 0, 65, 3700)] == ["0:00", "0:00", "1:05", "1:01:40"]


def test_a_log_gets_a_line_every_few_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLKIT_HEADLESS", "1")
    display = callbacks.progress("run", 120)
    for step in range(1, 121):
        display.update({**ROW, "step": step})
    display.note("careful")
    display.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("run  step 1/120  reward 0.250")
    assert lines[0].endswith(" left")
    assert lines[-2].startswith("run  step 120/120")
    assert lines[-1] == "careful"
    assert 10 <= len(lines) <= 16


def test_without_a_terminal_lines_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLKIT_HEADLESS", raising=False)
    assert isinstance(callbacks.progress("run", 3), callbacks.LogProgress)


def test_the_bar_counts_steps(capsys: pytest.CaptureFixture[str]) -> None:
    display = callbacks.BarProgress("run", 2)
    display.update({**ROW, "step": 1})
    display.note("careful")
    display.update({**ROW, "step": 2})
    display.close()
    err = capsys.readouterr().err
    assert "2/2" in err
    assert "careful" in err
    assert "reward 0.250" in err


def test_a_notebook_cell_keeps_one_line_of_plain_text() -> None:
    from IPython.core.displaypub import CapturingDisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    publisher, shell.display_pub = shell.display_pub, CapturingDisplayPublisher()
    try:
        display = callbacks.NotebookProgress("run", 2)
        display.update({**ROW, "step": 1})
        display.update({**ROW, "step": 2})
        outputs = shell.display_pub.outputs
    finally:
        shell.display_pub = publisher
        InteractiveShell.clear_instance()
    assert [o.get("update", False) for o in outputs] == [False, True, True]
    assert len({o["transient"]["display_id"] for o in outputs}) == 1
    assert all(set(o["data"]) == {"text/plain"} for o in outputs)  # no widget state
    assert outputs[-1]["data"]["text/plain"].startswith("run  2 steps  reward 0.250")
