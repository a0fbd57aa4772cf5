// no-kernel:NAME takes torch_npu's kernels of an operator, all of its overloads, out of torch's table, as if torch_npu had
// none: torch then falls back to the CPU. They are put back at the end of the process, where torch_npu takes out its own.
// Compiled with -fno-access-control, since the table has no public way to do this.
#include "emulator.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdlib>
#include <list>

namespace {

using Kernels = decltype(c10::impl::OperatorEntry::kernels_)::mapped_type;

struct Taken {
  c10::impl::OperatorEntry* entry;
  Kernels kernels;
};

std::list<Taken>& taken() {
  static auto* taken = new std::list<Taken>;
  return *taken;
}

constexpr auto NPU = c10::DispatchKey::PrivateUse1;

void take_out() {
  auto& dispatcher = c10::Dispatcher::singleton();
  for (auto& name : emulated::faults("no-kernel")) {
    size_t before = taken().size();
    for (auto& overload : dispatcher.getAllOpNames()) {
      if (overload.name != name) continue;
      auto handle = dispatcher.findOp(overload);
      auto* entry = &handle->operatorDef_->op;
      auto found = entry->kernels_.find(NPU);
      if (found == entry->kernels_.end()) continue;
      taken().push_back({entry, std::move(found->second)});
      entry->kernels_.erase(found);
      entry->updateDispatchTable_(dispatcher, NPU);
    }
    if (taken().size() == before) {
      std::fprintf(stderr, "EMULATED_CANN_FAULTS: torch_npu has no kernel for %s\n", name.c_str());
      std::abort();
    }
  }
  std::atexit([] {
    for (auto& [entry, kernels] : taken()) entry->kernels_[NPU] = std::move(kernels);
  });
}

__attribute__((constructor)) void ask() {
  if (!emulated::faults("no-kernel").empty()) emulated::when_a_device_is_set(take_out);
}

}  // namespace
