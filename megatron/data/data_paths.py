"""Where a split's data come from: prefixes, or weights and prefixes, on the command line or in a data path file."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron.config import DataConfig
from megatron.errors import UserError

SPLITS = ("train", "valid", "test")

_PAIR = re.compile(r"\s*(\S+)\s+(.*\S)\s*")


@dataclass(frozen=True)
class Source:
    """One file pair of a split."""

    prefix: str
    weight: float | None
    """None: in proportion to its tokens"""


@dataclass(frozen=True)
class SplitSources:
    """Everything that a split reads."""

    sources: tuple[Source, ...]
    divided: bool
    """whether the documents are divided between the splits by --split"""


def split_sources(config: DataConfig, split: str) -> SplitSources | None:
    """The sources of ``split`` (one of :data:`SPLITS`), or None if no flag names any.

    Raises UserError for a path list or file that cannot be understood.
    """
    if config.data_path is not None:
        return SplitSources(parse_data_path(config.data_path, "--data-path"), divided=True)
    flag = f"--{split}-data-path"
    paths, file = getattr(config, f"{split}_data_path"), getattr(config, f"{split}_data_path_file")
    if paths is not None:
        return SplitSources(parse_data_path(paths, flag), divided=False)
    if file is not None:
        return SplitSources(read_data_path_file(file, f"{flag}-file"), divided=False)
    return None


def parse_data_path(items: Sequence[str], where: str) -> tuple[Source, ...]:
    """Sources of a list ``prefix ...`` or ``weight prefix ...``; a pair may also be one item, ``"weight prefix"``.

    ``where``: flag or file and line, for messages.
    """
    words = [word for item in items for word in _divide(item)]
    if not words:
        raise UserError(f"{where} names no data: give prefixes, or pairs of weight and prefix")
    if _number(words[0]) is None:
        weighted = [word for word in words if _number(word) is not None]
        if weighted:
            raise UserError(f"{where}: {words[0]!r} has no weight but {weighted[0]} is one: give all of them or none")
        return tuple(Source(prefix, None) for prefix in words)
    if len(words) % 2:
        raise UserError(f"{where}: weights and prefixes do not come in pairs (near {words[-1]!r})")
    return tuple(_pair(weight, prefix, where) for weight, prefix in zip(words[::2], words[1::2]))


def read_data_path_file(path: str, flag: str) -> tuple[Source, ...]:
    """Sources of a file: pairs of weight and prefix, one a line or all on one line, each pair quoted or not.

    Quotes as in a shell, so names may hold spaces; blank lines and lines that start with # are skipped.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise UserError(f"{flag}: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{flag}: {path} is no text file ({error.reason} at byte {error.start})") from error
    sources: list[Source] = []
    for number, found in _sources_of_lines(lines, path):
        sources += found
        if (sources[0].weight is None) != (found[0].weight is None):
            words = ("has a weight", "has none") if sources[0].weight is None else ("has no weight", "has one")
            raise UserError(
                f"{flag}: {path}, line {number}: {found[0].prefix!r} {words[0]} and {sources[0].prefix!r} {words[1]}: "
                "give all of them or none"
            )
    if not sources:
        raise UserError(f"{flag}: {path} names no data: write pairs of weight and prefix, one a line")
    return tuple(sources)


def _sources_of_lines(lines: Iterable[str], path: str) -> Iterator[tuple[int, tuple[Source, ...]]]:
    """Line numbers and what the lines name; lines that name nothing are left out."""
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error} (quotes as in a shell)") from error
        yield number, parse_data_path(words, f"{path}, line {number}")


def _divide(item: str) -> tuple[str, ...]:
    """("weight", "prefix") of an item that holds both, else the item itself."""
    match = _PAIR.fullmatch(item)
    return match.groups() if match and _number(match[1]) is not None else (item,)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _pair(weight: str, prefix: str, where: str) -> Source:
    value = _number(weight)
    if value is None:
        raise UserError(f"{where}: {weight!r} stands where a weight is expected (before {prefix!r})")
    if not math.isfinite(value) or value <= 0:
        raise UserError(f"{where}: weight {weight} of {prefix!r} must be a number above 0 (or drop the pair)")
    return Source(prefix, value)


def split_documents(shares: Sequence[float], split: str, documents: int) -> range:
    """The documents of ``split`` when ``documents`` are divided by ``shares`` (of train, valid, test; sum 1).

    As Megatron divides them: boundaries are rounded to the nearest document one after another, and what is then too
    many or too few is taken off every boundary but the first.
    """
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + round(share * documents))
    excess = bounds[-1] - documents
    bounds = [0] + [max(0, bound - excess) for bound in bounds[1:]]
    first = SPLITS.index(split)
    return range(bounds[first], bounds[first + 1])
