"""Means, the log of a run, and stopping on request."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from latentgen.core.errors import Interrupted
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
    with Trackers(metrics, board, stage="unet", start_step=4, names=["tensorboard"]) as log:
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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(stop_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.mark.parametrize("number", StopRequest.signals)
def test_a_signal_raises_at_once_where_nothing_is_to_be_saved(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="the same command continues"), StopRequest() as stop:  # noqa: PT012
        with stop:
            pass
        deliver(number)
    assert stop.asked
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", StopRequest.signals)
def test_a_signal_only_asks_where_it_is_postponed(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop, stop.postponed():
        assert not stop.asked
        deliver(number)
        assert stop.asked
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", StopRequest.signals)
def test_a_second_signal_acts_at_once_unless_it_is_an_echo(number: signal.Signals, clock: SimpleNamespace) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop, stop.postponed():
        deliver(signal.SIGINT)
        clock.now += stop_module.ECHO / 2
        deliver(number)  # the launcher passes on what the terminal sent already
        clock.now += stop_module.ECHO
        with pytest.raises(KeyboardInterrupt) as caught:
            deliver(number)
        assert not isinstance(caught.value, Interrupted), "which would mean that all is saved"
        assert signal.getsignal(number) is before, "and a third one does what it does elsewhere"


def test_a_signal_here_after_one_at_another_process_is_the_first(clock: SimpleNamespace) -> None:
    with StopRequest() as stop, stop.postponed():
        stop.ask()
        assert stop.asked
        clock.now += 10
        deliver(signal.SIGTERM)


def test_a_late_signal_does_not_disturb_who_is_leaving(clock: SimpleNamespace) -> None:
    with pytest.raises(Interrupted, match="saved"), StopRequest() as stop:  # noqa: PT012
        try:
            with stop.postponed():
                stop.asked = True  # all processes have agreed on it
                raise Interrupted("saved")
        finally:
            stop.ask()
            deliver(signal.SIGTERM)
            clock.now += stop_module.ECHO / 2
            deliver(signal.SIGTERM)


def test_a_signal_at_another_process_raises_here_too() -> None:
    with pytest.raises(Interrupted), StopRequest() as stop:  # noqa: PT012
        threading.Thread(target=stop.ask).start()
        for _ in range(1000):
            time.sleep(0.01)
        pytest.fail("nothing came")
