"""CANN's version as torch-npu 2.9 tells it."""


def get_cann_version() -> str:
    return "8.5.1"
