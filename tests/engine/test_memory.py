"""Running out of memory changes how a step is cut, and nothing else."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toy_settings
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from latentgen.core.errors import UserError
from latentgen.core.rand import Draw
from latentgen.data.loader import Cut, Loader
from latentgen.data.order import Shuffled
from latentgen.engine import memory
from latentgen.engine.checkpoint import Checkpoint, load_newest
from latentgen.engine.loop import Loop
from latentgen.engine.memory import Fitting, cut_rows, smaller
from latentgen.engine.optim import build_optimizer
from latentgen.engine.settings import StagePaths
from latentgen.engine.task import Phase
from latentgen.models.unet import attention_kernel, build_unet, checkpoint_activations

STEPS, BATCH = 4, 12
SETTINGS = replace(
    toy_settings.SETTINGS, steps=STEPS, warmup_steps=1, log_every=2, save_every=2, keep_last=9, fit_micro_batch=True
)


class Narrow(nn.Linear):
    """A layer that has room for `room` examples at once, from the call number `since` on."""

    def __init__(self, room: int, since: int = 0) -> None:
        super().__init__(5, 3)
        self.room, self.since, self.calls = room, since, 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if len(x) > self.room and self.calls > self.since:
            raise torch.OutOfMemoryError("no room")
        self.seen += len(x)
        return super().forward(x)


class Toy:
    name = "toy"

    def __init__(self, room: int, since: int = 0) -> None:
        torch.manual_seed(0)
        self.modules: dict[str, nn.Module] = {"net": Narrow(room, since)}
        self.averaged: tuple[str, ...] = ("net",)

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("net", ("net",)),)

    def losses(self, phase: str, batch: Any, draw: Draw) -> dict[str, Tensor]:
        out = self.modules["net"](batch["x"] + draw.normal("more", (5,)))
        return {"loss": (out - batch["y"]).square().mean()}

    def preview(self, averaged: Mapping[str, nn.Module], step: int, folder: Path) -> dict[str, float]:
        return {}


def fetch(draw: Draw) -> dict[str, Any]:
    return {"x": draw.normal("x", (5,)), "y": draw.normal("y", (3,)), "names": [str(i) for i in draw.indices]}


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def trained(
    folder: Path, accelerator: Accelerator, toy: Toy, *, micro: int | None = None, steps: int = STEPS, fit: bool = True
) -> Checkpoint:
    data = Loader(fetch, Shuffled(20), 0, "toy", Cut(BATCH, micro), steps)
    settings = replace(SETTINGS, steps=steps, fit_micro_batch=fit)
    paths = StagePaths(folder / "c", folder / "s", folder / "m.jsonl", folder / "tb")
    Loop(toy, data, settings, accelerator, paths).run()
    found = load_newest(folder / "c")
    assert found is not None
    return found


def same(one: Checkpoint, two: Checkpoint) -> None:
    for group in ("weights-net", "ema-net", "optimizer-net", "meter"):
        assert one.tensors[group].keys() == two.tensors[group].keys()
        for name, value in one.tensors[group].items():
            assert torch.equal(value, two.tensors[group][name]), (group, name)


@pytest.mark.parametrize(("room", "size"), [(11, 6), (6, 6), (5, 3), (1, 1)])
def test_the_rehearsal_finds_what_a_user_would_have_given(room, size, accelerator, tmp_path, caplog):
    found = trained(tmp_path / "auto", accelerator, Toy(room))
    given_size = trained(tmp_path / "given", accelerator, Toy(room), micro=size, fit=False)
    assert found.data["micro_batch"] == size
    same(found, given_size)
    assert f"now {size} at once" in caplog.text


def test_memory_that_runs_out_later_loses_no_step_and_no_gradient(accelerator, tmp_path):
    # One call rehearses, two train; then the third step fails, is cut and begun anew.
    found = trained(tmp_path / "cut", accelerator, Toy(4, since=3))
    plain = trained(tmp_path / "plain", accelerator, Toy(BATCH), fit=False)
    assert found.data["micro_batch"] == 3
    for name, value in plain.tensors["weights-net"].items():
        if name != "seen":
            torch.testing.assert_close(found.tensors["weights-net"][name], value, rtol=1e-5, atol=1e-6)
    assert not torch.equal(plain.tensors["weights-net"]["weight"], plain.tensors["ema-net"]["weight"])


def test_a_resumed_run_keeps_the_size_that_was_found(accelerator, tmp_path):
    whole = trained(tmp_path / "whole", accelerator, Toy(5))
    trained(tmp_path / "parts", accelerator, Toy(5), steps=2)
    # There is room for all now, and still the sums are taken in the old order.
    same(trained(tmp_path / "parts", accelerator, Toy(BATCH)), whole)


def test_without_auto_it_is_an_error(accelerator, tmp_path):
    with pytest.raises(torch.OutOfMemoryError):
        trained(tmp_path, accelerator, Toy(5), fit=False)


def test_a_single_example_that_does_not_fit_is_said_so(accelerator, tmp_path):
    with pytest.raises(UserError, match="gradient_checkpointing"):
        trained(tmp_path, accelerator, Toy(0))


def test_all_processes_take_the_smallest_size(monkeypatch):
    other = [True, True, False]  # when the memory of the second process runs out
    monkeypatch.setattr(memory, "anywhere", lambda accelerator, here: here or other.pop(0))
    data = Loader(fetch, Shuffled(20), 0, "toy", Cut(BATCH), 1)
    _, micro_batches = next(iter(data.iterate(0)))
    fitting = Fitting(SimpleNamespace(num_processes=2, device=torch.device("cpu")), active=True)  # type: ignore[arg-type]
    ran: list[int] = []
    fitting.rehearse(micro_batches, lambda parts: ran.append(len(parts[0][0].rows)))
    assert fitting.size == 3
    assert ran == [12, 6, 3]

    def fail(parts: Any) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(UserError, match="micro_batch=1: "):
        fitting.attempt(micro_batches, fail)


@given(st.integers(1, 40), st.integers(1, 4), st.data())
def test_cutting_keeps_every_example_and_its_draws(rows, world, data):
    size = data.draw(st.sampled_from([k for k in range(1, rows + 1) if rows % k == 0]))
    rank = data.draw(st.integers(0, world - 1))
    loader = Loader(fetch, Shuffled(50), 1, "toy", Cut(rows * world, None, rank, world), 1)
    ((_, before),) = loader.iterate(0)
    after = cut_rows(before, size)
    assert {len(draw.rows) for draw, _ in after} == {size}
    (draw, batch) = before[0]
    assert [i for part, _ in after for i in part.indices] == list(draw.indices)
    assert [i for part, _ in after for i in part.rows] == list(draw.rows)
    assert torch.equal(torch.cat([part.normal("noise", (2,)) for part, _ in after]), draw.normal("noise", (2,)))
    assert torch.equal(torch.cat([part["x"] for _, part in after]), batch["x"])
    assert [name for _, part in after for name in part["names"]] == batch["names"]


@given(st.integers(2, 500))
def test_smaller_divides_and_at_least_halves(rows):
    size = smaller(rows)
    assert rows % size == 0
    assert 1 <= size <= rows / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_gives_equal_gradients(dtype):
    torch.manual_seed(0)
    unet = build_unet(
        latent_size=4, latent_channels=2, channels=(8, 8), layers_per_block=1, attention=(True, True), heads=2,
        context_dim=6, norm_groups=2, dropout=0.2,
    ).train()  # fmt: skip
    x, t, context = torch.randn(3, 2, 4, 4), torch.tensor([1.0, 5.0, 9.0]), torch.randn(3, 4, 6)

    def gradients() -> tuple[list[Tensor], int]:
        kept: list[int] = []
        unet.zero_grad()
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v.numel()) or v, lambda v: v):
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
                attention_kernel("auto", dtype=dtype, training=True),
            ):
                out = unet(x, t, encoder_hidden_states=context, return_dict=False)[0]
            kept_forward = sum(kept)
        out.float().square().mean().backward()
        return [p.grad.clone() for p in unet.parameters() if p.grad is not None], kept_forward

    plain, much = gradients()
    checkpoint_activations(unet, "auto", dtype=dtype)
    again, little = gradients()
    assert little < much / 2
    assert len(plain) == len(again) > 10
    for one, two in zip(plain, again, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)


def test_eight_bit_adam_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        build_optimizer({"net": nn.Linear(2, 2)}, kind="adamw8bit", lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)
