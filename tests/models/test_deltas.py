from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.models.deltas import Factors, delta, fits, missing, without_mid, without_scale


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def lora(o: int, i: int, r: int, kernel: int | None = None, alpha: float | None = None) -> Factors:
    spatial, one = ((), ()) if kernel is None else ((kernel, kernel), (1, 1))
    tensors = {"down": rand(r, i, *spatial), "up": rand(o, r, *one, seed=1)}
    return Factors("lora", tensors, None if alpha is None else torch.tensor(alpha))


def tucker(o: int, i: int, r: int) -> Factors:
    return Factors("lora", {"down": rand(r, i, 1, 1), "up": rand(o, r, 1, 1), "mid": rand(r, r, 3, 3)})


LOHA_CONV = {"w1_a": (2, 4), "w1_b": (2, 6), "t1": (2, 2, 3, 3), "w2_a": (2, 4), "w2_b": (2, 6), "t2": (2, 2, 3, 3)}
EVERY: dict[str, tuple[Factors, tuple[int, ...]]] = {
    "lora": (lora(4, 6, 2, alpha=3), (4, 6)),
    "lora conv": (lora(4, 6, 2, kernel=3), (4, 6, 3, 3)),
    "lora linear for a 1x1 conv": (lora(4, 6, 2), (4, 6, 1, 1)),
    "lora tucker": (tucker(4, 6, 2), (4, 6, 3, 3)),
    "loha": (Factors("loha", {"w1_a": rand(4, 2), "w1_b": rand(2, 6), "w2_a": rand(4, 2), "w2_b": rand(2, 6)}), (4, 6)),
    "loha tucker": (
        Factors("loha", {n: rand(*shape, seed=k) for k, (n, shape) in enumerate(LOHA_CONV.items())}),
        (4, 6, 3, 3),
    ),
    "lokr": (Factors("lokr", {"w1": rand(2, 3), "w2": rand(2, 2)}, torch.tensor(7.0)), (4, 6)),
    "lokr low rank": (
        Factors("lokr", {"w1_a": rand(2, 1), "w1_b": rand(1, 3), "w2_a": rand(2, 1), "w2_b": rand(1, 2)}),
        (4, 6),
    ),
    "lokr conv": (Factors("lokr", {"w1": rand(2, 3), "w2": rand(2, 2, 3, 3)}), (4, 6, 3, 3)),
    "lokr conv flat": (Factors("lokr", {"w1": rand(2, 3), "w2_a": rand(2, 2), "w2_b": rand(2, 18)}), (4, 6, 3, 3)),
    "lokr conv tucker": (
        Factors("lokr", {"w1": rand(2, 3), "w2_a": rand(2, 2), "w2_b": rand(2, 2), "t2": rand(2, 2, 3, 3)}),
        (4, 6, 3, 3),
    ),
}


def by_definition(factors: Factors, shape: tuple[int, ...]) -> Tensor:
    """Entry by entry, as in the papers."""
    t = {name: value.double() for name, value in factors.tensors.items()}
    o, i = shape[:2]
    kernel = [
        (y, x) for y in range(shape[2] if len(shape) > 2 else 1) for x in range(shape[3] if len(shape) > 2 else 1)
    ]

    def conv(value: Tensor, a: int, b: int, y: int, x: int) -> Tensor:
        return value[a, b] if value.dim() == 2 else value[a, b, min(y, value.shape[2] - 1), min(x, value.shape[3] - 1)]

    def low_rank(name: str, core: str, a: int, b: int, y: int, x: int) -> Tensor:
        left, right = t[f"{name}_a"], t[f"{name}_b"]
        rank = range(right.shape[0])
        if core in t:
            return sum((t[core][r, s, y, x] * left[r, a] * right[s, b] for r in rank for s in rank), torch.zeros(()))
        if right.shape[1] != i and len(shape) > 2 and factors.kind == "lokr":
            b = b * len(kernel) + y * shape[3] + x
        return sum((left[a, r] * right[r, b] for r in rank), torch.zeros(()))

    def entry(a: int, b: int, y: int, x: int) -> Tensor:
        if factors.kind == "lora":
            rank = range(t["down"].shape[0])
            up, down = t["up"], t["down"]
            if "mid" in t:
                mid = t["mid"]
                return sum(
                    (up[a, r, 0, 0] * mid[r, s, y, x] * down[s, b, 0, 0] for r in rank for s in rank), torch.zeros(())
                )
            return sum((conv(up, a, r, 0, 0) * conv(down, r, b, y, x) for r in rank), torch.zeros(()))
        if factors.kind == "loha":
            return low_rank("w1", "t1", a, b, y, x) * low_rank("w2", "t2", a, b, y, x)
        o2, i2 = o // 2, i // 3
        first = t["w1"][a // o2, b // i2] if "w1" in t else low_rank("w1", "", a // o2, b // i2, y, x)
        if "w2" in t:
            return first * conv(t["w2"], a % o2, b % i2, y, x)
        return first * low_rank("w2", "t2", a % o2, b % i2, y, x)

    made = torch.stack([entry(a, b, y, x) for a in range(o) for b in range(i) for y, x in kernel]).reshape(shape)
    return factors.scale * made


@pytest.mark.parametrize("name", EVERY)
def test_the_change_is_what_the_papers_define(name: str) -> None:
    factors, shape = EVERY[name]
    assert fits(factors, torch.Size(shape))
    made = delta(factors, torch.zeros(shape, dtype=torch.float64))
    torch.testing.assert_close(made, by_definition(factors, shape), rtol=1e-6, atol=1e-6)


def test_alpha_counts_over_the_rank_and_not_where_there_is_none() -> None:
    assert EVERY["lora"][0].scale == 1.5
    assert EVERY["lora conv"][0].scale == 1.0
    assert EVERY["lokr"][0].rank is None
    assert EVERY["lokr"][0].scale == 1.0


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("axis", [0, 1])
def test_dora_gives_every_row_or_column_its_magnitude(name: str, axis: int) -> None:
    factors, shape = EVERY[name]
    magnitude = rand(shape[axis]).abs() + 0.5
    stored = magnitude.reshape([-1 if d == axis else 1 for d in range(len(shape))])
    weight = rand(*shape, seed=9)
    tuned = weight + delta(Factors(factors.kind, factors.tensors, factors.alpha, stored), weight)
    torch.testing.assert_close(tuned.transpose(0, axis).flatten(1).norm(dim=1), magnitude)
    plain = weight + delta(factors, weight)
    directions = [value.transpose(0, axis).flatten(1) for value in (tuned, plain)]
    torch.testing.assert_close(torch.cosine_similarity(*directions), torch.ones(shape[axis]))


def test_dora_leaves_a_row_of_zeros_alone() -> None:
    weight = torch.zeros(4, 6)
    factors = Factors("lora", {"down": torch.zeros(2, 6), "up": torch.zeros(4, 2)}, None, torch.ones(4, 1))
    assert torch.equal(delta(factors, weight), weight)


@given(
    o=st.integers(1, 5),
    i=st.integers(1, 5),
    r=st.integers(1, 4),
    alpha=st.floats(0.1, 20),
    kernel=st.sampled_from([None, 1, 3]),
)
def test_folding_the_scale_or_the_middle_factor_in_changes_nothing(
    o: int, i: int, r: int, alpha: float, kernel: int | None
) -> None:
    factors = lora(o, i, r, kernel, alpha)
    weight = torch.zeros(o, i) if kernel is None else torch.zeros(o, i, kernel, kernel)
    torch.testing.assert_close(delta(without_scale(factors), weight), delta(factors, weight))
    assert without_mid(factors) is factors
    with_mid, weight = tucker(o, i, r), torch.zeros(o, i, 3, 3)
    torch.testing.assert_close(delta(without_mid(with_mid), weight), delta(with_mid, weight))


@pytest.mark.parametrize("name", EVERY)
def test_factors_of_another_shape_are_refused(name: str) -> None:
    factors, shape = EVERY[name]
    for other in ((shape[1], shape[0], *shape[2:]), (shape[0], shape[1] + 1, *shape[2:]), (shape[0] * 2, *shape[1:])):
        assert not fits(factors, torch.Size(other))
        with pytest.raises(UserError, match="do not fit a weight"):
            delta(factors, torch.zeros(other))


def test_a_magnitude_of_another_size_is_refused() -> None:
    factors, shape = EVERY["lora"]
    assert not fits(Factors("lora", factors.tensors, None, torch.ones(5, 1)), torch.Size(shape))


@pytest.mark.parametrize(
    ("kind", "names", "lacking"),
    [
        ("lora", {"down"}, "up"),
        ("lora", {"down", "up"}, None),
        ("loha", {"w1_a", "w1_b", "w2_a"}, "w2_b"),
        ("lokr", {"w1", "w2_a"}, "w2"),
        ("lokr", {"w1_a", "w1_b", "w2"}, None),
    ],
)
def test_what_is_missing(kind: str, names: set[str], lacking: str | None) -> None:
    assert missing(kind, names) == lacking
