"""What a resumed run's config must share with its checkpoint, and what it may change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dlrm.config import DataConfig, RunConfig, to_values
from dlrm.errors import CheckpointError
from pipeline.checkpoint import Checkpoint

_ORDER = (
    ("", "seed"),
    ("data", "batch_size"),
    ("data", "shuffle"),
    ("data", "shuffle_window"),
    ("data", "shuffle_block"),
    ("data", "drop_last"),
)
_DEFAULTS = {field.name: field.default for field in fields(DataConfig)}
"""What a checkpoint means that was written before ``data`` had a field: it was trained as the default still does."""


def check_resumable(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Refuse to resume where the config means another run.

    Raises:
        CheckpointError: the place in the data would mean other rows, or the run did not start from ``run.init``.
    """
    before, now = checkpoint.meta.get("config"), to_values(config)
    if before is None:  # weights alone, which the engine refuses
        return
    for section, name in _ORDER:
        old, new = (_value(values, section, name) for values in (before, now))
        if old != new:
            path = f"{section}.{name}" if section else name
            raise CheckpointError(
                f"checkpoint {checkpoint.path}: was trained with {path} = {old}, not {new}, so its place in the data "
                f"means other rows; restore {path} or choose another run.directory"
            )
    if config.run.init not in {None, before["run"]["init"]}:
        raise CheckpointError(
            f"run.init: {config.run.init}, but the run in {config.run.directory} started from "
            f"{before['run']['init'] or 'its seed'} and would go on from there; choose another run.directory"
        )


def _value(values: Mapping[str, Any], section: str, name: str) -> Any:
    """Of one of ``_ORDER``, in a config's plain values."""
    return values[section].get(name, _DEFAULTS[name]) if section else values[name]


def rule_changed(checkpoint: Checkpoint, config: RunConfig, rule: str, field: str | None = None) -> bool:
    """Whether a stopping rule (``target``, ``early_stop``), or one field of it, is another than the checkpoint's."""
    old, new = (values["train"][rule] or {} for values in (checkpoint.meta["config"], to_values(config)))
    return bool(old.get(field) != new.get(field) if field else old != new)
