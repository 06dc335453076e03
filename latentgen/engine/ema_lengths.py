"""Averages of several relative lengths, tracked beside the one that is previewed, and their snapshots on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from latentgen.engine import sharding
from latentgen.engine.ema import Ema
from latentgen.engine.ema_profiles import exponent_of, power_share
from latentgen.engine.ema_snapshots import Snapshot, narrow, write_snapshot


class EmaLengths:
    """Power-function averages of the networks that have an average (arXiv 2312.02696, section 3).

    `averages` are named NETWORK-LENGTH; they are part of a checkpoint.

    Args:
        networks: by name; what changes of them is copied.
        lengths: relative ones, see `engine.ema_profiles`.
        every: steps between two snapshots; the last step has one too.
        wide: keep snapshots in the averages' own type, not in float16.
        kind: of averages: `Ema`, or `HostEma`.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        lengths: tuple[float, ...],
        every: int,
        *,
        wide: bool = False,
        kind: type[Ema] = Ema,
    ) -> None:
        self.every, self.wide, self._networks = every, wide, dict(networks)
        self._of = {f"{name}-{length}": (name, length) for name in networks for length in lengths}
        self.averages = {
            key: kind(networks[name], partial(power_share, exponent=exponent_of(length)))
            for key, (name, length) in self._of.items()
        }

    def follow_sharded(self) -> None:
        """Begin anew from the networks, which were sharded meanwhile."""
        for key, (name, _) in self._of.items():
            self.averages[key].follow_sharded(self._networks[name])

    def update(self, step: int, skip: Tensor) -> None:
        """Move every average after optimizer step `step`, unless `skip` is 1."""
        for key, (name, _) in self._of.items():
            self.averages[key].update(self._networks[name], step, skip)

    def due(self, step: int, last: int) -> bool:
        """Whether a snapshot belongs to the state after `step` steps of `last`."""
        return bool(self.averages) and (step == last or step % self.every == 0)

    def save(self, folder: Path, step: int, *, main: bool) -> None:
        """Write the snapshot of `step`. All processes must ask; the main one writes.

        Raises:
            UserError: the disk has too little room.
        """
        found: list[Snapshot] = []
        for key, (name, length) in self._of.items():
            ema = self.averages[key]
            averaged = ema.changing.parameters
            # One length after the other: only the main process has whole tensors, and only of one length in full width.
            tensors = sharding.gather(ema.state_dict(), keep=main)
            kept = {k: v.cpu() if self.wide or k not in averaged else narrow(v) for k, v in tensors.items()}
            found.append(Snapshot(name, step, length, kept, averaged))
        if main:
            write_snapshot(folder, step, found)
