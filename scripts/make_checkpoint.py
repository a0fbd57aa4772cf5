"""Write seeded weights under the keys of a published layout, for demos and tests where no hub is reached."""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.numpy import save_file

from npu_export.random_weights import seeded_tensor
from npu_export.weight_files import RANDOM_SEED_METADATA


def read_layout(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by key from a file of `key<TAB>dims` lines, dims with commas between, none for a scalar."""
    lines = path.read_text("utf-8").splitlines()
    pairs = (line.split("\t") for line in lines if line)
    return {key: tuple(int(size) for size in dims.split(",") if size) for key, dims in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layout", type=Path, help="file of key<TAB>dims lines")
    parser.add_argument("folder", type=Path, help="where model.safetensors is written")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shapes = read_layout(arguments.layout)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: seeded_tensor(key, shape, arguments.seed) for key, shape in shapes.items()}
    save_file(
        tensors,
        arguments.folder / "model.safetensors",
        metadata={"format": "pt", RANDOM_SEED_METADATA: str(arguments.seed)},
    )
    print(f"{arguments.folder / 'model.safetensors'}: {len(tensors)} seeded tensors, seed {arguments.seed}")


if __name__ == "__main__":
    main()
