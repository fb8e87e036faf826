"""The settings of `RunConfig` as flags, read off the model so that none is written twice."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter
from pydantic.fields import FieldInfo

from frostline.tasks.config import RunConfig, load_config

__all__ = ["CONFIG", "config_flags", "merged", "overrides", "setting_from_text"]

#: The option for a file of settings of commands that make many runs.
CONFIG = Parameter(
    help="YAML file of settings, such as `fit --print-config` writes; flags win over it. What this "
    "command says by itself , such as policy, seed and output, is not read from it."
)
_GROUP = Group("Settings (the same names in --config)", sort_key=1)
_POSITIONAL = ("model", "data", "policy")
_EITHER_WAY = inspect.Parameter.POSITIONAL_OR_KEYWORD


def config_flags(
    command: Callable[..., None], *, without: Collection[str] = ()
) -> Callable[..., None]:
    """Give a command one flag per setting; it receives those given as its first argument.

    The first three settings may also be given by position. A flag that was not given is absent
    from the mapping, so that a configuration file keeps its say.

    Args:
        command: takes the mapping, then options of its own by name.
        without: settings that get no flag.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    settings = [_flag(name, field) for name, field in RunConfig.model_fields.items()]
    settings = [flag for flag in settings if flag.name not in without]
    settings.sort(key=lambda p: p.kind)  # by position first, as Python wants them

    @functools.wraps(command)
    def with_flags(*args: Any, **given: Any) -> None:
        values = {p.name: value for p, value in zip(settings, args, strict=False)}
        values |= {p.name: given.pop(p.name) for p in settings if p.name in given}
        command(values, **given)

    parameters = [*settings, *own]
    del with_flags.__wrapped__  # or its signature would be found instead of ours
    with_flags.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    with_flags.__annotations__ = {p.name: p.annotation for p in parameters}
    return with_flags


def setting_from_text(name: str, text: str) -> Any:
    """A setting's value from the command line: text as it is, "null" and "0.5,0.5,0.5" resolved.

    The types themselves are checked where the configuration is built.

    Example:
        >>> setting_from_text("image_mean", "0.5,0.4,0.3"), setting_from_text("patience", "null")
        (('0.5', '0.4', '0.3'), None)
    """
    kinds = typing.get_args(RunConfig.model_fields[name].annotation)
    if type(None) in kinds and text == "null":
        return None
    if any(typing.get_origin(kind) is tuple for kind in kinds):
        return tuple(text.split(","))
    return text


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    switch = field.annotation is bool
    default = "" if field.is_required() else f" [default: {_written(field.default)}]"
    about = Parameter(
        group=_GROUP,
        help=f"{field.description}{default}",
        metavar=None if switch else _values(field.annotation),
    )
    return inspect.Parameter(
        name,
        _EITHER_WAY if name in _POSITIONAL else inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[bool | None if switch else str | None, about],
    )


def _values(annotation: Any) -> str:
    """What a setting takes, in words: "keep|release", "NUMBER", "random|PATH".

    Example:
        >>> _values(int | None), _values(typing.Literal["sgd", "adam"])
        ('INTEGER', 'sgd|adam')
    """
    origin, kinds = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "|".join(kinds)
    if origin is Annotated:
        return _values(kinds[0])
    if origin is tuple and kinds[-1] is Ellipsis:
        return f"{_values(kinds[0])},..."
    if origin is tuple:
        return ",".join(map(_values, kinds))
    if kinds:
        return "|".join(_values(kind) for kind in kinds if kind is not type(None))
    return {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(annotation, "TEXT")


def _written(default: object) -> str:
    if default is None:
        return "null"
    if default == ():
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(default)


def overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """The given flags as `load_config` wants them."""
    return {
        name: setting_from_text(name, value) if isinstance(value, str) else value
        for name, value in given.items()
    }


def merged(
    given: Mapping[str, Any], config: Path | None, *, without: Collection[str]
) -> dict[str, Any]:
    """The settings of a file and the given flags, which win.

    Args:
        given: flags.
        config: YAML file, or None.
        without: settings that the command has no flag for; not read from the file.

    Raises:
        ConfigError: what the file says cannot be read or used.
    """
    flags = overrides(given)
    if config is None:
        return flags
    said = load_config(config, flags).model_dump(mode="json", exclude_unset=True)
    return {name: value for name, value in said.items() if name not in without}
