"""How near an average that is put together from snapshots comes to one that was tracked: the table in docs/training.md.

    python benchmarks/ema_lengths.py

Weights walk at random for 2,000 steps; snapshots of two lengths are taken at even distances, in float64. Printed is the
error of what is put together, as a share of the distance between the true average and the last weights.
"""

from __future__ import annotations

import math

import torch

from latentgen.engine.ema_profiles import Profile, exponent_of, fit

STEPS, WEIGHTS = 2000, 4000
TRACKED, WANTED, SNAPSHOTS = (0.05, 0.10), (0.03, 0.075, 0.15, 0.20, 0.25), (5, 10, 20, 40)


def main() -> None:
    torch.manual_seed(0)
    walk = torch.randn(STEPS, WEIGHTS, dtype=torch.float64).cumsum(dim=0) / math.sqrt(STEPS)

    def average(profile: Profile) -> torch.Tensor:
        edges = (torch.arange(profile.step + 1, dtype=torch.float64) / profile.step) ** (profile.exponent + 1)
        return edges.diff() @ walk[: profile.step]

    print("| snapshots of each | " + " | ".join(f"{length:g}" for length in WANTED) + " |")
    print("|---" * (1 + len(WANTED)) + "|")
    for count in SNAPSHOTS:
        known = [Profile(STEPS * (i + 1) // count, exponent_of(length)) for i in range(count) for length in TRACKED]
        kept, row = torch.stack([average(profile) for profile in known]), []
        for length in WANTED:
            wanted = Profile(STEPS, exponent_of(length))
            true, factors = average(wanted), torch.tensor(fit(wanted, known).factors, dtype=torch.float64)
            row.append(f"{100 * float((factors @ kept - true).norm() / (true - walk[-1]).norm()):.2g} %")
        print(f"| {count} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
