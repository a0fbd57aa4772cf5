"""Errors that only an export has."""

from npu_runtime.errors import Error


class CheckpointError(Error):
    """A checkpoint that cannot be found, read safely, or used whole."""


class PrecisionError(Error):
    """A precision does not hold what the network computes with these weights; keeping parts in float32 may help."""


class LintError(Error):
    """A frozen program holds something that an Ascend device cannot run as it stands."""
