// Operators on the host's view of device memory, and graphs of them.
#pragma once

#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

namespace npu {

// What an argument becomes just before it is computed with.
enum class Rounding {
  kHf32,   // float32 keeps 11 explicit bits of its mantissa
  kFloat,  // half precision becomes float32
};

struct Change {
  size_t argument;
  Rounding rounding;
};

// An operator over CPU tensors that lie in device memory; it can be computed as often as one likes.
struct Call {
  c10::OperatorHandle op;
  torch::jit::Stack arguments;
  std::vector<Change> changes;
};

// The operator's results as its kernel for the CPU gives them.
torch::jit::Stack compute(const Call& call);

// Adds a call that was computed to the graph that this thread captures. `results` are CPU tensors in device memory
// that every replay writes to, or nothing where the call wrote to its arguments; `used` are the tensors it was given.
void record(Call call, std::vector<at::Tensor> results, const std::vector<at::Tensor>& used);

// Before a call of a capture writes to this tensor: what lies outside the capture has its contents back at the end,
// for a capture computes nothing on hardware.
void keep_contents(const at::Tensor& tensor);

}  // namespace npu
