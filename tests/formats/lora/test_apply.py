from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import tiny
import torch
from made import lora, trained

from latentgen.core.errors import UserError
from latentgen.formats.lora.apply import merge, merged, unmerge
from latentgen.formats.lora.file import LoraFile, trained_lora
from latentgen.models.adapters import KINDS
from latentgen.models.deltas import Factors


def states(networks: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {f"{name} {key}": v.clone() for name, net in networks.items() for key, v in net.state_dict().items()}


def assert_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", tiny.BASES)
def test_the_merged_network_computes_what_the_adapter_computed(kind: str, family: str) -> None:
    networks, tuned = trained(kind, family)
    before, expected = tiny.outputs(networks), tiny.outputs(tuned)
    merge(networks, trained_lora(tuned))
    for name, made in tiny.outputs(networks).items():
        assert not torch.allclose(expected[name], before[name], atol=0.01)
        torch.testing.assert_close(made, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_zero_leaves_every_bit(kind: str) -> None:
    networks, file = lora(kind)
    networks["unet"].half()
    before = states(networks)
    merge(networks, file, 0.0)
    assert_equal(states(networks), before)
    merge(networks, file, {"unet": 0.0})
    after = states(networks)
    assert_equal(*({k: v for k, v in s.items() if k.startswith("unet")} for s in (after, before)))
    assert any(not torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_originals_come_back_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    networks, file = lora(kind)
    for network in networks.values():
        network.to(dtype)
    before = states(networks)
    with merged(networks, file, 0.7):
        assert any(not torch.equal(value, before[key]) for key, value in states(networks).items())
    assert_equal(states(networks), before)

    def fail() -> None:
        with merged(networks, file):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert_equal(states(networks), before)


@pytest.mark.parametrize("kind", ["lora", "lokr", "loha"])
def test_unmerge_is_merge_backwards(kind: str) -> None:
    networks, file = lora(kind)
    before = states(networks)
    merge(networks, file, 0.5)
    unmerge(networks, file, 0.5)
    for key, value in states(networks).items():
        torch.testing.assert_close(value, before[key], rtol=1e-5, atol=1e-5)


def test_dora_cannot_be_subtracted() -> None:
    networks, file = lora("dora", targets=("attention",))
    with pytest.raises(UserError, match=r"DoRA cannot be subtracted .*load the model again"):
        unmerge(networks, file)


@pytest.mark.parametrize("kind", KINDS)
def test_half_the_weight_is_half_the_change(kind: str) -> None:
    base, file = lora(kind)
    half, whole = copy.deepcopy(base), copy.deepcopy(base)
    merge(half, file, 0.5)
    merge(whole, file)
    full = states(whole)
    for (key, value), start in zip(states(half).items(), states(base).values(), strict=True):
        torch.testing.assert_close(value - start, 0.5 * (full[key] - start), rtol=1e-4, atol=1e-5)


def test_the_sum_is_rounded_once_from_float32() -> None:
    networks, file = lora(targets=("attention",))
    exact = copy.deepcopy(networks)
    networks["unet"].half()
    exact["unet"].half().float()
    merge(networks, file)
    merge(exact, file)
    for key, value in networks["unet"].state_dict().items():
        assert torch.equal(value, exact["unet"].state_dict()[key].half())


def test_other_models_are_refused_and_left_alone() -> None:
    _, file = lora(family="sdxl", targets=("attention",))
    networks = tiny.networks("sd1")
    before = states(networks)
    with pytest.raises(UserError, match="changes text_encoder_2, which the model has not; give text_encoder_2 the"):
        merge(networks, file)
    with pytest.raises(UserError, match=r"does not fit the model: unet .*made for another one"):
        merge(networks, file, {"text_encoder_2": 0.0})
    assert_equal(states(networks), before)


def test_what_is_not_finite_is_refused_and_nothing_changed() -> None:
    networks, file = lora(targets=("attention",))
    networks["unet"].half()
    before = states(networks)
    unet = dict(file.modules["unet"])
    path = list(unet)[-1]
    unet[path] = Factors("lora", unet[path].tensors, torch.tensor(1e9))
    with pytest.raises(FloatingPointError, match="the merged model is refused"):
        merge(networks, LoraFile(modules={"unet": unet}))
    assert_equal(states(networks), before)
