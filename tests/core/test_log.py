"""What the programs print."""

from __future__ import annotations

import pytest

from latentgen.core.log import counted, progress


def test_a_bar_without_a_terminal_says_little_and_ends_with_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("unet", "step", total=1000) as bar:
        for _ in range(1000):
            bar.update()
            bar.set_postfix(loss="0.5", refresh=False)
    text = capsys.readouterr().err
    assert text.count("\r") <= 3
    assert "1000/1000" in text
    assert "unet" in text


def test_a_bar_goes_over_what_it_is_given() -> None:
    assert list(progress("caching", "chunk", over=range(3), disable=True)) == [0, 1, 2]


@pytest.mark.parametrize(("number", "text"), [(950, "950"), (12_340, "12.3k"), (4.31e6, "4.31M"), (1.2e20, "1.20e+20")])
def test_counts_are_short(number: float, text: str) -> None:
    assert counted(number) == text
