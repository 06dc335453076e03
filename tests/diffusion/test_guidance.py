"""Guidance asks for what it needs and no more, in one forward pass."""

from __future__ import annotations

import math

import pytest
import torch

from latentgen.core.errors import UserError
from latentgen.diffusion.guidance import CFG, batched, bind
from latentgen.diffusion.parameterization import V, convert, to_x0


def test_cfg_formula_and_the_cheap_case() -> None:
    cond, uncond = torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 2, 2), 1.0)
    x, sigma = torch.zeros_like(cond), torch.ones(1)
    both = {"cond": cond, "uncond": uncond}
    assert CFG(2.5).needs(1.0) == ("cond", "uncond")
    assert CFG(1.0).needs(1.0) == ("cond",)
    assert torch.equal(CFG(2.5).combine(both, x, sigma), torch.full_like(cond, 6.0))
    assert torch.equal(CFG(0.0).combine(both, x, sigma), uncond)
    assert CFG(1.0).combine({"cond": cond}, x, sigma) is cond
    with pytest.raises(UserError, match="guidance scale"):
        CFG(math.nan)


def test_guiding_x0_is_guiding_the_prediction() -> None:
    generator = torch.Generator().manual_seed(0)
    x, v_cond, v_uncond = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64, generator=generator)
    sigma = torch.tensor([0.3, 9.0], dtype=torch.float64)
    p, scale = V(), 7.5
    in_x0 = CFG(scale).combine({"cond": to_x0(p, v_cond, x, sigma), "uncond": to_x0(p, v_uncond, x, sigma)}, x, sigma)
    in_v = to_x0(p, v_uncond + scale * (v_cond - v_uncond), x, sigma)
    torch.testing.assert_close(in_x0, in_v)
    torch.testing.assert_close(convert(v_cond, x, sigma, p, p), v_cond)


def test_one_forward_pass_for_all_kinds() -> None:
    calls: list[tuple[int, tuple[str, ...]]] = []

    def denoise_kinds(x: torch.Tensor, sigma: torch.Tensor, kinds: tuple[str, ...]) -> torch.Tensor:
        calls.append((len(x), kinds))
        assert len(sigma) == len(x)
        shift = {"cond": 1.0, "uncond": -1.0}
        return x + torch.cat([torch.full_like(b, shift[k]) for k, b in zip(kinds, x.chunk(len(kinds)), strict=True)])

    x, sigma = torch.randn(3, 2, 4, 4), torch.full((3,), 2.0)
    guided = bind(CFG(3.0), batched(denoise_kinds))(x, sigma)
    torch.testing.assert_close(guided, x - 1 + 3 * 2)
    torch.testing.assert_close(bind(CFG(1.0), batched(denoise_kinds))(x, sigma), x + 1)
    assert calls == [(6, ("cond", "uncond")), (3, ("cond",))]


class AboveOne:
    """Guided only above sigma = 1, like an interval."""

    def needs(self, sigma: float) -> tuple[str, ...]:
        return ("uncond", "cond") if sigma > 1 else ("cond",)

    def combine(self, predictions: dict[str, torch.Tensor], x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return predictions["cond"]


@pytest.mark.parametrize(
    ("levels", "kinds"), [([2.0, 2.0], ("cond", "uncond")), ([0.5, 0.5], ("cond",)), ([0.5, 2.0], ("cond", "uncond"))]
)
def test_unneeded_predictions_are_not_made(levels: list[float], kinds: tuple[str, ...]) -> None:
    asked: list[tuple[str, ...]] = []

    def predict(kinds: tuple[str, ...], x: torch.Tensor, sigma: torch.Tensor) -> dict[str, torch.Tensor]:
        asked.append(kinds)
        return dict.fromkeys(kinds, x)

    bind(AboveOne(), predict)(torch.zeros(2, 1, 2, 2), torch.tensor(levels))
    assert asked == [kinds]
