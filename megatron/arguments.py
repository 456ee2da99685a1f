"""The command line: built from the fields of ``megatron.config``, and the only reader of ``sys.argv``.

Names, meanings and defaults are Megatron-DeepSpeed's. A flag that nobody here reads is an error, never ignored.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

from megatron.config import ObjectiveConfig, RunConfig, concern_types
from megatron.errors import UserError
from megatron.options import Options, flag_of
from megatron.unsupported_flags import explain_unknown


def parse_arguments(objective: Literal["ar", "mdm"], argv: Sequence[str] | None = None) -> RunConfig:
    """Return the run that ``argv`` (default: the process's own arguments) describes for ``objective``.

    Where a flag is repeated the last one counts. Raises UserError, one line that names the flag, for an unknown flag, a
    value of the wrong kind or out of range, a flag that ``objective`` ignores, a missing flag, or a contradiction.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(objective)
    namespace, rest = parser.parse_known_args(argv)
    if rest:
        raise UserError(_explain_rest(parser, argv, rest))
    values = vars(namespace)
    _refuse_other_objective(objective, values)
    _require(values)
    concerns: dict[str, Any] = {}
    for name, cls in concern_types().items():
        own = {f.name: values[f.name] for f in _flags(cls) if f.name in values}
        concerns[name] = cls(**own, **({"objective": objective} if cls is ObjectiveConfig else {}))
    return RunConfig(**concerns, given=frozenset(values))


def build_parser(objective: Literal["ar", "mdm"]) -> argparse.ArgumentParser:
    """Return the parser of the entry point for ``objective``. Flags that are not given are absent from its result."""
    diffusion = objective == "mdm"
    parser = OneLineParser(
        prog=_entry_point(objective),
        usage="%(prog)s --num-layers N --hidden-size N --num-attention-heads N ... (flags below)",
        description="Pretrain a masked-diffusion model." if diffusion else "Pretrain an autoregressive model.",
        epilog="A flag that takes no value is off unless given. Defaults stand in [brackets].",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=120),
    )
    for name, cls in concern_types().items():
        assert cls.__doc__ is not None
        group = parser.add_argument_group(name, cls.__doc__.splitlines()[0])
        hints = typing.get_type_hints(cls)
        for setting in _flags(cls):
            hidden = setting.metadata["only"] not in (None, objective)
            _add_flag(group, setting, hints[setting.name], hidden=hidden)
    return parser


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are a UserError, one line."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        flag, _, cause = message.partition(": ")
        if cause.startswith("ignored explicit argument"):
            message = f"{flag} takes no value: drop {cause.removeprefix('ignored explicit argument ')}"
        raise UserError(message)


def _entry_point(objective: str) -> str:
    return "pretrain_diff_gpt.py" if objective == "mdm" else "pretrain_gpt.py"


def _flags(cls: type[Options]) -> list[dataclasses.Field[Any]]:
    """Return the fields of ``cls`` that are flags, in order."""
    return [setting for setting in dataclasses.fields(cls) if setting.metadata]


def _add_flag(group: argparse._ArgumentGroup, setting: dataclasses.Field[Any], hint: Any, *, hidden: bool) -> None:
    """Add ``setting``, whose resolved type is ``hint``, to ``group``; a hidden flag parses but is not in the help."""
    flag, default = flag_of(setting), setting.default
    names = (
        [flag, "--local-rank"] if setting.name == "local_rank" else [flag]
    )  # torchrun and DeepSpeed spell it differently
    text = setting.metadata["help"]
    if default is dataclasses.MISSING:
        text += " (required)"
    elif default is not None and default is not False:
        text += f" [{default}]"
    settings: dict[str, Any] = {"dest": setting.name, "help": argparse.SUPPRESS if hidden else text.replace("%", "%%")}
    optional = type(None) in typing.get_args(hint)
    kind = next(t for t in typing.get_args(hint) if t is not type(None)) if isinstance(hint, types.UnionType) else hint
    if kind is bool:
        group.add_argument(*names, action=argparse.BooleanOptionalAction if optional else "store_true", **settings)
        return
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        settings |= {"nargs": "+" if Ellipsis in parts else len(parts), "action": _StoreTuple}
        kind = parts[0]
    choices = setting.metadata["choices"]
    readers: dict[Any, tuple[str, Callable[[str], Any]]] = {
        int: ("N", _whole_number),
        float: ("X", _number),
        str: ("TEXT", str),
    }
    letter, reader = readers[kind]
    settings["metavar"] = "{" + ",".join(map(str, choices)) + "}" if choices else letter
    # Choices and ranges are checked by the configuration, so that a file or a test gets the same message.
    group.add_argument(*names, type=reader, **settings)


class _StoreTuple(argparse.Action):
    """Store several values as a tuple: configurations are immutable."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _explain_rest(parser: argparse.ArgumentParser, argv: Sequence[str], rest: Sequence[str]) -> str:
    """Return one line on the first of the words in ``rest``, which argparse could not place."""
    unknown = next((word for word in rest if word.startswith("-")), None)
    if unknown is not None:
        return explain_unknown(unknown.partition("=")[0], _visible_flags(parser))
    flag, room = None, 0.0  # the last flag, and how many more values it takes
    for word in argv:
        if word.startswith("--"):
            flag, equals, _ = word.partition("=")
            room = 0 if equals else _capacity(parser, flag)
        elif room < 1:
            break
        else:
            room -= 1
    if flag is None:
        return f"{word!r} follows no flag: flags begin with --"
    if _capacity(parser, flag) == 0:
        return f"{flag} takes no value: drop {word!r}"
    return f"{flag} has one value too many: drop {word!r} (quote a value with spaces)"


def _capacity(parser: argparse.ArgumentParser, flag: str) -> float:
    """Return how many values ``flag`` of ``parser`` takes at most."""
    nargs = next((action.nargs for action in parser._actions if flag in action.option_strings), 0)
    return 1 if nargs is None else math.inf if nargs == "+" else float(nargs)


def _visible_flags(parser: argparse.ArgumentParser) -> list[str]:
    return [name for a in parser._actions if a.help is not argparse.SUPPRESS for name in a.option_strings]


def _refuse_other_objective(objective: str, values: dict[str, Any]) -> None:
    """Raise UserError for a given flag that only the other objective reads, whatever its value."""
    for cls in concern_types().values():
        for setting in _flags(cls):
            reader = setting.metadata["only"]
            if setting.name in values and reader not in (None, objective):
                flag, ours, theirs = flag_of(setting), _entry_point(objective), _entry_point(reader)
                raise UserError(f"{flag} is for {theirs}: {ours} ignores it, so drop it")


def _require(values: dict[str, Any]) -> None:
    """Raise UserError naming every required flag that is missing."""
    settings = [setting for cls in concern_types().values() for setting in _flags(cls)]
    missing = [flag_of(f) for f in settings if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise UserError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} required: see --help")
