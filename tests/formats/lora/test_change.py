from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import lora
from test_apply import states

from latentgen.core.errors import UserError
from latentgen.formats.lora.apply import merge
from latentgen.formats.lora.change import combine, extract, resize
from latentgen.formats.lora.families import shapes_of
from latentgen.formats.lora.file import LoraFile
from latentgen.models.adapters import adaptable
from latentgen.models.deltas import Factors, delta


def deltas(file: LoraFile, networks: Any) -> dict[str, torch.Tensor]:
    shapes = shapes_of(networks)
    return {
        f"{name} {path}": delta(factors, torch.zeros(shapes[name][path]))
        for name, own in file.modules.items()
        for path, factors in own.items()
    }


def changed(family: str = "sd1") -> tuple[Any, Any]:
    """A family's networks, and others of whose linear layers and convolutions every second is another."""
    base = tiny.networks(family)
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(1)
    for network in tuned.values():
        for module in list(adaptable(network).values())[::2]:
            with torch.no_grad():
                module.weight += 0.1 * torch.randn(module.weight.shape, generator=generator)
    return base, tuned


@pytest.mark.parametrize("family", tiny.BASES)
def test_at_full_rank_the_difference_is_reproduced(family: str) -> None:
    base, tuned = changed(family)
    file = extract(base, tuned, 10_000)
    merge(base, file)
    wanted = states(tuned)
    for key, value in states(base).items():
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=1e-5)
    for name, network in base.items():
        assert set(file.modules[name]) == set(list(adaptable(network))[::2])


def test_a_cut_rank_is_the_nearest_there_is() -> None:
    base, tuned = changed()
    file = extract(base, tuned, 2, 3)
    for name, own in file.modules.items():
        old, new = adaptable(base[name]), adaptable(tuned[name])
        for path, factors in own.items():
            change = new[path].weight - old[path].weight
            rank = 3 if change.dim() == 4 and change.shape[2] > 1 else 2
            assert factors.rank == min(rank, *change.flatten(1).shape)
            left = (change - delta(factors, change)).norm()
            torch.testing.assert_close(
                left, torch.linalg.svdvals(change.flatten(1))[rank:].norm(), rtol=1e-4, atol=1e-5
            )


def test_conv_rank_zero_leaves_large_convolutions_out() -> None:
    base, tuned = changed()
    file = extract(base, tuned, 2, 0)
    assert all(shapes_of(base)["unet"][path][2:].numel() == 1 for path in file.modules["unet"])


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
def test_energy_keeps_the_least_rank_that_holds_it(energy: float) -> None:
    base, tuned = changed()
    for path, factors in extract(base, tuned, 10_000, energy=energy).modules["text_encoder"].items():
        change = adaptable(tuned["text_encoder"])[path].weight - adaptable(base["text_encoder"])[path].weight
        squares = torch.linalg.svdvals(change.double()).square()
        assert factors.rank is not None
        assert squares[: factors.rank].sum() >= (energy - 1e-6) * squares.sum()
        assert squares[: factors.rank - 1].sum() < energy * squares.sum()


def test_clamped_entries_stay_below_the_quantile() -> None:
    base, tuned = changed()
    free, clamped = extract(base, tuned, 4), extract(base, tuned, 4, clamp=0.85)
    for path, factors in free.modules["text_encoder"].items():
        entries = torch.cat([value.flatten() for value in factors.tensors.values()]).abs()
        bound = torch.quantile(entries, 0.85, interpolation="nearest")
        other = clamped.modules["text_encoder"][path].tensors
        assert max(value.abs().max() for value in other.values()) <= entries.sort().values[-len(entries) // 12]
        assert all(torch.equal(other[n], v.clamp(-bound, bound)) for n, v in factors.tensors.items())


def test_what_a_lora_cannot_hold_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    base, tuned = changed()
    with torch.no_grad():
        tuned["unet"].conv_in.bias += 1
        tuned["unet"].conv_norm_out.weight += 1
    with caplog.at_level(logging.WARNING):
        extract(base, tuned, 1)
    assert "unet: 2 tensors differ that a LoRA cannot hold, such as conv_in.bias" in caplog.text


def test_models_that_cannot_be_compared() -> None:
    base, tuned = changed()
    with pytest.raises(UserError, match="no linear layer and no convolution differs"):
        extract(base, copy.deepcopy(base), 2)
    with pytest.raises(UserError, match="use two of one family"):
        extract(base, tiny.networks("sdxl"), 2)
    with pytest.raises(UserError, match=r"unet .* is not the same in both"):
        extract({"unet": base["unet"]}, {"unet": tiny.networks("sdxl")["unet"]}, 2)
    for wrong in ({"rank": 0}, {"rank": 1, "conv_rank": -1}, {"rank": 1, "energy": 0.0}, {"rank": 1, "clamp": 1.5}):
        with pytest.raises(UserError, match=r"must be|outside"):
            extract(base, tuned, **wrong)
    with torch.no_grad():
        tuned["unet"].conv_in.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"unet conv_in not finite"):
        extract(base, tuned, 2)


def test_resized_to_the_rank_it_has_it_is_what_it_was() -> None:
    networks, file = lora(rank=3)
    for same in (resize(file, 3), resize(file, 8), resize(file, energy=1.0)):
        for key, value in deltas(same, networks).items():
            torch.testing.assert_close(value, deltas(file, networks)[key], rtol=1e-4, atol=1e-5)


@settings(max_examples=20)
@given(rank=st.integers(1, 4), less=st.integers(1, 4), alpha=st.floats(0.5, 8), spatial=st.booleans())
def test_resized_it_is_the_best_of_its_rank(rank: int, less: int, alpha: float, spatial: bool) -> None:
    generator = torch.Generator().manual_seed(rank + 10 * less)
    kernel, one = ((3, 3), (1, 1)) if spatial else ((), ())
    tensors = {
        "down": torch.randn(rank, 7, *kernel, generator=generator),
        "up": torch.randn(6, rank, *one, generator=generator),
    }
    factors = Factors("lora", tensors, torch.tensor(alpha))
    file = resize(LoraFile(modules={"unet": {"x": factors}}), less)
    weight = torch.zeros(6, 7, *kernel)
    change = delta(factors, weight)
    left = (change - delta(file.modules["unet"]["x"], weight)).norm()
    torch.testing.assert_close(left, torch.linalg.svdvals(change.flatten(1))[less:].norm(), rtol=1e-4, atol=1e-4)
    assert file.modules["unet"]["x"].rank == min(rank, less)


def test_resized_headers_do_not_say_the_old_rank() -> None:
    _, file = lora(targets=("attention",))
    said = LoraFile(modules=file.modules, metadata={"ss_network_dim": "3", "ss_seed": "7"})
    assert resize(said, 1).metadata == {"ss_seed": "7"}


@settings(max_examples=10)
@given(weights=st.lists(st.floats(-2, 2), min_size=1, max_size=3))
def test_combined_it_is_the_sum(weights: list[float]) -> None:
    made = [
        lora(seed=seed, rank=2 + seed, alpha=1 + seed, targets=("attention", "conv1")[: 1 + seed % 2])
        for seed in range(len(weights))
    ]
    networks = made[0][0]
    files = [file for _, file in made]
    combined = combine(files, weights)
    expected: dict[str, torch.Tensor] = {}
    for file, weight in zip(files, weights, strict=True):
        for key, value in deltas(file, networks).items():
            expected[key] = expected.get(key, 0) + weight * value
    got = deltas(combined, networks)
    assert got.keys() == expected.keys()
    for key, value in got.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-5)
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert combined.modules["unet"][path].rank == sum(2 + seed for seed in range(len(weights)))


def test_combined_and_cut() -> None:
    networks, one = lora(seed=1, targets=("attention",))
    _, other = lora(seed=2, targets=("attention",))
    whole, cut = combine([one, other], [0.5, 2.0]), combine([one, other], [0.5, 2.0], method="svd", rank=2)
    for path, factors in cut.modules["unet"].items():
        assert factors.rank == 2
        change = deltas(whole, networks)[f"unet {path}"]
        left = (change - deltas(cut, networks)[f"unet {path}"]).norm()
        torch.testing.assert_close(left, torch.linalg.svdvals(change)[2:].norm(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dora", "lokr", "loha"])
def test_what_does_not_add_up_is_refused(kind: str) -> None:
    _, file = lora(kind, targets=("attention",))
    _, plain = lora(targets=("attention",))
    with pytest.raises(UserError, match=r"combine: unet .* is .*merge it into its model and extract a LoRA"):
        combine([plain, file])
    with pytest.raises(UserError, match=r"resize: unet .* is "):
        resize(file, 1)


def test_numbers_that_do_not_fit() -> None:
    _, file = lora(targets=("attention",))
    _, other = lora(family="sdxl", targets=("attention",))
    unknown: Any = "mean"
    for call, message in (
        (lambda: combine([file], [1, 2]), "2 weights for 1 files"),
        (lambda: combine([]), "0 weights for 0 files"),
        (lambda: combine([file], method=unknown), 'method "mean" is unknown'),
        (lambda: combine([file], method="svd"), "svd needs a rank"),
        (lambda: combine([file], rank=2), "concat has none"),
        (lambda: combine([file, other]), "they are for different models"),
        (lambda: resize(file), "give a rank, an energy or both"),
        (lambda: resize(file, 0), "rank 0 must be"),
        (lambda: resize(file, energy=2.0), "energy 2.0 is outside"),
    ):
        with pytest.raises(UserError, match=message):
            call()
