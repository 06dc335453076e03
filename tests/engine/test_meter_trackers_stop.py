"""Means, the log of a run, and stopping on request."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from latentgen.engine import stop as stop_module
from latentgen.engine.meter import Meter
from latentgen.engine.stop import StopRequest
from latentgen.engine.trackers import Trackers


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def deliver(number: int) -> None:
    """What the interpreter does with a signal; when it does so is its own affair."""
    handler = signal.getsignal(number)
    assert callable(handler)
    handler(number, None)


def test_meter_takes_means_and_begins_anew(accelerator: Accelerator) -> None:
    meter = Meter()
    assert meter.read(accelerator) == {}
    for value in (1.0, 2.0, 6.0):
        meter.add("loss", torch.tensor(value, requires_grad=True))
    meter.add("half", torch.tensor(1.0), count=0)  # the first micro-batch of two
    meter.add("half", torch.tensor(2.0), count=1)
    assert meter.check(accelerator) == {"half": 3.0, "loss": 3.0}
    assert meter.read(accelerator) == {"half": 3.0, "loss": 3.0}
    meter.add("loss", torch.tensor(5.0))
    assert meter.read(accelerator) == {"loss": 5.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_meter_refuses_what_is_not_finite(bad: float, accelerator: Accelerator) -> None:
    meter = Meter()
    meter.add("fine", torch.tensor(1.0))
    meter.add("loss", torch.tensor(bad))
    meter.add("loss", torch.tensor(1.0))
    with pytest.raises(FloatingPointError, match=r"^loss not finite"):
        meter.check(accelerator)


def test_meter_state_continues_the_mean(accelerator: Accelerator) -> None:
    meter, other = Meter(), Meter()
    for value in (1.0, 2.0):
        meter.add("critic/loss.x", torch.tensor(value))
    other.load_state_dict(meter.state_dict(accelerator), torch.device("cpu"))
    other.add("critic/loss.x", torch.tensor(6.0))
    assert other.read(accelerator) == {"critic/loss.x": 3.0}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_resuming_drops_the_lines_that_come_again(tmp_path: Path) -> None:
    metrics, board = tmp_path / "m.jsonl", tmp_path / "tb"
    with Trackers(metrics, board, stage="vae", start_step=0) as log:
        log.log(9, "train", {"loss": 1.0})
    with Trackers(metrics, board, stage="unet", start_step=0) as log:
        for step in (2, 4, 6):
            log.log(step, "train", {"loss": float(step)})
            log.log(step, "preview", {"psnr": float(step)})
    with open(metrics, "a") as file:
        file.write('{"stage": "unet", "kind": "tr')  # a kill in the middle of a line
    with Trackers(metrics, board, stage="unet", start_step=4) as log:
        log.log(4, "preview", {"psnr": 40.0})
        log.log(6, "train", {"loss": 60.0})
    assert [
        (line["stage"], line["kind"], line["step"], line.get("loss", line.get("psnr"))) for line in lines(metrics)
    ] == [
        ("vae", "train", 9, 1.0),
        ("unet", "train", 2, 2.0),
        ("unet", "preview", 2, 2.0),
        ("unet", "train", 4, 4.0),
        ("unet", "preview", 4, 40.0),
        ("unet", "train", 6, 60.0),
    ]
    assert list((board / "unet").glob("events.*"))


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with Trackers(tmp_path / "m.jsonl", tmp_path / "tb", stage="unet", start_step=0, active=False) as log:
        log.log(1, "train", {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_finite_stays_json(tmp_path: Path) -> None:
    with Trackers(tmp_path / "m.jsonl", tmp_path / "tb", stage="unet", start_step=0) as log:
        log.log(1, "preview", {"psnr": float("inf")})
    assert lines(tmp_path / "m.jsonl")[0]["psnr"] == "inf"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_is_undone_on_leaving(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.asked
        deliver(number)
        assert stop.asked
    assert signal.getsignal(number) is before


def test_a_second_signal_acts_at_once_unless_it_is_an_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(stop_module, "time", SimpleNamespace(monotonic=lambda: now))
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt), StopRequest() as stop:  # noqa: PT012
            deliver(signal.SIGINT)
            assert stop.asked
            now += stop_module.ECHO / 2
            deliver(signal.SIGINT)  # the launcher passes on what the terminal sent already
            now += stop_module.ECHO
            deliver(signal.SIGINT)
            pytest.fail("the second request was not obeyed")
        assert now == 100 + 1.5 * stop_module.ECHO
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)
