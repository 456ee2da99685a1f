"""The Slurm cluster of the tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from slurm.cluster import Cluster, missing_programs


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two idle nodes; at the end no process of the cluster or of its jobs is left."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"needs Debian's slurm-wlm and munge: no {', '.join(missing)}")
    running = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        running.start()
        yield running
    finally:
        left = running.stop()
    assert not left, left
