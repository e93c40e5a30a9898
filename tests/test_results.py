"""The README's numbers are those of the published study, and the table says what the file says."""

import pytest

from rlkit import paths, results, stats
from rlkit.panels import Contrast
from rlkit.seeds import verdict


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RLKIT_FIGURES", str(tmp_path))
    return tmp_path


def test_values_and_verdicts_reach_the_table(folder) -> None:
    gain = stats.Estimate(0.5, 0.4, 0.6, 100)
    contrast = Contrast("RL - base", gain, (0.5,), verdict(gain, 0.03), "this checkpoint")
    values = {
        "greedy": stats.Estimate(0.25, 0.2, 0.3, 100),
        "length": stats.Estimate(61.26, 60, 63, 9),
    }
    results.save("03_results", values, [contrast], seeds={"RL": 6, "": 3})
    text = results.fill(f"before\n{results.BEGIN}\nold\n{results.END}\nafter", folder)
    assert text.startswith("before\n") and text.endswith("\nafter") and "old" not in text
    assert "| greedy | 0.250 | 0.200 to 0.300 | 3 |  |" in text
    assert "| length | 61.3 | 60.0 to 63.0 | 3 |  |" in text
    assert "| RL - base | 0.500 | 0.400 to 0.600 | 6 | BETTER |" in text
    assert results.fill(text, folder) == text


def test_a_contrast_can_carry_another_verdict(folder) -> None:
    gain = stats.Estimate(0.5, 0.4, 0.6, 100)
    pair = [Contrast(n, gain, (0.5,), verdict(gain, 0.03), "x") for n in ("a: length", "b")]
    path = results.save("08_results", {}, pair, seeds={"": 6}, verdicts={"a: length": "AGREES"})
    lines = path.read_text().splitlines()[1:]
    assert [line.rsplit(",", 1)[1] for line in lines] == ["AGREES", "BETTER"]


def test_missing_markers_or_results_are_named(folder) -> None:
    with pytest.raises(ValueError, match="needs the lines"):
        results.fill("no markers", folder)
    with pytest.raises(ValueError, match="make publish"):
        results.fill(f"{results.BEGIN}\n{results.END}", folder)


def test_readme_shows_the_published_results() -> None:
    text = (paths.root() / "README.md").read_text()
    assert results.fill(text, paths.root() / "figures") == text, "run `make readme`"
