"""Prepared data sets: ``dataset.json`` and the binary files that it lists, read and written.

Shapes: B rows, N dense columns, T tables, H key columns of all tables, K keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlrm.config import DataConfig
from dlrm.device import Device
from dlrm.errors import ConfigError, DataError
from embedding.jagged import Jagged
from pipeline.checksums import algorithm_of, checksum_fault, file_checksum
from pipeline.formats.batch import HostBatch, size_fault
from pipeline.formats.jagged import JaggedReader
from pipeline.formats.raw import RawReader, RowFiles, Rows
from pipeline.formats.record_files import DecodedRecords, RecordFiles, RecordLayout, RecordSource, prefers_direct
from pipeline.generated import SCHEME, GeneratedRecords, GeneratedRows, RowNumbers, parse_synthetic
from pipeline.generator import DeviceRows
from pipeline.manifest import Ceilings, FileInfo, Manifest, SplitInfo, TableInfo, read_manifest, unit_of
from pipeline.record_loader import RecordLoader
from pipeline.writer import DatasetWriter

__all__ = ["Ceilings", "Dataset", "DatasetWriter", "HostBatch", "Split", "TableInfo", "load_dataset"]


class Split:
    """One split of a data set.

    Attributes:
        name: such as ``train``.
        rows: how many samples it has.
        shards: samples of each file, in order.
    """

    def __init__(self, dataset: Dataset, name: str) -> None:
        """Map the split's files.

        Raises:
            DataError: a file is missing, truncated or oversized.
        """
        self._info = info = dataset.manifest.splits[name]
        self._dataset = dataset
        self.name = name
        self.rows = info.rows
        self.shards = tuple(file.rows for file in info.files if file.part == "rows")
        manifest = dataset.manifest
        self._generated: GeneratedRows | None = None
        if manifest.layout == "synthetic":
            self.shards = (info.rows,)
            self._generated = GeneratedRows(manifest, name, dataset.path)
        self._reader: JaggedReader | RawReader = (
            JaggedReader(dataset.path, manifest, info)
            if manifest.layout == "jagged"
            else RawReader(dataset.path, manifest, info, self._row_files())
        )

    def _row_files(self) -> RowFiles | None:
        """What stands for the Raw files of a split that has none."""
        if self._dataset.manifest.layout == "parquet":
            try:
                from pipeline.formats.parquet_rows import ParquetRows  # loads polars, which nothing else here needs
            except ImportError as error:
                raise ConfigError(
                    f"data.path: training from Parquet files needs {error.name}; install it, or convert them to raw"
                ) from None
            return ParquetRows(self._dataset.path, self._dataset.manifest, self._info)
        return self._generated

    def read(self, rows: NDArray[np.int64] | slice) -> HostBatch:
        """Read rows in the order asked for; safe from several threads at once.

        Args:
            rows: [B] row numbers from 0, or a slice of them.

        Returns:
            The rows. Every bag holds exactly one key, and ``keys.offsets`` is ``None``, if and only if all
            tables of a Raw data set have hotness 1 and its manifest says that no key is missing: this
            is the same for every batch and rank.

        Raises:
            DataError: a value is out of range; the message names file, row, column and value.
            IndexError: a row number lies outside the split.
        """
        return self._reader.read(self._numbers(rows))

    def read_keys(self, rows: NDArray[np.int64] | slice) -> Jagged:
        """The keys alone of ``read``."""
        return self._reader.read_keys(self._numbers(rows))

    def records(
        self,
        data: DataConfig,
        *,
        seed: int,
        rank: int,
        ranks: int,
        device: Device,
        batch_size: int | None = None,
        shuffle: bool | None = None,
        drop_last: bool | None = None,
        whole_batches: bool = False,
        numbers: bool = False,
        keep: int = 1,
        start_step: int = 0,
        stop_step: int | None = None,
        epochs: int | None = None,
    ) -> RecordLoader:
        """Batches of the rows as they are stored, in pinned buffers: for devices that take records apart themselves.

            with split.records(config.data, seed=1, rank=0, ranks=2, device=device, epochs=1) as loader:
                for batch in loader:
                    device.upload(batch.records, out)  # [B, V] uint32; batch.layout says which word is what
                    batch.hold(event)  # of the upload: the buffer is not overwritten before it

        Args:
            data: of the run: order, batch size, depth of the ring, threads.
            seed: of the order.
            rank: whose share of each batch.
            ranks: how many share it.
            device: gives the buffers.
            batch_size: rows of the global batch; ``None``: those of ``data``, as with the next two.
            shuffle: ``False``: file order.
            drop_last: leave out an incomplete last batch of an epoch.
            whole_batches: hand over the rows of all ranks.
            numbers: hand over numbers of rows [B, 2] (int64 as two words), for a device that makes the rows itself
                (``rows_on``).
            keep: batches that the consumer looks at, at once.
            start_step: steps that are done already.
            stop_step: last step; ``None``: only ``epochs`` ends it.
            epochs: passes over the split; ``None``: only ``stop_step`` ends it.

        Raises:
            ConfigError: the split has rows, but ``drop_last`` leaves no batch of them.
            DataError: the layout has no records of one length, or ``numbers`` of rows that lie in files are asked for.
        """
        return RecordLoader(
            self,
            device=device,
            batch_size=batch_size or data.batch_size,
            rank=rank,
            ranks=ranks,
            seed=seed,
            shuffle=data.shuffle if shuffle is None else shuffle,
            window=data.shuffle_window,
            drop_last=data.drop_last if drop_last is None else drop_last,
            prefetch=data.prefetch,
            block=data.shuffle_block,
            readers=data.readers,
            keep=keep,
            whole_batches=whole_batches,
            numbers=numbers,
            start_step=start_step,
            stop_step=stop_step,
            epochs=epochs,
        )

    @property
    def synthetic(self) -> bool:
        """Whether its rows are made as they are read."""
        return self._generated is not None

    def rows_on(self, device: Device) -> DeviceRows:
        """What makes the rows of a synthetic set on a device.

        Raises:
            DataError: the rows lie in files.
        """
        return DeviceRows(self.made().generator, device)

    def made(self) -> GeneratedRows:
        """The rows of a synthetic set.

        Raises:
            DataError: the rows lie in files.
        """
        if self._generated is None:
            raise DataError(
                f"data set {self._dataset.path}: layout {self._dataset.manifest.layout!r} has its rows in files; only "
                "those of a synthetic set can be made on a device"
            )
        return self._generated

    def record_source(self, *, direct: bool | None = None, numbers: bool = False) -> RecordSource:
        """The rows as they are stored; whoever asks for them closes them.

        Args:
            direct: pass the page cache by; ``None``: where the split takes more than half of the memory.
            numbers: numbers of rows in the place of rows (see ``records``).

        Raises:
            DataError: the layout has no records of one length, or ``numbers`` of rows that lie in files are asked for.
        """
        if numbers:
            return RowNumbers(self.made())
        if self._generated is not None:
            return GeneratedRecords(self._generated)
        if self._dataset.manifest.layout == "parquet":
            return DecodedRecords(self._dataset.manifest, self._reader.files)
        if direct is None:
            direct = prefers_direct(sum(file.bytes for file in self._info.files))
        return RecordFiles(self._dataset.path, self._dataset.manifest, self._info, self._reader.files, direct=direct)

    @property
    def files(self) -> RowFiles:
        """Labels and dense columns (Raw: keys too) as they are stored, or what makes the rows of a synthetic set."""
        return self._reader.files

    def release(self, start: int, stop: int) -> None:
        """Let go of the memory that rows ``start .. stop`` take as mapped pages; they may be read again."""
        self._reader.release(start, stop)

    def will_need(self, start: int, stop: int) -> None:
        """Ask the system to read rows ``start .. stop`` ahead into its page cache; returns at once."""
        self._reader.will_need(start, stop)

    def _numbers(self, rows: NDArray[np.int64] | slice) -> Rows:
        if isinstance(rows, slice):
            return np.arange(*rows.indices(self.rows), dtype=np.int64)
        numbers: Rows = np.ascontiguousarray(rows, np.int64)
        if numbers.size and (numbers.min() < 0 or numbers.max() >= self.rows):
            raise IndexError(f"rows {numbers.min()} .. {numbers.max()} lie outside 0 .. {self.rows - 1}")
        return numbers


class Dataset:
    """A prepared data set in a folder.

    Attributes:
        path: its folder.
        manifest: every field of ``dataset.json``.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Take over a manifest and check that its files are there in the listed sizes.

        Raises:
            DataError: a file is missing, truncated or oversized.
        """
        self.path = path
        self.manifest = manifest
        self._splits: dict[str, Split] = {}
        for split in manifest.splits.values():
            for file in split.files:
                _check_size(path / file.path, file, manifest)

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self.manifest.name

    @property
    def num_dense(self) -> int:
        """N, how many dense columns it has."""
        return len(self.manifest.dense.names)

    @property
    def tables(self) -> tuple[TableInfo, ...]:
        """The categorical features, in order."""
        return self.manifest.tables

    @property
    def layout(self) -> RecordLayout | None:
        """Of its rows as they are stored, where a device may take them apart (``split_records``); else ``None``."""
        if self.manifest.layout == "jagged":
            return None
        layout = RecordLayout.of(self.manifest)
        return layout if layout.splittable else None

    @property
    def key_dtype(self) -> str:
        """``int32`` or ``int64``."""
        return self.manifest.key_dtype

    @property
    def weighted(self) -> bool:
        """Whether keys carry weights."""
        return self.manifest.weighted

    @property
    def splits(self) -> dict[str, SplitInfo]:
        """Rows and files of each split by name."""
        return self.manifest.splits

    def split(self, name: str) -> Split:
        """One split, its files mapped.

        Raises:
            DataError: there is no such split.
        """
        if name not in self.manifest.splits:
            known = ", ".join(self.manifest.splits) or "none"
            raise DataError(f"data set {self.path}: no split {name!r}; it has {known}")
        if name not in self._splits:
            self._splits[name] = Split(self, name)
        return self._splits[name]

    def verify(self) -> tuple[str, ...]:
        """Check sizes and sums of all files.

        Returns:
            Paths of the files that the manifest has no sum for (adopted ones).

        Raises:
            DataError: a file differs from the manifest.
        """
        unchecked = []
        for split in self.manifest.splits.values():
            for file in split.files:
                path = self.path / file.path
                _check_size(path, file, self.manifest)
                if file.checksum is None:
                    unchecked.append(file.path)
                elif (found := file_checksum(path, algorithm_of(file.checksum))) != file.checksum:
                    raise DataError(checksum_fault(path, found, file.checksum))
        return tuple(unchecked)

    def summary(self) -> dict[str, Any]:
        """What a report says about the data, as plain JSON values."""
        manifest = self.manifest
        ceilings = manifest.ceilings
        return {
            "name": manifest.name,
            "path": str(self.path),
            "layout": manifest.layout,
            "num_dense": self.num_dense,
            "dense_dtype": manifest.dense.dtype,
            "dense_transform": manifest.dense.transform,
            "num_tables": len(manifest.tables),
            "table_rows": {table.name: table.rows for table in manifest.tables},
            "hotness": {table.name: table.hotness for table in manifest.tables},
            "key_dtype": manifest.key_dtype,
            "weighted": manifest.weighted,
            "splits": {name: split.rows for name, split in manifest.splits.items()},
            "licence": manifest.licence,
            "source": manifest.source,
            "notes": list(manifest.notes),
            "ceilings": ceilings
            and {
                "best": ceilings.best,
                "best_additive": ceilings.best_additive,
                "dense_only": ceilings.dense_only,
            },
        }


def load_dataset(path: str | Path) -> Dataset:
    """Open a prepared data set.

    Args:
        path: folder with ``dataset.json``, or ``synthetic:...`` (docs/data.md) for rows that are made as they are
            read.

    Raises:
        ConfigError: ``synthetic:...`` is malformed.
        DataError: the folder is missing or malformed, or a file does not have the size that it lists.
    """
    if str(path).startswith(SCHEME):
        return Dataset(Path(str(path)), parse_synthetic(str(path)))
    directory = Path(path)
    return Dataset(directory, read_manifest(directory))


def _check_size(path: Path, file: FileInfo, manifest: Manifest) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; restore the file or prepare the data set again") from None
    if found != file.bytes:
        raise DataError(size_fault(path, found, file.bytes, unit_of(manifest, file.part)))
