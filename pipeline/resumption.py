"""What a resumed run's config must share with its checkpoint, and what it may change."""

from __future__ import annotations

from dlrm.config import RunConfig, to_values
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


def check_resumable(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Refuse to resume where the config means another run.

    Raises:
        CheckpointError: the place in the data would mean other rows, or the run did not start from ``run.init``.
    """
    before, now = checkpoint.meta.get("config"), to_values(config)
    if before is None:  # weights alone, which the engine refuses
        return
    for section, name in _ORDER:
        old, new = (values[section][name] if section else values[name] for values in (before, now))
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


def rule_changed(checkpoint: Checkpoint, config: RunConfig, rule: str, field: str | None = None) -> bool:
    """Whether a stopping rule (``target``, ``early_stop``), or one field of it, is another than the checkpoint's."""
    old, new = (values["train"][rule] or {} for values in (checkpoint.meta["config"], to_values(config)))
    return bool(old.get(field) != new.get(field) if field else old != new)
