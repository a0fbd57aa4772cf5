// The device itself: settings, memory, streams and what a capture forbids. No tensors and no operators.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <c10/core/Allocator.h>
#include <c10/core/Device.h>
#include <c10/core/Storage.h>

namespace npu {

constexpr auto kNpu = c10::DeviceType::PrivateUse1;

struct Settings {
  std::atomic<bool> conv_hf32{true};
  std::atomic<bool> matmul_hf32{false};
  std::atomic<bool> compatible_impl{false};
  std::atomic<bool> fallback_can_be_disabled{false};  // torch_npu 2.13 reads the variable, 2.9 does not
};

Settings& settings();

// The variable's value, empty where it is not set.
std::string variable(const char* name);

// One line at the end of the file that SIMULATED_NPU_LOG names.
void log(const std::string& event);

// What the first use of a device does. Throws in a child forked after it, and where there is no device.
void initialise();

// This thread's device.
c10::DeviceIndex current_device();

// The device's index, this thread's for -1. Throws where there is none of that index.
c10::DeviceIndex index_of(c10::Device device);

c10::Allocator& allocator();

// Memory of its own kind for `nbytes`, whatever this thread's device is. Its contents are undefined.
c10::DataPtr allocate(size_t nbytes, c10::DeviceIndex device);

// Makes a storage hold `nbytes` at least, with its contents as they were.
void grow(const c10::Storage& storage, size_t nbytes);

// A piece of memory as a graph remembers it. An address may be used again; `serial` tells whether it was.
struct Block {
  void* address;
  size_t nbytes;
  c10::DeviceIndex device;
  uint64_t serial;
  uint64_t pool;   // 0 outside of captures
  uint64_t graph;  // the graph whose capture asked for it
  bool live;       // false while only its pool has it
};

// The block that starts here; none for a null pointer.
std::optional<Block> block_at(const void* address);

// Fills memory with bytes of all ones, which are NaN in every floating-point type.
void poison(void* address, size_t nbytes);

// Memory of captures. A pool keeps what its captures freed until the last of its graphs is released, so that
// addresses in graphs stay valid; later captures in it use that memory again, as on hardware.
uint64_t new_pool();
void retain_pool(uint64_t pool);
void release_pool(uint64_t pool);
std::vector<Block> blocks_of_pool(uint64_t pool);

// The capture under way in this process, one at most.
struct Capture {
  uint64_t graph;
  uint64_t pool;
  c10::DeviceIndex device;
  bool from_other_threads;  // what it forbids is forbidden to other threads too: mode "global"
};

// Starts one on this thread's stream. Throws on the default stream, inside another, with TASK_QUEUE_ENABLE=2.
void begin_capture(const Capture& capture);

// Ends it; false where something forbidden was done meanwhile.
bool end_capture();

// The capture that takes what this thread issues now.
const Capture* capture_of_this_thread();

// Throws, and makes the capture invalid, where one under way forbids this.
void forbid_in_capture(const std::string& what);

}  // namespace npu
