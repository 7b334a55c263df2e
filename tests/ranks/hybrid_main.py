"""Program of one MPI rank: placements of every kind, one node and two, against one rank."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.threads import launched_ranks, settle_threads

settle_threads()
sys.path.insert(0, str(Path(__file__).parent))

import hybrid_cases as hc  # noqa: E402
import numpy as np  # noqa: E402

from embedding.comm_mpi import world  # noqa: E402
from embedding.sparse_optim import KINDS  # noqa: E402
from embedding.topology import start_of  # noqa: E402

PLACED = ("hybrid", "column_wise", "replicated", "table_wise", "row_wise", "distinct_table_wise")


def main() -> None:
    comm = world(launched_ranks())
    assert comm.size > 1
    for number, kind in enumerate(KINDS):
        kinds = tuple(place for place in PLACED if kind != "rowwise_adagrad" or place != "column_wise")
        case = hc.HybridCase(
            seed=number,
            rows=(50, 3, 300, 40, 9, 31),
            batches=(24, 24, 3, 24),
            dim=6,
            hotness=1 + number % 3,
            kinds=kinds,
            kind=kind,
            nodes=1 + number % 2,
            poolings=("sum", "concat", "mean", "concat"),
        )
        mine, alone = hc.train(case, comm), hc.run_alone(case)
        for step, total in enumerate(case.batches):
            begin, end = (start_of(total, comm.size, rank) for rank in (comm.rank, comm.rank + 1))
            expected = alone.vectors[step][begin:end]
            np.testing.assert_allclose(mine.vectors[step], expected, rtol=1e-12, atol=1e-12)
        whole = hc.whole_tables(case, [alone])
        assert mine.shards
        for table, rows, columns, replicated, arrays in mine.shards:
            where = (slice(rows.start, rows.stop, rows.step), slice(columns.start, columns.stop))
            for name, array in arrays.items():
                expected = whole[f"{table}.{name}"][where[: array.ndim]]
                np.testing.assert_allclose(array, expected, rtol=1e-12, atol=1e-12, err_msg=f"{table}.{name}")
                if replicated:
                    everyones = np.empty((comm.size, *array.shape), array.dtype)
                    comm.all_gather(array, everyones).wait()
                    assert (everyones == array).all(), f"replicas of {table}.{name} differ"
    comm.barrier()
    if comm.rank == 0:
        print(f"all plans hold on {comm.size} ranks")


if __name__ == "__main__":
    main()
