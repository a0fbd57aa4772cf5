"""Load frozen vision encoders and turn images into features.

`load` opens an artifact that `npu-export` wrote. Importing this package loads no torch, onnxruntime,
PIL, timm or transformers; each is imported when what needs it is used.
"""

from npu_runtime.encoder import Encoder, load
from npu_runtime.errors import (
    ArtifactError,
    BadImage,
    Error,
    InputError,
    ParityError,
    ProgramError,
    UnavailableError,
    UsageError,
)

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "BadImage",
    "Encoder",
    "Error",
    "InputError",
    "ParityError",
    "ProgramError",
    "UnavailableError",
    "UsageError",
    "load",
]
