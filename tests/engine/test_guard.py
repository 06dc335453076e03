"""A step that goes wrong, whatever goes wrong, is as if it had not been; it is named; too many in a row end the run."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from faulty import STEPS, Fault, data, faulty_loop, leave_out, lines, state
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from latentgen.core.tensors import not_finite
from latentgen.engine import ema, muon
from latentgen.engine import guard as guarding
from latentgen.engine import step as stepping
from latentgen.engine.checkpoint import steps_in
from latentgen.engine.guard import Guard, lerp_on_device, lerp_unless, require_finite
from latentgen.engine.loop import Loop
from latentgen.engine.meter import Meter
from latentgen.engine.optim import build_optimizer
from latentgen.engine.spikes import Spikes

NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(params=["host", "device"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the verdict stays; "device" is what happens on a GPU, with the CPU in its place."""
    if request.param == "device":
        on_device(monkeypatch)
    return request.param


def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Guard.__init__

    def init(self: Guard, *arguments: Any) -> None:
        plain(self, *arguments)
        self.host = False

    monkeypatch.setattr(Guard, "__init__", init)
    monkeypatch.setattr(ema, "lerp_unless", lerp_on_device)


def different(accelerator: Accelerator, fault: Fault, **how: Any) -> list[str]:
    """What a run with a bad step has other than one that leaves that step out, bit for bit: state and logged means."""
    with tempfile.TemporaryDirectory() as temporary:
        bad, good = Path(temporary, "bad"), Path(temporary, "good")
        loops = faulty_loop(bad, accelerator, fault, **how), faulty_loop(good, accelerator, **how)
        leave_out(loops[1], {fault.step})
        for loop in loops:
            loop.run()
        first, second = (state(loop) for loop in loops)
        found = [name for name in first.keys() | second.keys() if name not in first or name not in second]
        found += [name for name, value in first.items() if name in second and not torch.equal(value, second[name])]
        found += [name for name, value in first.items() if not bool(value.isfinite().all())]
        if lines(bad, "train") != lines(good, "train"):
            found.append("means")
        notes = lines(bad, "guard")
        if [note["step"] for note in notes] != [fault.step + 1]:
            found.append("notes")
        # Only a step that ran knows that the critic has begun.
        return sorted(name for name in found if not (name.startswith("spikes/") and fault.step == 2))


HOW = st.fixed_dictionaries(
    {"micro": st.sampled_from([None, 4]), "optimizer": st.sampled_from(["adamw", "muon"]), "log_every": st.just(3)}
)
FAULTS = st.builds(
    Fault,
    st.sampled_from(["loss", "gradient", "batch"]),
    st.integers(0, STEPS - 2),
    st.sampled_from([NAN, INF, -INF]),
)


@settings(max_examples=8)
@given(FAULTS, HOW)
def test_a_run_with_a_bad_step_is_one_without_that_step(fault: Fault, how: dict[str, Any]) -> None:
    assert different(Accelerator(cpu=True), fault, **how) == []


@settings(max_examples=8)
@given(FAULTS, HOW)
def test_so_it_is_where_nobody_reads_the_verdict(fault: Fault, how: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        on_device(patch)
        assert different(Accelerator(cpu=True), fault, **how) == []


def blind(self: Guard, *arguments: Any) -> torch.Tensor:
    return torch.zeros(())


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "every step is good": (Guard, "judge", blind),
    "the optimizer moves": (Guard, "apply", lambda self, optimizer: optimizer.step()),
    "averages move": (ema, "lerp_unless", lambda skip, *rest: lerp_unless(torch.zeros(()), *rest)),
    "batch statistics stay": (stepping, "_take_back", lambda buffers, skip: None),
    "it counts in the means": (Meter, "forget", lambda self, names: None),
    "its values are in the means": (stepping, "_unless", lambda skip, value: value),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_guard_that_does_less_is_found_out(
    mutant: str, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*MUTANTS[mutant])
    found: set[str] = set()
    for fault in (Fault("gradient", 3), Fault("batch", 4)):
        try:
            found.update(different(accelerator, fault))
        except FloatingPointError as error:
            found.add(str(error))
    assert found


def test_where_nobody_reads_it_muon_must_ask_too(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch)
    plain = muon.Muon._turn
    monkeypatch.setattr(muon.Muon, "_turn", lambda self, some, group, skip: plain(self, some, group, None))
    with pytest.raises(FloatingPointError):
        different(accelerator, Fault("gradient", 3), optimizer="muon")


def test_an_optimizer_that_knows_no_verdict_is_left_out(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As 8-bit ones are."""
    on_device(monkeypatch)

    def plain(modules: dict[str, nn.Module], **settings: Any) -> torch.optim.Optimizer:
        parameters = [p for module in modules.values() for p in module.parameters()]
        return torch.optim.NAdam([{"params": parameters, "rate": 1.0}], lr=settings["lr"])

    monkeypatch.setattr("latentgen.engine.optim.build_optimizer", plain)
    assert different(accelerator, Fault("gradient", 3)) == []


def test_a_bad_critic_is_left_out_alone(accelerator: Accelerator, tmp_path: Path, place: str) -> None:
    loop = faulty_loop(tmp_path, accelerator, Fault("loss", 4, phase="critic"))
    before: dict[str, torch.Tensor] = {}
    plain = loop.step

    def step(number: int, parts: Any) -> None:
        if number == 4:
            before.update(state(loop))
        plain(number, parts)
        if number == 4:
            after = state(loop)
            changed.update(name for name in before if not torch.equal(before[name], after[name]))

    changed: set[str] = set()
    loop.step = step  # type: ignore[assignment, method-assign]
    loop.run()
    assert {"weights-net/0.weight", "optimizer-net/0.exp_avg"} <= changed, "its phase was good, and came first"
    assert not any(name.startswith(("weights-critic/", "optimizer-critic/", "ema-")) for name in changed)
    (note,) = lines(tmp_path, "guard")
    assert (note["step"], note["phase"], note["what"]) == (5, "critic", "loss")


def test_a_bad_phase_takes_the_later_ones_with_it(accelerator: Accelerator, tmp_path: Path, place: str) -> None:
    loop = faulty_loop(tmp_path, accelerator, Fault("gradient", 4))
    loop.run()
    steps = {name: float(value) for name, value in state(loop).items() if name.endswith("/0.step")}
    assert steps == {"optimizer-net/0.step": STEPS - 1, "optimizer-critic/0.step": STEPS - 3}
    (note,) = lines(tmp_path, "guard")
    assert (note["phase"], note["what"], note["skipped"]) == ("net", "gradient", 1)


def indices(accelerator: Accelerator, step: int) -> list[int]:
    return [index for draw, _ in dict(data(accelerator).iterate(0))[step] for index in draw.indices]


@pytest.mark.parametrize("what", ["loss", "gradient", "batch"])
def test_the_examples_are_named(what: str, accelerator: Accelerator, tmp_path: Path, place: str) -> None:
    """All of the micro-batches whose loss is bad; of a bad gradient all of the step; of the data the one it is in."""
    faulty_loop(tmp_path, accelerator, Fault(what, 5), micro=2).run()
    (note,) = lines(tmp_path, "guard")
    whole = indices(accelerator, 5)
    assert note["examples"] == (whole if what == "gradient" else whole[:2])
    assert note["not_finite_in_data"] == ([whole[1]] if what == "batch" else [])
    assert note["what"] == ("gradient" if what == "gradient" else "loss")


def test_batches_are_not_held_for_ever(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device(monkeypatch)
    monkeypatch.setattr(guarding, "HELD", 4)
    faults = [Fault("batch", 1), Fault("batch", 6)]
    faulty_loop(tmp_path, accelerator, *faults, log_every=STEPS).run()
    early, late = lines(tmp_path, "guard")
    assert early["examples"] == indices(accelerator, 1)
    assert (early["not_finite_in_data"], late["not_finite_in_data"]) == ([], [indices(accelerator, 6)[1]])


def test_a_bad_weight_ends_the_run_with_a_report_and_nothing_saved(
    accelerator: Accelerator, tmp_path: Path, place: str
) -> None:
    reports: list[int] = []
    loop = faulty_loop(
        tmp_path, accelerator, Fault("weight", 3), steps=12, bad_steps=3, save_every=2, ema_snapshots=2,
        on_preview=lambda: reports.append(len(lines(tmp_path, "guard"))),
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"checkpoint of step 4 is refused: weights-net/0.weight"):
        loop.run()
    assert steps_in(tmp_path / "c") == [2]
    for file in tmp_path.glob("e/*/*.safetensors"):
        assert not_finite(load_file(file)) == [], "averages did not move"
    assert reports[-1] == len(lines(tmp_path, "guard")) == 1, "the report was made when all was written down"


@pytest.mark.parametrize("log_every", [1, 12])
def test_too_many_in_a_row_end_it_however_seldom_one_looks(
    log_every: int, accelerator: Accelerator, tmp_path: Path, place: str
) -> None:
    """Also when there were good steps again by the time somebody looked."""
    faults = [Fault("loss", step) for step in (1, 4, 5, 6)]
    loop = faulty_loop(tmp_path, accelerator, *faults, steps=12, bad_steps=3, log_every=log_every)
    with pytest.raises(FloatingPointError, match="3 steps in a row were skipped, up to step 7: loss not finite"):
        loop.run()
    assert [note["step"] for note in lines(tmp_path, "guard")] == [2, 5, 6, 7]
    assert steps_in(tmp_path / "c") == []
    quiet = faulty_loop(tmp_path / "more", accelerator, *faults, steps=12, bad_steps=4, log_every=log_every)
    quiet.run()
    assert (quiet.guard.in_row, quiet.guard.total) == (0, 4)


def test_nothing_that_is_not_finite_passes(accelerator: Accelerator) -> None:
    good = {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor([1, 2]), "d": torch.ones(0)}
    assert not_finite({**good, "e": torch.full((2,), 1e300, dtype=torch.float64)}) == []
    for value in (NAN, INF, -INF):
        bad = {**good, "x": torch.tensor([[1.0, value]]), "y": torch.tensor(value, dtype=torch.bfloat16)}
        assert not_finite(bad) == ["x", "y"]
        with pytest.raises(FloatingPointError, match=r"the thing is refused: g/x, g/y not finite"):
            require_finite({"f": good, "g": bad}, accelerator, "the thing")
    require_finite({"f": good}, accelerator, "the thing")


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=4), st.floats(0, 1, width=32), st.booleans())
def test_averages_move_or_stay(values: list[float], weight: float, skip: bool) -> None:
    theirs = [torch.tensor([*values, NAN if skip else 1.0])]
    for move in (lerp_unless, lerp_on_device):
        mine = [torch.linspace(-1, 1, len(values) + 1)]
        before = mine[0].clone()
        move(torch.tensor(float(skip)), mine, theirs, weight)
        if skip:
            assert torch.equal(mine[0], before)
        else:
            torch.testing.assert_close(mine[0], before.lerp(theirs[0], weight), rtol=1e-5, atol=1e-3)


def test_float16_leaves_overflowing_gradients_to_its_scaler_but_not_spikes() -> None:
    """GradScaler's own bookkeeping must go on when a step is left out."""
    net, accelerator = nn.Linear(2, 1), Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    accelerator.scaler = scaler
    try:
        optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(net.parameters(), lr=0.1, fused=True))
        optimizer.scaler = scaler
        guard = Guard(accelerator, 3)
        guard.host = False
        moved = []
        for number, bad in enumerate([0.0, NAN, 0.0]):
            before = net.weight.detach().clone()
            loss = net(torch.ones(1, 2)).square().sum() + bad
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer.optimizer)
            guard.begin()
            guard.judge(number, "net", [], [loss], torch.tensor(INF), [])
            guard.apply(optimizer)
            optimizer.zero_grad()
            moved.append(not torch.equal(before, net.weight))
        assert moved == [True, False, True]
    finally:
        accelerator.scaler = None


def test_the_loop_hands_its_settings_on(accelerator: Accelerator, tmp_path: Path) -> None:
    loop = faulty_loop(tmp_path, accelerator, bad_steps=7, spikes=3.0, rollback_every=5)
    assert isinstance(loop, Loop)
    assert (loop.guard.limit, loop.guard.spikes.factor, loop.rollback.every) == (7, 3.0, 5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_nobody_waits_for_the_device(kind: str, accelerator: Accelerator) -> None:
    """Tensors without values: whoever asks for one fails."""
    with FakeTensorMode():
        net = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 16))
        plain = build_optimizer({"net": net}, kind=kind, lr=0.1, betas=(0.9, 0.99), weight_decay=0.1)
        optimizer = accelerator.prepare_optimizer(plain)
        guard = Guard(accelerator, 3, Spikes(20.0, torch.device("cpu")))
        average = [p.detach().clone() for p in net.parameters()]

        def step(number: int, host: bool) -> None:
            guard.host = host
            loss = net(torch.randn(4, 16)).square().mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            guard.begin()
            skip = guard.judge(number, "net", [], [loss], norm, [])
            stepping._unless(skip, loss)
            stepping._take_back([(b, b.clone()) for b in net.buffers()], skip)
            guard.apply(optimizer)
            guard.end()
            lerp_on_device(skip, average, [p.detach() for p in net.parameters()], 0.1)

        for number in range(2):
            step(number, host=False)
        with pytest.raises(DataDependentOutputException):
            step(2, host=True)
