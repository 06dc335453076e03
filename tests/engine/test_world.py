"""Training refuses another world than it was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from latentgen.core.errors import UserError
from latentgen.engine import world
from latentgen.engine.sharding import Sharding, shard
from latentgen.engine.world import (
    check_found,
    check_precision,
    check_world,
    check_wrapping,
    launcher_command,
    make_world,
    processes_asked,
    sharding_asked,
    warn_of_slow_bf16,
)

LAUNCH = ["/venv/bin/python", "/venv/bin/accelerate", "launch"]


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ([], None),
        ([*LAUNCH, "train.py"], None),
        ([*LAUNCH, "--cpu", "--num_processes", "2", "train.py"], 2),
        ([*LAUNCH, "--num_processes=2", "train.py", "train.steps=3"], 2),
        ([*LAUNCH, "--num-processes", "3", "train.py"], 3),
        ([*LAUNCH, "--num-processes=4", "train.py"], 4),
    ],
)
def test_processes_asked_of_accelerate(words: list[str], asked: int | None) -> None:
    assert processes_asked(words, {}) == asked


@pytest.mark.parametrize("form", ["--config_file {}", "--config_file={}", "--config-file {}"])
def test_processes_asked_in_a_config_file(form: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("compute_environment: LOCAL_MACHINE\nnum_processes: 5\n")
    words = [*LAUNCH, *form.format(path).split(" ")]
    assert processes_asked([*words, "train.py"], {}) == 5
    assert processes_asked([*words, "--num_processes", "2", "train.py"], {}) == 2, "the command line wins"
    path.write_text("mixed_precision: bf16\n")
    assert processes_asked([*words, "train.py"], {}) is None


def test_processes_asked_of_torchrun() -> None:
    assert processes_asked([], {"WORLD_SIZE": "2", "RANK": "0"}) == 2


def test_the_projects_launcher_files_say_how_many() -> None:
    path = Path(__file__).parents[2] / "configs" / "accelerate" / "two-cpu.yaml"
    assert processes_asked([*LAUNCH, "--config_file", str(path), "train.py"], {}) == 2


def test_what_accelerate_config_wrote_counts_unless_a_file_is_named(tmp_path: Path) -> None:
    default, named = tmp_path / "default_config.yaml", tmp_path / "named.yaml"
    default.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    named.write_text("num_processes: 3\n")
    assert processes_asked([*LAUNCH, "train.py"], {}, default) == 2
    assert processes_asked([*LAUNCH, "--config_file", str(named), "train.py"], {}, default) == 3
    assert processes_asked([], {}, default) is None, "nobody launched anything"


def test_check_world() -> None:
    with pytest.raises(
        UserError, match=r"the launcher was asked for 2 processes, 1 found: nothing was trained; .*two-cpu"
    ):
        check_world(1, 2, None)
    with pytest.raises(UserError, match=r"the recipe \(train.processes\) asks for 1 process, 2 found"):
        check_world(2, 2, 1)
    check_world(2, 2, 2)
    check_world(1, None, None)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("launched", ["", "no", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize("form", [None, "--mixed_precision {}", "--mixed-precision={}"])
def test_precisions_cannot_disagree_silently(
    precision: str, launched: str, form: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    words = [*LAUNCH, *(form.format(launched).split(" ") if form and launched else []), "train.py"]
    own = {"fp32": "no"}.get(precision, precision)
    if launched in ("", own):
        check_precision(precision, {"ACCELERATE_MIXED_PRECISION": launched} if launched else {}, words)
        assert not caplog.messages
    elif launched == "no" and form is None:
        check_precision(precision, {"ACCELERATE_MIXED_PRECISION": "no"}, words)
        assert caplog.messages == [
            f"the launcher's mixed_precision: no is ignored, train.precision decides: {precision}"
        ]
    else:
        with pytest.raises(UserError, match=rf"is {precision} but .*_precision {launched}: make .*_precision {own} or"):
            check_precision(precision, {"ACCELERATE_MIXED_PRECISION": launched}, words)


def test_the_launchers_words_on_precision_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(world, "launcher_command", lambda: [*LAUNCH, "--mixed_precision", "no", "train.py"])
    with pytest.raises(UserError, match=r"train\.precision is bf16 but the launcher says --mixed_precision no"):
        make_world("bf16", device="cpu")


class _Process:
    def __init__(self, *lines: list[str]) -> None:
        self.lines = lines

    def parents(self) -> list[_Process]:
        return [_Process(line) for line in self.lines]

    def cmdline(self) -> list[str]:
        return self.lines[0]


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([["bash"], ["/usr/bin/init"]], False),
        ([[*LAUNCH, "train.py"], ["bash"]], True),
        ([["bash"], ["python", "/x/accelerate-launch", "--cpu", "train.py"]], True),
        ([["python", "train.py", "accelerate"]], False),
        ([["grep", "launch", "notes"]], False),
    ],
)
def test_the_launcher_is_found_above(lines: list[list[str]], found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.psutil, "Process", lambda: _Process(*lines))
    assert bool(launcher_command()) is found


@pytest.mark.parametrize(("capability", "slow"), [("AVX2", True), ("DEFAULT", True), ("AVX512", False)])
def test_bf16_is_warned_of_where_the_processor_has_none(
    capability: str, slow: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_slow_bf16(capability)
    assert ("say train.precision=fp32" in caplog.text) is slow


def test_half_precision_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        make_world("fp16", device="cpu")


def test_one_process_where_two_are_asked_is_refused() -> None:
    with pytest.raises(UserError, match="asks for 2 processes, 1 found"):
        make_world("fp32", processes=2, device="cpu")


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize("variable", ["DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_other_wrappings_are_refused_rather_than_ignored(variable: str) -> None:
    check_wrapping({}, "fp16")
    check_wrapping({f"ACCELERATE_USE_{variable}": "false"}, "fp16")
    with pytest.raises(UserError, match=r"launcher asks for (DeepSpeed|Megatron|accelerate's par).*many-gpus\.yaml"):
        check_wrapping({f"ACCELERATE_USE_{variable}": "true"}, "fp32")


@pytest.mark.parametrize(
    ("environment", "precision", "said"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "fp32", r"FSDP version 1, .* fsdp_version: 2"),
        ({**FSDP2, "FSDP_VERSION": "1"}, "fp32", "FSDP version 1"),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "fp32", "fsdp_offload_params: true"),
        ({**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "bf16", "fsdp_activation_checkpointing: true"),
        (FSDP2, "fp16", "fp16 cannot be trained with FSDP"),
    ],
)
def test_varieties_of_fsdp_that_cannot_be_done_are_refused(
    environment: dict[str, str], precision: str, said: str
) -> None:
    check_wrapping(FSDP2, "fp32")
    check_wrapping(FSDP2, "bf16")
    with pytest.raises(UserError, match=said):
        check_wrapping(environment, precision)


def test_what_the_launcher_says_of_sharding(caplog: pytest.LogCaptureFixture) -> None:
    assert sharding_asked({}) is None
    assert sharding_asked({**FSDP2, "ACCELERATE_USE_FSDP": "false"}) is None
    assert sharding_asked(FSDP2) == Sharding()
    said = {"FSDP_MIN_NUM_PARAMS": "7", "FSDP_RESHARD_AFTER_FORWARD": "false"}
    assert sharding_asked({**FSDP2, **said, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}) == Sharding(7, False)
    assert not caplog.records
    assert sharding_asked({**FSDP2, "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}) == Sharding()
    assert "NO_WRAP is ignored" in caplog.text


def test_a_network_that_is_not_wrapped_as_asked_is_refused() -> None:
    net, frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    check_found({"net": net}, (), 1)
    check_found({"frozen": frozen}, (), 2)
    with pytest.raises(UserError, match=r"DDP over 2 processes was asked for, but the network net is a plain Linear"):
        check_found({"net": net}, (), 2)
    with pytest.raises(UserError, match=r"FSDP2, cut over 2 processes was asked for, but the network net is a plain"):
        check_found({"net": net}, ("net",), 2)


def test_a_network_cut_over_fewer_processes_is_refused(tmp_path: Path) -> None:
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        net = nn.Linear(3, 2)
        shard(net, Sharding(), torch.device("cpu"))
        check_found({"net": net}, ("net",), 1)
        with pytest.raises(UserError, match="FSDP2, cut over 2 processes was asked for"):
            check_found({"net": net}, ("net",), 2)
    finally:
        distributed.destroy_process_group()


def test_one_process_has_nothing_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="asks for FSDP, 1 process found: nothing to share"):
        make_world("fp32", device="cpu")
