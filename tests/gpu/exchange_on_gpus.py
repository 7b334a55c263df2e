"""Program of one MPI rank with a GPU: tables exchanged and scores ranked over NCCL, or staged through the host where
ranks share a GPU.

``mpirun -np 2 python -m mpi4py tests/gpu/exchange_on_gpus.py nccl`` wants a GPU for every rank; with ``staged`` any
number of ranks share what there is.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.threads import launched_ranks, settle_threads

settle_threads()
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ranks"))

import bag_exchange_cases as bc  # noqa: E402
import comm_cases  # noqa: E402
import cupy  # noqa: E402
import exchange_cases as xc  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from dlrm.cuda import CudaDevice, count_gpus  # noqa: E402
from dlrm.errors import DeviceError  # noqa: E402
from embedding.comm import SingleComm  # noqa: E402
from embedding.comm_mpi import world  # noqa: E402
from embedding.comm_nccl import NcclComm  # noqa: E402
from embedding.comm_staged import StagedComm  # noqa: E402
from embedding.exchange_route import travelling  # noqa: E402
from embedding.nccl_memory import nccl_memory  # noqa: E402
from embedding.topology import discover  # noqa: E402
from pipeline.metrics import evaluate_scores  # noqa: E402


class OnDevice:
    """A carrier of device buffers, handed buffers of the host: the cases of all carriers run on it, too."""

    def __init__(self, comm: Any, device: CudaDevice) -> None:
        self._comm, self._device = comm, device
        self.rank, self.size = comm.rank, comm.size

    def _through(self, call: Any, *buffers: np.ndarray) -> Any:
        moved = [self._device.xp.asarray(buffer) for buffer in buffers]
        event = call(*moved)
        device = self._device

        class Arrival:
            def wait(self) -> None:
                event.wait()
                if buffers[-1].size:
                    buffers[-1][...] = device.to_host(moved[-1])

        return Arrival()

    def all_to_all(self, send: np.ndarray, recv: np.ndarray) -> Any:
        return self._through(self._comm.all_to_all, send, recv)

    def all_to_all_v(self, send: np.ndarray, going: Any, recv: np.ndarray, coming: Any) -> Any:
        return self._through(lambda s, r: self._comm.all_to_all_v(s, going, r, coming), send, recv)

    def all_reduce(self, buffer: np.ndarray, op: Any = "sum") -> Any:
        return self._through(lambda b: self._comm.all_reduce(b, op), buffer)

    def all_gather(self, send: np.ndarray, recv: np.ndarray) -> Any:
        return self._through(self._comm.all_gather, send, recv)

    def broadcast(self, buffer: np.ndarray, root: int = 0) -> Any:
        return self._through(lambda b: self._comm.broadcast(b, root), buffer)

    def split(self, color: int, key: int) -> OnDevice:
        return OnDevice(self._comm.split(color, key), self._device)

    def split_node(self) -> OnDevice:
        return OnDevice(self._comm.split_node(), self._device)

    def barrier(self) -> None:
        self._comm.barrier()

    def progress(self) -> None:
        self._comm.progress()


def captured(case: xc.ExchangeCase, comm: Any, device: CudaDevice, host: Any) -> xc.Outcome:
    """The same batches with every step but the first of each Flight replayed from a CUDA graph."""
    trainer = xc.Trainer(case, comm, device, host)
    seen, graphs = [], {}
    for number in range(len(trainer.work)):
        buffers = trainer.upload(number)
        trainer.set_up(number)

        def issue(number: int = number, buffers: Any = buffers) -> None:
            trainer.input_dist(number)
            trainer.step(buffers)

        if number < 2:  # kernels are compiled
            issue()
        else:
            if number % 2 not in graphs:
                device.synchronize()
                graphs[number % 2] = device.capture("main", issue)
            graphs[number % 2].launch()
        assert not trainer.overflowed()
        seen.append(trainer.vectors(number))
    return xc.outcome_of(trainer, seen, 0)


def check_metrics(host: Any, carrier: Any, device: CudaDevice) -> None:
    """Scores of all ranks, many of them equal, give every rank what one GPU gives for all of them."""
    rng = np.random.default_rng(17)
    scores = np.round(rng.normal(-2, 1.5, 200_003), 3).astype(np.float32)
    labels = (rng.random(scores.size) < 1 / (1 + np.exp(-scores))).astype(np.float32)
    rows, truth = device.xp.asarray(scores), device.xp.asarray(labels)
    expected = evaluate_scores(rows, truth, SingleComm(), device)
    # Unequal shares, the last rank has none.
    cuts = [scores.size * (r + 1) ** 2 // max(1, host.size - 1) ** 2 for r in range(host.size - 1)]
    share = slice(*([0, *cuts, scores.size] if host.size > 1 else [0, scores.size])[host.rank : host.rank + 2])
    assert evaluate_scores(rows[share], truth[share], host, device, carrier) == expected


def check_room(comm: Any, device: CudaDevice) -> None:
    """What is exchanged lies in memory that NCCL opens to peers, and is not handed out twice."""
    memory = nccl_memory()
    assert memory is not None
    with pytest.raises(DeviceError, match="cannot be had of NCCL"):
        memory.take(1 << 50)
    assert comm.room((0, 4), np.float32) is None
    made = [travelling(comm, device, (size, 4), np.float32) for size in (3, 1000, 0, 3)]
    addresses = {array.data.ptr for array in made if array.size}
    assert len(addresses) == 3
    for array in made:
        assert array.size == 0 or isinstance(array.data.mem, cupy.cuda.UnownedMemory)
        assert not device.to_host(array).any()
        array.fill(7)
    del made, array
    again = travelling(comm, device, (999, 4), np.float32)
    assert again.data.ptr in addresses
    assert not device.to_host(again).any()


def check_by_node(comm: Any, device: CudaDevice, host: Any) -> None:
    """Rows that go by node are those that go from rank to rank, to the last bit; gradients come to the same."""
    for nodes in (2, 4):
        if host.size % nodes == 0 and host.size > nodes:
            case = xc.ExchangeCase(seed=61 + nodes, nodes=nodes, batches=(96, 96, 13, 96))
            by_node, flat = (xc.train(each, comm, device, host) for each in (case, replace(case, nodes=1)))
            xc.check(case, by_node, xc.run_alone(case), comm.rank, comm.size)
            np.testing.assert_array_equal(by_node.vectors[0], flat.vectors[0])


def check_cases(comm: Any, device: CudaDevice, host: Any) -> None:
    """All kinds of exchanges, as by one rank."""
    for case in xc.CASES:
        if host.size % case.nodes:
            continue
        outcome = xc.train(case, comm, device, host)
        xc.check(case, outcome, xc.run_alone(case), comm.rank, comm.size)
        assert (outcome.overflows > 0) == (case.short < 1)
    for bags in bc.CASES:
        if host.size % bags.nodes == 0:
            xc.check(bags, bc.train(bags, comm, device, host), bc.run_alone(bags), comm.rank, comm.size)


def main() -> None:
    carrier = sys.argv[1]
    host = world(launched_ranks())
    device = CudaDevice(discover(host).local_rank % count_gpus())
    comm: Any = NcclComm(host, device.index) if carrier == "nccl" else StagedComm(host, device)
    if carrier == "nccl":
        check_room(comm, device)
    comm_cases.run_all(OnDevice(comm, device))
    check_metrics(host, comm, device)
    check_by_node(comm, device, host)
    if carrier == "nccl" or host.size < 8:  # as many processes on one GPU take their time
        check_cases(comm, device, host)
    if carrier == "nccl":
        forms: tuple[dict[str, Any], ...] = (
            {"kind": "sgd"}, {"kind": "adam"}, {"kind": "sgd", "kinds": xc.LISTED},
            {"kind": "adam", "kinds": xc.CUT, "once": True},
            {"kind": "adagrad", "rows": (9000, 3, 700, 2000, 9, 4000), "touched": True},
        )  # fmt: skip
        for number, form in enumerate(forms):
            case = replace(xc.CASES[0], seed=100 + number, dim=128, batches=(480,) * 8, **form)
            outcome = captured(case, comm, device, host)
            xc.check(case, outcome, xc.run_alone(case), comm.rank, comm.size)
        comm.close()
        comm.close()
    host.barrier()
    if host.rank == 0:
        print(f"all exchanges hold on {host.size} ranks over {carrier}")


if __name__ == "__main__":
    main()
