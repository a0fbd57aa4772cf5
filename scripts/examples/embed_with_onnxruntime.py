"""Embed images with onnxruntime alone, from the files of an artifact; nothing of npu_runtime is imported.

`python scripts/examples/embed_with_onnxruntime.py vit-base-fp32 features.npy a.jpg b.jpg` writes float32 [N, D], one
row for each image in the order given. It needs onnxruntime, numpy and pillow. Nothing here checks the files' hashes;
`npu-runtime verify` does, once where the artifact is deployed.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from from_manifest import batches, read_program

artifact, output, *paths = sys.argv[1:]
manifest, program = read_program(Path(artifact), "onnx")
session = onnxruntime.InferenceSession(Path(artifact) / program["file"], providers=["CPUExecutionProvider"])
names = manifest["inputs"][0]["name"], manifest["outputs"][0]["name"]
rows = []
for count, images in batches(paths, program["batch"], manifest):
    rows.append(session.run([names[1]], {names[0]: images})[0][:count])
np.save(output, np.concatenate(rows))
