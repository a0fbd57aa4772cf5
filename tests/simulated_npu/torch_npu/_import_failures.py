"""The ways in which importing torch-npu fails, chosen by SIMULATED_NPU_IMPORT."""

import os
import sys
import traceback


def raise_chosen() -> None:
    chosen = os.environ.get("SIMULATED_NPU_IMPORT", "")
    no_cann = ImportError("libhccl.so: cannot open shared object file: No such file or directory")
    if chosen == "no-cann":
        raise no_cann
    if chosen == "no-cann-exit":
        traceback.print_exception(no_cann)
        sys.exit()
    if chosen == "cuda":
        raise RuntimeError("Two accelerators cannot be used at the same time in PyTorch: npu and cuda.")
    if chosen:
        raise ValueError(f"SIMULATED_NPU_IMPORT: expected no-cann, no-cann-exit or cuda, got {chosen!r}")
