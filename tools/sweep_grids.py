"""The grids of runs that ``tools/sweep.py`` knows by name: a script, and the values that its variables take."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from megatron.budget import read_token_table
from megatron.errors import UserError

FAMILIES: Final = ("arm", "mdm")
SCRIPTS: Final = Path("examples_training")

# One run's variables, by name.
Settings = dict[str, str]


@dataclass(frozen=True)
class Grid:
    """Runs of one script.

    Attributes:
        script: the file ``examples_training/<family>/example_<script>.sh``.
        about: one line for the help.
        points: family -> settings that belong together; a family that is absent has no such script.
        axes: variables crossed with every point and with each other.
    """

    script: str
    about: str
    points: Mapping[str, Sequence[Settings]] = field(default_factory=lambda: {family: [{}] for family in FAMILIES})
    axes: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One run: a family's script and the variables it is given."""

    family: str
    script: str
    settings: Settings

    @property
    def path(self) -> Path:
        """The script, from the repository root."""
        return SCRIPTS / self.family / f"example_{self.script}.sh"

    @property
    def arguments(self) -> list[str]:
        """The script's arguments."""
        return [f"{name}={value}" for name, value in self.settings.items()]


def grids() -> dict[str, Grid]:
    """Every grid by name: those of 2507.15857, and the regularised baseline of 2509.14786 and 2606.06888."""
    mdm_only: dict[str, list[Settings]] = {"mdm": [{}]}
    ar_only: dict[str, list[Settings]] = {"arm": [{}]}
    return {
        "chinchilla": Grid("chinchilla", "scaling law: four budgets, five sizes around each optimum", _CHINCHILLA),
        "data_value": Grid("data_value", "1 to 100 epochs of the same total at three optima", _data_value()),
        "epochs": Grid(
            "training",
            "sizes x epochs over 100M unique tokens",
            axes={"MODEL_PARAM": ("140M", "278M", "425M"), "EPOCH_CNT": ("10", "50", "100", "500")},
        ),
        "lr": Grid(
            "lr_exploration",
            "learning rate, its end, Adam's beta2, warm-up",
            axes={
                "LR": ("1e-4", "2e-4", "4e-4", "8e-4"),
                "MIN_LR": ("2e-5", "1e-6"),
                "ADAM_BETA2": ("0.95", "0.99"),
                "WARMUP_PERCENT": ("1", "5"),
            },
        ),
        "weight_decay": Grid(
            "weight_decay",
            "weight decay x dropout: each family's own best regularisation",
            {family: [_dropout(x) for x in ("0", "0.1", "0.2", "0.3")] for family in FAMILIES},
            {"WEIGHT_DECAY": ("0.1", "0.2", "0.4", "0.8", "1.6", "3.2")},
        ),
        "left_to_right": Grid(
            "left_to_right", "share of left-to-right masks", mdm_only, {"AR_RATIO": ("0", "0.25", "0.5", "0.75", "1")}
        ),
        "order_list": Grid(
            "order_list", "number of token orders", ar_only, {"NUM_ORDER_LIST": ("1", "2", "4", "8", "16")}
        ),
        "attention_dropout": Grid(
            "attention_dropout", "attention dropout", ar_only, {"ATTENTION_DROPOUT": ("0.1", "0.25", "0.5", "0.75")}
        ),
        "token_masking": Grid(
            "token_masking", "share of masked positions", ar_only, {"RANDMASK_RATIO": ("0", "0.25", "0.5", "0.75", "1")}
        ),
    }


def tasks(grid: Grid, families: Sequence[str], extra: Mapping[str, Sequence[str]]) -> list[Task]:
    """Every run of ``grid``; ``extra`` adds axes, or replaces a variable of the grid on all of its points."""
    runs = []
    for family in families:
        if family not in grid.points:
            raise UserError(f"--family {family}: there is no examples_training/{family}/example_{grid.script}.sh")
        axes = {**grid.axes, **extra}
        for point in grid.points[family]:
            fixed = {name: value for name, value in point.items() if name not in extra}
            for values in itertools.product(*axes.values()):
                task = Task(family, grid.script, {**fixed, **dict(zip(axes, values))})
                if task not in runs:  # points that differ only in a replaced variable
                    runs.append(task)
    return runs


def _dropout(probability: str) -> Settings:
    return {"HIDDEN_DROPOUT": probability, "ATTENTION_DROPOUT": probability}


# One epoch of 41B tokens is enough for all but two: MDM at 100 with 217M (76.6B) and 306M (55.4B).
_CHINCHILLA_SIZES: Final = {
    ("arm", "6"): ("90M", "117M", "163M", "217M", "278M"),
    ("arm", "10"): ("117M", "163M", "217M", "278M", "425M"),
    ("arm", "30"): ("217M", "306M", "425M", "587M", "724M"),
    ("arm", "100"): ("425M", "552M", "724M", "893M", "1143M"),
    ("mdm", "6"): ("44M", "57M", "90M", "117M", "163M"),
    ("mdm", "10"): ("57M", "90M", "117M", "163M", "217M"),
    ("mdm", "30"): ("117M", "163M", "217M", "278M", "425M"),
    ("mdm", "100"): ("217M", "306M", "425M", "552M", "724M"),
}
_CHINCHILLA: Final = {
    family: [
        {"FLOPS_FACTOR": factor, "MODEL_PARAM": size}
        for (owner, factor), sizes in _CHINCHILLA_SIZES.items()
        if owner == family
        for size in sizes
    ]
    for family in FAMILIES
}

# The optimal model at 1e19, 3e19 and 1e20 FLOPs, and the data it sees once.
_OPTIMA: Final = {
    "arm": {"217M": "7B6", "425M": "12B", "724M": "23B8"},
    "mdm": {"117M": "13B5", "217M": "23B", "425M": "40B"},
}


def _data_value() -> dict[str, list[Settings]]:
    """Each optimum with every share of its data that the token table holds."""
    table = read_token_table()
    points: dict[str, list[Settings]] = {}
    for family, optima in _OPTIMA.items():
        points[family] = []
        for model, data in optima.items():
            for epochs in (1, 2, 4, 10, 20, 50, 100):
                name = data if epochs == 1 else f"{data}_{epochs}ep"
                if name in table:
                    points[family].append(
                        {"MODEL_PARAM": model, "DATA_CNT": name, "UNIQUE_TOKENS": name, "EPOCH_CNT": str(epochs)}
                    )
    return points
