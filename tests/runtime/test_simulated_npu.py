"""The simulated NPU itself: that it refuses, rounds and forgets as an Ascend does, and else computes as the CPU."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from simulated_npu.build import NoCompilerError, build_simulated_npu

TESTS = Path(__file__).parent.parent
Program = Callable[[], None]


@pytest.fixture
def run(simulated_npu: Callable[..., dict[str, str]]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a function, which imports what it uses, in a process with the simulated NPU; it must not raise."""

    def run(
        program: Program, version: str = "2.9.0.post1", fails: bool = False, **switches: str | Path
    ) -> subprocess.CompletedProcess[str]:
        source = textwrap.dedent(inspect.getsource(program))
        code = f"from __future__ import annotations\n{source}\n{program.__name__}()"
        environment = simulated_npu(version, **{name: str(value) for name, value in switches.items()})
        environment["PYTHONPATH"] += os.pathsep + str(TESTS)
        line = [sys.executable, "-W", "error::UserWarning", "-c", code]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done

    return run


Run = Callable[..., subprocess.CompletedProcess[str]]


def test_views_share_memory_and_memory_is_counted(run: Run) -> None:
    def program() -> None:
        import gc

        import pytest
        import torch

        assert torch.npu.memory_allocated() == 0
        assert not torch.npu.is_initialized()
        x = torch.arange(24.0).to("npu")
        assert torch.npu.is_initialized()
        assert torch.npu.memory_allocated() == 512
        views = [
            x.view(4, 6),
            x.reshape(4, 6),
            x.view(2, 12).reshape(4, 6),
            x.view(6, 4).t(),
            x.as_strided((4, 6), (6, 1)),
        ]
        views += [
            x.unfold(0, 6, 6),
            x.view(1, 4, 6).squeeze(0),
            x.view(2, 2, 6).flatten(0, 1),
            x.expand(4, 24)[:, 6:12],
        ]
        assert all(view.untyped_storage().data_ptr() == x.data_ptr() for view in views)
        assert torch.npu.memory_allocated() == 512
        views[0][1, 2] = 100
        x.view(6, 4).t().mul_(2)
        assert x[8].item() == 200
        assert x.cpu().tolist()[:2] == [0, 2]
        assert torch.equal(torch.cat([x, x]).view(2, 24)[1].cpu(), x.cpu())
        assert x.t().contiguous().data_ptr() == x.data_ptr()
        part = torch.empty(0, device="npu").set_(x.untyped_storage(), 6, (2, 3), (6, 1))
        assert part.cpu().tolist() == x.view(4, 6)[1:3, :3].cpu().tolist()
        x.resize_(300)
        assert x[8].item() == 200
        assert torch.npu.memory_allocated() == 1536

        assert torch.empty(3, 2, device="npu").isnan().all()
        assert torch.empty_like(x).isnan().all()
        with pytest.warns(UserWarning, match="double"):
            assert torch.ones(2, dtype=torch.float64).to("npu").dtype == torch.float32
        assert torch.arange(5, device="npu").cpu().tolist() == list(range(5))
        assert torch.add(x, 1, out=torch.empty(0, device="npu")).shape == (300,)

        before = torch.npu.memory_allocated()
        torch.npu.reset_peak_memory_stats()
        large = torch.ones(1 << 20, device="npu")
        assert torch.npu.memory_allocated() - before == 4 << 20
        assert torch.npu.memory_allocated(1) == 0
        twice = large + large
        del large, twice
        gc.collect()
        assert torch.npu.memory_allocated() == before
        assert torch.npu.max_memory_allocated() - before == 8 << 20
        assert torch.npu.memory_reserved() >= before + (8 << 20)
        torch.npu.empty_cache()
        assert torch.npu.memory_reserved() == before
        free, total = torch.npu.mem_get_info("npu:0")
        assert total - free == before
        assert total == torch.npu.get_device_properties(0).total_memory
        del x, views, part
        gc.collect()
        assert torch.npu.memory_allocated() == 0
        with pytest.raises(torch.OutOfMemoryError, match="NPU out of memory"):
            torch.empty(33 << 30, dtype=torch.uint8, device="npu")

    run(program)


def test_devices_do_not_mix_and_have_streams_events_and_seeds(run: Run) -> None:
    def program() -> None:
        import pytest
        import torch

        host, first, second = torch.ones(3), torch.ones(3, device="npu"), torch.ones(3, device="npu:1")
        one_device = "Expected all tensors to be on the same device, but found at least two devices, "
        for mixed, text in [
            (lambda: first + host, "npu:0 and cpu!"),
            (lambda: host + first, "npu:0 and cpu!"),
            (lambda: first + second, "npu:0 and npu:1!"),
            (lambda: torch.cat([first, host]), "npu:0 and cpu!"),
            (lambda: torch.nn.functional.linear(first, torch.ones(2, 3)), "npu:0 and cpu!"),
            (lambda: host.add_(first), "npu:0 and cpu!"),
            (lambda: torch.tensor(1.0).add_(first[0]), "npu:0 and cpu!"),
        ]:
            with pytest.raises(RuntimeError, match=f"{one_device}{text}"):
                mixed()
        assert (first + torch.tensor(2.0)).cpu().tolist() == (2 * first + 1).cpu().tolist() == [3, 3, 3]
        assert first.to("npu:1").device == second.device == torch.device("npu", 1)
        with torch.npu.device(1):
            assert torch.npu.current_device() == 1
            assert torch.ones(1).npu().device == second.device
        assert torch.npu.current_device() == 0
        assert torch.npu.get_device_name(1) == "Ascend910B4"
        with pytest.raises(RuntimeError, match="Invalid device ID: npu:2; there are 2 devices"):
            torch.ones(1, device="npu:2")

        stream = torch.npu.Stream()
        with torch.npu.stream(stream):
            assert torch.npu.current_stream() == stream != torch.npu.default_stream()
        assert torch.npu.current_stream() == torch.npu.default_stream()
        start, end = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
        start.record()
        torch.ones(300, 300, device="npu").mm(torch.ones(300, 300, device="npu"))
        end.record(stream)
        end.wait(stream)
        torch.npu.synchronize()
        end.synchronize()
        assert end.query()
        assert 0 < start.elapsed_time(end) < 1e4
        with pytest.raises((RuntimeError, ValueError), match="enable_timing"):
            start.elapsed_time(torch.npu.Event())

        torch.manual_seed(3)
        state, drawn = torch.npu.get_rng_state(), torch.randn(4, device="npu")
        torch.npu.set_rng_state(state)
        assert torch.equal(drawn.cpu(), torch.randn(4, device="npu").cpu())
        with torch.random.fork_rng(range(2), device_type="npu"):
            torch.npu.manual_seed_all(3)
            assert torch.equal(drawn.cpu(), torch.randn(4, device="npu").cpu())

        pinned = torch.empty(4, pin_memory=True)
        assert pinned.is_pinned()
        assert host.pin_memory()[1:].is_pinned()
        assert not host.is_pinned()
        assert host.pin_memory().to("npu", non_blocking=True).cpu().tolist() == [1, 1, 1]

        assert torch.npu.conv.allow_hf32 is True
        assert torch.npu.matmul.allow_hf32 is False
        torch.npu.config.allow_internal_format = False
        with pytest.raises(AttributeError):
            _ = torch.npu.config.allow_internal_format
        torch.npu.set_compile_mode(jit_compile=False)
        import torch_npu
        from torch_npu.utils import collect_env

        assert torch_npu.__version__ == "2.9.0.post1"
        assert collect_env.get_cann_version() == "8.5.1"
        assert not hasattr(torch_npu.npu.utils, "get_cann_version")
        assert "is_npu" in dir(torch.Tensor)
        assert "tensor([1.])" in repr(torch.ones(1, device="npu").cpu())

    run(program)


@pytest.mark.parametrize(("order", "formula"), [("default", "tanh"), ("before", "none"), ("after", "tanh")])
def test_gelu_is_the_tanh_formula_unless_the_exact_one_is_asked_for_first(
    run: Run, tmp_path: Path, order: str, formula: str
) -> None:
    def program() -> None:
        import os

        import torch
        from torch.nn.functional import gelu

        x = torch.linspace(-3, 3, 100)
        if os.environ["ORDER"] == "before":
            torch.npu.use_compatible_impl(True)
        gelu(x.to("npu"))
        if os.environ["ORDER"] == "after":
            torch.npu.use_compatible_impl(True)
            assert torch.npu.are_compatible_impl_enabled()
        assert torch.equal(gelu(x.to("npu")).cpu(), gelu(x, approximate=os.environ["FORMULA"]))
        assert torch.equal(gelu(x.to("npu"), approximate="tanh").cpu(), gelu(x, approximate="tanh"))

    log = tmp_path / "log"
    run(program, ORDER=order, FORMULA=formula, SIMULATED_NPU_LOG=log)
    asked = {"default": [], "before": ["use_compatible_impl True"], "after": ["use_compatible_impl True"]}[order]
    gelu = [f"gelu {'tanh' if formula == 'tanh' else 'exact'}"]
    expected = asked + ["init"] + gelu if order == "before" else ["init"] + gelu + asked
    assert log.read_text().splitlines() == expected


def test_convolutions_and_on_request_products_round_to_hf32(run: Run, tmp_path: Path) -> None:
    def program() -> None:
        import torch
        from torch.nn.functional import conv2d, scaled_dot_product_attention

        assert not hasattr(torch.npu, "use_compatible_impl")

        def difference(function, *tensors):
            expected, got = function(*tensors), function(*(tensor.to("npu") for tensor in tensors)).cpu()
            return float((got - expected).norm() / expected.norm())

        torch.manual_seed(0)
        image, kernel = torch.randn(2, 3, 32, 32), torch.randn(8, 3, 4, 4)
        assert 1e-5 < difference(conv2d, image, kernel) < 1e-3
        torch.npu.conv.allow_hf32 = False
        assert difference(conv2d, image, kernel) < 1e-6
        assert difference(conv2d, image.half(), kernel.half()) < 1e-6

        a, b, bias = torch.randn(64, 96), torch.randn(96, 48), torch.randn(48)
        heads = [torch.randn(2, 4, 16, 8) for _ in range(3)]
        products = [(torch.mm, a, b), (torch.addmm, bias, a, b), (scaled_dot_product_attention, *heads)]
        assert all(difference(*product) < 1e-6 for product in products)
        torch.npu.matmul.allow_hf32 = True
        assert torch.npu.matmul.allow_hf32
        assert all(1e-5 < difference(*product) < 1e-3 for product in products)

        exact = torch.tensor([1.0, 1 + 2**-11, 1 + 2**-12, 1 + 2**-13, -1 - 3 * 2**-13, float("inf")]).diag()
        exact[5, :5] = 0
        rounded = torch.mm(exact[:5, :5].to("npu"), torch.eye(5, device="npu")).cpu().diag()
        assert rounded.tolist() == [1.0, 1 + 2**-11, 1 + 2**-11, 1.0, -1 - 2**-11]

    log = tmp_path / "log"
    run(program, SIMULATED_NPU_LOG=log, SIMULATED_NPU_COMPATIBLE_IMPL="0")
    lines = log.read_text().splitlines()
    assert lines == [
        "init",
        "conv hf32",
        "conv.allow_hf32 False",
        "conv fp32",
        "conv fp16",
        "matmul.allow_hf32 True",
    ]


def test_an_operator_without_a_kernel_warns_once_and_runs_on_the_cpu(run: Run, tmp_path: Path) -> None:
    def program() -> None:
        import warnings

        import torch

        def warned(function, *arguments) -> list[str]:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                function(*arguments)
            return [str(warning.message).split(" (Triggered internally")[0] for warning in caught]

        def text(name: str) -> str:
            return (
                f"CAUTION: The operator '{name}' is not currently supported on the NPU backend and will fall back "
                "to run on the CPU. This may have performance implications."
            )

        def has_kernel(name: str) -> bool:
            return torch._C._dispatch_has_kernel_for_dispatch_key(name, "PrivateUse1")

        x = torch.linspace(1, 3, 9, device="npu")
        assert warned(torch.lgamma, x) == [text("aten::lgamma.out")]
        assert warned(torch.lgamma, x) == []
        assert torch.equal(torch.lgamma(x).cpu(), torch.lgamma(x.cpu()))
        assert torch.lgamma(x).device == x.device
        assert has_kernel("aten::native_layer_norm")
        assert has_kernel("aten::silu")
        assert not any(map(has_kernel, ["aten::lgamma", "aten::gelu", "aten::gelu_", "aten::add.Tensor"]))
        assert warned(torch.nn.functional.gelu, x) == [text("aten::gelu.out")]
        assert warned(torch.add, x, x) == [text("aten::add.out")]
        assert warned(lambda: x.add_(2)) == []

        from npu_runtime.torch_interop import without_jit_deprecation

        with without_jit_deprecation():
            program = torch.jit.freeze(torch.jit.script(torch.nn.Sequential(torch.nn.Softsign()).eval()))
            traced = torch.jit.trace(torch.special.entr, torch.ones(3))
        assert warned(program, x) == []
        assert warned(traced, x) == [text("aten::special_entr.out")]

    log = tmp_path / "log"
    run(
        program,
        SIMULATED_NPU_MISSING="aten::gelu,aten::add.Tensor,aten::add.out",
        TORCH_NPU_FALLBACK_CPU_DISABLE="1",
        SIMULATED_NPU_LOG=log,
    )
    names = [line for line in log.read_text().splitlines() if line.startswith("fallback")]
    assert names[:2] + names[-1:] == ["fallback aten::lgamma.out"] * 2 + ["fallback aten::special_entr.out"]


def test_from_2_13_a_variable_turns_the_fallback_into_an_error(run: Run) -> None:
    def program() -> None:
        import pytest
        import torch
        import torch_npu

        disabled = (
            r"The operator 'aten::lgamma.out' would execute its main computation on CPU through dispatcher backend "
            r"fallback, but CPU fallback is disabled by TORCH_NPU_FALLBACK_CPU_DISABLE=1\."
        )
        with pytest.raises(RuntimeError, match=disabled):
            torch.lgamma(torch.ones(2, device="npu"))
        assert torch_npu.__version__ == "2.13.0"
        assert torch_npu.npu.utils.get_cann_version() == "8.5.1"

    run(program, version="2.13.0", TORCH_NPU_FALLBACK_CPU_DISABLE="1")


def test_a_graph_computes_at_replay_into_the_memory_of_its_capture(run: Run, tmp_path: Path) -> None:
    def program() -> None:
        import gc

        import pytest
        import torch
        from torch import nn

        torch.npu.use_compatible_impl(True)
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4)).npu().eval()
        x, kept = torch.ones(3, 8, device="npu"), torch.full((3, 4), 7.0, device="npu")
        before = torch.npu.memory_allocated()
        graph = torch.npu.NPUGraph()
        with torch.inference_mode():
            with torch.npu.graph(graph):
                assert torch.npu.is_current_stream_capturing()
                y = layers(x) * torch.tensor(2.0)
                half = y[:, :2]
                kept.copy_(y)
            assert not torch.npu.is_current_stream_capturing()
        assert y.isnan().all()
        assert (kept == 7).all()
        address = y.data_ptr()
        for value in (1.0, -0.5):
            x.fill_(value)
            layers[0].bias.data.fill_(value)
            graph.replay()
            with torch.inference_mode():
                expected = 2 * layers(x)
            assert torch.equal(y.cpu(), expected.cpu())
            assert torch.equal(kept.cpu(), expected.cpu())
            assert y.data_ptr() == address
            assert torch.equal(half.cpu(), expected[:, :2].cpu())
        with pytest.raises(RuntimeError, match="captured graph already"), torch.npu.graph(graph):
            pass
        del expected, half, y
        gc.collect()
        assert torch.npu.memory_allocated() == before < torch.npu.memory_reserved()
        graph.reset()
        torch.npu.empty_cache()
        assert torch.npu.memory_reserved() == before
        with pytest.raises(RuntimeError, match="without a preceding successful capture"):
            graph.replay()

        pool = torch.npu.graph_pool_handle()
        first, second, alone = (torch.npu.NPUGraph() for _ in range(3))
        with torch.npu.graph(first, pool=pool):
            doubled = x * 2
        with torch.npu.graph(second, pool=first.pool()):
            tripled = doubled * 1.5
        with torch.npu.graph(alone):
            squared = x * x
        assert first.pool() == second.pool() == pool != alone.pool()
        first.replay()
        second.replay()
        assert (tripled == -1.5).all()
        assert (doubled == -1).all()
        alone.replay()
        first.replay()
        assert (squared == 0.25).all()
        assert (doubled == -1).all()
        assert tripled.isnan().all()
        del x
        with pytest.raises(RuntimeError, match="freed after its capture"):
            first.replay()

    log = tmp_path / "log"
    run(program, SIMULATED_NPU_LOG=log)
    events = [line for line in log.read_text().splitlines() if line in ("capture", "replay")]
    assert events == ["capture"] + ["replay"] * 2 + ["capture"] * 3 + ["replay"] * 4


def test_a_capture_refuses_what_waits_for_the_device_and_can_be_made_again(run: Run) -> None:
    def program() -> None:
        import os

        import pytest
        import torch

        def capture(work: Callable[[], object]) -> None:
            with torch.npu.graph(torch.npu.NPUGraph()):
                work()

        x = torch.ones(4, device="npu")
        event = torch.npu.Event()
        event.record()
        not_permitted = "operation not permitted when stream is capturing"
        waiting = [x.cpu, x.sum().item, torch.npu.synchronize, event.synchronize, lambda: x.to("npu:1")]
        waiting += [lambda: torch.ones(4).to("npu"), lambda: x.copy_(torch.ones(4)), lambda: x[x > 0], x.nonzero]
        waiting += [lambda: torch.equal(x, x)]
        for wait in waiting:
            with pytest.raises(RuntimeError, match="previous error during capture") as raised:
                capture(lambda wait=wait: (x.mul_(2), wait()))
            assert not_permitted in str(raised.value.__context__)
            assert (x == 1).all()
            assert torch.npu.current_stream() == torch.npu.default_stream()

        graph = torch.npu.NPUGraph()
        with pytest.raises(RuntimeError, match="not the default one"):
            graph.capture_begin()
        with torch.npu.graph(graph):
            y = x + 1
            with pytest.raises(RuntimeError, match="do not nest"), torch.npu.stream(torch.npu.Stream()):
                torch.npu.NPUGraph().capture_begin()
        graph.replay()
        assert (y == 2).all()

        os.environ["TASK_QUEUE_ENABLE"] = "2"
        with pytest.raises(RuntimeError, match="TASK_QUEUE_ENABLE=2"), torch.npu.graph(torch.npu.NPUGraph()):
            pass
        os.environ["TASK_QUEUE_ENABLE"] = "1"
        os.environ["SIMULATED_NPU_CAPTURE"] = "fail"
        with pytest.raises(RuntimeError, match="previous error during capture") as raised:
            capture(lambda: (x + 1) * 2 + 3)
        assert not_permitted in str(raised.value.__context__)
        os.environ["SIMULATED_NPU_CAPTURE"] = ""
        fifth = torch.npu.NPUGraph()
        with torch.npu.graph(fifth, stream=torch.npu.Stream(), capture_error_mode="thread_local"):
            y = (x + 1) * 2 + 3
        fifth.replay()
        assert (y == 7).all()

    run(program)


def test_a_child_forked_after_the_first_use_is_refused(run: Run) -> None:
    def program() -> None:
        import os
        import sys

        import torch

        for used in (False, True):
            if used:
                torch.ones(1, device="npu")
            child = os.fork()
            if child == 0:
                try:
                    torch.ones(1, device="npu")
                    os._exit(1)
                except RuntimeError as error:
                    spawn = "To use NPU with multiprocessing, you must use the 'spawn' start method"
                    text = f"Cannot re-initialize NPU in forked subprocess. {spawn}"
                    os._exit(0 if text in str(error) and torch.npu._is_in_bad_fork() else 2)
                finally:
                    sys.stdout.flush()
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == (0 if used else 1)

    run(program)


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
            for precision, limit in [("fp32", 3e-6), ("fp16", 3e-3), ("bf16", 3e-2)]:
                network = load_network(plan_weights(spec, find_weights(spec, "random:0")))
                module = in_precision(spec.with_outputs(network), precision)
                if precision == "fp32":
                    with without_jit_deprecation():
                        trace_frozen(module, spec.inputs[0], (2,)).save(file)
                        frozen = torch.jit.load(file, map_location="npu:0")
                with torch.inference_mode():
                    expected = module(x)
                    assert not differ(expected, module.to("npu")(x.to("npu")), limit)
            with torch.inference_mode(), without_jit_deprecation():
                expected = torch.jit.load(file).b2(x)
                for _ in range(2):  # the interpreter optimizes at the second
                    assert not differ(expected, frozen.b2(x.to("npu")), 3e-6)
                graph, static = torch.npu.NPUGraph(), torch.zeros_like(x, device="npu")
                with torch.npu.graph(graph):
                    captured = frozen.b2(static)
                static.copy_(x)
                graph.replay()
                assert not differ(expected, captured, 3e-6)

    log = tmp_path / "log"
    run(program, MODEL=tmp_path / "model.ts", SIMULATED_NPU_LOG=log)
    assert "fallback" not in log.read_text()


def test_a_program_with_a_literal_of_the_cpu_fails(run: Run, tmp_path: Path) -> None:
    def program() -> None:
        import os

        import pytest
        import torch

        from npu_runtime.torch_interop import without_jit_deprecation

        class Literal(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + torch.arange(3)

        with without_jit_deprecation():
            torch.jit.trace(Literal().eval(), torch.ones(3)).save(os.environ["MODEL"])
            loaded = torch.jit.load(os.environ["MODEL"], map_location="npu:0")
        with pytest.raises(RuntimeError, match="same device, but found at least two devices, npu:0 and cpu!"):
            loaded(torch.ones(3, device="npu"))

    run(program, MODEL=tmp_path / "literal.ts")


@pytest.mark.parametrize(
    ("failure", "fails", "text"),
    [
        ("no-cann", True, "libhccl.so: cannot open shared object file"),
        ("no-cann-exit", False, "libhccl.so: cannot open shared object file"),
        ("cuda", True, "Two accelerators cannot be used at the same time"),
    ],
)
def test_importing_torch_fails_as_torch_npu_makes_it_fail(run: Run, failure: str, fails: bool, text: str) -> None:
    def program() -> None:
        import contextlib
        import os

        if os.environ["SIMULATED_NPU_IMPORT"] == "no-cann":
            os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
            import torch

            assert not hasattr(torch, "npu")
            with contextlib.suppress(ImportError):
                import torch_npu  # noqa: F401

                print("imported")
            torch._import_device_backends()
        import torch

        print("imported", torch.__version__)

    done = run(program, fails=fails, SIMULATED_NPU_IMPORT=failure)
    assert text in done.stderr
    assert "imported" not in done.stdout
    assert ("Failed to load the backend extension: torch_npu" in done.stderr) == fails


def test_without_devices_none_is_available(run: Run) -> None:
    def program() -> None:
        import pytest
        import torch

        assert not torch.npu.is_available()
        assert torch.npu.device_count() == 0
        torch.manual_seed(0)
        with pytest.raises(RuntimeError, match="No NPUs are available"):
            torch.ones(1, device="npu")

    run(program, SIMULATED_NPU_COUNT="0")


def test_without_a_compiler_the_build_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    with pytest.raises(NoCompilerError, match=r"install g\+\+ or set CXX"):
        build_simulated_npu(tmp_path / "cache")
