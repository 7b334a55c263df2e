"""Whether a checkpoint is of the model that it is to be loaded into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dlrm.errors import CheckpointError


def check_compatible(meta_model: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compare a checkpoint's model with the one to be loaded.

    Raises:
        CheckpointError: they differ; the first difference is named by its path.
    """
    difference = next(_differences(meta_model, expected, "model"), None)
    if difference:
        path, found, wanted = difference
        raise CheckpointError(
            f"checkpoint of another model: {path} is {found} in the checkpoint, but {wanted} here; "
            "use the config and data set that it was trained with"
        )


def _differences(found: Any, expected: Any, path: str) -> Iterator[tuple[str, str, str]]:
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        for key in [*expected, *(key for key in found if key not in expected)]:
            if key not in found or key not in expected:
                yield f"{path}.{key}", _shown(found, key), _shown(expected, key)
            else:
                yield from _differences(found[key], expected[key], f"{path}.{key}")
        # The order of the tables decides which pairs the interaction has; that of the sections means nothing.
        if path != "model" and list(found) != list(expected):
            yield f"order of {path}", ", ".join(found), ", ".join(expected)
    elif isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        if list(found) != list(expected):
            yield path, str(list(found)), str(list(expected))
    elif found != expected or isinstance(found, bool) != isinstance(expected, bool):
        yield path, repr(found), repr(expected)


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "absent"
