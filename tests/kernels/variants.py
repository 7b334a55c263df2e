"""The macros that the CUDA sources are compiled with: shapes and types that take every branch of them."""

from __future__ import annotations

from dlrm.interaction_cuda import FUSED_BACKWARD, FUSED_FORWARD
from dlrm.nvrtc import Defines
from dlrm.philox_cuda import constants as philox_constants
from embedding.lookup_cuda import POOL
from embedding.sorted_update_cuda import SUM
from pipeline.generator_cuda import constants

VARIANTS: dict[str, tuple[Defines, ...]] = {
    "embedding/lookup.cu": (
        (("DIM", 128), ("WEIGHT", "float"), ("KEY", "int"), ("OUT", "half_t"), ("WEIGHTED", 0), *POOL.items()),
        (("DIM", 128), ("WEIGHT", "half_t"), ("KEY", "int"), ("OUT", "half_t"), ("WEIGHTED", 0), *POOL.items()),
        (("DIM", 48), ("WEIGHT", "half_t"), ("KEY", "int64"), ("OUT", "half_t"), ("WEIGHTED", 1), *POOL.items()),
        (("DIM", 8), ("WEIGHT", "bfloat_t"), ("KEY", "int"), ("OUT", "float"), ("WEIGHTED", 1), *POOL.items()),
        (("DIM", 256), ("WEIGHT", "float"), ("KEY", "int"), ("OUT", "bfloat_t"), ("WEIGHTED", 1), *POOL.items()),
    ),
    "embedding/sparse_optim.cu": (
        (("DIM", 128), ("KEY", "int"), ("GRAD", "half_t"), ("HOT", 26)),
        (("DIM", 16), ("KEY", "int64"), ("GRAD", "bfloat_t"), ("HOT", 32)),
        (("DIM", 128), ("KEY", "int"), ("GRAD", "half_t"), ("HOT", 1), ("WEIGHTED", 0)),
        (("DIM", 48), ("KEY", "int64"), ("GRAD", "float"), ("HOT", 1), ("WEIGHTED", 1)),
        (("DIM", 256), ("KEY", "int"), ("GRAD", "float"), ("HOT", 6)),
    ),
    "embedding/row_sort.cu": (
        (("KEY", "int"), ("BAGS", 0), ("WEIGHTED", 0), ("BITS", 9)),
        (("KEY", "int"), ("BAGS", 1), ("WEIGHTED", 0), ("BITS", 9)),
        (("KEY", "int64"), ("BAGS", 1), ("WEIGHTED", 1), ("BITS", 3)),
    ),
    "embedding/sorted_update.cu": tuple(
        (
            ("DIM", dim), ("WEIGHT", weight), ("GRAD", grad), ("KIND", kind), ("BAGS", bags), ("WEIGHTED", weighted),
            *SUM.items(),
        )
        for dim, weight, grad, kind, bags, weighted in (
            (128, "float", "half_t", 0, 0, 0), (128, "half_t", "half_t", 0, 1, 0), (48, "float", "float", 1, 1, 1),
            (128, "float", "half_t", 3, 1, 0), (16, "bfloat_t", "bfloat_t", 4, 1, 1), (256, "float", "float", 5, 0, 0),
            (8, "half_t", "float", 2, 0, 0),
        )
    ),
    "embedding/bag_lists.cu": ((("KEY", "int"),), (("KEY", "int64"),)),
    "embedding/frequent_rows.cu": ((("KEY", "int"), ("PLACE", "int")), (("KEY", "int64"), ("PLACE", "int64"))),
    "embedding/pair_lists.cu": ((("KEY", "int"),), (("KEY", "int64"),)),
    "embedding/row_moves.cu": tuple(
        (("DIM", dim), ("IN", source), ("OUT", target), ("FROM", listed), ("TO", 1 - listed), ("SCALED", scaled))
        for dim, source, target, listed, scaled in (
            (128, "float", "half_t", 1, 1), (128, "half_t", "half_t", 0, 0), (48, "float", "float", 1, 0),
            (16, "bfloat_t", "float", 0, 0), (256, "half_t", "bfloat_t", 1, 0),
        )
    ),
    "dlrm/interaction.cu": (
        (("DIM", 128), ("VECTORS", 27), ("FIRST", 1), ("NUMBER", "half_t"), ("ALIGNED", 1), ("RELU", 1)),
        (("DIM", 40), ("VECTORS", 60), ("FIRST", 0), ("NUMBER", "bfloat_t"), ("ALIGNED", 0), ("RELU", 0)),
        (
            ("DIM", 128), ("VECTORS", 27), ("FIRST", 1), ("NUMBER", "half_t"), ("ALIGNED", 1), ("RELU", 1),
            ("WEIGHT", "float"), ("KEY", "int"), *FUSED_BACKWARD.items(),
        ),
        *(
            (
                ("DIM", dim), ("VECTORS", 27), ("FIRST", first), ("NUMBER", number), ("ALIGNED", 1), ("RELU", 1),
                ("WEIGHT", weight), ("KEY", "int"), ("LISTED", 1), ("SENT", first), *FUSED_BACKWARD.items(),
            )
            for dim, first, number, weight in ((128, 1, "half_t", "float"), (40, 0, "half_t", "bfloat_t"))
        ),
        (
            ("DIM", 256), ("VECTORS", 9), ("FIRST", 0), ("NUMBER", "bfloat_t"), ("ALIGNED", 0), ("RELU", 1),
            ("WEIGHT", "bfloat_t"), ("KEY", "int64"), *FUSED_FORWARD.items(),
        ),
    ),
    "dlrm/fused_products.cu": tuple(
        (("NUMBER", number), ("FORWARD", forward), ("MASKED", masked), ("SUMMED", summed))
        for number, forward, masked, summed in (
            ("half_t", 0, 0, 0), ("half_t", 0, 0, 1), ("bfloat_t", 1, 0, 0), ("bfloat_t", 1, 1, 0),
        )
    ),
    "dlrm/gemm.cu": (
        (("NUMBER", "half_t"),),
        (("NUMBER", "float"),),
        (("NUMBER", "bfloat_t"),),
    ),
    "dlrm/logit.cu": (
        (("NUMBER", "half_t"), ("EACH", 8), ("RELU", 1)),
        (("NUMBER", "bfloat_t"), ("EACH", 1), ("RELU", 0)),
        (("NUMBER", "float"), ("EACH", 4), ("RELU", 1)),
    ),
    "dlrm/relu.cu": (
        (("NUMBER", "half_t"), ("EACH", 8), ("MASK", 2), ("SUMMED", 1)),
        (("NUMBER", "bfloat_t"), ("EACH", 1), ("MASK", 1), ("SUMMED", 0)),
        (("NUMBER", "float"), ("EACH", 4), ("MASK", 0), ("SUMMED", 1)),
    ),
    "dlrm/interaction_plain.cu": (
        (("DIM", 128), ("VECTORS", 27), ("FIRST", 1), ("NUMBER", "float"), ("RELU", 1)),
        (("DIM", 12), ("VECTORS", 70), ("FIRST", 0), ("NUMBER", "half_t"), ("RELU", 0)),
    ),
    "dlrm/loss.cu": ((("LABEL", "float"), ("GRAD", "half_t")), (("LABEL", "signed char"), ("GRAD", "float"))),
    "dlrm/optim.cu": (
        *((("KIND", kind), ("GRAD", "float"), ("COPY", "half_t"), ("WITH_COPY", 1)) for kind in range(5)),
        (("KIND", 0), ("GRAD", "bfloat_t"), ("COPY", "bfloat_t"), ("WITH_COPY", 0)),
    ),
    "dlrm/philox.cu": tuple((*philox_constants(), ("OUT", kind)) for kind in ("float", "half_t")),
    "pipeline/generator.cu": (constants(),),
    "pipeline/score_groups.cu": (
        (("SCORE", "float"), ("LABEL", "float"), ("MERGED", 0)),
        (("SCORE", "double"), ("LABEL", "unsigned char"), ("MERGED", 1)),
    ),
    "pipeline/split_records.cu": (
        (
            ("NUMBER", "half_t"), ("INDEXED", 1), ("WIDE", 0), ("LOG", 0), ("LABEL_ONE", 1), ("ROWS", 64), ("BAGS", 0),
            ("WEIGHTED", 0),
        ),
        (
            ("NUMBER", "float"), ("INDEXED", 0), ("WIDE", 1), ("LOG", 1), ("LABEL_ONE", 1065353216), ("ROWS", 3),
            ("BAGS", 2), ("WEIGHTED", 1),
        ),
        (
            ("NUMBER", "half_t"), ("INDEXED", 0), ("WIDE", 0), ("LOG", 0), ("LABEL_ONE", 1), ("ROWS", 35), ("BAGS", 1),
            ("WEIGHTED", 0),
        ),
    ),
}  # fmt: skip
"""By source; a source that is not listed stands for itself, without macros."""
