"""A function in two processes that begin anew. Loaded by the tests of other folders too.

accelerate's own launcher for this forks, and a forked process cannot go backward where its parent has on another
device than the CPU: on the meta device, say, where costs are counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

from accelerate.utils import PrepareForLaunch, patch_environment
from torch.multiprocessing.spawn import start_processes


def in_two_processes(function: Callable[..., None], *args: Any) -> None:
    """Call `function(*args)` in both, with gloo between them; it must be a module's own, not one inside a test."""
    with tempfile.NamedTemporaryFile() as meeting:
        world = {"world_size": 2, "master_addr": "127.0.0.1", "master_port": "29500"}
        own = {"accelerate_mixed_precision": "no", "accelerate_use_cpu": "yes"}
        with patch_environment(**world, **own, accelerate_debug_rdv_file=meeting.name):
            start_processes(PrepareForLaunch(function, debug=True), args=args, nprocs=2, start_method="spawn")
