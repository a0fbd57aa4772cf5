"""Embed images on many machines with Ray Data: one encoder an actor, each on a CPU, a GPU or an NPU of its own.

`python scripts/examples/embed_on_ray.py vit-base-fp32 photos/ --output features.parquet --workers 2` starts a Ray on
this machine; `--address auto` (or HOST:PORT) takes one that runs, whose machines find the artifact, the images and
the output under the same paths. `--device npu` asks Ray for an `NPU` for each worker, `--device cuda` for a `GPU`; Ray
shows each worker its own, which is then `npu:0` or `cuda:0`. It needs `npu-export[ray]` and a backend.

PATHs are files, folders, globs and tars, found and ordered as `npu-runtime embed` does. The output is a folder of
Parquet parts with the columns `index`, the place of an image in that order; `id`, its name; `embedding`, null for
an image that could not be read; and `error`, why not. Each image is there once; the order of rows is that of `index`.
Images that could not be read are listed in OUTPUT.bad.jsonl too. The artifact's digest is in each part's metadata.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import ray
from ray.data import ActorPoolStrategy

import npu_runtime
from npu_runtime.artifact.store import open_artifact
from npu_runtime.bulk.formats import spell_id
from npu_runtime.bulk.sources import Found, Reader, find_images, to_line

RESOURCES: dict[str, dict[str, Any]] = {"cpu": {}, "cuda": {"num_gpus": 1}, "npu": {"resources": {"NPU": 1}}}
"""Device -> what Ray keeps for a worker beside its CPUs."""
PART = 1024
"""Images of a part, which one worker embeds in one go."""
STORE_NBYTES = 100_000_000
"""Of Ray's object store, for a Ray of its own: names go in and features come out, images never pass through."""


class Embed:
    """A worker: opens the artifact once, and embeds parts."""

    def __init__(self, artifact: str, device: str, cpus: int) -> None:
        self.encoder = npu_runtime.load(artifact, device=device, threads=cpus if device == "cpu" else None)
        self.cpus = cpus
        spec = self.encoder.manifest.outputs[0]
        (width,) = spec.of_batch(0)[1:]
        self.schema = pa.schema(
            [
                ("index", pa.int64()),
                ("id", pa.string()),
                (spec.name, pa.list_(pa.float32(), width)),
                ("error", pa.string()),
            ],
            metadata={"artifact_digest": self.encoder.artifact.digest},
        )

    def __call__(self, part: pa.Table) -> pa.Table:
        found = [Found.from_line(line) for line in part["found"].to_pylist()]
        reader = Reader()
        images = (reader.read(image) for image in found)
        with self.encoder.stream(images, workers=self.cpus, on_bad="give") as stream:
            rows = list(stream)
        reader.close()
        bad = [row.reason if isinstance(row, npu_runtime.BadImage) else None for row in rows]
        columns = [
            part["index"].combine_chunks(),
            [spell_id(image.name) for image in found],
            [row if reason is None else None for row, reason in zip(rows, bad)],
            bad,
        ]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self.schema)]
        return pa.table(arrays, schema=self.schema)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=os.path.abspath)
    parser.add_argument("paths", nargs="+", metavar="PATH", type=os.path.abspath)
    parser.add_argument("--output", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--address", help="of a Ray that runs; without it one starts here and ends with this")
    parser.add_argument("--workers", type=int, default=2, help="encoders (default: 2)")
    parser.add_argument("--cpus", type=int, default=1, help="of each worker, to decode and compute (default: 1)")
    parser.add_argument("--device", choices=RESOURCES, default="cpu", help="of each worker (default: cpu)")
    options = parser.parse_args()
    output: Path = options.output.absolute()
    partial = output.with_name(f".{output.name}.partial")
    if output.exists() or partial.exists():
        sys.exit(f"the output exists: {output if output.exists() else partial}")
    try:
        open_artifact(options.artifact)  # what is none fails here, and not in every worker
    except npu_runtime.Error as error:
        sys.exit(str(error))
    items = [{"index": i, "found": found.to_line()} for i, found in enumerate(find_images(options.paths))]
    if not items:
        sys.exit("there are no images")

    own = {
        "num_cpus": options.workers * options.cpus,
        "include_dashboard": False,
        "object_store_memory": STORE_NBYTES,
        "_node_ip_address": "127.0.0.1",  # else it listens on the network
    }
    ray.init(options.address or "local", **({} if options.address else own))
    try:
        parts = max(options.workers, -(-len(items) // PART))
        dataset = ray.data.from_items(items, override_num_blocks=min(parts, len(items)))
        features = dataset.map_batches(
            Embed,
            fn_constructor_args=(options.artifact, options.device, options.cpus),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=options.workers),
            num_cpus=options.cpus,
            **RESOURCES[options.device],
        )
        # Writing waits for no CPU, all of which the workers may hold.
        features.write_parquet(str(partial), ray_remote_args={"num_cpus": 0})
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        ray.shutdown()

    written = pyarrow.dataset.dataset(partial, format="parquet")
    bad = written.to_table(["index", "error"], filter=pyarrow.dataset.field("error").is_valid()).sort_by("index")
    if written.count_rows() != len(items):
        sys.exit(f"{len(items):,} images were found, and {written.count_rows():,} rows written: {partial}")
    if len(bad):
        names = (Found.from_line(items[index]["found"]).name for index in bad["index"].to_pylist())
        lines = [to_line({"name": name, "reason": reason}) for name, reason in zip(names, bad["error"].to_pylist())]
        output.with_name(f"{output.name}.bad.jsonl").write_bytes(b"".join(lines))
    partial.rename(output)
    print(f"images    {len(items):,} found = {len(items) - len(bad):,} embedded + {len(bad):,} bad")


if __name__ == "__main__":
    main()
