"""What ``--output`` names, tried before the work whose results go there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from megatron.errors import UserError
from megatron.files import TEMPORARY


def check_output(name: str) -> Path:
    """The path ``name``, at which a file can be written. Nothing is created, and an existing file stays as it is.

    Raises:
        UserError: it is empty or no file, or the file system refuses a file there.
    """
    if not name:
        raise UserError("--output is empty: give a file, or leave the flag out")
    path = Path(name)
    try:
        if path.is_dir():
            raise UserError(f"--output {name}: is a directory, give a file")
        if path.exists() and not path.is_file():
            raise UserError(f"--output {name}: is no regular file")
        path.with_name(f"{TEMPORARY}{path.name}").exists()  # raises where the name is too long
        directory = path.parent
        while not os.path.lexists(directory):
            directory = directory.parent
        with tempfile.TemporaryFile(dir=directory):  # root may write anywhere, says access(2)
            pass
    except OSError as error:
        raise UserError(f"--output {name}: cannot be written: {error.strerror}") from error
    return path
