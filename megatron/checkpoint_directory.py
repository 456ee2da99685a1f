"""What a checkpoint directory holds, for whoever looks: no other rank is needed, and nothing is changed."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megatron.errors import UserError
from megatron.files import read_text
from megatron.run_metadata import CheckpointMetadata, read_metadata

LATEST_FILE: Final = "latest"
BEST_FILE: Final = "best.json"
TAG: Final = re.compile(r"global_step\d+")


@dataclass(frozen=True)
class Best:
    """``best.json``: this run's checkpoint of lowest validation loss; retention may have deleted it since."""

    tag: str
    iteration: int
    loss: float
    stderr: float | None = None


class CheckpointDirectory:
    """The checkpoints in one directory, which may be absent."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def checkpoints(self) -> list[CheckpointMetadata]:
        """Return the complete checkpoints, in the order they were written."""
        return [metadata for metadata in self.stored() if incomplete(self.directory / metadata.tag) is None]

    def stored(self) -> list[CheckpointMetadata]:
        """Return the same without a look at every file; a directory whose ``run.json`` cannot be read is skipped."""
        found = []
        for path in self.directory.glob("global_step*"):
            with contextlib.suppress(UserError):
                if TAG.fullmatch(path.name):
                    found.append(read_metadata(path))
        return sorted(found, key=lambda metadata: (metadata.sequence, metadata.iteration))

    def latest_tag(self) -> str | None:
        """Return the tag that ``latest`` names; without that file the last one written; None where there is none."""
        named = read_text(self.directory / LATEST_FILE)
        if named is not None:
            return named.strip()
        complete = self.checkpoints()
        return complete[-1].tag if complete else None

    def resolve(self, load_tag: str | None = None) -> str | None:
        """Return the tag to load: ``load_tag``, else the latest; None where the directory is absent or empty.

        Raises:
            UserError: not a directory, no such tag, ``latest`` names one that is not there, or one that lacks files.
        """
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"--load {self.directory} is a file: name a checkpoint directory")
        tag = self.latest_tag() if load_tag is None else load_tag
        if tag is None:
            return None
        path = self.directory / tag
        if not TAG.fullmatch(tag) or not path.is_dir():
            source = f"{self.directory / LATEST_FILE} names {tag!r}" if load_tag is None else f"--load-tag {load_tag}"
            raise UserError(f"{source}: there is no such checkpoint in {self.directory}; {self._available()}")
        problem = incomplete(path)
        if problem is not None:
            raise UserError(f"checkpoint {path} is incomplete: {problem}; {self._available()}")
        return tag

    def metadata(self, tag: str) -> CheckpointMetadata:
        """Return ``run.json`` of a checkpoint; UserError if it is missing or damaged."""
        return read_metadata(self.directory / tag)

    def best(self) -> Best | None:
        """Return the best checkpoint of this run so far; UserError if ``best.json`` is damaged."""
        path = self.directory / BEST_FILE
        text = read_text(path)
        try:
            if text is None:
                return None
            best = Best(**json.loads(text))
            kinds = (best.tag, str), (best.iteration, int), (best.loss, int | float)
            if not all(isinstance(value, kind) for value, kind in kinds):
                raise TypeError("a value has the wrong type")
            return best
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error}): remove it") from error

    def _available(self) -> str:
        tags = ", ".join(m.tag for m in self.checkpoints())
        return f"--load-tag can be one of: {tags}" if tags else "it holds no complete checkpoint"


def incomplete(checkpoint: Path) -> str | None:
    """Return what a checkpoint directory lacks; None for a complete one."""
    try:
        files = read_metadata(checkpoint).files
    except UserError as error:
        return str(error)
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None
