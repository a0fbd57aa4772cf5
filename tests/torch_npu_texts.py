"""What the vendor's wheels of torch_npu print where they cannot run, word for word but for dates and folders."""

from __future__ import annotations

NO_CANN = "libhccl.so: cannot open shared object file: No such file or directory"
"""torch_npu 2.9.0 to 2.14.0, ImportError."""
NO_CANN_2_7 = (
    f"{NO_CANN}. Please check that the cann package is installed. Please run 'source set_env.sh' in the CANN "
    "installation path.\n[ERROR] 2026-11-29-12:05:16 (PID:6147, Device:-1, RankID:-1) ERR00008 PTA resource not found"
)
"""torch_npu 2.7.1, ImportError."""
OTHER_TORCH = (
    "/venv/lib/python3.11/site-packages/torch_npu/lib/libtorch_npu.so: "
    "undefined symbol: _ZNK4c10d7Backend15incref_pyobjectEv"
)
"""torch_npu 2.14.0 with torch 2.13.0, ImportError; 2.12.0 and 2.9.0.post9 lack other symbols, all of C++."""
TWO_ACCELERATORS = (
    "Two accelerators cannot be used at the same time in PyTorch: npu and cuda. You can install the cpu version of "
    "PyTorch to use your npu device, or use the cuda device with 'export TORCH_DEVICE_BACKEND_AUTOLOAD=0'.\n"
    "[ERROR] 2026-11-29-12:08:21 (PID:8456, Device:-1, RankID:-1) ERR00007 PTA feature not supported"
)
"""torch_npu 2.13.0, RuntimeError."""
NO_START = (
    "ExchangeDevice:../torch_npu/csrc/core/npu/sys_ctrl/npu_sys_ctrl.cpp:337 NPU function error: "
    "c10_npu::SetDevice(device), error code is 507033\n"
    "[ERROR] 2026-11-29-12:09:17 (PID:8904, Device:0, RankID:-1) ERR00100 PTA call acl api failed\n"
    "[Error]: Failed to start the device. \n"
    "        Rectify the fault based on the error information in the ascend log.\n"
    "aclrtSetDevice fails, as EMULATED_CANN_FAULTS asks"
)
"""torch_npu 2.13.0, RuntimeError; the last line is CANN's own."""
