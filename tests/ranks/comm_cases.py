"""What every ``Comm`` must do: one body, run with a single rank, with threads, and as a program under mpirun."""

from __future__ import annotations

from typing import Any

import numpy as np

from embedding.comm import all_gather_bytes, broadcast_bytes
from embedding.topology import discover, share_of, start_of

DTYPES = ("float32", "float64", "int32", "int64", "uint8")


def numbers(rank: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Values that name their rank and place."""
    return ((np.arange(np.prod(shape, dtype=int)) * 7 + rank * 31 + 3) % 101).reshape(shape).astype(dtype)


def all_to_all(comm: Any, dtype: str) -> None:
    send = numbers(comm.rank, (comm.size * 3, 2), dtype)
    recv = np.zeros_like(send)
    comm.all_to_all(send, recv).wait()
    own = slice(3 * comm.rank, 3 * comm.rank + 3)
    expected = [numbers(rank, send.shape, dtype)[own] for rank in range(comm.size)]
    np.testing.assert_array_equal(recv, np.concatenate(expected))


def all_to_all_v(comm: Any, dtype: str) -> None:
    """Counts differ by pair, and some are 0; two exchanges are under way at once."""

    def counts(rank: int) -> list[int]:
        return [(rank * 2 + other * 3) % 4 for other in range(comm.size)]

    events, pairs = [], []
    for width in ((), (5,)):
        mine = counts(comm.rank)
        send = numbers(comm.rank, (sum(mine) + 2, *width), dtype)
        received = [counts(rank)[comm.rank] for rank in range(comm.size)]
        recv = np.full((sum(received) + 1, *width), 9, dtype)
        events.append(comm.all_to_all_v(send, mine, recv, received))
        pieces = []
        for rank in range(comm.size):
            begin = sum(counts(rank)[: comm.rank])
            whole = numbers(rank, (sum(counts(rank)) + 2, *width), dtype)
            pieces.append(whole[begin : begin + counts(rank)[comm.rank]])
        pairs.append((recv, np.concatenate([*pieces, np.full((1, *width), 9, dtype)])))
    for event, (recv, expected) in zip(events, pairs, strict=True):
        event.wait()
        np.testing.assert_array_equal(recv, expected)


def all_reduce(comm: Any, dtype: str) -> None:
    for op, reduce in (("sum", np.sum), ("max", np.max), ("min", np.min)):
        buffer = numbers(comm.rank, (4, 3), dtype) // 8  # the sum of four ranks fits a byte
        expected = reduce([numbers(rank, (4, 3), dtype) // 8 for rank in range(comm.size)], axis=0)
        comm.all_reduce(buffer, op).wait()
        np.testing.assert_array_equal(buffer, expected)


def all_gather(comm: Any, dtype: str) -> None:
    recv = np.zeros((comm.size, 2, 3), dtype)
    comm.all_gather(numbers(comm.rank, (2, 3), dtype), recv).wait()
    np.testing.assert_array_equal(recv, [numbers(rank, (2, 3), dtype) for rank in range(comm.size)])


def broadcast(comm: Any, dtype: str) -> None:
    for root in {0, comm.size - 1}:
        buffer = numbers(comm.rank, (7,), dtype)
        comm.broadcast(buffer, root).wait()
        np.testing.assert_array_equal(buffer, numbers(root, (7,), dtype))


def bytes_of_any_length(comm: Any) -> None:
    texts = [b"x" * (rank * 5 % 7) + bytes([rank]) * (rank % 2) for rank in range(comm.size)]
    assert all_gather_bytes(comm, texts[comm.rank]) == texts
    assert all_gather_bytes(comm, b"") == [b""] * comm.size
    for root in {0, comm.size - 1}:
        assert broadcast_bytes(comm, b"from %d" % comm.rank, root) == b"from %d" % root
    assert broadcast_bytes(comm, b"") == b""


def split(comm: Any) -> None:
    """Odd and even ranks, in reverse order."""
    part = comm.split(comm.rank % 2, -comm.rank)
    members = [rank for rank in reversed(range(comm.size)) if rank % 2 == comm.rank % 2]
    assert part.size == len(members)
    assert members[part.rank] == comm.rank
    total = np.array([comm.rank], np.int64)
    part.all_reduce(total).wait()
    assert total[0] == sum(members)


def topology(comm: Any) -> None:
    one = discover(comm)
    assert (one.node, one.num_nodes) == (0, 1)
    assert (one.local_rank, one.local_size) == (comm.rank, comm.size)
    if comm.size % 2:
        return
    two = discover(comm, nodes=2)
    half = comm.size // 2
    assert (two.node, two.num_nodes) == (comm.rank // half, 2)
    assert (two.local_rank, two.local_size) == (comm.rank % half, half)
    assert (two.inside.rank, two.inside.size) == (two.local_rank, half)
    assert (two.across.rank, two.across.size) == (two.node, 2)


def shares(comm: Any) -> None:
    rows = 11
    mine = np.array([share_of(rows, comm.size, comm.rank), start_of(rows, comm.size, comm.rank)])
    everyone = np.empty((comm.size, 2), np.int64)
    comm.all_gather(mine, everyone).wait()
    assert everyone[:, 0].sum() == rows
    np.testing.assert_array_equal(everyone[:, 1], np.cumsum(everyone[:, 0]) - everyone[:, 0])


def run_all(comm: Any) -> None:
    """Every case, in the same order on every rank."""
    for dtype in DTYPES:
        for case in (all_to_all, all_to_all_v, all_reduce, all_gather, broadcast):
            case(comm, dtype)
    for whole in (bytes_of_any_length, split, topology, shares):
        whole(comm)
    comm.barrier()
