"""Averages of any length out of snapshots: against averages that were tracked, and what is refused."""

from __future__ import annotations

import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from latentgen.core.errors import UserError
from latentgen.engine.ema import Ema
from latentgen.engine.ema_lengths import EmaLengths
from latentgen.engine.ema_profiles import exponent_of, power_share
from latentgen.engine.ema_snapshots import narrow, rebuild

STEPS, EVERY, WANTED = 400, 20, (0.05, 0.075, 0.10, 0.15, 0.20)


class Net(nn.Module):
    """Weights that walk at random, one that never moves, and a buffer that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.walk = nn.Parameter(0.1 * torch.randn(2000))
        self.still = nn.Parameter(0.1 * torch.randn(50))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def snapshots(folder: Path, wide: bool) -> tuple[Net, dict[float, Ema]]:
    """A run with snapshots of two lengths in `folder`; its last weights, and five averages that were tracked."""
    torch.manual_seed(0)
    net = Net()
    still = net.still.detach().clone()
    kept = EmaLengths({"net": net}, (0.05, 0.10), EVERY, wide=wide)
    tracked = {length: Ema(net, partial(power_share, exponent=exponent_of(length))) for length in WANTED}
    for step in range(STEPS):
        with torch.no_grad():
            net.walk += 0.01 * torch.randn(2000) / math.sqrt(STEPS)
            net.count += 1
        kept.update(step, torch.zeros(()))
        for ema in tracked.values():
            ema.update(net, step, torch.zeros(()))
        if kept.due(step + 1, STEPS):
            kept.save(folder, step + 1, main=True)
    assert torch.equal(net.still, still)
    return net, tracked


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Net, dict[float, Ema]]:
    folder = tmp_path_factory.mktemp("ema")
    return folder, *snapshots(folder, wide=True)


def apart(rebuilt: dict[str, Tensor], ema: Ema, net: Net) -> float:
    """The error of what was put together, over how far the average is from the last weights."""
    true = ema.averaged.walk.detach().double()
    return float((rebuilt["walk"].double() - true).norm() / (true - net.walk.detach()).norm())


@pytest.mark.parametrize("length", WANTED)
def test_what_is_put_together_is_what_would_have_been_tracked(length: float, walked) -> None:
    folder, net, tracked = walked
    found = rebuild(folder, "net", length)
    assert found.step == STEPS
    assert apart(found.tensors, tracked[length], net) < (1e-6 if length in (0.05, 0.10) else 0.005)
    # the plain weights, or the nearest length that is there, are no such answer
    others = [other for other in WANTED if other != length]
    assert min(apart(found.tensors, tracked[other], net) for other in others) > 0.05


def test_weights_that_never_moved_come_out_as_they_are(walked) -> None:
    folder, net, _ = walked
    found = rebuild(folder, "net", 0.15)
    torch.testing.assert_close(found.tensors["still"], net.still.detach(), rtol=1e-6, atol=0)
    assert int(found.tensors["count"]) == STEPS, "a buffer is the newest, not an average"
    assert set(found.tensors) == set(net.state_dict())


def test_half_precision_costs_its_last_bits(tmp_path: Path) -> None:
    net, tracked = snapshots(tmp_path, wide=False)
    found = rebuild(tmp_path, "net", 0.15)
    assert found.tensors["walk"].dtype == torch.float32
    error = (found.tensors["walk"] - tracked[0.15].averaged.walk).abs()
    assert float((error / net.walk.detach().abs().clamp_min(1e-2)).max()) < 2**-9
    assert float(error.max()) > 1e-6, "this is not float32"


def test_the_average_of_an_earlier_step(walked, tmp_path: Path) -> None:
    folder, _, _ = walked
    assert rebuild(folder, "net", 0.10, step=200).step == 200
    assert int(rebuild(folder, "net", 0.10, step=200).tensors["count"]) == 200
    with pytest.raises(UserError, match=r"no snapshot of step 210; the last before it is of step 200"):
        rebuild(folder, "net", 0.10, step=210)
    with pytest.raises(UserError, match=r"no snapshots .* up to step 3"):
        rebuild(folder, "net", 0.10, step=3)
    with pytest.raises(UserError, match=r"no snapshots of averages of critic; train with train.ema_lengths"):
        rebuild(folder, "critic", 0.10)
    with pytest.raises(UserError, match=r"train\.ema_lengths"):
        rebuild(tmp_path / "nothing", "net", 0.10)


def test_a_damaged_snapshot_is_named_and_passed_over(walked, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(walked[0], tmp_path / "copy")
    file = tmp_path / "copy" / "00000200" / "net-0.05.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    whole = rebuild(tmp_path / "copy", "net", 0.15)
    assert "00000200: net-0.05.safetensors is damaged" in caplog.text
    assert len(whole.fit.factors) == 2 * (STEPS // EVERY - 1)


def test_snapshots_come_when_they_should_and_hold_no_half_ones(walked) -> None:
    folder, _, _ = walked
    assert sorted(path.name for path in folder.iterdir()) == [f"{s:08d}" for s in range(EVERY, STEPS + 1, EVERY)]
    kept = EmaLengths({"net": Net()}, (0.1,), 30)
    assert [step for step in range(1, 101) if kept.due(step, 100)] == [30, 60, 90, 100]
    assert not EmaLengths({"net": Net()}, (), 1).due(1, 1)


def test_what_float16_cannot_hold_stays_as_it_is() -> None:
    assert narrow(torch.tensor([1.0, 2.0])).dtype == torch.float16
    assert narrow(torch.tensor([1.0, 1e6])).dtype == torch.float32
    assert narrow(torch.tensor([3])).dtype == torch.int64
