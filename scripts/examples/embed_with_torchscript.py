"""Embed images with torch alone, as libtorch does it in C++, from the files of an artifact.

`python scripts/examples/embed_with_torchscript.py vit-base-fp32 features.npy a.jpg b.jpg` writes float32 [N, D], one
row for each image in the order given. It needs torch, numpy and pillow; nothing of npu_runtime is imported. In C++ it
is `torch::jit::load(file)` and `module.get_method("b4")({images})`, whose result is a tuple in the manifest's order of
outputs. A traced method does not check how many images it is given, and nothing here checks the files' hashes.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from from_manifest import batches, read_program

artifact, output, *paths = sys.argv[1:]
manifest, program = read_program(Path(artifact), "torchscript")
method = getattr(torch.jit.load(Path(artifact) / program["file"], map_location="cpu"), program["entry_point"])
rows = []
with torch.inference_mode():
    for count, images in batches(paths, program["batch"], manifest):
        rows.append(method(torch.from_numpy(images))[0][:count].numpy())
np.save(output, np.concatenate(rows))
