#include "graph.h"

#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "device.h"

namespace npu {
namespace {

constexpr int kCallsBeforeFailure = 3;  // SIMULATED_NPU_CAPTURE=fail

struct Recorded {
  Call call;
  std::vector<at::Tensor> results;
};

struct Graph {
  uint64_t id;
  uint64_t pool = 0;  // 0 before its capture
  c10::DeviceIndex device = 0;
  bool capturing = false;
  bool captured = false;
  std::vector<Recorded> calls;
  std::map<const void*, Block> inputs;  // memory that it reads and did not allocate
  std::map<void*, std::vector<char>> kept;
};

std::mutex mutex;
std::map<int64_t, std::unique_ptr<Graph>> graphs;

Graph& graph_of(int64_t id) {
  std::lock_guard lock(mutex);
  return *graphs.at(id);
}

at::Tensor rounded(const at::Tensor& tensor, Rounding rounding) {
  if (rounding == Rounding::kFloat) {
    return tensor.to(at::kFloat);
  }
  if (tensor.scalar_type() != at::kFloat) {
    return tensor;
  }
  // To the nearest: half of the last bit kept is added, the 12 bits below go. Infinity and NaN have no such bits.
  auto result = tensor.clone();
  auto* bits = static_cast<uint32_t*>(result.data_ptr());
  for (int64_t i = 0; i < result.numel(); ++i) {
    if ((bits[i] & 0x7F800000u) != 0x7F800000u) {
      bits[i] = (bits[i] + 0x800u) & ~0xFFFu;
    }
  }
  return result;
}

int64_t create() {
  static int64_t last = 0;
  std::lock_guard lock(mutex);
  graphs[++last] = std::make_unique<Graph>();
  graphs[last]->id = last;
  return last;
}

void reset(int64_t id) {
  auto& graph = graph_of(id);
  TORCH_CHECK(!graph.capturing, "A graph cannot be reset during its capture.");
  graph.calls.clear();
  graph.inputs.clear();
  if (graph.pool != 0) {
    release_pool(std::exchange(graph.pool, 0));
  }
  graph.captured = false;
}

void destroy(int64_t id) {
  if (!graph_of(id).capturing) {
    reset(id);
    std::lock_guard lock(mutex);
    graphs.erase(id);
  }
}

void begin(int64_t id, int64_t pool, const std::string& mode) {
  initialise();
  auto& graph = graph_of(id);
  TORCH_CHECK(!graph.captured, "This NPUGraph has a captured graph already; make another for another capture.");
  TORCH_CHECK(
      mode == "global" || mode == "thread_local" || mode == "relaxed",
      "Unknown capture error mode ", mode, ". Expected global, thread_local or relaxed.");
  const auto chosen = pool == 0 ? new_pool() : static_cast<uint64_t>(pool);
  begin_capture({graph.id, chosen, current_device(), mode == "global"});
  graph.pool = chosen;
  graph.device = current_device();
  graph.capturing = true;
  retain_pool(chosen);
  log("capture");
}

void end(int64_t id) {
  auto& graph = graph_of(id);
  TORCH_CHECK(graph.capturing, "capture_end without capture_begin.");
  TORCH_CHECK(
      capture_of_this_thread() != nullptr, "A capture must end on the stream and in the thread it began on.");
  const bool valid = end_capture();
  graph.capturing = false;
  graph.captured = true;
  for (const auto& [address, contents] : std::exchange(graph.kept, {})) {
    std::memcpy(address, contents.data(), contents.size());
  }
  for (const auto& block : blocks_of_pool(graph.pool)) {
    if (block.graph == graph.id) {
      poison(block.address, block.nbytes);
    }
  }
  if (!valid) {
    reset(id);
    TORCH_CHECK(false, "NPU error: operation failed due to a previous error during capture.");
  }
}

void replay(int64_t id) {
  auto& graph = graph_of(id);
  TORCH_CHECK(graph.captured, "Called NPUGraph::replay without a preceding successful capture.");
  forbid_in_capture("replaying a graph");
  for (const auto& [address, input] : graph.inputs) {
    const auto now = block_at(address);
    TORCH_CHECK(
        now && now->live && now->serial == input.serial,
        "The graph reads ", input.nbytes, " bytes that were freed after its capture: keep its inputs and weights. "
        "(On hardware it would read whatever lies there now.)");
  }
  for (const auto& block : blocks_of_pool(graph.pool)) {
    if (block.graph != graph.id && graph.inputs.count(block.address) == 0) {
      poison(block.address, block.nbytes);
    }
  }
  for (const auto& recorded : graph.calls) {
    const auto results = compute(recorded.call);
    at::AutoDispatchBelowADInplaceOrView guard;
    for (size_t i = 0; i < recorded.results.size(); ++i) {
      if (recorded.results[i].defined()) {
        recorded.results[i].copy_(results[i].toTensor());
      }
    }
  }
  log("replay");
}

}  // namespace

torch::jit::Stack compute(const Call& call) {
  at::AutoDispatchBelowADInplaceOrView guard;
  auto stack = call.arguments;
  for (const auto& change : call.changes) {
    auto& argument = stack.at(change.argument);
    if (argument.isTensor() && argument.toTensor().defined()) {
      argument = rounded(argument.toTensor(), change.rounding);
    }
  }
  call.op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
  return stack;
}

void record(Call call, std::vector<at::Tensor> results, const std::vector<at::Tensor>& used) {
  auto& graph = graph_of(static_cast<int64_t>(capture_of_this_thread()->graph));
  for (const auto& tensor : used) {
    const auto block = block_at(tensor.storage().data());
    if (block && block->graph != graph.id) {
      graph.inputs.emplace(block->address, *block);
    }
  }
  graph.calls.push_back({std::move(call), std::move(results)});
  if (graph.calls.size() == kCallsBeforeFailure && variable("SIMULATED_NPU_CAPTURE") == "fail") {
    forbid_in_capture("SIMULATED_NPU_CAPTURE=fail");
  }
}

void keep_contents(const at::Tensor& tensor) {
  auto& graph = graph_of(static_cast<int64_t>(capture_of_this_thread()->graph));
  const auto block = block_at(tensor.storage().data());
  if (block && block->graph != graph.id) {
    const auto* bytes = static_cast<const char*>(block->address);
    graph.kept.try_emplace(block->address, bytes, bytes + block->nbytes);
  }
}

TORCH_LIBRARY_FRAGMENT(simulated_npu, m) {
  m.def("graph_create", &create);
  m.def("graph_destroy", &destroy);
  m.def("graph_begin", &begin);
  m.def("graph_end", &end);
  m.def("graph_replay", &replay);
  m.def("graph_reset", &reset);
  m.def("graph_pool", [](int64_t id) { return static_cast<int64_t>(graph_of(id).pool); });
  m.def("new_pool", [] { return static_cast<int64_t>(new_pool()); });
  m.def("is_capturing", [] { return capture_of_this_thread() != nullptr; });
}

}  // namespace npu
