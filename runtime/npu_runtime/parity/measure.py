"""One session against a baseline, image by image, so that memory holds the outputs of one chunk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from npu_runtime.artifact.schema import TensorSpec, Tolerance
from npu_runtime.artifact.store import Array
from npu_runtime.errors import ProgramError
from npu_runtime.parity.metrics import ImageMetrics, judge, measure_image, neighbours_kept, summarise
from npu_runtime.parity.profiles import Profile, judge_profile
from npu_runtime.parity.records import OutputParity
from npu_runtime.parity.scales import output_scales
from npu_runtime.parity.token_errors import Errors, measure_tokens, summarise_tokens

Outputs = Mapping[str, Array]
"""By name, float32 [N, ...]."""


class Measurement:
    """Figures of a session's outputs, gathered chunk by chunk."""

    def __init__(self, specs: Sequence[TensorSpec], reference: Outputs | None = None) -> None:
        """The scales of channels are those of the `reference` outputs; without it, of each expected output itself."""
        self._specs = specs
        self._scales = {} if reference is None else output_scales(reference, specs)
        self._images: dict[tuple[str, str | None], list[ImageMetrics]] = {}
        self._vectors: dict[str, tuple[list[Array], list[Array]]] = {}
        self._tokens: dict[tuple[str, str | None], list[Errors]] = {}
        self.worst: int | None = None
        """Number of the image that is farthest off, by the largest relative L2 error of its outputs."""
        self.worst_outputs: tuple[Outputs, Outputs] = ({}, {})
        """Its own outputs and the expected ones, [1, ...]."""
        self._worst_error = -1.0
        self._count = 0

    def add(self, actual: Outputs, expected: Outputs) -> None:
        """Outputs of the next images. Raises ProgramError when names, shapes or numbers of images differ."""
        if _shapes(actual) != _shapes(expected):
            raise ProgramError(
                "the program gives other outputs than the baseline", expected=_shapes(expected), got=_shapes(actual)
            )
        for index in range(len(next(iter(actual.values())))):
            errors = [
                self._add_image(spec, actual[spec.name][index], expected[spec.name][index]) for spec in self._specs
            ]
            error = max(np.inf if np.isnan(error) else error for error in errors)
            if error > self._worst_error:
                self._worst_error, self.worst = error, self._count
                self.worst_outputs = (_image(actual, index), _image(expected, index))
            self._count += 1

    def results(self, tolerances: Sequence[Tolerance], profile: Profile | None = None) -> tuple[OutputParity, ...]:
        """What was gathered, each output and kind of tokens judged by its tolerances."""
        return tuple(self._results(tolerances, profile))

    def _add_image(self, spec: TensorSpec, actual: Array, expected: Array) -> float:
        scale = self._scales.get(spec.name)
        whole = measure_image(actual, expected, scale)
        self._images.setdefault((spec.name, None), []).append(whole)
        tokens = measure_tokens(actual, expected) if actual.ndim == 2 else None
        if tokens is not None:
            self._tokens.setdefault((spec.name, None), []).append(tokens)
        for group in spec.groups:
            part = slice(group.start, group.stop)
            figures = measure_image(actual[part], expected[part], None if scale is None else scale[part])
            self._images.setdefault((spec.name, group.name), []).append(figures)
            if tokens is not None:
                self._tokens.setdefault((spec.name, group.name), []).append(tokens[part])
        if actual.ndim == 1:
            vectors = self._vectors.setdefault(spec.name, ([], []))
            vectors[0].append(actual.copy())
            vectors[1].append(expected.copy())
        return whole.relative_l2_error

    def _results(self, tolerances: Sequence[Tolerance], profile: Profile | None) -> Iterator[OutputParity]:
        for (output, group), images in self._images.items():
            metrics, kept = summarise(images), None
            if group is None and output in self._vectors:
                actual, expected = self._vectors[output]
                kept = neighbours_kept(np.stack(actual), np.stack(expected))
            whole = group is None
            yield OutputParity(
                output,
                group,
                metrics,
                kept,
                tuple(images),
                judge(output, metrics, tolerances, group),
                judge_profile(output, metrics, profile) if whole and profile else (),
                summarise_tokens(self._tokens[output, group]) if (output, group) in self._tokens else None,
            )


def _image(outputs: Outputs, index: int) -> Outputs:
    return {name: array[index : index + 1].copy() for name, array in outputs.items()}


def _shapes(outputs: Outputs) -> str:
    return ", ".join(f"{name} {list(outputs[name].shape)}" for name in sorted(outputs))
