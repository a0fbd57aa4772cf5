"""Dataclasses to JSON and back, for manifests and records."""

from __future__ import annotations

import json
import math
import re
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from npu_runtime.errors import Error

T = TypeVar("T")

NOT_FINITE = ("nan", "inf", "-inf")
DAMAGED = "the file was edited or damaged; run it again"
"""What to do about a record that is not as it was written."""


def to_json(value: Any) -> Any:
    """Dataclasses, tuples and mappings as what `json` writes; NaN and infinity, which JSON lacks, as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    return value


def read_record_text(path: str | Path) -> str:
    """The text of a record's file; raises Error when it is none."""
    try:
        return Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise Error("the record is no text", where=path, got=error) from error


def read_record_name(text: str, where: str) -> str | None:
    """What kind of record a text says that it is; None where it does not. Raises Error when it is no JSON."""
    document = _parse_record(text, where)
    name = document.get("record") if isinstance(document, dict) else None
    return name if isinstance(name, str) else None


def read_header(text: str, where: str, *, record: str, major: int, hint: str) -> tuple[dict[str, Any], int]:
    """A JSON document that begins with `"record": record` and `"schema": "MAJOR.MINOR"`, and its minor version.

    Raises Error for what is no such document or of another major version.
    """
    document = _parse_record(text, where)
    version = document.get("schema") if isinstance(document, dict) and document.get("record") == record else None
    match = re.fullmatch(r"([0-9]{1,9})\.([0-9]{1,9})", version) if isinstance(version, str) else None
    if match is None or int(match[1]) != major:
        raise Error(
            f"this is no {record} record that this version reads",
            where=where,
            expected=f'"record": "{record}" of schema {major}.x',
            got=f"schema {version}" if match else text[:80],
            hint=hint,
        )
    return document, int(match[2])


def _parse_record(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Error("the record is not JSON", where=where, got=error) from error


@dataclass(frozen=True, slots=True)
class RecordSchema(Generic[T]):
    """How a kind of record is written as JSON and read again on any machine."""

    name: str
    kind: type[T]
    major: int
    minor: int
    beside: tuple[str, ...]
    """Fields that documents may have beside the record's own: how the command ended, what it was compared with."""
    made_by: str
    """The commands that write it, for messages."""

    def encode(self, record: T, beside: Mapping[str, object] = MappingProxyType({})) -> str:
        """The record as indented JSON, header first and what stands beside it last."""
        header = {"record": self.name, "schema": f"{self.major}.{self.minor}"}
        document = {**header, **to_json(record), **to_json(beside)}
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)

    def decode(self, text: str, where: str) -> T:
        """The record in `text`, read from `where`; raises Error when it is none, damaged, or of a newer major."""
        hint = f"pass what {self.made_by} wrote; upgrade npu-export to read a newer one"
        document, minor = read_header(text, where, record=self.name, major=self.major, hint=hint)
        body = {name: value for name, value in document.items() if name not in ("record", "schema", *self.beside)}
        reader = Reader("the record", where, DAMAGED, Error, allow_not_finite=True)
        return reader.decode(self.kind, body, lenient=minor > self.minor)


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads one document, and says where in it a value is wrong."""

    what: str
    """The document, as messages call it: `the manifest`."""
    where: str
    hint: str
    error: type[Error]
    allow_not_finite: bool = False
    """Whether a float may be NaN or infinite, as `to_json` spells them: a figure may, a limit may not."""

    def decode(self, kind: type[T], document: Any, *, lenient: bool) -> T:
        """The document as a dataclass whose types hold throughout; `lenient` ignores fields that it does not know."""
        decoded: T = self._decode(kind, document, "", lenient)
        return decoded

    def _decode(self, kind: Any, value: Any, at: str, lenient: bool) -> Any:
        """`value` as `kind`; `at` is the path inside the document."""
        origin = typing.get_origin(kind)
        if is_dataclass(kind):
            return self._decode_fields(kind, value, at, lenient)
        if origin is tuple and isinstance(value, list):
            arguments = typing.get_args(kind)
            if arguments[-1] is Ellipsis:
                arguments = (arguments[0],) * len(value)
            if len(arguments) == len(value):
                pairs = enumerate(zip(arguments, value))
                return tuple(self._decode(k, v, f"{at}[{i}]", lenient) for i, (k, v) in pairs)
        elif origin in (typing.Union, types.UnionType):
            for choice in typing.get_args(kind):
                if self._is_scalar(choice, value):
                    return self._scalar(choice, value)
            inner = [c for c in typing.get_args(kind) if is_dataclass(c) or typing.get_origin(c) in (tuple, Mapping)]
            if len(inner) == 1 and value is not None:
                return self._decode(inner[0], value, at, lenient)
        elif origin is Mapping and isinstance(value, dict):
            item = typing.get_args(kind)[1]
            return {name: self._decode(item, v, f"{at}.{name}", lenient) for name, v in value.items()}
        elif kind is object or self._is_scalar(kind, value):
            return self._scalar(kind, value)
        raise self.error(
            f"{self.what} has a wrong value at {at or 'its top'}",
            where=self.where,
            expected=_describe(kind),
            got=json.dumps(value)[:200],
            hint=self.hint,
        )

    def _decode_fields(self, kind: Any, value: Any, at: str, lenient: bool) -> Any:
        hints = typing.get_type_hints(kind)
        names = [field.name for field in fields(kind)]
        # What a minor version added has a default, and older documents lack it.
        required = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
        got = list(value) if isinstance(value, dict) else None
        if got is None or required - set(got) or (set(got) - set(names) and not lenient):
            raise self.error(
                f"{self.what} has wrong fields at {at or 'its top'}",
                where=self.where,
                expected=", ".join(names),
                got=json.dumps(value)[:200] if got is None else ", ".join(got),
                hint=self.hint,
            )
        present = [name for name in names if name in value]
        return kind(**{n: self._decode(hints[n], value[n], f"{at}.{n}".lstrip("."), lenient) for n in present})

    def _is_scalar(self, kind: Any, value: Any) -> bool:
        if typing.get_origin(kind) is typing.Literal:
            return value in typing.get_args(kind) and not isinstance(value, bool)
        if kind is type(None):
            return value is None
        if isinstance(value, bool):
            return kind is bool
        if kind is float:  # json reads NaN, Infinity and 1e999; a limit of those would judge nothing
            if self.allow_not_finite and value in NOT_FINITE:
                return True
            return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
        return typing.get_origin(kind) is None and isinstance(kind, type) and isinstance(value, kind)

    def _scalar(self, kind: Any, value: Any) -> Any:
        return float(value) if kind is float else value


def _describe(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
