"""Command lines and config files, turned into typed options; whatever is wrong with them is said in one sentence."""

import io
import re
import types
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

T = TypeVar("T")

_NOUNS = {int: "a whole number", float: "a number", str: "text", Path: "a path", types.NoneType: "None"}


def parse(options: type[T], arguments: Sequence[str], program: str) -> T:
    """`options`, a dataclass, filled from `--name value` arguments; underscores and hyphens are the same.

    `--config file.yaml` is read first, as if its `name: value` lines stood before the arguments: the command line
    beats the file. Raises ValueError; exits with 0 after printing the help that --help asks for.
    """
    hints = _hints(options)
    if "config" in hints:
        arguments = [*_from_file(arguments, hints), *arguments]
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            parsed, unknown = tyro.cli(
                options,
                prog=program,
                args=arguments,
                use_underscores=True,
                return_unknown_args=True,
                registry=_registry(),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_reason(stop, complaint.getvalue(), hints)) from None
    if unknown:
        stray = unknown[0]
        if not stray.startswith("-"):
            raise ValueError(
                f"{stray!r} stands where an option should: write --name value, and quote a value that has spaces."
            )
        raise ValueError(_unknown(stray, hints))
    return parsed


def _hints(options: type) -> dict[str, Any]:
    """Option name -> type, with the options of a nested dataclass beside the others."""
    found: dict[str, Any] = {}
    hints = get_type_hints(options)
    for field in fields(options):  # type: ignore[arg-type]  # tyro, too, takes a type to be a dataclass
        hint = hints[field.name]
        found.update(_hints(hint) if is_dataclass(hint) else {field.name: hint})  # type: ignore[arg-type]
    return found


def _unknown(token: str, hints: Mapping[str, Any]) -> str:
    """`token` is an option with its dashes, the name of one from a file, or a stray value."""
    shown = token.partition("=")[0]
    name = shown.lstrip("-").replace("-", "_")
    dashes = "--" if token.startswith("-") else ""
    near = get_close_matches(name, hints, n=1)
    hint = f"did you mean {dashes}{near[0]}?" if near else f"known are {', '.join(dashes + known for known in hints)}."
    return f"Unknown option {shown!r}: {hint}"


def _from_file(arguments: Sequence[str], hints: Mapping[str, Any]) -> list[str]:
    """The arguments that say what the file given by --config says."""
    at = [i for i, token in enumerate(arguments) if token == "--config" or token.startswith("--config=")]
    if not at:
        return []
    given = arguments[at[-1]].partition("=")[2] or next(iter(arguments[at[-1] + 1 :]), "")
    path = Path(given)
    if not path.is_file():
        raise ValueError(f"config {given!r} is no file: give a YAML file of option: value lines.")
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} should hold option: value lines, but it holds a {type(values).__name__}.")
    told: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in hints or name == "config":
            raise ValueError(f"{path}: {_unknown(str(key), {k: v for k, v in hints.items() if k != 'config'})}")
        if hints[name] is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{path}: {name} is true or false, not {value!r}.")
            told.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, list):
            told += [f"--{name}", *map(str, value)]
        else:
            told.append(f"--{name}={value}")
    return told


def _registry() -> ConstructorRegistry:
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def _rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        """Says in words what tyro says in Python types."""
        hint = info.type
        many = get_origin(hint) is tuple
        parts = get_args(hint) if many else (hint,)
        repeated = parts[1:] == (...,)
        parts = parts[:1] if repeated else parts
        if bool in parts or not all(map(_understood, parts)):
            return None

        def read(tokens: list[str]) -> Any:
            kinds = parts * len(tokens) if repeated else parts
            values = tuple(_read(kind, token) for kind, token in zip(kinds, tokens, strict=True))
            if any(value is _REFUSED for value in values):
                raise ValueError(f"takes {_wanted(hint)}, not {' '.join(tokens)!r}.")
            return values if many else values[0]

        return PrimitiveConstructorSpec(
            nargs="*" if repeated else len(parts),
            metavar=" ".join(map(_metavar, parts)) + " ..." * repeated,
            instance_from_str=read,
            is_instance=lambda value: isinstance(value, tuple) == many,
            str_from_instance=lambda value: [str(part) for part in (value if many else (value,))],
        )

    return registry


_REFUSED = object()


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _understood(hint: Any) -> bool:
    return all(member in _NOUNS or get_origin(member) is Literal for member in _members(hint))


def _wanted(hint: Any) -> str:
    """What an option of this type takes, in words."""
    if get_args(hint)[1:] == (...,):
        return f"one or more values ({_wanted(get_args(hint)[0])})"
    if get_origin(hint) is tuple:
        return f"{len(get_args(hint))} values ({', '.join(map(_wanted, get_args(hint)))})"
    said: list[str] = []
    for member in _members(hint):
        said += map(str, get_args(member)) if get_origin(member) is Literal else [_NOUNS[member]]
    return ", ".join(said[:-1]) + " or " * (len(said) > 1) + said[-1]


def _metavar(hint: Any) -> str:
    names = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}
    shown = []
    for member in _members(hint):
        choices = ",".join(map(str, get_args(member)))
        shown.append(f"{{{choices}}}" if get_origin(member) is Literal else names.get(member))
    return "|".join(name for name in shown if name)


def _read(hint: Any, token: str) -> Any:
    """The token as the first member of the type that it can be, None and choices before numbers before text."""
    members = _members(hint)
    if types.NoneType in members and token == "None":
        return None
    for member in members:
        for choice in get_args(member) if get_origin(member) is Literal else ():
            if token == str(choice):
                return choice
    for kind in (int, float, Path, str):
        if kind in members:
            with suppress(ValueError):
                return kind(token)
    return _REFUSED


def _reason(stop: SystemExit, complaint: str, hints: Mapping[str, Any]) -> str:
    """One sentence on why tyro gave up: the error it met where there was one, else what it printed."""
    text = " ".join(re.sub(r"[│╭╮╰╯─]+", " ", complaint).split()).partition("For full helptext")[0].strip()
    empty = re.search(r"Missing value for argument '--([\w-]+)'", text)
    if empty:
        name = empty[1].replace("-", "_")
        return f"{name} takes {_wanted(hints[name])}, but was given too little."
    cause: BaseException | None = stop
    while cause is not None and not isinstance(cause, ValueError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return text
    named = re.search(r"Error parsing --([\w-]+)", text)
    return f"{named[1].replace('-', '_')} {cause}" if named else str(cause)
