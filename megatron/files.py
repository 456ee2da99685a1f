"""Files that survive a crash: flushed to disk, replaced as a whole, described in one line when the disk refuses."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

TEMPORARY: Final = ".tmp-"
PROBE: Final = ".probe-"


def flush(path: Path) -> None:
    """fsync a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush directories; they need no flush either.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def finite(value: Any) -> Any:
    """Return ``value`` with every NaN and infinity in it replaced by None: JSON has no word for them."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write and flush an indented JSON object; numbers that are not finite become null."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(finite(content), file, indent=1, allow_nan=False)
        file.write("\n")
    flush(path)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file: a reader, now or after a crash, finds the old or the new text, never a part of it."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            remove(temporary)
        raise
    flush(path.parent)


def read_text(path: Path) -> str | None:
    """Return the content of a file, None where there is none. What is no UTF-8 is there as U+FFFD: whoever reads a name
    or JSON finds it damaged, and says so."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def remove(path: Path) -> None:
    """Remove a file or a tree that may not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def describe(error: Exception, directory: Path | None = None) -> str:
    """Return one line for a failed write, with its errno.

    ``torch.save`` reports a full disk as a RuntimeError without errno: with ``directory`` the file system is asked.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror or os.strerror(error.errno)} (errno {error.errno})"
    text = (str(error) or type(error).__name__).splitlines()[0]
    if directory is None or not isinstance(error, RuntimeError):
        return text
    probe = directory / f"{PROBE}{uuid.uuid4().hex}"
    try:
        with open(probe, "wb") as file:
            file.write(bytes(1 << 20))
            os.fsync(file.fileno())
    except OSError as cause:
        return f"{describe(cause)}: {text}"
    finally:
        with contextlib.suppress(OSError):
            remove(probe)
    return text
