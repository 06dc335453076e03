"""Two processes for a test, and what they drew."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
RECORDED = HERE / "recorded_train.py"
LAUNCHERS = ROOT / "configs" / "accelerate"


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def world(count: int) -> list[dict[str, str]]:
    """The environments that a launcher gives to so many processes, on a port that is free."""
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def run_two(script: str, *arguments: str, environment: dict[str, str]) -> None:
    """Two processes of a script of this folder, to their end, which must be good."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / script), *arguments],
            env={**environment, **own},
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in world(2)
    ]
    for process in processes:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said


def launch(kind: str) -> list[str]:
    """The command line of a launcher of two processes, up to the script; on a port that is free."""
    port = free_port()
    if kind == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    if kind == "fsdp2":  # groups of 500 weights, or networks this small would be put together at once
        words = [str(LAUNCHERS / "fsdp2.yaml"), "--num_processes", "2", "--fsdp_min_num_params", "500"]
    else:
        words = [str(LAUNCHERS / "two-cpu.yaml")]
    return [accelerate, "launch", "--config_file", *words, "--main_process_port", port]


def read_draws(folder: Path) -> dict[tuple[str, int, int], dict[str, object]]:
    """(stage, step, row of the global batch) -> all that was drawn for it; nothing may be drawn twice."""
    found: dict[tuple[str, int, int], dict[str, object]] = {}
    for file in folder.glob("*.jsonl"):
        for text in file.read_text().splitlines():
            line = json.loads(text)
            row = found.setdefault((line.pop("stage"), line.pop("step"), line.pop("row")), {})
            assert not row.keys() & line.keys(), "one row, two processes"
            row.update(line)
    return found
