// Tensors of the device, the kernels that it has, and what becomes of operators without one.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <string_view>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include "device.h"
#include "graph.h"

namespace npu {
namespace {

using at::Tensor;
using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

// ---- tensors

c10::ScalarType supported(c10::ScalarType dtype) {
  if (dtype != c10::kDouble) {
    return dtype;
  }
  TORCH_WARN_ONCE("Device do not support double dtype now, dtype cast replace with float.");
  return c10::kFloat;
}

// Allocates on one device whatever this thread's is, as torch's own functions for empty tensors want it.
struct AllocatorOf final : c10::Allocator {
  explicit AllocatorOf(c10::DeviceIndex device) : device(device) {}
  c10::DataPtr allocate(size_t nbytes) override {
    return npu::allocate(nbytes, device);
  }
  void copy_data(void* to, const void* from, size_t nbytes) const override {
    default_copy_data(to, from, nbytes);
  }
  c10::DeviceIndex device;
};

// The storage keeps the allocator, so each device's is kept for good.
AllocatorOf* allocator_of(c10::Device device) {
  static auto* const leaked = new std::map<c10::DeviceIndex, AllocatorOf>;
  static std::mutex mutex;
  std::lock_guard lock(mutex);
  return &leaked->try_emplace(index_of(device), index_of(device)).first->second;
}

c10::Device device_or_current(std::optional<c10::Device> device) {
  return {kNpu, index_of(device.value_or(c10::Device(kNpu, -1)))};
}

// Whoever reads what was never written finds NaN.
Tensor poisoned(Tensor tensor) {
  poison(tensor.storage().mutable_data(), tensor.storage().nbytes());
  return tensor;
}

Tensor empty(
    at::IntArrayRef size,
    std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout> /*layout*/,
    std::optional<c10::Device> device,
    std::optional<bool> pin_memory,
    std::optional<c10::MemoryFormat> format) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only tensors of the CPU can be pinned.");
  return poisoned(at::detail::empty_generic(
      size, allocator_of(device_or_current(device)), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      supported(dtype.value_or(c10::get_default_dtype_as_scalartype())), format));
}

Tensor unfilled(at::IntArrayRef size, at::IntArrayRef stride, c10::ScalarType dtype, c10::Device device) {
  return at::detail::empty_strided_generic(
      size, stride, allocator_of(device), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), supported(dtype));
}

Tensor empty_strided(
    at::IntArrayRef size,
    at::IntArrayRef stride,
    std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout> /*layout*/,
    std::optional<c10::Device> device,
    std::optional<bool> pin_memory) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only tensors of the CPU can be pinned.");
  const auto type = dtype.value_or(c10::get_default_dtype_as_scalartype());
  return poisoned(unfilled(size, stride, type, device_or_current(device)));
}

const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<c10::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  grow(self.storage(), at::detail::computeStorageNbytesContiguous(size, self.itemsize(), self.storage_offset()));
  if (format && *format != c10::MemoryFormat::Preserve) {
    impl->empty_tensor_restride(*format);
  }
  return self;
}

Tensor& set_storage_strided(
    Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset);
  if (stride.size() == size.size() && !size.empty()) {
    impl->set_sizes_and_strides(size, stride);
  } else {
    impl->set_sizes_contiguous(size);
  }
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage source) {
  const auto numel = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_storage_strided(self, std::move(source), 0, {numel}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage_strided(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor& set_empty(Tensor& self) {
  return set_tensor(self, at::empty({0}, self.options()));
}

void record_stream(Tensor& /*self*/, c10::Stream /*stream*/) {}

// ---- CPU tensors over the device's memory

// One storage for each of the device's, so that what aliases there aliases here.
class HostViews {
 public:
  Tensor of(const Tensor& tensor) {
    if (tensor.device().type() != kNpu) {
      return tensor;
    }
    auto view = at::detail::make_tensor<c10::TensorImpl>(
        storage_of(tensor.storage()), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
    view.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    views_.emplace_back(view, tensor);
    return view;
  }

  // The tensor of the device that the view is of.
  std::optional<Tensor> original(const Tensor& view) const {
    for (const auto& [known, tensor] : views_) {
      if (known.is_same(view)) {
        return tensor;
      }
    }
    return std::nullopt;
  }

  // The device's storage whose view this is.
  std::optional<c10::Storage> original(const c10::Storage& view) const {
    for (const auto& [device, host] : storages_) {
      if (host.is_alias_of(view)) {
        return device;
      }
    }
    return std::nullopt;
  }

  // Takes over the sizes that a kernel gave to its outputs.
  void resize_originals() {
    for (const auto& [view, tensor] : views_) {
      if (view.sizes() != tensor.sizes()) {
        tensor.resize_(view.sizes());
        HostViews().of(tensor).copy_(view);
      }
    }
  }

 private:
  c10::Storage storage_of(const c10::Storage& device) {
    for (const auto& [known, host] : storages_) {
      if (known.unsafeGetStorageImpl() == device.unsafeGetStorageImpl()) {
        return host;
      }
    }
    const bool nothing = device.nbytes() == 0;  // an output that the kernel is to size
    c10::Storage host(
        c10::Storage::use_byte_size_t(), device.nbytes(),
        nothing ? c10::DataPtr() : c10::DataPtr(device.mutable_data(), c10::Device(c10::DeviceType::CPU)),
        nothing ? c10::GetAllocator(c10::DeviceType::CPU) : nullptr, nothing);
    storages_.emplace_back(device, host);
    return host;
  }

  std::vector<std::pair<Tensor, Tensor>> views_;
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_;
};

// The device's tensor with these contents.
Tensor to_device(Tensor host, c10::Device device) {
  if (supported(host.scalar_type()) != host.scalar_type() || !host.is_non_overlapping_and_dense()) {
    host = host.to(supported(host.scalar_type())).contiguous();
  }
  auto tensor = unfilled(host.sizes(), host.strides(), host.scalar_type(), device);
  if (host.nbytes() > 0) {
    std::memcpy(tensor.mutable_data_ptr(), host.const_data_ptr(), host.nbytes());
  }
  return tensor;
}

template <typename Function>
IValue map_tensors(const IValue& value, const Function& function) {
  if (value.isTensor()) {
    const auto& tensor = value.toTensor();
    return tensor.defined() ? IValue(function(tensor)) : value;
  }
  if (value.isTensorList()) {
    auto tensors = value.toTensorVector();
    for (auto& tensor : tensors) {
      tensor = function(tensor);
    }
    return tensors;
  }
  if (value.isOptionalTensorList()) {
    auto tensors = value.toOptionalTensorVector();
    for (auto& tensor : tensors) {
      if (tensor && tensor->defined()) {
        tensor = function(*tensor);
      }
    }
    return tensors;
  }
  return value;
}

std::vector<Tensor> tensors_in(at::ArrayRef<IValue> values) {
  std::vector<Tensor> found;
  for (const auto& value : values) {
    map_tensors(value, [&](const Tensor& tensor) {
      found.push_back(tensor);
      return tensor;
    });
  }
  return found;
}

// ---- kernels

// Operators that a 910B has kernels for: those of encoders and their likes. An entry stands for all overloads of
// the operator, in place or not, that need a kernel of their own.
const std::set<std::string_view> kKernels = {
    "abs", "add", "addbmm", "addcdiv", "addcmul", "addmm", "addmv", "all", "amax", "amin", "any", "arange", "argmax",
    "argmin", "argsort", "atan", "avg_pool2d", "_adaptive_avg_pool2d", "baddbmm", "bernoulli", "bitwise_and",
    "bitwise_not", "bitwise_or", "bmm", "cat", "ceil", "clamp", "clamp_max", "clamp_min", "convolution_overrideable",
    "cos", "cumsum", "div", "dot", "elu", "eq", "equal", "erf", "exp", "eye", "fill", "flip", "floor",
    "floor_divide", "fmod", "gather", "ge", "gelu", "glu", "gt", "hardsigmoid", "hardswish", "hardtanh", "index",
    "index_add", "index_copy", "index_fill", "_index_put_impl", "index_select", "isnan", "le", "leaky_relu", "lerp",
    "linalg_vector_norm", "linspace", "_local_scalar_dense", "log", "log2", "_log_softmax", "logical_and",
    "logical_not", "logical_or", "lt", "masked_fill", "masked_select", "max", "max_pool2d_with_indices", "maximum",
    "mean", "min", "minimum", "mish", "mm", "mul", "mv", "native_batch_norm", "native_group_norm",
    "native_layer_norm", "ne", "neg", "nonzero", "norm", "normal", "pow", "prod", "random", "reciprocal", "relu",
    "remainder", "roll", "round", "rsqrt", "rsub", "scaled_dot_product_attention", "scatter", "scatter_add",
    "sigmoid", "sign", "silu", "sin", "_softmax", "softplus", "sort", "sqrt", "std", "sub", "sum", "tanh", "topk",
    "tril", "triu", "trunc", "uniform", "upsample_bicubic2d", "upsample_bilinear2d", "upsample_nearest2d", "var",
    "var_mean", "where", "zero",
};

// Their kernel takes the place of torch's decomposition.
const std::set<std::string_view> kInsteadOfDecomposition = {
    "convolution_overrideable", "scaled_dot_product_attention"};

// The arguments of products, which are rounded where hf32 is allowed.
const std::map<std::string_view, std::vector<size_t>> kMatmuls = {
    {"addbmm", {1, 2}}, {"addmm", {1, 2}}, {"addmv", {1, 2}}, {"baddbmm", {1, 2}}, {"bmm", {0, 1}},
    {"dot", {0, 1}},    {"mm", {0, 1}},    {"mv", {0, 1}},    {"scaled_dot_product_attention", {0, 1, 2}},
};

// Kernels whose output's size is in the data, for which the host waits.
const std::set<std::string_view> kSizedByData = {"masked_select", "nonzero"};

std::string_view base_name(const c10::OperatorName& name) {
  std::string_view base = name.name;
  base.remove_prefix(std::min(base.size(), std::string_view("aten::").size()));
  if (base.size() > 1 && base.back() == '_') {
    base.remove_suffix(1);
  }
  return base;
}

// The device of all tensors; a scalar of the host's may be among them. This thread's where there is none.
c10::Device common_device(const std::vector<Tensor>& tensors) {
  const auto first = std::find_if(
      tensors.begin(), tensors.end(), [](const Tensor& tensor) { return tensor.device().type() == kNpu; });
  if (first == tensors.end()) {
    return {kNpu, current_device()};
  }
  for (const auto& tensor : tensors) {
    const bool scalar_of_host = tensor.device().is_cpu() && tensor.dim() == 0;
    TORCH_CHECK(
        tensor.device() == first->device() || scalar_of_host,
        "Expected all tensors to be on the same device, but found at least two devices, ", first->device(), " and ",
        tensor.device(), "!");
  }
  return first->device();
}

at::Generator& generator_of(c10::DeviceIndex device) {
  static auto* const leaked = new std::map<c10::DeviceIndex, at::Generator>;
  return leaked->try_emplace(device, at::detail::createCPUGenerator(0)).first->second;
}

// Which gelu the process has: settled by the first one, as torch_npu 2.9.0.post1 does.
bool gelu_is_exact() {
  static const bool exact = [] {
    const bool exact = settings().compatible_impl;
    log(exact ? "gelu exact" : "gelu tanh");
    return exact;
  }();
  return exact;
}

std::string_view convolution_type(c10::ScalarType dtype) {
  switch (dtype) {
    case c10::kHalf:
      return "fp16";
    case c10::kBFloat16:
      return "bf16";
    default:
      return settings().conv_hf32 ? "hf32" : "fp32";
  }
}

// The operator as the device computes it, over views of its memory.
Call prepared(const OperatorHandle& op, at::ArrayRef<IValue> arguments, c10::Device device, HostViews& views) {
  Call call{op, {}, {}};
  const bool captured = capture_of_this_thread() != nullptr;
  const auto& schema = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto argument = map_tensors(arguments[i], [&](const Tensor& tensor) {
      // A graph holds the value that a scalar of the host's had.
      return captured && tensor.device().type() != kNpu ? tensor.clone() : views.of(tensor);
    });
    if (schema[i].type()->str() == "Generator?") {
      TORCH_CHECK(argument.isNone(), "Expected an 'npu' device type for generator but found 'cpu'");
      argument = generator_of(device.index());
    }
    call.arguments.push_back(std::move(argument));
  }
  const auto base = base_name(op.operator_name());
  if (base == "gelu" && !gelu_is_exact()) {
    call.arguments[1] = "tanh";
  } else if (base == "convolution_overrideable") {
    call.op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution", "");
    if (settings().conv_hf32) {
      call.changes = {{0, Rounding::kHf32}, {1, Rounding::kHf32}};
    }
  } else if ((base == "_softmax" || base == "_log_softmax") && call.arguments[2].toBool()) {
    call.arguments[2] = false;  // half to float, which the CPU does not have
    call.changes = {{0, Rounding::kFloat}};
  } else if (const auto matmul = kMatmuls.find(base); matmul != kMatmuls.end() && settings().matmul_hf32) {
    for (const auto argument : matmul->second) {
      call.changes.push_back({argument, Rounding::kHf32});
    }
  }
  return call;
}

bool waits_for_device(const OperatorHandle& op, const std::vector<Tensor>& tensors) {
  const auto base = base_name(op.operator_name());
  const bool by_mask = base == "index" || base == "_index_put_impl";
  for (const auto& result : op.schema().returns()) {
    if (result.type()->str().find("Tensor") == std::string::npos) {
      return true;
    }
  }
  return kSizedByData.count(base) > 0 || (by_mask && std::any_of(tensors.begin() + 1, tensors.end(), [](auto& tensor) {
    return tensor.scalar_type() == c10::kBool || tensor.scalar_type() == c10::kByte;
  }));
}

std::vector<Tensor> written_in(const OperatorHandle& op, at::ArrayRef<IValue> arguments) {
  std::vector<Tensor> written;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto* alias = op.schema().arguments()[i].alias_info();
    if (alias != nullptr && alias->isWrite()) {
      const auto tensors = tensors_in(arguments[i]);
      written.insert(written.end(), tensors.begin(), tensors.end());
    }
  }
  return written;
}

// The kernel of every operator in the table.
void kernel(const OperatorHandle& op, Stack* stack) {
  initialise();
  const auto& schema = op.schema();
  const auto arguments = torch::jit::last(*stack, schema.arguments().size()).vec();
  const auto tensors = tensors_in(arguments);
  const auto device = common_device(tensors);
  const auto* capture = capture_of_this_thread();
  if (waits_for_device(op, tensors)) {
    forbid_in_capture(c10::toString(op.operator_name()));
  }
  if (base_name(op.operator_name()) == "convolution_overrideable") {
    log("conv " + std::string(convolution_type(tensors[0].scalar_type())));
  }
  for (const auto& written : written_in(op, arguments)) {
    TORCH_CHECK(
        written.device() == device, "Expected all tensors to be on the same device, but found at least two devices, ",
        device, " and ", written.device(), "!");  // a scalar of the host's may be read, not written
    if (capture != nullptr) {
      keep_contents(written);
    }
  }

  HostViews views;
  auto results = compute(prepared(op, arguments, device, views));
  views.resize_originals();
  std::vector<Tensor> fresh(results.size());  // results in memory of their own
  for (size_t i = 0; i < results.size(); ++i) {
    results[i] = map_tensors(results[i], [&](const Tensor& host) {
      if (const auto given = views.original(host)) {
        return *given;
      }
      if (const auto storage = views.original(host.storage())) {
        auto alias = at::detail::make_tensor<c10::TensorImpl>(
            c10::Storage(*storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), host.dtype());
        alias.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
        return alias;
      }
      auto moved = to_device(host, device);
      fresh[i] = HostViews().of(moved);
      return moved;
    });
  }
  if (capture != nullptr) {
    HostViews again;  // what the kernel resized has other memory by now
    record(prepared(op, arguments, device, again), std::move(fresh), tensors);
  }
  torch::jit::drop(*stack, arguments.size());
  for (auto& result : results) {
    torch::jit::push(*stack, std::move(result));
  }
}

std::atomic<int64_t> nbytes_copied_in{0};  // from the host, to any device

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  if (self.device() == source.device()) {
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
    Stack stack{self, source, non_blocking};
    kernel(op, &stack);
    return self;
  }
  initialise();
  forbid_in_capture("a copy between " + self.device().str() + " and " + source.device().str());
  if (source.device().is_cpu()) {
    nbytes_copied_in += static_cast<int64_t>(source.nbytes());
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  HostViews views;
  views.of(self).copy_(views.of(source));
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool non_blocking) {
  auto target = to;
  return copy_(target, self, non_blocking);
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  to.resize_(self.sizes());
  return copy_from(self, to, false);
}

// What torch_npu does with an operator that has no kernel: a warning, once for each, then the CPU.
void fallback(const OperatorHandle& op, Stack* stack) {
  static const bool disabled = settings().fallback_can_be_disabled && variable("TORCH_NPU_FALLBACK_CPU_DISABLE") == "1";
  const auto name = c10::toString(op.operator_name());
  TORCH_CHECK(
      !disabled, "The operator '", name,
      "' would execute its main computation on CPU through dispatcher backend fallback, "
      "but CPU fallback is disabled by TORCH_NPU_FALLBACK_CPU_DISABLE=1.");
  static std::mutex mutex;
  static std::set<std::string> warned;
  bool first = false;
  {
    std::lock_guard lock(mutex);
    first = warned.insert(name).second;
  }
  log("fallback " + name);
  if (first) {
    TORCH_WARN(
        "CAUTION: The operator '", name, "' is not currently supported on the NPU backend and will fall back to run ",
        "on the CPU. This may have performance implications.");
  }
  at::native::cpu_fallback(op, stack);
}

bool is_missing(const c10::OperatorName& name) {
  static const auto missing = [] {
    std::set<std::string> names;
    std::stringstream given(variable("SIMULATED_NPU_MISSING"));
    for (std::string one; std::getline(given, one, ',');) {
      names.insert(one);
    }
    return names;
  }();
  return missing.count(c10::toString(name)) > 0 || missing.count("aten::" + std::string(base_name(name))) > 0;
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("view", &at::native::view);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", &resize_);
  m.impl("set_", &set_empty);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage_strided);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("record_stream", &record_stream);
  m.impl("copy_", &copy_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const auto base = base_name(name);
    if (name.name.rfind("aten::", 0) != 0 || kKernels.count(base) == 0 || is_missing(name)) {
      continue;
    }
    const auto op = c10::Dispatcher::singleton().findSchema(name);
    if (op && (op->hasKernelForDispatchKey(c10::DispatchKey::CPU) || kInsteadOfDecomposition.count(base) > 0)) {
      m.impl(c10::toString(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&kernel>());
    }
  }
}

// Before 2.13 torch has nothing that leads from autograd to a backend's own kernel of a composite operator.
TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) {
  if (!is_missing({"aten::scaled_dot_product_attention", ""})) {
    m.impl("scaled_dot_product_attention", torch::CppFunction::makeFallthrough());
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_FRAGMENT(simulated_npu, m) {
  m.def("nbytes_copied_in", [] { return nbytes_copied_in.load(); });
  m.def("manual_seed", [](int64_t device, int64_t seed) {
    generator_of(static_cast<c10::DeviceIndex>(device)).set_current_seed(static_cast<uint64_t>(seed));
  });
  m.def("rng_state", [](int64_t device) {
    return generator_of(static_cast<c10::DeviceIndex>(device)).get_state();
  });
  m.def("set_rng_state", [](int64_t device, const Tensor& state) {
    generator_of(static_cast<c10::DeviceIndex>(device)).set_state(state);
  });
}

}  // namespace npu
