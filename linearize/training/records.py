"""Reading what a recipe's `data.source` names: a text file, a file of records, or a data set of the Hub."""

from __future__ import annotations

import difflib
import json
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from linearize.recipe.schema import SourceSpec

TEXT_FILES = {".txt", ".md", ".raw", ".tokens"}
RECORD_FILES = {".jsonl", ".json", ".parquet"}
LONGEST_RECORD = 16_000_000
"""Characters of one line; a document of more is a file that has lost its line breaks, and takes minutes to tokenize."""
HUB_SHUFFLE_BUFFER = 10_000
"""Records of a streamed data set that are shuffled among themselves: all of it is never on this machine."""

_FEWEST_PARTS, _SHORTEST_PART, _LONGEST_PART = 64, 256, 65_536
"""Of a text file; characters."""

Record = tuple[str, Any, bool]
"""Where it stands (file:line), what stands there, and whether the document ends with it."""


def read_records(spec: SourceSpec, *, seed: int) -> Iterator[Record]:
    """The records of a file or of a Hub data set, in an order made from `seed` and of nothing else: what one stage
    holds out, others recognise by its place."""
    source = spec.source or ""
    path = Path(source).expanduser()
    if not path.exists() and not _is_path(source):
        yield from _hub_records(spec, seed)
        return
    records = _file_records(path, source)
    random.Random(seed).shuffle(records)  # noqa: S311 - an order, not a secret
    yield from records


def _is_path(source: str) -> bool:
    """Whether a source that does not exist was meant as a file; Hub ids have one slash at most, and may have dots."""
    path = Path(source)
    if path.suffix in TEXT_FILES | RECORD_FILES or source.startswith((".", "/", "~")) or source.count("/") > 1:
        return True
    return path.parent != Path() and path.parent.is_dir()


def _file_records(path: Path, source: str) -> list[Record]:
    """All records of a file."""
    readable = ", ".join(sorted(TEXT_FILES | RECORD_FILES))
    if not path.exists():
        if not path.parent.is_dir():
            raise DataError(f"{source}: no such file; its folder {path.parent} does not exist either")
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=3, cutoff=0.5)
        raise DataError(
            f"{source}: no such file" + (f"; did you mean {' or '.join(near)}?" if near else " in that folder")
        )
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in TEXT_FILES | RECORD_FILES)
        raise DataError(
            f"{source}: this is a folder; name a file in it ({', '.join(inside[:5]) or f'one of {readable}'})"
        )
    if not path.is_file():
        raise DataError(f"{source}: not a regular file; give one of {readable}")
    if path.suffix not in TEXT_FILES | RECORD_FILES:
        raise DataError(f"{source}: cannot read {path.suffix or 'a file without extension'}; give one of {readable}")
    if path.suffix == ".parquet":
        records = _parquet_records(path, source)
    else:
        try:
            # utf-8-sig drops the byte order mark that some editors put first.
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as problem:
            byte = f"byte 0x{problem.object[problem.start]:02x} at {problem.start:,}"
            raise DataError(f"{source}: not UTF-8 text ({byte}); convert it first, for example with iconv") from problem
        except OSError as problem:
            raise DataError(f"{source}: cannot be read: {problem.strerror}") from problem
        if path.suffix in TEXT_FILES:
            # Enough of them to hold some out, and long ones where there is much: none is seen beyond its own end.
            parts = _parts(text, min(max(len(text) // _FEWEST_PARTS, _SHORTEST_PART), _LONGEST_PART))
            records = [(source, {"text": part}, number == len(parts)) for number, part in enumerate(parts, 1)]
        elif path.suffix == ".json" and text.lstrip().startswith("["):
            items = _parse(text, source, 1)
            records = [(f"{source}, record {number}", item, True) for number, item in enumerate(items, 1)]
        else:
            lines = enumerate(text.split("\n"), 1)
            records = [(f"{source}:{n}", _parse(line, source, n), True) for n, line in lines if line.strip()]
    if not records:
        raise DataError(f"{source}: the file is empty; give one with text in it")
    return records


def _parse(text: str, source: str, line: int) -> Any:
    """The JSON in `text`, which starts at `line` of the file."""
    if len(text) > LONGEST_RECORD and not text.startswith("["):
        raise DataError(
            f"{source}:{line}: a record of {len(text):,} characters; split it into records of at most "
            f"{LONGEST_RECORD:,}"
        )
    try:
        return json.loads(text)
    except json.JSONDecodeError as problem:
        at = line + problem.lineno - 1
        raise DataError(
            f"{source}:{at}: broken JSON ({problem.msg} at column {problem.colno}); mend that line"
        ) from problem
    except RecursionError:
        raise DataError(f"{source}:{line}: broken JSON (nested too deeply); mend that line") from None
    except ValueError as problem:  # more digits than Python reads
        raise DataError(f"{source}:{line}: broken JSON ({str(problem).split(':')[0]}); mend that line") from problem


def _parts(text: str, size: int) -> list[str]:
    """`text` in parts of `size` to `2 * size` characters that begin at a paragraph, else at a line, else at a word."""
    parts = []
    while len(text) > 2 * size:
        found = (re.compile(gap).search(text, size, 2 * size) for gap in (r"\n[ \t]*\n\s*", r"\n", r"\s"))
        cut = next((match.end() for match in found if match), 2 * size)
        parts.append(text[:cut])
        text = text[cut:]
    return [*parts, text] if text.strip() else parts


def _parquet_records(path: Path, source: str) -> list[Record]:
    """The rows of a Parquet file."""
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as problem:
        reason = str(problem).splitlines()[0]
        raise DataError(f"{source}: not a readable Parquet file ({reason}); write it again") from problem
    return [(f"{source}, row {number}", row, True) for number, row in enumerate(rows, 1)]


def _hub_records(spec: SourceSpec, seed: int) -> Iterator[Record]:
    """The records of a Hub data set, streamed: only what is used is downloaded."""
    import datasets

    name = f"{spec.source}/{spec.config}" if spec.config else spec.source
    try:
        stream = datasets.load_dataset(spec.source, spec.config, split=spec.split, streaming=True)
        for number, record in enumerate(stream.shuffle(seed=seed, buffer_size=HUB_SHUFFLE_BUFFER), 1):
            yield f"{name} {spec.split}, record {number}", record, True
    # The library, its HTTP client and its readers of a dozen formats all raise their own kinds.
    except Exception as problem:
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise DataError(
            f"{name} (split {spec.split}): no file of that name, and as a Hub data set it cannot be read: {reason}; "
            "check the name and the network, or name a .txt, .jsonl or .parquet file"
        ) from problem
