"""What files of features look like, so that rows can be appended and the file is whole when its header says how many.

- `.npy`: numpy's header, rows; names beside it, as lines of JSON.
- `.safetensors`: a header of fixed length with the artifact's digest, rows, and the lines of names as bytes.
- `.parquet`: a folder of part files with columns `id` and `embedding`, each with the digest in its metadata.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from npu_runtime.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".safetensors", ".npy", ".parquet")
PART_NBYTES = 1 << 26
"""Of the rows of a Parquet part, about; a part ends with a batch."""
_ROOM = 40
"""Characters of a safetensors header that numbers of rows and bytes may grow by."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What the rows of a file are."""

    name: str
    """The output of the encoder."""
    shape: tuple[int, ...]
    """Of one row, float32."""
    metadata: Mapping[str, str]
    """Written into the file where its format has room: digest, encoder, weights."""

    @property
    def nbytes(self) -> int:
        return 4 * math.prod(self.shape)


def check_format(output: Path) -> None:
    """Raise UsageError where no format is known by the name's end, UnavailableError where its package is missing."""
    if output.suffix not in SUFFIXES:
        expected = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise UsageError("unknown kind of output", where=output, expected=expected, got=output.suffix)
    if output.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise UnavailableError(
                "writing Parquet needs pyarrow", where=output, hint="pip install 'npu-export[parquet]'"
            ) from error


def header(suffix: str, rows: Rows, count: int, names_nbytes: int) -> bytes:
    """What a file begins with; as long for any count."""
    if suffix == ".npy":
        buffer = io.BytesIO()
        described = {"descr": "<f4", "fortran_order": False, "shape": (count, *rows.shape)}
        np.lib.format.write_array_header_1_0(buffer, described)  # which leaves room for the count to grow
        return buffer.getvalue()
    if suffix == ".safetensors":
        end = count * rows.nbytes
        tensors = {
            "__metadata__": dict(rows.metadata),
            rows.name: {"dtype": "F32", "shape": [count, *rows.shape], "data_offsets": [0, end]},
            "names": {"dtype": "U8", "shape": [names_nbytes], "data_offsets": [end, end + names_nbytes]},
        }
        text = json.dumps(tensors).encode("ascii")
        empty = len(text) - sum(len(str(number)) for number in (count, end, names_nbytes, end, end + names_nbytes))
        length = -(-(empty + 5 * _ROOM) // 8) * 8
        return length.to_bytes(8, "little") + text.ljust(length)
    return b""


def spell_id(name: str) -> str:
    """A name as a Parquet `id`, which is UTF-8: bytes that are none become `\\udcff`."""
    return name.encode("utf-8", "backslashreplace").decode()


def write_part(path: Path, rows: Rows, data: bytes, names: list[str]) -> None:
    """A Parquet part file of rows, one after the other in `data`, and their names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = pa.array(np.frombuffer(data, np.float32))
    ids = pa.array(map(spell_id, names), pa.string())
    table = pa.table([ids, pa.FixedSizeListArray.from_arrays(values, math.prod(rows.shape))], schema=_schema(rows))
    pq.write_table(table, path, use_dictionary=False, compression="none")


def _schema(rows: Rows) -> pa.Schema:
    import pyarrow as pa

    column = pa.list_(pa.field("element", pa.float32()), math.prod(rows.shape))
    fields = [pa.field("id", pa.string()), pa.field(rows.name, column)]
    return pa.schema(fields, metadata={**rows.metadata, "shape": json.dumps(rows.shape)})
