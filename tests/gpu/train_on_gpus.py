"""Program of one MPI rank with a GPU: a whole training run whose lists are too short.

``mpirun -np 2 python -m mpi4py tests/gpu/train_on_gpus.py CONFIG SIGMAS`` is ``python -m pipeline.train CONFIG`` but
for the room in the lists of exchanged rows: so many standard deviations above what is expected, mostly below 0.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from pipeline.threads import settle_threads

settle_threads()

from pipeline import engine_cuda, train  # noqa: E402


def main() -> int:
    config, sigmas = sys.argv[1], float(sys.argv[2])
    measure = engine_cuda.measure_lists

    def shorter(*arguments: Any) -> Any:
        return replace(measure(*arguments), sigmas=sigmas)

    engine_cuda.measure_lists = shorter
    return train.main(config, debug=True)


if __name__ == "__main__":
    sys.exit(main())
