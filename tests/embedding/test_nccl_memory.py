"""Memory that GPUs open to each other: handed out again, and not given back while a communicator may know of it."""

from __future__ import annotations

import gc

from hypothesis import given
from hypothesis import strategies as st

from embedding.nccl_memory import Block, OpenMemory


class Ledger:
    """An allocator of addresses, and what it has given."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.freed: list[int] = []

    def allocate(self, size: int) -> int:
        address = 1000 * (len(self.sizes) + 1)
        self.sizes[address] = size
        return address

    def memory(self) -> OpenMemory:
        return OpenMemory(self.allocate, self.freed.append)


def test_the_smallest_that_fits_comes_again() -> None:
    ledger = Ledger()
    memory = ledger.memory()
    held = [memory.take(size)[0] for size in (100, 300, 200)]
    small, large, middle = (block.address for block in held)
    held.clear()
    first, used = memory.take(150)
    assert (first.address, used) == (middle, True)
    second, used = memory.take(150)
    assert (second.address, used) == (large, True)
    third, used = memory.take(150)
    assert not used
    assert third.address not in {small, middle, large}
    assert ledger.freed == []


@given(st.lists(st.one_of(st.integers(1, 1000), st.integers(-5, -1)), max_size=40), st.integers(0, 5))
def test_no_two_hold_the_same_and_all_goes_back_once(steps: list[int], kept: int) -> None:
    """A positive step takes so many bytes, a negative one lets go of one of the blocks held."""
    ledger, held = Ledger(), []
    memory = ledger.memory()
    sizes: list[int] = []
    for step in steps:
        if step > 0:
            held.append(memory.take(step)[0])
            sizes.append(step)
        elif held:
            place = step % len(held)
            del held[place], sizes[place]
        addresses = [block.address for block in held]
        assert len(set(addresses)) == len(addresses)
        assert all(ledger.sizes[block.address] >= size for block, size in zip(held, sizes, strict=True))
        assert ledger.freed == []
    del held[kept:]
    memory.close()
    left = {block.address for block in held}
    assert sorted(ledger.freed) == sorted(set(ledger.sizes) - left)
    held.clear()
    assert sorted(ledger.freed) == sorted(ledger.sizes)


def test_a_block_outlives_the_name_of_its_memory() -> None:
    ledger = Ledger()
    block: Block | None = ledger.memory().take(10)[0]
    gc.collect()
    assert ledger.freed == []
    assert block is not None
