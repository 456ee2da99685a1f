"""An entry point: from a command line to an exit code. What ends a run wrongly is said here, in one line."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from typing import Final, Literal, NoReturn

from megatron.arguments import parse_arguments
from megatron.checkpointing import CheckpointError
from megatron.config_checks import resolve_for_world
from megatron.distributed.roll_call import is_lost_peer, roll_call
from megatron.distributed.topology import Topology
from megatron.errors import OneRankError, UserError
from megatron.initialize import initialize, shut_down
from megatron.metrics import MetricsError
from megatron.run import set_up
from megatron.training import NotFinite, pretrain

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 1
EXIT_WRONG_INPUT: Final = 2
EXIT_INTERRUPTED: Final = 130  # as a shell says of SIGINT
# A launcher ends all ranks when one ends: before they have met, the first one gets this long (seconds) to say why.
HEAD_START: Final = 5.0


def main(objective: Literal["ar", "mdm"], argv: Sequence[str] | None = None) -> int:
    """Run an entry point; returns its exit code: 0 done or stopped with a checkpoint, 1 failed, 2 wrong
    input. Ctrl-C ends the process with 130, unless ``--exit-signal-handler`` stops it."""
    start_time = time.monotonic()
    topology: Topology | None = None
    try:
        config = parse_arguments(objective, argv)
        topology = initialize(config.parallel)
        config = resolve_for_world(config, topology.world_size)
        run = set_up(config, topology)
        pretrain(run, start_time)
        code = EXIT_DONE
    except UserError as error:
        code = _complain(error, EXIT_WRONG_INPUT, met=topology is not None)
    except (CheckpointError, MetricsError, NotFinite) as error:
        code = _complain(error, EXIT_FAILED)
    except KeyboardInterrupt:
        # No farewell to the others: they have been interrupted, too, or wait for this process.
        _complain(UserError("interrupted (Ctrl-C)"), EXIT_INTERRUPTED)
        _end_at_once(EXIT_INTERRUPTED)
    except RuntimeError as error:
        if topology is None or topology.world_size == 1 or not is_lost_peer(error):
            raise
        _leave_alone(error, topology)
    shut_down()
    return code


def _leave_alone(error: RuntimeError, topology: Topology) -> NoReturn:
    """Another process died or hangs: say which, and end without waiting for it."""
    lost = roll_call(topology)
    if topology.rank == min(set(range(topology.world_size)) - set(lost), default=topology.rank):
        who = f"rank {', '.join(map(str, lost))} did not answer" if lost else "all ranks failed in it"
        cause = str(error).splitlines()[0]
        print(
            f"error: a collective failed or took longer than --distributed-timeout-minutes: {who} ({cause}); the last "
            "checkpoint is intact",
            file=sys.stderr,
            flush=True,
        )
    _end_at_once(EXIT_FAILED)


def _end_at_once(code: int) -> NoReturn:
    """A usual exit would wait for processes that are lost."""
    for child in multiprocessing.active_children():
        child.terminate()  # loader workers
    sys.stdout.flush()
    os._exit(code)


def _complain(error: Exception, code: int, met: bool = True) -> int:
    """Print one line; of several ranks that all failed alike only the first does. ``met``: they have a topology."""
    if os.environ.get("RANK", "0") == "0" or isinstance(error, OneRankError):  # the launcher's rank
        print(f"error: {error}", file=sys.stderr, flush=True)
    elif not met:
        time.sleep(HEAD_START)
    return code
