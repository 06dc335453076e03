"""Networks of which a part is frozen are trained with the same exactness, and only what changes is kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import faulty
import pytest
import torch
from accelerate import Accelerator
from partial import FROZEN, NORM, STEPS, TRAINED, Adapted, Partial, partial_loop
from safetensors.torch import load_file
from torch import Tensor, nn

from latentgen.core.errors import UserError
from latentgen.engine.changing import Changing
from latentgen.engine.checkpoint import Checkpoint, load_newest, read_checkpoint, steps_in
from latentgen.engine.ema import Ema
from latentgen.engine.ema_host import HostEma
from latentgen.engine.ema_lengths import EmaLengths
from latentgen.engine.ema_snapshots import rebuild
from latentgen.engine.loop import Loop
from latentgen.engine.saver import Saver
from latentgen.engine.task import Phase

WAYS = [("adamw", None), ("muon", None), ("adamw", "cpu")]
"""(optimizer, device of the averages)"""
KEPT = {"net": TRAINED | NORM, "token": {"row"}, "critic": {"weight", "bias"}, "still": set()}


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(scope="module", params=WAYS, ids=str)
def how(request: pytest.FixtureRequest) -> dict[str, Any]:
    optimizer, device = request.param
    return {"optimizer": optimizer, "ema_device": device}


@pytest.fixture(scope="module")
def whole(how: dict[str, Any], accelerator: Accelerator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption, with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("whole")
    partial_loop(folder, accelerator, **how).run()
    return folder


def flat(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {f"{group}/{name}": value for group, own in checkpoint.tensors.items() for name, value in own.items()}


def differences(found: Path, whole: Path) -> list[str]:
    """Tensors and lines of the log that are not equal at the end."""
    one, two = (load_newest(folder / "c") for folder in (found, whole))
    assert one is not None
    assert two is not None
    assert one.step == two.step == STEPS
    a, b = flat(one), flat(two)
    assert a.keys() == b.keys()
    wrong = [name for name in a if not torch.equal(a[name], b[name])]
    return wrong if faulty.lines(found) == faulty.lines(whole) else [*wrong, "log"]


class Kill(Exception):
    """Stands for a process that dies."""


def stopped(loop: Loop, at: int) -> Loop:
    """The loop, which a kill ends before step `at`, from 0."""
    plain = loop.data

    class Dying:
        def iterate(self, start: int) -> Iterator[Any]:
            for step, parts in plain.iterate(start):
                if step == at:
                    raise Kill
                yield step, parts

    loop.data = Dying()
    return loop


def test_what_changes_is_trained_or_a_buffer() -> None:
    net = Adapted(norm=True)
    found = Changing(net)
    assert found.parameters == TRAINED
    assert set(found.names) == TRAINED | NORM
    assert {name for name, _ in net.named_parameters(remove_duplicate=False)} == TRAINED | FROZEN
    plain = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert list(Changing(plain).names) == list(plain.state_dict()), "all, where nothing is frozen"
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    assert Changing(tied).parameters == {"0.weight", "0.bias", "1.weight", "1.bias"}


def storages(module: nn.Module) -> dict[int, int]:
    """Address -> bytes of the memory that a module holds."""
    held = [value.untyped_storage() for value in (*module.parameters(), *module.buffers())]
    return {storage.data_ptr(): storage.nbytes() for storage in held}


@pytest.mark.parametrize("kind", [Ema, HostEma])
def test_averages_share_what_is_frozen_and_hold_no_more_than_what_changes(kind: type[Ema]) -> None:
    net = Adapted(norm=True)
    lengths = EmaLengths({"net": net}, (0.05, 0.1), 1, kind=kind)
    changing = sum(value.nbytes for name, value in net.state_dict().items() if name not in FROZEN)
    for ema in (kind(net, 0.9), *lengths.averages.values()):
        for name, own in ema.averaged.named_parameters(remove_duplicate=False):
            assert not own.requires_grad
            assert (own.data_ptr() == net.get_parameter(name).data_ptr()) == (name in FROZEN), name
        mine, theirs = storages(ema.averaged), storages(net)
        assert sum(size for at, size in mine.items() if at not in theirs) == changing
        assert set(ema.state_dict()) == TRAINED | NORM
    assert all(p.requires_grad == (name in TRAINED) for name, p in net.named_parameters())


def test_an_average_beside_a_gpu_holds_there_what_changes() -> None:
    """As far as a machine without one shows it: the meta device stands for the other one."""
    net, elsewhere = Adapted(norm=True), torch.device("meta")
    for copied in (Ema(net, 0.9, elsewhere).averaged, Changing(net).copied(HostEma(net, 0.9).averaged, elsewhere)):
        state = copied.state_dict()
        assert {name for name, value in state.items() if value.device == elsewhere} == TRAINED | NORM
        assert all(copied.get_parameter(name) is net.get_parameter(name) for name in FROZEN)


@pytest.mark.parametrize("at", range(1, STEPS))
def test_a_run_stopped_at_any_step_continues_bit_for_bit(
    at: int, how: dict[str, Any], whole: Path, accelerator: Accelerator, tmp_path: Path
) -> None:
    with pytest.raises(Kill):
        stopped(partial_loop(tmp_path, accelerator, **how), at).run()
    assert steps_in(tmp_path / "c")[-1] == at
    partial_loop(tmp_path, accelerator, **how).run()
    assert differences(tmp_path, whole) == []
    for name in ("net-0.1", "token-0.1"):
        path = Path("e", f"{STEPS:08d}", f"{name}.safetensors")
        assert (tmp_path / path).read_bytes() == (whole / path).read_bytes()


def test_nothing_can_be_left_out(
    how: dict[str, Any], whole: Path, accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tensor after the other is restored as it was before the first step: each time the comparison says so.

    But for an average's buffers, which are the network's own after the next step.
    """
    first = flat(partial_loop(tmp_path, accelerator, **how).state.snapshot(0))
    begun = {name: value.clone() for name, value in first.items()}
    saved = flat(read_checkpoint(whole / "c" / "00000003"))
    begun = {name: begun.get(name, torch.zeros_like(value)) for name, value in saved.items()}
    copied = {f"ema-net{length}/{name}" for length in ("", "-0.1") for name in NORM}
    names = {name for name, value in saved.items() if not torch.equal(value, begun[name])} - copied
    trained = {f"{part}-net/{name}" for part in ("weights", "ema") for name in TRAINED}
    statistics = {f"weights-net/{name}" for name in NORM}
    others = {"weights-token/row", "ema-token/row", "weights-critic/bias", "optimizer-critic/0.step"}
    assert trained | statistics | others < names
    with pytest.raises(Kill):
        stopped(partial_loop(tmp_path / "stopped", accelerator, **how), 3).run()
    plain = Saver.load
    for number, leave in enumerate(sorted(names)):

        def load(self: Saver, wanted: Any, leave: str = leave) -> Checkpoint | None:
            found = plain(self, wanted)
            if found is not None:
                group, name = leave.split("/", 1)
                found.tensors[group][name] = begun[leave].clone()
            return found

        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "stopped", folder)
        with monkeypatch.context() as patch:
            patch.setattr(Saver, "load", load)
            partial_loop(folder, accelerator, **how).run()
        assert differences(folder, whole), f"{leave} may be left out unseen"


def test_what_is_frozen_is_not_saved_and_never_written_to(
    how: dict[str, Any], whole: Path, accelerator: Accelerator, tmp_path: Path
) -> None:
    with pytest.raises(Kill):
        stopped(partial_loop(tmp_path, accelerator, **how), 3).run()
    loop = partial_loop(tmp_path, accelerator, rollback_every=2, **how)
    net = loop.trained.plain["net"]
    before = {name: (p._version, p.clone()) for name, p in net.named_parameters() if name in FROZEN}
    loop.run()
    for name, (version, value) in before.items():
        assert net.get_parameter(name)._version == version, "nor has anybody written the same"
        assert torch.equal(net.get_parameter(name), value)
        assert loop.averaged()["net"].get_parameter(name) is net.get_parameter(name)
    for step in range(1, STEPS + 1):
        groups = read_checkpoint(whole / "c" / f"{step:08d}").tensors
        for name, kept in KEPT.items():
            assert set(groups[f"weights-{name}"]) == kept, "also of a critic that is frozen when this is saved"
            if name != "critic":
                assert set(groups[f"ema-{name}"]) == set(groups[f"ema-{name}-0.1"]) == kept
        assert len({name.partition(".")[0] for name in groups["optimizer-net"]}) == len(TRAINED) + 1
    good = load_newest(tmp_path / "c")
    assert good is not None
    assert set(good.tensors["good-weights-net"]) == TRAINED | NORM
    assert set(load_file(whole / "e" / f"{STEPS:08d}" / "net-0.1.safetensors")) == TRAINED | NORM


def test_rates_and_decay_of_a_phase_reach_its_optimizer_and_the_log_has_the_schedules(
    whole: Path, accelerator: Accelerator, tmp_path: Path
) -> None:
    loop = partial_loop(tmp_path, accelerator)
    loop.run()
    for name, about in (("net", (1.0, 0.1)), ("token", (3.0, 0.0))):
        (group,) = (
            group
            for group in loop.trained.optimizers["net"].param_groups
            if any(p is own for p in group["params"] for own in loop.trained.plain[name].parameters() if own.ndim > 1)
        )
        assert (group["lr"] / loop.settings.rate(STEPS - 1), group["weight_decay"]) == pytest.approx(about)
    for line in faulty.lines(whole, "train"):
        assert line["learning_rate"] == loop.settings.rate(line["step"] - 1)


def test_a_checkpoint_has_the_size_of_what_is_trained(accelerator: Accelerator, tmp_path: Path) -> None:
    class Large(Partial):
        def __init__(self) -> None:
            super().__init__()
            self.modules["net"].register_module("table", nn.Embedding(50_000, 20).requires_grad_(False))

    loop = partial_loop(tmp_path, accelerator, save_every=99)
    large = Loop(Large(), loop.data, loop.settings, accelerator, loop.paths)
    large.run()
    base = sum(p.nbytes for p in large.trained.plain["net"].parameters())
    files = sum(path.stat().st_size for folder in ("c", "e") for path in (tmp_path / folder).rglob("*.safetensors"))
    assert base > 4_000_000
    assert files < 50_000


def test_snapshots_give_the_average_of_what_changes(whole: Path) -> None:
    """That of a length that was tracked, as it is in the checkpoint."""
    last = load_newest(whole / "c")
    assert last is not None
    for network in ("net", "token"):
        found = rebuild(whole / "e", network, 0.1)
        tracked = last.tensors[f"ema-{network}-0.1"]
        assert found.tensors.keys() == tracked.keys() == KEPT[network]
        assert all(torch.equal(value, tracked[name]) for name, value in found.tensors.items())


@pytest.mark.parametrize("name", ["up.weight", "norm.running_mean"])
def test_a_checkpoint_of_other_parts_is_refused(name: str, accelerator: Accelerator, tmp_path: Path) -> None:
    loop = partial_loop(tmp_path, accelerator)
    saved = {group: dict(own) for group, own in loop.state.groups().items()}
    value = saved["weights-net"].pop(name)
    with pytest.raises(UserError, match=rf"what was saved is not what this run trains \({name}\)"):
        loop.state.put(saved)
    for wrong in ({name: value[:1]}, {name: value, "base.0.weight": torch.zeros(16, 6)}):
        with pytest.raises(UserError, match=r"what was saved is not what this run trains"):
            loop.state.put({**saved, "weights-net": {**saved["weights-net"], **wrong}})


class Changed(Partial):
    """With a network that the test has changed."""

    def __init__(self, change: Mapping[str, nn.Module], trains: tuple[str, ...]) -> None:
        super().__init__()
        self.modules |= change
        self.trains = trains

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("net", self.trains),)


def test_a_phase_without_anything_to_train_is_refused(accelerator: Accelerator, tmp_path: Path) -> None:
    loop = partial_loop(tmp_path, accelerator)
    with pytest.raises(UserError, match="the network still has nothing to train: all of it is frozen"):
        Loop(Changed({}, ("net", "still")), loop.data, loop.settings, accelerator, loop.paths)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_trained_is_not_in_half_precision(dtype: torch.dtype, accelerator: Accelerator, tmp_path: Path) -> None:
    loop = partial_loop(tmp_path, accelerator)
    net = Adapted(norm=True)
    net.up.to(dtype)
    with pytest.raises(UserError, match=rf"net cannot be trained in {str(dtype)[6:]} \(up\.bias\): load .* float32"):
        Loop(Changed({"net": net}, ("net", "token")), loop.data, loop.settings, accelerator, loop.paths)
