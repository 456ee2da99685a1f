"""Compare runs: one table and one picture from their ``metrics.jsonl``.

    python tools/report.py [--output comparison.png] [LABEL=]CHECKPOINT_DIR ...

The table gives, for every run, the model, its parameters, unique tokens, epochs, weight decay, the best and the last
validation loss with their standard errors, and the epoch of the best, and says where losses do not compare. The picture
shows validation loss against epochs on a logarithmic axis, with the best point of every run marked. Of a run, losses
count that were measured while it trained, on the windows that it measured last.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.errors import UserError
from megatron.metrics import of_training, on_last_windows, read_metrics
from tools.output_flag import check_output

COLUMNS = (
    "run",
    "model",
    "parameters",
    "unique tokens",
    "epochs",
    "weight decay",
    "best valid loss",
    "at epoch",
    "last valid loss",
)
PICTURES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Run:
    """One training run as its metrics file tells it."""

    label: str
    meta: dict[str, Any]
    valid: list[dict[str, Any]]

    @property
    def best(self) -> dict[str, Any]:
        """The validation event with the lowest loss."""
        return min(self.valid, key=lambda event: event["loss"])

    @property
    def last(self) -> dict[str, Any]:
        """The last validation event."""
        return self.valid[-1]

    @property
    def conditions(self) -> list[str]:
        """The flags by which its losses are not those of the text alone."""
        return list(self.meta.get("loss_conditions", []))

    @property
    def is_bound(self) -> bool:
        """Whether its losses are upper bounds of the true ones."""
        return self.meta["objective"] == "mdm" and not self.conditions

    def loss(self, event: dict[str, Any]) -> str:
        """A loss as :func:`with_error` writes it; a bound is called one."""
        return ("<= " if self.is_bound else "") + with_error(event)


def with_error(event: dict[str, Any], sign: str = "+/-") -> str:
    """The loss of a validation event with its standard error, if more than one window says one."""
    return f"{event['loss']:.3f}" + ("" if event["stderr"] is None else f" {sign} {event['stderr']:.3f}")


def load_run(argument: str) -> Run:
    """Read ``[LABEL=]DIRECTORY`` (or a path to a metrics file).

    Raises:
        UserError: no metrics file there, or no validation in it.
    """
    label, _, directory = argument.rpartition("=")
    path = Path(directory)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{argument}: no metrics.jsonl there; give a checkpoint directory (--save) of a run")
    events = of_training(read_metrics(path))
    meta = [event for event in events if event["kind"] == "meta" and event.get("event") == "start"]
    valid = on_last_windows(events)
    if not meta or not valid:
        raise UserError(f"{path}: holds no validation yet; train with --valid-data-path and --eval-interval")
    return Run(label or path.parent.name, meta[-1], valid)


def table(runs: list[Run]) -> list[tuple[str, ...]]:
    """Rows of the comparison, the header first."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for run in runs:
        meta, best, last = run.meta, run.best, run.last
        rows.append(
            (
                run.label,
                meta["objective"].upper(),
                f"{meta['parameters']:,}",
                f"{meta['tokens_per_epoch']:,}",
                f"{last['epoch']:.1f}",
                f"{meta['weight_decay']:g}",
                run.loss(best),
                f"{best['epoch']:.1f}",
                run.loss(last),
            )
        )
    return rows


def remarks(runs: list[Run]) -> list[str]:
    """What to know before one loss is compared with another."""
    said = []
    windows = {(run.meta.get("valid_windows"), run.last["windows"]) for run in runs}
    if len(windows) == 1 and None not in next(iter(windows)):
        said.append("Losses are nats per token on the same windows.")
    elif len({count for _, count in windows}) > 1 or len({name for name, _ in windows} - {None}) > 1:
        counts = ", ".join(f"{run.label} {run.last['windows']}" for run in runs)
        said.append(f"NOT THE SAME WINDOWS, so losses do not compare (windows: {counts}).")
    else:
        said.append("Losses are nats per token; older files do not say whether on the same windows.")
    if any(run.is_bound for run in runs):
        said.append("'<=': an MDM loss is an upper bound (negative ELBO) of its true loss.")
    said += [
        f"{run.label}: not the loss of the text alone ({', '.join(run.conditions)}); it compares with runs of the same "
        "objective and flags only." for run in runs if run.conditions
    ]  # fmt: skip
    return said


def format_table(rows: list[tuple[str, ...]]) -> str:
    """Align the columns with blanks."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def picture_path(name: str) -> Path:
    """Where the picture goes.

    Raises:
        UserError: it is no png, pdf or svg, or cannot be written.
    """
    path = check_output(name)
    if path.suffix.lower() not in PICTURES:
        raise UserError(f"--output {name}: end its name in {', '.join(PICTURES)}")
    return path


def plot(runs: list[Run], path: Path) -> None:
    """Draw validation loss against epochs (log axis), the best point of every run marked with its value."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    figure, axes = pyplot.subplots(figsize=(8.5, 5.2), dpi=130)
    styles: dict[str, int] = {}
    for run in runs:
        family = run.meta["objective"]
        style = ("-", "--", ":", "-.")[styles.get(family, 0) % 4]
        styles[family] = styles.get(family, 0) + 1
        color = {"ar": "#c44e52", "mdm": "#4c72b0"}[family]
        epochs = [event["epoch"] for event in run.valid if event["epoch"] > 0]
        losses = [event["loss"] for event in run.valid if event["epoch"] > 0]
        errors = [event["stderr"] or 0.0 for event in run.valid if event["epoch"] > 0]
        axes.plot(
            epochs,
            losses,
            style,
            color=color,
            label=f"{run.label}: best {with_error(run.best, '±')}",
        )
        low = [loss - error for loss, error in zip(losses, errors, strict=True)]
        high = [loss + error for loss, error in zip(losses, errors, strict=True)]
        axes.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(
            run.best["epoch"],
            run.best["loss"],
            "*" if style == "-" else "o",
            color=color,
            markersize=11,
            markeredgecolor="black",
        )
    best = min(run.best["loss"] for run in runs)
    start = max(run.valid[0]["loss"] for run in runs)
    axes.set_ylim(best - 0.1 * (start - best), start + 0.35 * (start - best))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("epochs over the same unique tokens (log axis)")
    axes.set_ylabel("validation loss (nats per token; MDM: upper bound)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="upper left", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]DIRECTORY", help="checkpoint directories of runs")
    parser.add_argument("--output", metavar="FILE", help="write the picture here (png, pdf or svg)")
    arguments = parser.parse_args(argv)
    try:
        picture = None if arguments.output is None else picture_path(arguments.output)
        runs = [load_run(argument) for argument in arguments.runs]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(format_table(table(runs)))
    print("\n" + "\n".join(remarks(runs)))
    if picture is not None:
        try:
            plot(runs, picture)
        except OSError as error:
            print(f"error: --output {picture}: cannot be written: {error.strerror or error}", file=sys.stderr)
            return 2
        print(f"picture: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
