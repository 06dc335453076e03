"""Memory counted without a GPU: against what is known, against the CPU's allocator, and against CUDA's own autocast."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from latentgen.engine.footprint import PROBES, Allocated, Growth, LikeCuda, autocast, growth, storage_bytes


def test_what_comes_and_goes() -> None:
    x = torch.empty(10, device="meta")
    with Allocated() as seen:
        y = x + 1
        assert seen.alive == 40
        view = y[:5].t()
        assert seen.alive == 40, "a view is no memory of its own"
        y += 1
        x.mul_(2)
        assert seen.alive == 40
        z = torch.cat([y, y])
        assert seen.alive == 120
        del y
        assert seen.alive == 120, "the view holds it"
        del view, z
        assert seen.alive == 0
        torch.empty(3, device="meta", dtype=torch.int64)
    assert seen.peak == 120
    assert seen.history == [40, 120, 24]


def test_bytes_of_shared_storages_count_once() -> None:
    x = torch.empty(4, 4)
    assert storage_bytes([x, x.t(), x[0], torch.empty(2, dtype=torch.bfloat16)]) == 64 + 4


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))


def trained(network: nn.Module, rows: int, device: str) -> None:
    torch.autograd.backward(network(torch.ones(rows, 8, device=device)).square().mean())


def allocated(run: Callable[[], object]) -> int:
    """The most bytes alive in the CPU's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    alive = most = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


@pytest.mark.parametrize("rows", [1, 2, 7, 300])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_on_the_cpu_takes_what_was_foretold(rows: int, parts: int) -> None:
    def foretold(examples: int) -> list[int]:
        with torch.device("meta"):
            network = net()
        with Allocated() as seen:
            trained(network, examples, "meta")
        return seen.history if parts == 1 else seen.beside(p.grad for p in network.parameters() if p.grad is not None)

    real = net()
    for _ in range(parts - 1):
        trained(real, rows, "cpu")
    measured = allocated(lambda: trained(real, rows, "cpu"))
    assert math.isclose(
        growth(*map(foretold, PROBES))(rows), measured, rel_tol=0.02, abs_tol=600
    )  # each storage is rounded up


def test_growth_is_exact_where_another_moment_is_the_fullest() -> None:
    def run(examples: int) -> list[int]:
        with Allocated() as seen:
            large = torch.empty(100, device="meta")
            del large
            torch.empty(examples, 3, device="meta")
        return seen.history

    found = growth(*map(run, PROBES))
    assert found == Growth(((0, 12), (400, 0)))
    assert [found(n) for n in (1, 33, 34, 1000)] == [400, 400, 408, 12000]


def test_other_ways_for_other_numbers_are_not_mistaken() -> None:
    with pytest.raises(AssertionError, match="computed in another way"):
        growth([4, 8], [4, 8, 12])


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=16,
        attention_head_dim=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
    )


class RealAutocast(LikeCuda):
    """CUDA's own, which torch.autocast would refuse without a GPU; attention as in `LikeCuda`."""

    def __enter__(self) -> Any:
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.autocast_increment_nesting()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def saved(network: nn.Module, mode: LikeCuda, device: str) -> tuple[torch.dtype, int, int]:
    """Type of the output; storages kept for the backward pass, weights left out, and their bytes."""
    kept: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    inputs = [torch.empty(2, *shape, device=device) for shape in ((4, 8, 8), (), (5, 16))]
    inputs[0].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), mode:
        out = network(*inputs, return_dict=False)[0]
    own = {id(p.untyped_storage()) for p in network.parameters()}
    found = {id(v.untyped_storage()): v for v in kept if id(v.untyped_storage()) not in own}
    return out.dtype, len(found), storage_bytes(found.values())


@pytest.mark.parametrize("learns", [True, False])
def test_what_autocast_keeps_is_what_cudas_keeps(learns: bool) -> None:
    with torch.device("meta"):
        ours = saved(unet().train().requires_grad_(learns), LikeCuda(torch.bfloat16), "meta")
    with FakeTensorMode(), torch.device("cuda"):
        theirs = saved(unet().train().requires_grad_(learns), RealAutocast(), "cuda")
    assert ours == theirs
    assert ours[0] == torch.bfloat16


def test_a_network_in_mixed_precision_gives_float32() -> None:
    with torch.device("meta"):
        linear, x = nn.Linear(2, 2), torch.empty(1, 2)
    assert autocast(linear, torch.bfloat16)(x).dtype == torch.float32
    inside: list[torch.dtype] = []
    linear.register_forward_hook(lambda module, given, out: inside.append(out.dtype))
    autocast(linear, torch.bfloat16)(x)
    autocast(linear, None)(x)
    assert inside == [torch.bfloat16, torch.float32]


def test_attention_keeps_no_map() -> None:
    q = torch.empty(1, 2, 4096, 64, device="meta", requires_grad=True)
    with LikeCuda(), Allocated() as seen:
        out = functional.scaled_dot_product_attention(q, q, q, dropout_p=0.0)
    assert out.shape == q.shape
    assert seen.peak < 2 * storage_bytes([q]) < storage_bytes([q]) * 4096 // 64


def test_what_is_computed_again_is_not_kept() -> None:
    def peak(again: bool) -> int:
        with torch.device("meta"):
            blocks = nn.ModuleList(net() for _ in range(4))
            x = torch.empty(1000, 8, requires_grad=True)
        with LikeCuda(), Allocated() as seen:
            total = x
            for block in blocks:
                out = checkpoint(block, x, use_reentrant=False) if again else block(x)
                total = total + out.sum(1, keepdim=True)
            torch.autograd.backward(total.sum())
        return seen.peak

    assert peak(True) < peak(False) / 2
