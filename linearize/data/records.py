"""Read the records of `data.source`: a file or folder of text or records, a data set saved on disk, or a Hub data
set."""

from __future__ import annotations

import csv
import difflib
import json
import math
import random
import re
import tempfile
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.errors import DataError, counted
from linearize.recipe.schema import RECORD_SHAPES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from linearize.recipe.schema import SourceSpec

_TEXT = (".txt", ".md", ".raw", ".tokens")
_KINDS = (*_TEXT, ".jsonl", ".json", ".csv", ".tsv", ".parquet")
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
READABLE = f"{', '.join(_KINDS)}, also compressed ({', '.join(_COMPRESSED)})"
LONGEST_RECORD = 16_000_000
"""Maximum characters per line. A longer document is a file without line breaks, which takes minutes to tokenize."""
HUB_SHUFFLE_BUFFER = 10_000
"""Size of the shuffle buffer of a streamed data set, in records, because the data set is never local as a whole."""
_ABOUT = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog|contributing|code_of_conduct|use_policy)([._-].*)?"
    r"|dataset_infos?\.json|croissant\.json",
    re.IGNORECASE,
)
"""Files beside a data set that hold none of its records."""
_SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
"""Words in file names -> the split, as in `datasets`."""
CONVERSATIONS = ("messages", "conversations", "conversation")
"""Fields that may hold a conversation if `columns` is not set."""

_FEWEST_PARTS, _SHORTEST_PART, _LONGEST_PART = 64, 256, 65_536
"""Plain text: the least number of parts, and the bounds of a part's size in characters."""
_BOMB_BYTES, _BOMB_RATIO = 100_000_000, 200
"""A compressed file is refused if it unpacks to more bytes than this and to more than this multiple of its own size."""
_BLOCK = 1 << 20
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_MOST_SHOWN = 8

Record = tuple[str, Any, bool]
"""The record's place (file:line), its value, and True if the document ends with it."""


class Records:
    """The records of a source in an order that depends only on the seed, so every stage finds another stage's held-out
    documents at the same position.

    Attributes:
        about: remarks on the reading, such as the files of a folder, a table's separator, or a key of records.
        plain: True if the records are parts of plain text.
    """

    plain = False

    def __init__(self, parts: Sequence[Sequence[Record]], seed: int, about: Iterable[str] = ()) -> None:
        self.parts, self.seed, self.about = parts, seed, about
        self._ends = list(accumulate(map(len, parts)))

    def __iter__(self) -> Iterator[Record]:
        order = array("q", range(len(self)))
        random.Random(self.seed).shuffle(order)  # noqa: S311 - an order, not a secret
        return (self[place] for place in order)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, place: int) -> Record:
        part = bisect_right(self._ends, place)
        return self.parts[part][place - (self._ends[part - 1] if part else 0)]

    @property
    def first(self) -> Record | None:
        """The first record in file order."""
        return self[0]


class Streamed(Records):
    """The records of a streamed Hub data set; only the shards in use are downloaded."""

    def __init__(self, spec: SourceSpec, seed: int) -> None:
        super().__init__((), seed)
        self.spec = spec

    def __iter__(self) -> Iterator[Record]:
        return _hub_records(self.spec, self.seed)

    @property
    def first(self) -> None:
        """None, because the stream is shuffled and has no file order."""


@contextmanager
def open_records(spec: SourceSpec, *, seed: int) -> Iterator[Records]:
    """Open the source of `spec`. JSON lines and table rows are parsed one by one on access.

    Raises:
        DataError: the source cannot be found or read; also raised while records are read.
    """
    source = spec.source or ""
    path = Path(source).expanduser()
    if not path.exists() and not _is_path(source):
        yield Streamed(spec, seed)
        return
    _check_exists(path, source)
    if path.is_dir() and _is_saved(path):
        yield Records([_saved(path, source, spec.split)], seed)
        return
    about: dict[str, None] = {}  # an ordered set
    files = _shards(path, source, spec.split, about) if path.is_dir() else [path]
    packed = any(file.suffix.lower() in _COMPRESSED for file in files)
    with tempfile.TemporaryDirectory(prefix="linearize-") if packed else nullcontext("") as folder:
        parts = []
        for number, file in enumerate(files):
            shown = str(Path(source) / file.name) if path.is_dir() else source
            parts.append(_file_records(file, shown, spec, Path(folder) / str(number), about))
        records = Records(parts, seed, about)
        records.plain = _kind(files[0]) in _TEXT
        if not len(records):
            raise DataError(f"{source}: the file is empty; give one with text in it")
        yield records


def _is_path(source: str) -> bool:
    """True if a missing source looks like a path; Hub ids have at most one slash, and may contain dots."""
    path = Path(source)
    if _kind(path) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        return True
    return path.parent != Path() and path.parent.is_dir()


def _kind(path: Path) -> str | None:
    """The file name's ending for the format, without the ending for compression."""
    name = path.name.lower()
    ending = Path(name.removesuffix(next((end for end in _COMPRESSED if name.endswith(end)), ""))).suffix
    return ending if ending in _KINDS else None


def _check_exists(path: Path, source: str) -> None:
    if path.exists():
        return
    if not path.parent.is_dir():
        raise DataError(f"{source}: no such file; its folder {path.parent} does not exist either")
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=3, cutoff=0.5)
    raise DataError(f"{source}: no such file" + (f"; did you mean {' or '.join(near)}?" if near else " in that folder"))


def _shards(path: Path, source: str, split: str, about: dict[str, None]) -> list[Path]:
    """The files of a folder, all of one kind, sorted by name. Skips files about the data set, such as a README, and
    other splits; adds the names of both to `about`."""
    found = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith((".", "_")))
    files = [file for file in found if not _ABOUT.fullmatch(file.name)]
    files = _of_split(files, source, split)
    kinds = Counter(_kind(file) or file.suffix or file.name for file in files)
    if not any(map(_kind, files)):
        folders = sorted(p.name for p in path.iterdir() if p.is_dir())
        has = f"name one of its folders ({', '.join(folders[:5])}), or " if folders else ""
        raise DataError(f"{source}: no file in this folder can be read: {has}give a file of {READABLE}")
    if len(kinds) > 1:
        mixed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        raise DataError(
            f"{source}: this folder mixes several kinds of files ({mixed}); name a file in it, or move all others away"
        )
    names = [file.name for file in files]
    about[f"{len(names):,} files, {names[0]} to {names[-1]}" if len(names) > 1 else f"1 file, {names[0]}"] = None
    if beside := [file.name for file in found if file not in files]:
        about[f"files not read: {listed(beside)}"] = None
    return files


def listed(names: Iterable[str]) -> str:
    """The first names, and the number of further ones."""
    names = list(names)
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(names[:_MOST_SHOWN]) + more


def _of_split(files: list[Path], source: str, split: str) -> list[Path]:
    """The files whose names contain the split; all files if their names contain only one split, or none."""
    words = {file: re.split(r"[-_. 0-9]+", file.name.lower()) for file in files}
    named = {file: next((_SPLITS[word] for word in words[file] if word in _SPLITS), None) for file in files}
    # If a file name lacks a split, the others' split words may be parts of titles.
    if len({*named.values()}) < 2 or None in named.values():
        return files
    if split not in named.values():
        has = ", ".join(sorted({str(one) for one in named.values()}))
        raise DataError(f"{source}: has no file of a split {split}; set data.split to one of {has}")
    return [file for file in files if named[file] == split]


def _file_records(
    path: Path, source: str, spec: SourceSpec, unpacked: Path, about: dict[str, None]
) -> Sequence[Record]:
    """The records of a file; a compressed file is unpacked to `unpacked` first."""
    if not path.is_file():
        raise DataError(f"{source}: not a regular file; give one of {READABLE}")
    kind = _kind(path)
    if kind is None:
        raise DataError(f"{source}: cannot read {path.suffix or 'a file without extension'}; give one of {READABLE}")
    try:
        if path.suffix.lower() in _COMPRESSED:
            _unpack(path, source, unpacked)
            path = unpacked
        if kind == ".parquet":
            return _parquet_records(path, source)
        if kind in (".csv", ".tsv"):
            return _csv_records(path, source, "," if kind == ".csv" else "\t", about)
        if kind in _TEXT:
            text = path.read_text(encoding="utf-8-sig")  # drops the byte order mark of some editors
            # Enough parts to hold some out. Parts are long in a long text, because attention does not cross the end of
            # a part.
            parts = _parts(text, min(max(len(text) // _FEWEST_PARTS, _SHORTEST_PART), _LONGEST_PART))
            return [(source, {"text": part}, number == len(parts)) for number, part in enumerate(parts, 1)]
        return _json_records(path, source, spec, about, lines=kind == ".jsonl")
    except UnicodeDecodeError as problem:
        raise _not_utf8(problem, source) from problem
    except OSError as problem:
        raise DataError(f"{source}: cannot be read: {problem.strerror or problem}") from problem


def _not_utf8(problem: UnicodeDecodeError, where: str) -> DataError:
    byte = f"byte 0x{problem.object[problem.start]:02x} at {problem.start:,}"
    return DataError(f"{where}: not UTF-8 text ({byte}); convert it first, for example with iconv")


def _unpack(path: Path, source: str, unpacked: Path) -> None:
    import pyarrow  # type: ignore[import-untyped]

    most = max(_BOMB_BYTES, _BOMB_RATIO * path.stat().st_size)
    try:
        with (
            pyarrow.input_stream(str(path), compression=_COMPRESSED[path.suffix.lower()]) as stream,
            unpacked.open("wb") as file,
        ):
            while block := stream.read(_BLOCK):
                if file.tell() > most:
                    raise DataError(
                        f"{source}: unpacks to more than {most:,} bytes, {_BOMB_RATIO} times its size; if that is "
                        "right, unpack it yourself and name the result"
                    )
                file.write(block)
    except (pyarrow.ArrowException, OSError) as problem:
        if isinstance(problem, OSError) and problem.errno:
            raise
        reason = str(problem).splitlines()[0]
        raise DataError(f"{source}: is damaged or cut off ({reason}); fetch it again") from problem


class _Lines(Sequence[Record]):
    """A file of JSON lines; only the lines' offsets are in memory."""

    def __init__(self, path: Path, source: str) -> None:
        self.path, self.source = path, source
        self.starts, self.numbers = array("Q"), array("Q")
        start = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                    line, start = line[3:], 3
                if len(line) > 4 * LONGEST_RECORD:  # bytes; a character has at most 4
                    raise _too_long(f"{source}:{number}", len(line))
                if not line.isspace() and line:
                    self.starts.append(start)
                    self.numbers.append(number)
                start += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, place: Any) -> Any:
        number = self.numbers[place]
        try:
            with self.path.open("rb") as file:
                file.seek(self.starts[place])
                line = file.readline().decode().rstrip()
        except UnicodeDecodeError as problem:
            raise _not_utf8(problem, f"{self.source}:{number}") from problem
        except OSError as problem:
            raise DataError(f"{self.source}: cannot be read: {problem.strerror}") from problem
        if len(line) > LONGEST_RECORD:
            raise _too_long(f"{self.source}:{number}", len(line))
        return f"{self.source}:{number}", _parse(line, self.source, number), True


def _too_long(where: str, size: int) -> DataError:
    return DataError(f"{where}: a record of {size:,} characters; split it into records of at most {LONGEST_RECORD:,}")


def _json_records(
    path: Path, source: str, spec: SourceSpec, about: dict[str, None], *, lines: bool
) -> Sequence[Record]:
    """Read JSON lines, or one JSON value: an array, an object with an array of records, or a single record."""
    broken = None
    try:
        found = _Lines(path, source)
        if not len(found):
            return []
        head = found[0][1]
        several = len(found) > 1
        if several and lines:
            return found
        if isinstance(head, dict) and (several or (lines and not _key_of_records(head, spec))):
            return found
    except DataError as problem:
        broken = problem
    if broken and lines and path.stat().st_size > LONGEST_RECORD:
        raise broken
    try:
        whole = _parse(path.read_text(encoding="utf-8-sig"), source, 1)
    except DataError:
        if broken and lines:
            raise broken from None
        raise
    if isinstance(whole, list):
        return [(f"{source}, record {number}", item, True) for number, item in enumerate(whole, 1)]
    if isinstance(whole, dict) and (key := _key_of_records(whole, spec)):
        about[f"records under the key {key}"] = None
        return [(f"{source}, {key} {number}", item, True) for number, item in enumerate(whole[key], 1)]
    if (size := path.stat().st_size) > LONGEST_RECORD:
        raise _too_long(f"{source}:1", size)
    return [(f"{source}:1", whole, True)]


def _key_of_records(whole: dict[str, Any], spec: SourceSpec) -> str | None:
    """The key of an object's only list of objects; None if the object itself is a record or the list is a
    conversation."""
    own = {spec.field, *(spec.columns.named.values() if spec.columns else ())}
    known = {*CONVERSATIONS, *(name for must, may in RECORD_SHAPES.values() for name in (*must, *may)), *own}
    lists = [key for key, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    speaks = len(lists) == 1 and whole[lists[0]][0].keys() & {"role", "from"}
    return lists[0] if len(lists) == 1 and not speaks and not known & whole.keys() else None


def _parse(text: str, source: str, line: int) -> Any:
    """Parse the JSON in `text`, which starts at `line` of the file."""
    try:
        return json.loads(text, parse_constant=_constant)
    except json.JSONDecodeError as problem:
        at = line + problem.lineno - 1
        raise DataError(
            f"{source}:{at}: broken JSON ({problem.msg} at column {problem.colno}); mend that line"
        ) from problem
    except RecursionError:
        raise DataError(f"{source}:{line}: broken JSON (nested too deeply); mend that line") from None
    except ValueError as problem:  # an integer with more digits than Python accepts
        raise DataError(f"{source}:{line}: broken JSON ({str(problem).split(':')[0]}); mend that line") from problem


def _constant(name: str) -> float | None:
    """NaN becomes null, because pandas writes an empty cell as NaN."""
    return None if name == "NaN" else float(name)


def _csv_records(path: Path, source: str, usual: str, about: dict[str, None]) -> list[Record]:
    """The rows of a table with a header, as text; `usual` is the separator for the file's ending."""
    csv.field_size_limit(LONGEST_RECORD)
    records: list[Record] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        begins = 1
        header: list[str] | None = None
        try:
            delimiter = _separator(path, usual)
            if delimiter != usual:
                about[f"cells separated by {_SEPARATORS[delimiter]}, not {_SEPARATORS[usual]}"] = None
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            for row in rows:
                where, begins = f"{source}:{begins}", rows.line_num + 1
                if not row:
                    continue
                if header is None:
                    header = row
                    if len({*header}) < len(header):
                        raise DataError(f"{where}: two columns have one name ({', '.join(header)}); rename one of them")
                elif len(row) != len(header):
                    cells = counted(len(row), "cell", "cells")
                    raise DataError(f"{where}: {cells} under a header of {len(header)}; mend that row")
                else:
                    records.append((where, dict(zip(header, row, strict=True)), True))
        except csv.Error as problem:
            why = "a quote is never closed" if "end of data" in str(problem) else problem
            raise DataError(f"{source}:{begins}: not a readable table ({why}); mend that row") from problem
    return records


def _separator(path: Path, usual: str) -> str:
    """The separator of a table's cells. It is `usual`, unless `usual` leaves the header as one cell and exactly one
    other separator splits the header and the first row into equal numbers of cells."""
    widths: dict[str, list[int]] = {delimiter: [] for delimiter in _SEPARATORS}
    for delimiter, cells in widths.items():
        # `_csv_records` reports an error of csv later, with its row.
        with path.open(encoding="utf-8-sig", newline="") as file, suppress(csv.Error):
            cells.extend(islice((len(row) for row in csv.reader(file, delimiter=delimiter) if row), 2))
    fitting = [delimiter for delimiter, cells in widths.items() if cells[:1] > [1] and len({*cells}) == 1]
    return fitting[0] if widths[usual][:1] == [1] and len(fitting) == 1 else usual


class _Rows(Sequence[Record]):
    """The rows of a table, converted to Python values on access."""

    def __init__(self, source: str, length: int, row: Callable[[int], Any]) -> None:
        self.source, self.length, self.row = source, length, row

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: Any) -> Any:
        where = f"{self.source}, row {place + 1}"
        # Arrow and the decoders of `datasets` raise many kinds of exceptions.
        try:
            return where, _without_fill(self.row(place)), True
        except Exception as problem:
            raise DataError(f"{where}: cannot be read ({_first_line(problem)}); write the file again") from problem


def _without_fill(value: Any, *, within: bool = False) -> Any:
    """Remove the nulls that Arrow adds for keys of nested objects that only other rows have. NaN, an empty cell in
    pandas, becomes null."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {key: _without_fill(v, within=True) for key, v in value.items() if v is not None or not within}
    return [_without_fill(item, within=True) for item in value] if isinstance(value, list) else value


def _first_line(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0]


def _parquet_records(path: Path, source: str) -> _Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as problem:
        raise DataError(f"{source}: not a readable Parquet file ({_first_line(problem)}); write it again") from problem
    return _Rows(source, table.num_rows, lambda place: table.slice(place, 1).to_pylist()[0])


def _is_saved(path: Path) -> bool:
    """True for a folder written by `save_to_disk` of `datasets`."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _saved(path: Path, source: str, split: str) -> _Rows:
    """The rows of a data set written by `save_to_disk`; with several splits, those of `split`."""
    import datasets

    try:
        saved: Any = datasets.load_from_disk(str(path))
    except Exception as problem:  # errors of `datasets`, Arrow and JSON
        raise DataError(
            f"{source}: not a readable folder of save_to_disk ({_first_line(problem)}); save it again"
        ) from problem
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"{source}: has no split {split}; set data.split to one of {', '.join(saved)}")
        saved = saved[split]
    if not len(saved):
        raise DataError(f"{source}: the data set is empty; give one with text in it")
    return _Rows(source, len(saved), lambda place: saved[place])


def _parts(text: str, size: int) -> list[str]:
    """Cut `text` into parts of `size` to `2 * size` characters. A part begins at a paragraph, else at a line, else at a
    word."""
    parts = []
    while len(text) > 2 * size:
        found = (re.compile(gap).search(text, size, 2 * size) for gap in (r"\n[ \t]*\n\s*", r"\n", r"\s"))
        cut = next((match.end() for match in found if match), 2 * size)
        parts.append(text[:cut])
        text = text[cut:]
    return [*parts, text] if text.strip() else parts


def _hub_records(spec: SourceSpec, seed: int) -> Iterator[Record]:
    """Stream the records of a Hub data set."""
    import datasets

    name = f"{spec.source}/{spec.config}" if spec.config else spec.source
    try:
        stream = datasets.load_dataset(spec.source, spec.config, split=spec.split, streaming=True)
        for number, record in enumerate(stream.shuffle(seed=seed, buffer_size=HUB_SHUFFLE_BUFFER), 1):
            yield f"{name} {spec.split}, record {number}", _without_fill(record), True
    # `datasets`, its HTTP client and its file readers each raise their own kinds of exceptions.
    except Exception as problem:
        raise DataError(
            f"{name} (split {spec.split}): no file of that name, and as a Hub data set it cannot be read: "
            f"{_first_line(problem)}; check the name and the network, or name a .txt, .jsonl or .parquet file"
        ) from problem
