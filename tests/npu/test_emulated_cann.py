"""The emulated CANN under the vendor's torch_npu: work runs late and in order, memory is kept apart, faults come."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from emulated_cann.build import NoCompilerError, build_emulated_cann

TESTS = Path(__file__).parent.parent
Program = Callable[[], None]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(emulated_npu: Callable[..., dict[str, str]]) -> Run:
    """Run a function, which imports what it uses, in a process with the emulated NPU; it must not raise."""

    def run(program: Program, **variables: object) -> subprocess.CompletedProcess[str]:
        code = (
            f"from __future__ import annotations\n{textwrap.dedent(inspect.getsource(program))}\n{program.__name__}()"
        )
        environment = emulated_npu(**variables)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(TESTS)]))
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.mark.parametrize("streams", ["late", "prompt"])
def test_streams_keep_order_and_run_when_they_are_waited_for(run: Run, streams: str) -> None:
    def program() -> None:
        import os

        import torch

        host, x = torch.zeros(300, 300).pin_memory(), torch.randn(300, 300)
        on_device = x.to("npu:0")
        host.copy_(on_device * 2 + 1, non_blocking=True)
        if os.environ["EMULATED_CANN_STREAMS"] == "late":
            assert not host.any(), "the copy ran before anybody waited for it"
        torch.npu.synchronize()
        assert torch.equal(host, x * 2 + 1)

        side, first, second = torch.npu.Stream(), *(torch.npu.Event(enable_timing=True) for _ in range(2))
        with torch.npu.stream(side):
            first.record()
            product = on_device @ on_device
            second.record()
        torch.npu.current_stream().wait_event(second)
        host.copy_(product, non_blocking=True)
        while not second.query():  # asking makes it run
            pass
        assert first.elapsed_time(second) > 0
        torch.npu.current_stream().synchronize()
        torch.testing.assert_close(host, x @ x)

    run(program, EMULATED_CANN_STREAMS=streams)


def test_memory_is_of_a_kind_and_of_a_device_and_runs_out(run: Run) -> None:
    def program() -> None:
        import ctypes

        import pytest
        import torch

        x = torch.empty(1000, device="npu:0")
        assert x.cpu().isnan().all(), "memory that nothing was written to holds NaN"
        acl = ctypes.CDLL("libascendcl.so")
        acl.aclGetRecentErrMsg.restype = ctypes.c_char_p
        host, device = torch.zeros(4), torch.ones(4, device="npu:0")
        pointers = {"host": ctypes.c_void_p(host.data_ptr()), "device": ctypes.c_void_p(device.data_ptr())}

        def copy(to: str, of: str, kind: int) -> int:
            size = ctypes.c_size_t(16)
            return int(acl.aclrtMemcpy(pointers[to], size, pointers[of], size, kind))

        to_device, to_host = 1, 2
        assert copy("device", "host", to_device) == copy("host", "device", to_host) == 0
        assert copy("host", "host", to_device) == copy("device", "device", to_host) == 107000
        assert b"other pointers" in acl.aclGetRecentErrMsg()

        assert torch.npu.device_count() == 2
        assert torch.npu.get_device_name(1) == "Ascend910B4"
        for other in (torch.ones(2), torch.ones(2, device="npu:1")):
            with pytest.raises(RuntimeError, match="same device"):
                torch.ones(2, device="npu:0") @ other
        before = torch.npu.mem_get_info(0)[0]
        kept = torch.ones(8 << 20, device="npu:0")
        assert before - torch.npu.mem_get_info(0)[0] >= 32 << 20
        with pytest.raises(torch.OutOfMemoryError, match=r"NPU out of memory. Tried to allocate .* free"):
            torch.empty(40 << 20, device="npu:0")
        torch.empty(40 << 20, device="npu:1")
        del kept
        torch.empty(40 << 20, device="npu:0")

    run(program, EMULATED_CANN_MEMORY_MB=180)


def test_a_graph_computes_at_replay_into_the_memory_of_its_capture(run: Run, tmp_path: Path) -> None:
    def program() -> None:
        import pytest
        import torch

        x = torch.ones(4, device="npu:0")
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph):
            y = x * 3 + 1
        for value in (2.0, -1.0):
            x.fill_(value)
            graph.replay()
            assert (y == value * 3 + 1).all()

        for wait in (y.cpu, y.sum().item, torch.npu.synchronize):
            with pytest.raises(RuntimeError) as raised, torch.npu.graph(torch.npu.NPUGraph()):
                (x.mul_(2), wait())
            assert "507903" in str(raised.value) or "107027" in str(raised.value)
            torch.npu.set_stream(torch.npu.default_stream())  # which torch_npu leaves to the caller
            assert (x == -1).all(), "a capture runs nothing"
        again = torch.npu.NPUGraph()
        with torch.npu.graph(again):
            z = x - 1
        again.replay()
        assert (z == -2).all()

    log = tmp_path / "log"
    run(program, EMULATED_CANN_LOG=log)
    lines = log.read_text("utf-8").splitlines()
    assert [line for line in lines if line.startswith("replay")] == ["replay 2", "replay 2", "replay 1"]


@pytest.mark.parametrize("fault", ["replay:nothing", "replay:incomplete"])
def test_replays_go_wrong_on_request(run: Run, fault: str) -> None:
    def program() -> None:
        import os

        import torch

        x = torch.ones(4, device="npu:0")
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph):
            y = (x * 3).exp() + 1
        graph.replay()
        assert y.isnan().all() or os.environ["EMULATED_CANN_FAULTS"] == "replay:incomplete"
        assert not torch.equal(y.cpu(), (x.cpu() * 3).exp() + 1)

    run(program, EMULATED_CANN_FAULTS=fault)


@pytest.mark.parametrize(("missing", "name"), [("missing:aclnnSilu", "Swish"), ("", "Erfinv")])
def test_an_operator_that_is_missing_says_its_name_and_the_process_computes_no_more(
    run: Run, missing: str, name: str
) -> None:
    def program() -> None:
        import os

        import pytest
        import torch

        x = torch.ones(3, device="npu:0")
        torch.npu.synchronize()
        compute = torch.nn.functional.silu if os.environ["NAME"] == "Swish" else torch.erfinv
        with pytest.raises(RuntimeError, match=f"the emulated CANN has no aclop {os.environ['NAME']}"):
            compute(x).cpu()
        assert (x + 1).tolist() != [2, 2, 2], "torch_npu drops every operator after an error, without a word"

    run(program, NAME=name, EMULATED_CANN_FAULTS=missing)


def test_an_operator_without_a_kernel_runs_on_the_cpu_and_says_so_on_stderr_alone(run: Run) -> None:
    def program() -> None:
        import os
        import warnings

        import torch

        x = torch.linspace(-1, 1, 9).to("npu:0")
        assert not torch.ops.aten.gelu.default.has_kernel_for_dispatch_key(torch._C.DispatchKey.PrivateUse1)
        assert torch.ops.aten.silu.default.has_kernel_for_dispatch_key(torch._C.DispatchKey.PrivateUse1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                for _ in range(2):
                    assert torch.equal(torch.nn.functional.gelu(x).cpu(), torch.nn.functional.gelu(x.cpu()))
            except RuntimeError as error:
                assert os.environ.get("TORCH_NPU_FALLBACK_CPU_DISABLE") == "1"
                print(error)
        assert not [str(warning.message) for warning in caught if "fall back" in str(warning.message)]

    allowed = run(program, EMULATED_CANN_FAULTS="no-kernel:aten::gelu")
    text = "CAUTION: The operator 'aten::gelu.out' is not currently supported on the NPU backend and will fall back"
    assert allowed.stderr.count(text) == 1
    refused = run(program, EMULATED_CANN_FAULTS="no-kernel:aten::gelu", TORCH_NPU_FALLBACK_CPU_DISABLE="1")
    assert "'aten::gelu.out' would execute its main computation on CPU" in refused.stdout
    assert "TORCH_NPU_FALLBACK_CPU_DISABLE=1" in refused.stdout


@pytest.mark.parametrize("asked", ["first", "later"])
def test_gelu_is_the_tanh_formula_unless_the_exact_one_is_asked_for_first(run: Run, asked: str) -> None:
    def program() -> None:
        import os

        import torch
        from torch.nn.functional import gelu

        x = torch.linspace(-3, 3, 100)
        if os.environ["ASKED"] == "first":
            torch.npu.use_compatible_impl(True)
        gelu(x.to("npu:0"))
        torch.npu.use_compatible_impl(True)
        assert torch.npu.are_compatible_impl_enabled()
        formula = "none" if os.environ["ASKED"] == "first" else "tanh"
        assert torch.equal(gelu(x.to("npu:0")).cpu(), gelu(x, approximate=formula))

    run(program, ASKED=asked)


@pytest.mark.parametrize("fault", ["", "cube:hf32", "gelu:tanh", "attention:uniform"])
def test_numbers_are_of_float32_where_it_is_asked_for_and_go_wrong_on_request(run: Run, fault: str) -> None:
    def program() -> None:
        import os

        import torch
        from torch.nn.functional import conv2d, gelu, scaled_dot_product_attention

        def error(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> float:
            expected, got = function(*tensors), function(*(tensor.to("npu:0") for tensor in tensors)).cpu()
            return float((got - expected).norm() / expected.norm())

        fault = os.environ["EMULATED_CANN_FAULTS"]
        torch.npu.use_compatible_impl(True)
        torch.manual_seed(0)
        image, kernel = torch.randn(2, 3, 32, 32), torch.randn(8, 3, 4, 4)
        heads = [4 * torch.randn(2, 4, 16, 8) for _ in range(3)]
        a, b = torch.randn(64, 96), torch.randn(96, 48)
        assert torch.npu.conv.allow_hf32 is True
        assert torch.npu.matmul.allow_hf32 is False
        assert 1e-5 < error(conv2d, image, kernel) < 1e-3
        torch.npu.conv.allow_hf32 = False
        hf32 = fault == "cube:hf32"
        assert (error(conv2d, image, kernel) < 1e-6) != hf32
        assert (error(torch.mm, a, b) < 1e-6) != hf32
        torch.npu.matmul.allow_hf32 = True
        assert 1e-5 < error(torch.mm, a, b) < 1e-3
        assert (error(gelu, torch.linspace(-3, 3, 99)) < 1e-6) != (fault == "gelu:tanh")
        assert (error(scaled_dot_product_attention, *heads) < 1e-5) != (fault == "attention:uniform")

    run(program, EMULATED_CANN_FAULTS=fault)


def test_a_call_fails_from_the_one_that_was_asked_for(run: Run) -> None:
    def program() -> None:
        import pytest
        import torch

        x = torch.ones(3, device="npu:0")
        torch.npu.synchronize()
        torch.npu.synchronize()
        with pytest.raises(RuntimeError, match="507010"):
            torch.npu.synchronize()
        assert x.device.type == "npu"

    run(program, EMULATED_CANN_FAULTS="aclrtSynchronizeDevice@3=507010,aclrtSynchronizeDeviceWithTimeout@3=507010")


@pytest.mark.parametrize(("visible", "count"), [("0,1,2", 3), ("2", 1), ("", 0)])
def test_visible_devices_are_those_that_cann_takes(run: Run, visible: str, count: int) -> None:
    def program() -> None:
        import os

        import torch

        assert torch.npu.device_count() == int(os.environ["COUNT"])
        assert torch.npu.is_available() == (torch.npu.device_count() > 0)

    run(program, ASCEND_RT_VISIBLE_DEVICES=visible, COUNT=count, EMULATED_CANN_DEVICES=4)


def test_every_family_runs_as_on_the_cpu_eager_frozen_and_as_a_graph_without_the_fallback(
    run: Run, tmp_path: Path
) -> None:
    def program() -> None:
        import os

        import tiny
        import torch

        from npu_export.network import load_network, plan_weights
        from npu_export.precision import in_precision
        from npu_export.torchscript import trace_frozen
        from npu_export.weights import find_weights
        from npu_runtime.torch_interop import without_jit_deprecation

        def differ(expected, got, limit: float) -> bool:
            return any(
                float((a - b.cpu()).abs().max()) > limit or b.device.type != "npu" for a, b in zip(expected, got)
            )

        torch.npu.conv.allow_hf32 = False
        torch.npu.use_compatible_impl(True)
        torch.manual_seed(0)
        file = os.environ["MODEL"]
        for spec in tiny.FAMILIES:
            x = torch.randn(spec.inputs[0].of_batch(2))
            for precision, limit in [("fp32", 5e-6), ("fp16", 5e-3), ("bf16", 5e-2)]:
                network = load_network(plan_weights(spec, find_weights(spec, "random:0")))
                module = in_precision(spec.with_outputs(network), precision)
                if precision == "fp32":
                    with without_jit_deprecation():
                        trace_frozen(module, spec.inputs[0], (2,)).save(file)
                        frozen = torch.jit.load(file, map_location="npu:0")
                with torch.inference_mode():
                    expected = module(x)
                    assert not differ(expected, module.to("npu:0")(x.to("npu:0")), limit), (spec.name, precision)
            with torch.inference_mode(), without_jit_deprecation():
                expected = torch.jit.load(file).b2(x)
                static = x.to("npu:0")
                for _ in range(3):  # the interpreter optimises in the first ones
                    assert not differ(expected, frozen.b2(static), 5e-6), spec.name
                graph = torch.npu.NPUGraph()
                static.zero_()
                with torch.npu.graph(graph):
                    captured = frozen.b2(static)
                static.copy_(x)
                graph.replay()
                assert not differ(expected, captured, 5e-6), spec.name

    done = run(program, MODEL=tmp_path / "model.ts")
    assert "fall back to run on the CPU" not in done.stderr


def test_without_a_compiler_the_build_says_so(
    emulated_npu: Callable[..., dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    with pytest.raises(NoCompilerError, match=r"install g\+\+ or set CXX"):
        build_emulated_cann(tmp_path / "cache")
