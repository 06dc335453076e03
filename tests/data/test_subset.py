"""Who is held out depends on the content alone."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from latentgen.data.sources.subset import FEWEST, SHARE, Subset, hold_out

digests = st.lists(st.integers(0, 400), min_size=1, max_size=400).map(
    lambda numbers: [sha256(str(number).encode()).hexdigest() for number in numbers]
)


@given(digests, st.integers(0, 40))
def test_every_example_is_on_one_side_and_equal_ones_on_the_same(found: list[str], wanted: int) -> None:
    kept, held = hold_out(found, wanted)
    assert sorted(kept + held) == list(range(len(found)))
    assert not {found[i] for i in kept} & {found[i] for i in held}
    different = len({found[i] for i in held})
    assert different == (min(wanted, len(set(found)) // SHARE) if different else 0)
    assert different == 0 or different >= FEWEST


@given(digests, st.randoms(use_true_random=False))
def test_the_order_does_not_matter(found: list[str], shuffler) -> None:
    mixed = list(found)
    shuffler.shuffle(mixed)
    assert {mixed[i] for i in hold_out(mixed, 10)[1]} == {found[i] for i in hold_out(found, 10)[1]}


def test_more_examples_move_few_across() -> None:
    everyone = [sha256(bytes([n // 256, n % 256])).hexdigest() for n in range(2000)]
    before = {everyone[i] for i in hold_out(everyone[:1000], 64)[1]}
    after = {everyone[i] for i in hold_out(everyone[:1010], 64)[1]}
    assert len(before) == len(after) == 64
    assert len(before - after) <= 3
    assert everyone[0] in {everyone[i] for i in hold_out(everyone, 64)[0] + hold_out(everyone, 64)[1]}


def test_a_subset_is_a_source(few: Callable) -> None:
    source = few(6)
    part = Subset(source, (4, 1))
    assert len(part) == 2
    assert part.captions(0) == source.captions(4)
    assert part.name(1) == source.name(1)
    assert (part.image(0) == source.image(4)).all()
    assert part.contrasts(1, source.captions(1)[0]) == source.contrasts(1, source.captions(1)[0])
    keys = {part.key(), source.key(), Subset(source, (1, 4)).key(), Subset(few(6, 1), (4, 1)).key()}
    assert len(keys) == 4
