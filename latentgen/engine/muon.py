"""Muon: steps of the same size in every direction of a weight matrix (Jordan 2024; arXiv 2502.16982).

The gradient of a matrix is mostly a few directions. Muon takes its momentum and sets all singular values to about one,
so that rare directions (here: the word that tells a star from a heart) learn as fast as common ones. That is most of an
optimizer's time, so the processes share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn

from latentgen.core.processes import rank_and_world
from latentgen.engine.sharding import cut, here, whole

QUINTIC = (3.4445, -4.7750, 2.0315)
"""x -> a x + b x^3 + c x^5: five rounds take singular values from (0, 1] to about [0.7, 1.2] (Jordan 2024)."""

AT_ONCE = 2**22
"""Numbers of the whole matrices that each process holds beside its own while they are turned, four bytes each."""

SMALLEST = 16
"""Matrices with fewer rows or columns go to AdamW: they have few directions to tell apart."""


def orthogonalised(matrix: Tensor, dtype: torch.dtype, rounds: int = 5) -> Tensor:
    """The nearest matrix [m, n] with all singular values about one, by Newton-Schulz in `dtype`; zero stays zero.

    Directions that the gradient hardly has grow up to 500 times: in bfloat16, much of them is rounding.
    """
    x = matrix.to(dtype)
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / (x.norm() + 1e-7)
    # Squaring a matrix halves the digits of its small directions, which bfloat16 cannot spare.
    wide = x.shape[1] >= 2 * x.shape[0] and dtype == torch.float32
    x = _through_gram(x, rounds) if wide else _directly(x, rounds)
    return (x.mT if tall else x).to(matrix.dtype)


def _directly(x: Tensor, rounds: int) -> Tensor:
    a, b, c = QUINTIC
    for _ in range(rounds):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _through_gram(x: Tensor, rounds: int) -> Tensor:
    """The same with two products of x instead of ten: its rounds are polynomials of x x^T, which is small."""
    a, b, c = QUINTIC

    def polynomial(gram: Tensor) -> Tensor:
        p = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal().add_(a)
        return p

    gram = x @ x.mT
    p = turn = polynomial(gram)
    for _ in range(rounds - 1):
        gram = p @ gram @ p
        p = polynomial(gram)
        turn = p @ turn
    return turn @ x


def matrices_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The weights of linear and convolution layers that are large enough; no embeddings."""
    layers = (layer for module in modules for layer in module.modules() if isinstance(layer, KINDS))
    weights = dict.fromkeys(layer.get_parameter("weight") for layer in layers)
    return [w for w in weights if w.requires_grad and min(w.shape[0], w.numel() // w.shape[0]) >= SMALLEST]


KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Muon(torch.optim.AdamW):
    """Muon for `matrices`, AdamW for the rest; one learning rate serves both.

    An orthogonal matrix [m, n] has entries of root mean square 1 / sqrt(max(m, n)), AdamW's steps about 0.2:
    the update is scaled to that (arXiv 2502.16982, eq. 4). A convolution's weight is the matrix [out, in * h * w].

    Args:
        matrices: groups of parameters of two dimensions or more, with their weight decay.
        groups: AdamW's parameter groups.
        momentum: of Nesterov's kind, over gradients.
        dtype: to turn matrices in. bfloat16 is as good to learn with, and what GPUs multiply fast; what float32 gives
            also does not depend on how a batch is cut.

    Attributes:
        found_inf: 0-d, as torch's fused AdamW takes it: where it is 1, a step leaves weights and moments as they are,
            whatever the gradients, without waiting for the device. Not set is 0.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        own = [{**group, "momentum": momentum} for group in matrices]
        rest = [{**group, "momentum": None} for group in groups]
        super().__init__([*own, *rest], lr=lr, betas=betas, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. The matrices' gradients are consumed (None afterwards), which is how AdamW leaves them alone.

        All processes must take it together: each turns its share of the matrices.
        """
        assert closure is None, "the loop computes gradients before the step"
        skip: Tensor | None = getattr(self, "found_inf", None)  # set and deleted as torch's own optimizers know it
        for group in self.param_groups:
            if group["momentum"] is not None:
                for some in portions([p for p in group["params"] if p.grad is not None]):
                    self._turn(some, group, skip)
        return super().step()

    def _turn(self, parameters: list[nn.Parameter], group: dict[str, Any], skip: Tensor | None) -> None:
        matrices = [self._direction(parameter, group["momentum"], skip).flatten(1) for parameter in parameters]
        turned = shared(lambda matrix: orthogonalised(matrix, self.dtype), matrices)
        for parameter, matrix in zip(parameters, turned, strict=True):
            step, own = here(cut(matrix.view(parameter.shape), parameter)), here(parameter)
            decay, rate = 1 - group["lr"] * group["weight_decay"], group["lr"] * 0.2 * max(matrix.shape) ** 0.5
            if skip is None:
                own.mul_(decay).add_(step, alpha=-rate)
            else:
                own.copy_(torch.where(skip > 0, own, own.mul(decay).add_(step, alpha=-rate)))

    def _direction(self, parameter: nn.Parameter, momentum: float, skip: Tensor | None) -> Tensor:
        """Take the gradient into the momentum; return Nesterov's look ahead, whole, also where the parameter is cut."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        parameter.grad = None
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
            state["step"] = torch.zeros(())  # not counted here; AdamW looks for it in every state it loads
        mean = state["momentum"]
        if skip is None:
            mean.lerp_(gradient, 1 - momentum)
        else:
            own = here(mean)
            own.copy_(torch.where(skip > 0, own, own.lerp(here(gradient), 1 - momentum)))
        return whole(gradient.lerp(mean, momentum))


def portions(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters, large before small, in parts that take about `AT_ONCE` numbers of each process."""
    _, world = rank_and_world()
    some: list[nn.Parameter] = []
    for parameter in sorted(parameters, key=lambda p: -p.numel()):
        some.append(parameter)
        if len(some) % world == 0 and sum(p.numel() for p in some) >= world * AT_ONCE:
            yield some
            some = []
    if some:
        yield some


def shared(compute: Callable[[Tensor], Tensor], matrices: list[Tensor]) -> list[Tensor]:
    """`compute` of each matrix [m, n], its result of the same size; each process does its share and gets all."""
    rank, world = rank_and_world()
    if world == 1:
        return [compute(matrix) for matrix in matrices]
    shares = [matrices[number::world] for number in range(world)]
    totals = [sum(matrix.numel() for matrix in share) for share in shares]
    sent = matrices[0].new_zeros(max(totals))
    if shares[rank]:
        sent[: totals[rank]] = torch.cat([compute(matrix).flatten() for matrix in shares[rank]])
    received = [torch.empty_like(sent) for _ in range(world)]
    distributed.all_gather(received, sent)
    results: list[Tensor] = [sent] * len(matrices)
    for number, (share, total, flat) in enumerate(zip(shares, totals, received, strict=True)):
        parts = flat[:total].split([matrix.numel() for matrix in share])
        results[number::world] = [part.view(matrix.shape) for part, matrix in zip(parts, share, strict=True)]
    return results
