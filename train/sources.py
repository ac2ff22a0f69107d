"""Where text comes from: this Python's library, files, folders, JSONL, Parquet, ArrayRecord."""

import json
import os
import sysconfig
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

# What a standard library folder holds beside its own code: tests, tables, other people's packages.
_NOT_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)

NOT_TEXT = "must be UTF-8 text (convert it first, e.g. with iconv)"


def source_files(path: str | None) -> list[Path]:
    """The files that `read_documents(path, ...)` reads, in its order.

    Raises ValueError when `path` is neither a file nor a folder.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        return [file for file in _walk(root, _NOT_LIBRARY) if file.suffix == ".py"]
    root = os.path.expanduser(path)
    if os.path.isdir(root):
        return _walk(Path(root))
    if not os.path.isfile(root):
        raise refuse(path, "no such file or folder")
    return [Path(root)]


def read_documents(path: str | None, text_field: str) -> Iterator[str]:
    """Yields the non-empty documents of a source.

    Args:
      path: None for the library sources and language reference of the running Python; else a
        `.jsonl` (a document per line), `.parquet` (per row), `.array_record` or `.arecord` (per
        record: text, or a JSON object) file, any other file (one document), or a folder of such
        files, read in sorted order without hidden files and files that are not text.
      text_field: the JSON key or Parquet column that holds the text.

    Raises:
      ValueError: file unreadable or not UTF-8 text (in a folder: skipped), malformed record, no
        such field.
    """
    if path is None:
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
    for file in source_files(path):
        reader = _RECORDS.get(file.suffix.lower())
        try:
            texts = reader(file, text_field) if reader else [_text(file)]
            for text in texts:
                if text is None and is_single_document(path):
                    raise refuse(file, NOT_TEXT)
                if text:
                    yield text
        except OSError as error:
            raise refuse(file, f"cannot be read: {error.strerror or error}") from None


def is_single_document(path: str | None) -> bool:
    """Whether `path` is one document: a file of none of the record formats."""
    return (
        path is not None
        and os.path.isfile(os.path.expanduser(path))
        and Path(path).suffix.lower() not in _RECORDS
    )


def refuse(path: object, reason: str) -> ValueError:
    """The error, of one line, for a source that cannot be used."""
    return ValueError(f"data.path={str(path)!r}: {reason}".partition("\n")[0])


def _walk(root: Path, skip: Set[str] = frozenset()) -> list[Path]:
    files = []
    for folder, names, leaves in os.walk(root):
        names[:] = sorted(name for name in names if name[0] != "." and name not in skip)
        files += [Path(folder, leaf) for leaf in sorted(leaves) if leaf[0] != "."]
    return [file for file in files if file.is_file()]


def _text(file: Path) -> str | None:
    """The file's text, None when it is not text."""
    data = file.read_bytes()
    try:
        return None if b"\0" in data else data.decode()
    except UnicodeDecodeError:
        return None


def _jsonl(file: Path, text_field: str) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise refuse(file, f"line {number} is not JSON: {error}") from None
                yield _field(record, text_field, file, f"line {number}")


def _parquet(file: Path, text_field: str) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise refuse(file, "needs pyarrow: pip install 'bestiary[parquet]'") from None
    try:
        table = pq.ParquetFile(file)
    except pa.ArrowException as error:
        raise refuse(file, f"is not Parquet: {error}") from None
    with table:
        names = table.schema_arrow.names
        if text_field not in names:
            raise refuse(file, f"has no column {text_field!r}; name one of {names} in text-field")
        kind = table.schema_arrow.field(text_field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise refuse(file, f"column {text_field!r} must hold strings, not {kind}")
        try:
            for batch in table.iter_batches(columns=[text_field]):
                yield from (text or "" for text in batch.column(0).to_pylist())
        except (pa.ArrowException, OSError) as error:
            raise refuse(file, f"is damaged: {error}") from None


def _array_record(file: Path, text_field: str) -> Iterator[str]:
    import grain  # takes a second: only those who need it wait

    try:
        source: Any = grain.sources.ArrayRecordDataSource(str(file))
        count = len(source)
    except RuntimeError as error:
        raise refuse(file, f"is not ArrayRecord: {error}") from None
    with source:
        for number in range(count):
            try:
                text = source[number].decode()
            except UnicodeDecodeError:
                raise refuse(file, f"record {number} must be UTF-8 text or JSON") from None
            except RuntimeError as error:
                raise refuse(file, f"record {number} is damaged: {error}") from None
            try:
                record = json.loads(text) if text.startswith("{") else text
            except (ValueError, RecursionError):
                record = text  # text that happens to open with a brace
            is_json = isinstance(record, dict)
            yield _field(record, text_field, file, f"record {number}") if is_json else text


def _field(record: object, name: str, file: Path, where: str) -> str:
    if not isinstance(record, dict):
        raise refuse(file, f"{where} must be a JSON object, not {type(record).__name__}")
    if name not in record:
        fields = sorted(record)
        raise refuse(file, f"{where} has no field {name!r}; name one of {fields} in text-field")
    if not isinstance(record[name], str):
        kind = type(record[name]).__name__
        raise refuse(file, f"{where}: field {name!r} must be a string, not {kind}")
    return record[name]


_RECORDS = {
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".array_record": _array_record,
    ".arecord": _array_record,
}
