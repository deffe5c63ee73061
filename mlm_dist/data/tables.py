"""Text in columns: parquet files and Hugging Face `datasets` (extra `hf`), read in bounded memory."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlm_dist.data.members import LostDocument, decode
from mlm_dist.errors import UserError

Row = tuple[int, str | LostDocument]

_BATCH_ROWS = 256
# Without a buffer pyarrow reads the whole column of a row group at once, which is often the whole file.
_BUFFER_BYTES = 1 << 20


def require(module: str, extra: str, what: str) -> Any:
    """Import a module of an optional dependency.

    Raises:
        UserError: It is not installed; says how to.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{what} needs the package {module.partition('.')[0]}: pip install 'mlm-dist[{extra}]'"
        ) from error


def row_groups(path: Path, field: str) -> tuple[int, ...]:
    """Bytes of the column `field` in each row group of a parquet file, decompressed, by the file's footer.

    Raises:
        UserError: The file is damaged, or has no such column.
    """
    with _open_parquet(path) as file:
        check_column(str(path), file.schema_arrow.names, field)
        metadata = file.metadata
        columns = [j for j in range(metadata.num_columns) if _top(metadata.schema.column(j).path) == field]
        return tuple(
            sum(metadata.row_group(i).column(j).total_uncompressed_size for j in columns)
            for i in range(metadata.num_row_groups)
        )


def check_column(name: str, columns: list[str], field: str) -> None:
    """Check that a table has the column.

    Raises:
        UserError: It has not; lists those that it has.
    """
    if field not in columns:
        raise UserError(f"the input {name!r} has no column {field!r} (--field); its columns are {', '.join(columns)}")


def read_parquet(path: Path, start: int, end: int, field: str) -> Iterator[Row]:
    """Yield the values of a column in the row groups [start, end), each with its row's number in the file."""
    with _open_parquet(path) as file:
        row = sum(file.metadata.row_group(i).num_rows for i in range(start))
        batches = file.iter_batches(
            batch_size=_BATCH_ROWS, row_groups=list(range(start, end)), columns=[field], use_threads=False
        )
        try:
            for batch in batches:
                yield from enumerate(column_values(batch.column(0), field), row)
                row += batch.num_rows
        except (OSError, ValueError) as error:
            raise UserError(f"the input {str(path)!r} cannot be read from row {row} on: {_one_line(error)}") from error


def _open_parquet(path: Path) -> Any:
    parquet = require("pyarrow.parquet", "hf", "a .parquet input")
    try:
        return parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
        raise UserError(f"the input {str(path)!r} cannot be read as parquet: {_one_line(error)}") from error


def _top(path: str) -> str:
    return path.partition(".")[0]


def column_values(column: Any, field: str) -> Iterator[str | LostDocument]:
    """The strings of a pyarrow array or chunked array; what is none is lost."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        for value in column.is_null().to_pylist():
            yield LostDocument(f"the column {field!r} is {'null' if value else f'of type {kind}, not a string'}")
        return
    # As bytes, since one value that is not UTF-8 would fail all of its batch.
    for value in column.cast(pa.large_binary()).to_pylist():
        yield LostDocument(f"the column {field!r} is null") if value is None else decode(value)


def is_saved_dataset(directory: Path) -> bool:
    """Whether a directory was written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return _is_saved_split(directory) or (directory / "dataset_dict.json").is_file()


def _is_saved_split(directory: Path) -> bool:
    return (directory / "state.json").is_file() and (directory / "dataset_info.json").is_file()


def load_saved(directory: Path, split: str) -> tuple[Any, Path]:
    """The (memory-mapped) dataset of a directory written by `save_to_disk`, and the directory of its split.

    Raises:
        UserError: The directory has other splits only, or is damaged.
    """
    datasets = _datasets(f"the input {str(directory)!r}, a saved dataset,")
    if not _is_saved_split(directory):
        splits = sorted(path.name for path in directory.iterdir() if _is_saved_split(path))
        if split not in splits:
            raise UserError(
                f"the input {str(directory)!r} has no split {split!r} (--split); there is {', '.join(splits)}"
            )
        directory /= split
    try:
        return datasets.load_from_disk(str(directory), keep_in_memory=False), directory
    except Exception as error:  # damaged JSON or Arrow: whatever a parser raises
        raise UserError(f"the input {str(directory)!r} cannot be read as a dataset: {_one_line(error)}") from error


def load_named(name: str, config: str | None, split: str) -> Any:
    """A dataset of the hub, the cache or a directory of data files, as `datasets.load_dataset` finds it, memory-mapped from the cache.

    No code of the dataset's is run: scripts are refused by `datasets` itself.

    Raises:
        UserError: It cannot be had.
    """
    datasets = _datasets(f"--dataset {name}")
    try:
        found = datasets.load_dataset(name, config, split=split, keep_in_memory=False)
    except Exception as error:  # of many kinds: network, cache, formats, names
        raise UserError(f"--dataset {name} --split {split} could not be loaded: {_one_line(error)}") from error
    if not isinstance(found, datasets.Dataset):  # a list of splits
        raise UserError(f"--split {split!r} of --dataset {name} is no single split; name one, as train")
    return found


def _datasets(what: str) -> Any:
    datasets = require("datasets", "hf", what)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def text_bytes(dataset: Any, field: str) -> int:
    """Bytes of a dataset's column, about: of the rows that it selects from its table."""
    column = dataset.data.column(field)
    return int(column.nbytes) * len(dataset) // max(len(column), 1)


def read_rows(dataset: Any, start: int, end: int, field: str) -> Iterator[Row]:
    """Yield the values of a column in the rows [start, end) of a dataset, each with its row's number."""
    arrow = dataset.select_columns([field]).with_format("arrow")
    for row in range(start, end, _BATCH_ROWS):
        table = arrow[row : min(row + _BATCH_ROWS, end)]
        yield from enumerate(column_values(table.column(field), field), row)


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
