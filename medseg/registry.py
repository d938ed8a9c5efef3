"""Names → components. A component is a class with a configuration dataclass beside it.

Writing a new component is one file in the package of its kind (and one YAML in `configs/`):

    @dataclass(frozen=True)
    class TinyConfig:
        width: int = 8
        '''Number of filters.'''

    @MODELS.register("tiny", TinyConfig)
    class Tiny(nn.Module):
        def __init__(self, config: TinyConfig, *, in_channels: int, num_classes: int, spatial_dims: int): ...

Nothing here imports torch: the modules of a kind are imported on the first look-up.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import itertools
import pkgutil
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from medseg.errors import Code, MedsegError, nearest

T = TypeVar("T")
C = TypeVar("C", bound=type)

PLUGIN_GROUP = "medseg.plugins"
"""Entry-point group: each entry is a module that registers components when it is imported."""


@dataclass(frozen=True)
class Part(Generic[T]):
    """A registered component."""

    name: str
    build: Callable[..., T]
    config: type


class Registry(Generic[T]):
    """The components of one kind, by name.

    Args:
        kind: what they are, as the configuration group is called ("model", "loss").
        package: the package (or single module) whose modules register them, imported on first use.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._parts: dict[str, Part[T]] = {}
        self._loaded = False

    def register(self, name: str, config: type) -> Callable[[C], C]:
        """Class decorator: make a component known under `name` with its configuration dataclass."""

        def add(component: C) -> C:
            if name in self._parts:
                raise MedsegError(Code.NAME, f"the {self.kind} {name!r} is registered twice", where=component)
            self._parts[name] = Part(name, component, config)
            return component

        return add

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._load()
        return sorted(self._parts)

    def part(self, name: str) -> Part[T]:
        """Look a component up.

        Raises:
            MedsegError: E_NAME, with the nearest names.
        """
        self._load()
        if name not in self._parts:
            raise MedsegError(
                Code.NAME,
                f"there is no {self.kind} named {name!r}",
                where=f"{self.kind}.name",
                remedy=nearest(name, self._parts),
            )
        return self._parts[name]

    def build(self, settings: Mapping[str, Any], **context: Any) -> T:
        """Build a component from its settings: `name` and any fields of its configuration.

        Args:
            settings: {"name": ..., field: value, ...}; what is left out keeps its default.
            context: what the caller knows and no configuration states (channels, dimensions, parameters).
        Raises:
            MedsegError: E_NAME, E_CONFIG, or what the component itself refuses.
        """
        fields = dict(settings)
        part = self.part(str(fields.pop("name", "")))
        return part.build(make_config(part.config, fields, where=self.kind), **context)

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
            importlib.import_module(f"{self.package}.{module.name}")
        for plugin in plugins():
            plugin.load()


@functools.cache
def plugins() -> tuple[EntryPoint, ...]:
    """What other packages register. To find it, what every installed package states is read."""
    return tuple(entry_points(group=PLUGIN_GROUP))


def make_config(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """A configuration dataclass from plain values, nested dataclasses included.

    Args:
        cls: the dataclass.
        values: field → value; lists become tuples.
        where: the key under which the values stand, for messages ("model", "trainer"); "" at the top.
    Raises:
        MedsegError: E_CONFIG for an unknown key (with the nearest) or a value of the wrong type.
    """
    hints = type_hints(cls)
    known = {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    built: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else key
        if key not in known:
            raise MedsegError(Code.CONFIG, f"unknown key {path}", where=path, remedy=nearest(key, known))
        try:
            built[key] = _coerce(known[key], value, path)
        except MedsegError as error:
            meaning = field_descriptions(cls).get(key)
            if error.where != path or meaning is None:
                raise
            raise MedsegError(
                error.code, error.message, where=path, expected=error.expected, got=error.got, remedy=meaning
            ) from error
    return cls(**built)


def type_hints(cls: type) -> Mapping[str, Any]:
    """The types of a dataclass's fields, looked up once: that takes a tenth of a millisecond a field."""
    return _type_hints(typing.cast(typing.Hashable, cls))


@functools.cache
def _type_hints(cls: typing.Hashable) -> Mapping[str, Any]:
    return typing.get_type_hints(cls)


def field_descriptions(cls: type) -> dict[str, str]:
    """What the strings under a dataclass's fields say, those of its bases included: field → text. Empty where the
    source is not at hand."""
    found: dict[str, str] = {}
    for base in (base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)):
        try:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError):
            continue
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for field, text in itertools.pairwise(statements):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                    found[name] = " ".join(words.split())
    return {field.name: found[field.name] for field in _fields(cls) if field.name in found}


def _fields(cls: type) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


def described_fields(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Key, default (None where there is none) and meaning of each field of a dataclass, nested ones included.

    Args:
        cls: the dataclass.
        prefix: what stands before the names of its fields, such as "data".
    """
    texts = field_descriptions(cls)
    for field in dataclasses.fields(cls):
        default = None if field.default is dataclasses.MISSING else field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        key = f"{prefix}.{field.name}" if prefix else field.name
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            yield from described_fields(type(default), key)
        else:
            yield key, default, texts.get(field.name, "")


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """Check a value against a type hint; ints pass for floats and lists become tuples."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        if isinstance(value, Mapping):
            return make_config(typing.cast(type, hint), value, where=where)
        if not isinstance(value, typing.cast(type, hint)):
            raise _wrong_type(hint, value, where)
        return value
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _coerce(option, value, where)
            except MedsegError:
                continue
        raise _wrong_type(hint, value, where)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise MedsegError(
            Code.CONFIG,
            f"{where} does not take {value!r}",
            where=where,
            expected=" | ".join(str(a) for a in arguments),
            got=repr(value),
            remedy=nearest(str(value), [str(a) for a in arguments]),
        )
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _wrong_type(hint, value, where)
        if arguments[-1] is Ellipsis:
            return tuple(_coerce(arguments[0], v, where) for v in value)
        if len(value) != len(arguments):
            raise _wrong_type(hint, value, where)
        return tuple(_coerce(a, v, where) for a, v in zip(arguments, value, strict=True))
    if origin in (dict, Mapping) or hint is dict or getattr(origin, "__name__", "") == "Mapping":
        if not isinstance(value, Mapping):
            raise _wrong_type(hint, value, where)
        if not arguments:
            return dict(value)
        return {_coerce(arguments[0], k, where): _coerce(arguments[1], v, where) for k, v in value.items()}
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:  # a whole number of 400 digits
            raise _wrong_type(hint, value, where) from error
    if hint is int and isinstance(value, bool):
        raise _wrong_type(hint, value, where)
    if hint is None or hint is type(None):
        if value is None:
            return None
        raise _wrong_type(hint, value, where)
    if isinstance(hint, type) and isinstance(value, hint):
        return value
    raise _wrong_type(hint, value, where)


def _wrong_type(hint: Any, value: Any, where: str) -> MedsegError:
    expected = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint)
    return MedsegError(
        Code.CONFIG,
        f"{where} has the wrong type",
        where=where,
        expected=(expected or str(hint)).replace("NoneType", "null").replace("typing.", ""),
        got=f"{value!r} ({type(value).__name__})",
    )
