from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_runtime.artifact.codec import decode_manifest, encode_manifest
from npu_runtime.artifact.schema import (
    MANIFEST_NAME,
    SCHEMA_MAJOR,
    SCHEMA_MINOR,
    Boundary,
    Coverage,
    FileRecord,
    Manifest,
    Preprocessing,
    Probes,
    Program,
    Provenance,
    Reference,
    SourceFile,
    TensorSpec,
    TokenGroup,
    Tolerance,
    Weights,
    input_spec,
)
from npu_runtime.errors import ArtifactError
from npu_runtime.structured import to_json

TEXT = st.text(max_size=12)
COUNT = st.integers(0, 2**63)
SIZE = st.integers(1, 4096)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
HASH = st.text("0123456789abcdef", min_size=64, max_size=64)
MANIFESTS = Path(__file__).parents[1] / "data" / "manifests"
FILE_NAME = st.from_regex(r"[a-zä ]{1,6}(/[a-z]{1,3})?(\.[a-z]{1,4})?", fullmatch=True)


PROBES = {"file": "reference.safetensors", "batch": 1, "accelerator_margin": 10, "basis": ""}
STEM = {"module": "stem", "limit": 1e-5, "places": {}}


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Any manifest that an exporter could write."""
    shapes = st.lists(SIZE, max_size=3).map(lambda sizes: ("B", *sizes))
    groups = st.sampled_from([(TokenGroup("cls", 0, 1),), (TokenGroup("cls", 0, 1), TokenGroup("patches", 1, 5))])
    specs = st.builds(TensorSpec, TEXT, st.just("float32"), shapes) | st.builds(
        TensorSpec, TEXT, st.just("float32"), st.just(("B", 5, 8)), groups
    )
    files = draw(st.lists(st.builds(FileRecord, FILE_NAME, COUNT, HASH), min_size=1, unique_by=lambda r: r.file))
    names = st.sampled_from([record.file for record in files])
    hashes = {record.file: record.sha256 for record in files}
    programs = st.builds(
        lambda file, **rest: Program(file=file, sha256=hashes[file], **rest),
        file=names,
        format=TEXT,
        batch=SIZE,
        needs=st.lists(names, max_size=2).map(tuple),
        entry_point=st.none() | TEXT,
        opset=st.none() | COUNT,
    )
    outputs = draw(st.lists(specs, min_size=1, max_size=3))
    tolerances = st.builds(
        Tolerance,
        st.sampled_from([output.name for output in outputs]),
        st.sampled_from(["max_abs_error", "max_relative_l2_error"]),
        NUMBER,
        TEXT,
        st.sampled_from(["cpu", "cuda", "npu"]),
    )
    frozen = draw(st.lists(programs, min_size=1, max_size=3))
    positive = st.floats(1e-3, 1e3)
    boundaries = st.builds(Boundary, TEXT, positive, st.dictionaries(st.sampled_from([p.format for p in frozen]), TEXT))
    probes = st.builds(
        Probes,
        names,
        st.sampled_from([p.batch for p in frozen]),
        positive,
        TEXT,
        st.lists(boundaries, min_size=1, max_size=2).map(tuple),
    )
    weights = st.builds(
        Weights,
        TEXT,
        TEXT,
        TEXT,
        st.lists(st.builds(SourceFile, TEXT, COUNT, HASH), max_size=2).map(tuple),
        st.none() | COUNT,
        HASH,
        st.builds(Coverage, COUNT, COUNT, COUNT, COUNT),
    )
    size = draw(st.tuples(SIZE, SIZE))
    return Manifest(
        encoder=draw(TEXT),
        precision=draw(st.sampled_from(["fp32", "fp16", "bf16"])),
        inputs=tuple(draw(st.lists(specs, min_size=1, max_size=2))),
        outputs=tuple(outputs),
        programs=tuple(frozen),
        files=tuple(files),
        reference=Reference(
            draw(names),
            tuple(draw(st.lists(COUNT, min_size=1, max_size=3))),
            draw(st.dictionaries(TEXT, TEXT, max_size=2)),
        ),
        preprocessing=Preprocessing(
            size,
            draw(st.none() | st.integers(max(size), 2 * max(size))),
            draw(st.sampled_from(["bilinear", "bicubic"])),
            draw(st.tuples(NUMBER, NUMBER, NUMBER)),
            draw(st.tuples(positive, positive, positive)),
            draw(TEXT),
            draw(st.sampled_from([None, "hf", "timm", "upstream"])),
            draw(st.sampled_from(["even", "down"])),
        ),
        tolerances=tuple(draw(st.lists(tolerances, max_size=2))),
        provenance=Provenance(draw(weights), draw(st.dictionaries(TEXT, TEXT, max_size=2)), draw(st.none() | TEXT)),
        probes=draw(st.none() | probes),
    )


@given(manifests())
def test_decoding_inverts_encoding(manifest: Manifest) -> None:
    assert decode_manifest(encode_manifest(manifest), "m") == manifest


@given(manifests())
def test_encoding_inverts_decoding_byte_for_byte(manifest: Manifest) -> None:
    text = encode_manifest(manifest)
    assert encode_manifest(decode_manifest(text, "m")) == text


@pytest.fixture
def document(tiny_artifact: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((tiny_artifact / MANIFEST_NAME).read_text("utf-8"))
    return parsed


def decode(document: object) -> Manifest:
    return decode_manifest(json.dumps(document), "there/manifest.json")


def at(document: Any, *path: str | int) -> Any:
    for step in path:
        document = document[step]
    return document


def test_the_artifact_that_an_export_wrote_is_read(document: dict[str, Any]) -> None:
    manifest = decode(document)
    assert manifest.encoder == "tiny-vit"
    assert manifest.formats() == ("torchscript", "onnx")
    assert [program.batch for program in manifest.programs_for("onnx")] == [1, 4]


def test_a_manifest_from_a_newer_major_is_refused(document: dict[str, Any]) -> None:
    document["schema"] = f"{SCHEMA_MAJOR + 1}.0"
    with pytest.raises(ArtifactError, match="another major schema version") as caught:
        decode(document)
    assert caught.value.hint == "upgrade npu-export to read it"
    assert caught.value.where == "there/manifest.json"


def test_a_manifest_from_an_older_major_is_refused(document: dict[str, Any]) -> None:
    document["schema"] = f"{SCHEMA_MAJOR - 1}.7"
    with pytest.raises(ArtifactError, match="another major schema version") as caught:
        decode(document)
    assert caught.value.hint == "export it again"


def test_every_manifest_of_an_older_major_is_refused_with_what_to_do() -> None:
    files = [file for file in sorted(MANIFESTS.glob("*.json")) if int(file.stem[0]) < SCHEMA_MAJOR]
    assert [file.stem for file in files] == [f"{major}.0" for major in range(1, SCHEMA_MAJOR)]
    for file in files:
        with pytest.raises(ArtifactError, match="another major schema version") as caught:
            decode_manifest(file.read_text("utf-8"), str(file))
        assert (caught.value.expected, caught.value.got) == (f"schema {SCHEMA_MAJOR}.x", f"schema {file.stem}")
        assert caught.value.hint == "export it again"


def test_a_manifest_of_schema_1_that_calls_itself_2_is_refused() -> None:
    old = json.loads((MANIFESTS / "1.0.json").read_text("utf-8"))
    with pytest.raises(ArtifactError, match="wrong fields"):
        decode({**old, "schema": "2.0"})


def test_every_manifest_of_an_older_minor_is_read() -> None:
    files = sorted(MANIFESTS.glob(f"{SCHEMA_MAJOR}.*.json"))
    assert [file.stem for file in files] == [f"{SCHEMA_MAJOR}.{minor}" for minor in range(SCHEMA_MINOR)]
    for file in files:
        manifest = decode_manifest(file.read_text("utf-8"), str(file))
        assert manifest.encoder == "tiny-vit"
        assert (manifest.reference.numerics == {}) is (file.stem == "2.0")
        before_devices = file.stem in ("2.0", "2.1")
        assert (manifest.probes, [output.groups for output in manifest.outputs] == [(), ()]) == (None, before_devices)
        assert (manifest.tolerances_on("npu") == manifest.tolerances) is before_devices
        assert (manifest.ranges, manifest.keep_fp32) == (None, ())
        published = None if file.stem in ("2.0", "2.1", "2.2") else "hf"
        assert (manifest.preprocessing.publisher, manifest.preprocessing.crop_offset) == (published, "even")
        assert manifest.inputs == (input_spec("float32", (32, 32)),)


def test_a_newer_minor_is_read_and_what_it_adds_is_ignored(document: dict[str, Any]) -> None:
    expected = decode(document)
    document["schema"] = f"{SCHEMA_MAJOR}.{SCHEMA_MINOR + 1}"
    document["colour"] = "blue"
    document["programs"][0]["quantisation"] = {"bits": 8}
    document["provenance"]["weights"]["licence"] = None
    assert decode(document) == expected


def test_a_newer_minor_still_needs_every_field_that_this_version_reads(document: dict[str, Any]) -> None:
    document["schema"] = f"{SCHEMA_MAJOR}.{SCHEMA_MINOR + 1}"
    del document["programs"][0]["batch"]
    with pytest.raises(ArtifactError, match=r"wrong fields at programs\[0\]"):
        decode(document)


@pytest.mark.parametrize("path", [(), ("programs", 0), ("provenance", "weights"), ("outputs", 1)])
def test_an_unknown_field_at_this_minor_is_refused(document: dict[str, Any], path: tuple[str | int, ...]) -> None:
    at(document, *path)["colour"] = "blue"
    with pytest.raises(ArtifactError, match="wrong fields") as caught:
        decode(document)
    assert "colour" in str(caught.value.got)


@pytest.mark.parametrize(
    ("path", "field"),
    [((), "encoder"), ((), "tolerances"), (("programs", 1), "sha256"), (("provenance",), "revision")],
)
def test_a_missing_field_is_refused(document: dict[str, Any], path: tuple[str | int, ...], field: str) -> None:
    del at(document, *path)[field]
    with pytest.raises(ArtifactError, match="wrong fields") as caught:
        decode(document)
    assert field in str(caught.value.expected)


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ((), "encoder", 3),
        ((), "encoder", None),
        ((), "precision", "fp64"),
        ((), "programs", {}),
        (("programs", 0), "batch", "1"),
        (("programs", 0), "batch", 1.0),
        (("programs", 0), "batch", True),
        (("programs", 0), "needs", "weights.onnx.data"),
        (("programs", 0), "entry_point", 1),
        (("programs", 0), "opset", False),
        (("inputs", 0), "dtype", "float64"),
        (("inputs", 0), "shape", ["B", 3, True]),
        (("inputs", 0), "shape", ["N", 3, 32, 32]),
        (("preprocessing",), "size", [32, 32, 32]),
        (("preprocessing",), "mean", [0.5, 0.5]),
        (("preprocessing",), "std", [0.5, 0.5, True]),
        (("preprocessing",), "interpolation", "lanczos"),
        (("preprocessing",), "shortest_edge", "32"),
        (("preprocessing",), "shortest_edge", 32.0),
        (("preprocessing",), "shortest_edge", True),
        (("provenance", "weights"), "prefix", None),
        (("tolerances", 0), "limit", "1e-5"),
        (("tolerances", 0), "metric", "min_cosine"),
        (("provenance",), "versions", ["torch"]),
        (("provenance",), "versions", {"torch": 2}),
    ],
)
def test_a_value_of_another_type_is_refused(
    document: dict[str, Any], path: tuple[str | int, ...], field: str, value: object
) -> None:
    at(document, *path)[field] = value
    with pytest.raises(ArtifactError, match="wrong value at") as caught:
        decode(document)
    assert field in caught.value.what


def test_an_integer_where_a_float_belongs_is_read_as_a_float(document: dict[str, Any]) -> None:
    document["tolerances"][0]["limit"] = 1
    limit = decode(document).tolerances[0].limit
    assert (limit, type(limit)) == (1.0, float)


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
def test_a_number_that_no_float_holds_is_refused(document: dict[str, Any], token: str) -> None:
    document["tolerances"][0]["limit"] = "HERE"
    text = json.dumps(document).replace('"HERE"', token)
    with pytest.raises(ArtifactError, match=r"wrong value at tolerances\[0\].limit"):
        decode_manifest(text, "m")


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "a/../b", "a\\b", "", ".", "..", "./a", "a//b", "a/", "a/.", "a\0b", "a\nb", "\ud800"],
)
def test_a_path_that_leaves_the_folder_is_refused(document: dict[str, Any], name: str) -> None:
    document["files"].append({"file": name, "nbytes": 1, "sha256": "0" * 64})
    with pytest.raises(ArtifactError, match="a path outside the artifact") as caught:
        decode(document)
    assert caught.value.got == repr(name)


@pytest.mark.parametrize("name", ["x", "a/b", "a/b c.d", "..x", "ä.bin"])
def test_a_path_inside_the_folder_is_read(document: dict[str, Any], name: str) -> None:
    document["files"].append({"file": name, "nbytes": 1, "sha256": "0" * 64})
    assert decode(document).files[-1].file == name


def test_two_hashes_of_a_program_are_refused(document: dict[str, Any]) -> None:
    document["programs"][1]["sha256"] = "0" * 64
    with pytest.raises(ArtifactError, match="two hashes for one file") as caught:
        decode(document)
    assert "model.ts" in str(caught.value.where)


def test_two_hashes_of_a_listed_file_are_refused(document: dict[str, Any]) -> None:
    document["files"].insert(0, {**document["files"][-1], "sha256": "0" * 64})
    with pytest.raises(ArtifactError, match="two hashes for one file") as caught:
        decode(document)
    assert "weights.onnx.data" in str(caught.value.where)


@pytest.mark.parametrize("file", ["model.ts", "model.b1.onnx", "weights.onnx.data", "reference.safetensors"])
def test_a_file_that_is_used_and_not_listed_is_refused(document: dict[str, Any], file: str) -> None:
    document["files"] = [record for record in document["files"] if record["file"] != file]
    with pytest.raises(ArtifactError, match="incomplete") as caught:
        decode(document)
    assert caught.value.got == file


def test_a_tolerance_of_an_unknown_output_is_refused(document: dict[str, Any]) -> None:
    document["tolerances"][0]["output"] = "logits"
    with pytest.raises(ArtifactError, match="incomplete") as caught:
        decode(document)
    assert caught.value.got == "logits"


@pytest.mark.parametrize("field", ["programs", "inputs", "outputs"])
def test_a_manifest_without_programs_inputs_or_outputs_is_refused(document: dict[str, Any], field: str) -> None:
    document[field] = []
    document["tolerances"] = []
    with pytest.raises(ArtifactError, match="incomplete"):
        decode(document)


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (("outputs", 1), "groups", [{"name": "cls", "start": 0, "stop": 0}]),
        (("outputs", 1), "groups", [{"name": "cls", "start": 16, "stop": 18}]),
        (("outputs", 0), "groups", [{"name": "cls", "start": 0, "stop": 1}]),
        ((), "probes", {**PROBES, "boundaries": [STEM], "batch": 3}),
        ((), "probes", {**PROBES, "boundaries": [{**STEM, "places": {"om": "x"}}]}),
        ((), "probes", {**PROBES, "boundaries": [{**STEM, "limit": 0}]}),
        ((), "probes", {**PROBES, "boundaries": []}),
        (("programs", 2), "batch", 0),
        (("programs", 2), "batch", -4),
        (("inputs", 0), "shape", [1, 3, 32, 32]),
        (("inputs", 0), "shape", []),
        (("inputs", 0), "shape", ["B", 3, 0, 32]),
        (("outputs", 0), "shape", ["B", "B"]),
        (("outputs", 1), "shape", ["B", -17, 64]),
        (("preprocessing",), "size", [32, 0]),
        (("preprocessing",), "shortest_edge", 31),
        (("preprocessing",), "shortest_edge", 0),
        (("preprocessing",), "shortest_edge", -32),
        (("preprocessing",), "std", [0.5, 0.0, 0.5]),
        (("reference",), "seeds", []),
    ],
)
def test_a_value_that_no_artifact_has_is_refused(
    document: dict[str, Any], path: tuple[str | int, ...], field: str, value: object
) -> None:
    at(document, *path)[field] = value
    with pytest.raises(ArtifactError, match="values that no artifact has"):
        decode(document)


@pytest.mark.parametrize("size", [[32, 48], [48, 32]])
def test_a_shortest_edge_is_at_least_the_longer_side_of_what_is_cut_out(
    document: dict[str, Any], size: list[int]
) -> None:
    document["preprocessing"].update(size=size, shortest_edge=48)
    assert decode(document).preprocessing.shortest_edge == 48
    document["preprocessing"]["shortest_edge"] = 47
    with pytest.raises(ArtifactError, match="values that no artifact has") as caught:
        decode(document)
    assert caught.value.got == "shortest edge 47"


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"schema": "1.0"', "\ufeff{}", "1" * 5000])
def test_text_that_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="not JSON"):
        decode_manifest(text, "m")


@pytest.mark.parametrize(
    "document", [{}, [], None, 1, "1.0", *({"schema": v} for v in (1, 1.0, None, "", "1", "1.x", "1.0.0", "-1.0"))]
)
def test_json_without_a_schema_version_is_refused(document: object) -> None:
    with pytest.raises(ArtifactError, match="names no schema version"):
        decode(document)


def test_a_schema_version_of_thousands_of_digits_is_refused() -> None:
    with pytest.raises(ArtifactError, match="names no schema version"):
        decode({"schema": "1" * 5000 + ".0"})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data(), value=JSON)
def test_any_value_anywhere_is_read_or_refused_as_an_artifact_error(
    tiny_artifact: Path, data: st.DataObject, value: object
) -> None:
    document = json.loads((tiny_artifact / MANIFEST_NAME).read_text("utf-8"))
    node = document
    while True:
        key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], (dict, list)) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = value
    try:
        manifest = decode(document)
    except ArtifactError:
        return
    assert decode_manifest(encode_manifest(manifest), "m") == manifest


@pytest.mark.parametrize(("value", "text"), [(float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "-inf")])
def test_numbers_that_json_lacks_are_written_as_text(value: float, text: str) -> None:
    assert to_json({"value": (value, 1.5)}) == {"value": [text, 1.5]}


def test_a_manifest_with_an_unjudgeable_limit_is_not_read_back(
    artifact_copy: Path, edit_manifest: Callable[..., None]
) -> None:
    edit_manifest(artifact_copy, lambda document: document["tolerances"][0].update(limit="nan"))
    with pytest.raises(ArtifactError, match=r"wrong value at tolerances\[0\].limit"):
        decode_manifest((artifact_copy / MANIFEST_NAME).read_text("utf-8"), "m")
