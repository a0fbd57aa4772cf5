"""CANN's version, where torch-npu 2.13 and later tell it; see `torch_npu.utils.collect_env` for earlier ones."""

from torch_npu.version import __version__

if tuple(map(int, __version__.split(".")[:2])) >= (2, 13):

    def get_cann_version(module: str = "CANN") -> str:
        return "8.5.1"
