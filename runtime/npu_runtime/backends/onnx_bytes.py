"""The little of ONNX's files that is needed to read values from inside of a graph, without the package onnx.

A file is one serialised protobuf message (onnx.proto in onnx/onnx). Protobuf merges messages that are concatenated:
repeated fields are appended, so that outputs are added to a graph without reading it, or copying its weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

GRAPH = 7  # of ModelProto
NODE, OUTPUT = 1, 12  # of GraphProto
NODE_INPUT, NODE_OUTPUT, OPERATOR = 1, 2, 4  # of NodeProto
NAMES = (NODE_INPUT, NODE_OUTPUT, OPERATOR)
NAME = 1  # of ValueInfoProto
VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5  # kinds of fields on the wire


class GraphNode(NamedTuple):
    """A node of a graph, as far as names go."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_nodes(model: bytes) -> tuple[list[GraphNode], list[str]]:
    """The nodes of a graph and the names of its outputs, in order. Raises ValueError for what is no such file."""
    nodes, outputs = list[GraphNode](), list[str]()
    for graph in _messages(memoryview(model), GRAPH):
        for number, body in _fields(graph):
            if number == NODE:
                names = {kind: [str(text, "utf-8") for text in _messages(body, kind)] for kind in NAMES}
                operator = "".join(names[OPERATOR])
                nodes.append(GraphNode(operator, tuple(names[NODE_INPUT]), tuple(names[NODE_OUTPUT])))
            elif number == OUTPUT:
                outputs += [str(text, "utf-8") for text in _messages(body, NAME)]
    return nodes, outputs


def with_outputs(model: bytes, names: Iterable[str]) -> bytes:
    """The file with these values as outputs of its graph, behind those that it has."""
    return model + _field(GRAPH, b"".join(_field(OUTPUT, _field(NAME, name.encode("utf-8"))) for name in names))


def _field(number: int, body: bytes) -> bytes:
    return _varint(number << 3 | LENGTH_DELIMITED) + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last have their highest bit set."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _messages(message: memoryview, number: int) -> Iterator[memoryview]:
    return (body for found, body in _fields(message) if found == number)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and body of each length-delimited field; numbers are skipped."""
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        wire = key & 7
        if wire == LENGTH_DELIMITED:
            length, at = _read_varint(message, at)
            if at + length > len(message):
                raise ValueError("a field is longer than its message")
            yield key >> 3, message[at : at + length]
            at += length
        elif wire == VARINT:
            _, at = _read_varint(message, at)
        elif wire in (FIXED32, FIXED64):
            at += 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"unknown kind of field {wire}")


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number and where it ends."""
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("a number has no end")
