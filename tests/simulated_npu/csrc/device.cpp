#include "device.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include <pthread.h>

#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace npu {
namespace {

constexpr size_t kTotalMemory = size_t{32} << 30;  // an Ascend 910B4's
constexpr size_t kGranularity = 512;
constexpr int kMaxDevices = 16;

c10::DeviceIndex device_count() {
  static const int count = [] {
    const auto given = variable("SIMULATED_NPU_COUNT");
    return given.empty() ? 2 : std::stoi(given);
  }();
  return static_cast<c10::DeviceIndex>(std::min(count, kMaxDevices));
}

std::atomic<bool> initialised{false};
std::atomic<bool> forked_too_late{false};

void after_fork() {
  if (initialised) {
    forked_too_late = true;
    initialised = false;
  }
}

thread_local c10::DeviceIndex this_device = 0;
thread_local std::array<c10::StreamId, kMaxDevices> this_stream{};

void check_index(int64_t index) {
  TORCH_CHECK(
      index >= 0 && index < device_count(),
      "Invalid device ID: npu:", index, "; there are ", static_cast<int>(device_count()),
      " devices. [Error]: The device ID is out of range (107001)");
}

struct Usage {
  size_t allocated = 0;
  size_t peak = 0;
  size_t held = 0;    // in blocks, those that only a pool has included
  size_t cached = 0;  // given back by tensors, not yet by empty_cache
};

struct Pool {
  int graphs = 0;
  std::multimap<size_t, void*> free;
};

class Memory {
 public:
  void* allocate(size_t nbytes, c10::DeviceIndex device) {
    if (nbytes == 0) {
      return nullptr;
    }
    nbytes = (nbytes + kGranularity - 1) / kGranularity * kGranularity;
    const auto* capture = capture_of_this_thread();
    const bool captured = capture != nullptr && capture->device == device;
    std::lock_guard lock(mutex_);
    auto& usage = usage_.at(device);
    void* address = captured ? reuse(capture->pool, nbytes, device) : nullptr;
    if (address == nullptr) {
      usage.cached -= std::min(usage.cached, nbytes);
      TORCH_CHECK_WITH(
          OutOfMemoryError, usage.held + nbytes <= kTotalMemory,
          "NPU out of memory. Tried to allocate ", nbytes, " bytes (NPU ", static_cast<int>(device), "; ",
          kTotalMemory, " bytes total capacity; ", usage.held, " bytes already allocated)");
      TORCH_CHECK(posix_memalign(&address, kGranularity, nbytes) == 0, "the host has no memory for the device's");
      usage.held += nbytes;
    }
    usage.allocated += nbytes;
    usage.peak = std::max(usage.peak, usage.allocated);
    blocks_[address] = {
        address, nbytes, device, ++serial_, captured ? capture->pool : 0, captured ? capture->graph : 0, true};
    return address;
  }

  void release(void* address) {
    std::lock_guard lock(mutex_);
    auto& block = blocks_.at(address);
    usage_.at(block.device).allocated -= block.nbytes;
    const auto pool = pools_.find(block.pool);
    if (pool != pools_.end()) {
      block.live = false;
      pool->second.free.emplace(block.nbytes, address);
    } else {
      give_back(address);
    }
  }

  std::optional<Block> find(const void* address) {
    std::lock_guard lock(mutex_);
    const auto found = blocks_.find(address);
    return found == blocks_.end() ? std::nullopt : std::optional(found->second);
  }

  std::vector<Block> of_pool(uint64_t pool) {
    std::lock_guard lock(mutex_);
    std::vector<Block> found;
    for (const auto& [address, block] : blocks_) {
      if (block.pool == pool) {
        found.push_back(block);
      }
    }
    return found;
  }

  void retain(uint64_t pool) {
    std::lock_guard lock(mutex_);
    ++pools_[pool].graphs;
  }

  void release_pool(uint64_t id) {
    std::lock_guard lock(mutex_);
    const auto pool = pools_.find(id);
    if (--pool->second.graphs > 0) {
      return;
    }
    for (const auto& [nbytes, address] : pool->second.free) {
      give_back(address);
    }
    pools_.erase(pool);  // what is still live goes back when its tensors do
  }

  Usage usage(c10::DeviceIndex device) {
    std::lock_guard lock(mutex_);
    return usage_.at(device);
  }

  void reset_peak(c10::DeviceIndex device) {
    std::lock_guard lock(mutex_);
    usage_.at(device).peak = usage_.at(device).allocated;
  }

  void empty_cache() {
    std::lock_guard lock(mutex_);
    for (auto& usage : usage_) {
      usage.cached = 0;
    }
  }

 private:
  void* reuse(uint64_t pool, size_t nbytes, c10::DeviceIndex device) {
    auto& free = pools_.at(pool).free;
    auto [candidate, end] = free.equal_range(nbytes);
    for (; candidate != end; ++candidate) {
      void* address = candidate->second;
      if (blocks_.at(address).device == device) {
        free.erase(candidate);
        return address;
      }
    }
    return nullptr;
  }

  void give_back(void* address) {
    const auto found = blocks_.find(address);
    auto& usage = usage_.at(found->second.device);
    usage.held -= found->second.nbytes;
    usage.cached += found->second.nbytes;
    blocks_.erase(found);
    std::free(address);
  }

  std::mutex mutex_;
  std::unordered_map<const void*, Block> blocks_;
  std::unordered_map<uint64_t, Pool> pools_;
  std::array<Usage, kMaxDevices> usage_{};
  uint64_t serial_ = 0;
};

Memory& memory() {
  static auto* const leaked = new Memory;  // tensors outlive static objects
  return *leaked;
}

void release(void* address) {
  if (address != nullptr) {
    memory().release(address);
  }
}

struct NpuAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    return npu::allocate(nbytes, current_device());
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }
  void copy_data(void* to, const void* from, size_t nbytes) const override {
    default_copy_data(to, from, nbytes);
  }
};

// Page-locked memory of the host: plain memory whose addresses are known.
class PinnedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t nbytes) override {
    initialise();
    void* address = nullptr;
    TORCH_CHECK(posix_memalign(&address, 64, std::max(nbytes, size_t{1})) == 0, "no memory to pin");
    std::lock_guard lock(mutex_);
    ends_[address] = static_cast<char*>(address) + std::max(nbytes, size_t{1});
    return {address, address, &unpin, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &unpin;
  }
  void copy_data(void* to, const void* from, size_t nbytes) const override {
    default_copy_data(to, from, nbytes);
  }
  bool holds(const void* address) {
    std::lock_guard lock(mutex_);
    const auto after = ends_.upper_bound(address);
    return after != ends_.begin() && address < std::prev(after)->second;
  }
  static PinnedAllocator& instance() {
    static auto* const leaked = new PinnedAllocator;
    return *leaked;
  }

 private:
  static void unpin(void* address) {
    std::lock_guard lock(instance().mutex_);
    instance().ends_.erase(address);
    std::free(address);
  }

  std::mutex mutex_;
  std::map<const void*, const void*> ends_;
};

struct CaptureState {
  Capture capture;
  c10::StreamId stream;
  std::thread::id thread;
  bool valid = true;
};

std::mutex capture_mutex;
std::optional<CaptureState> capture_state;

// Everything issued is done at once, so an event is the time it was recorded.
struct RecordedEvent {
  std::chrono::steady_clock::time_point at;
};

c10::Stream stream_of(c10::DeviceIndex device, c10::StreamId id) {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(kNpu, device), id);
}

struct NpuGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return kNpu;
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device old(kNpu, this_device);
    setDevice(device);
    return old;
  }
  c10::Device getDevice() const override {
    return {kNpu, this_device};
  }
  void setDevice(c10::Device device) const override {
    if (device.has_index()) {
      check_index(device.index());
      this_device = device.index();
    }
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) {
      this_device = device.index();
    }
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return device_count();
  }
  c10::Stream getStream(c10::Device device) const override {
    const auto index = index_of(device);
    return stream_of(index, this_stream.at(index));
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return stream_of(index_of(device), 0);
  }
  c10::Stream getNewStream(c10::Device device, int /*priority*/ = 0) const override {
    static std::atomic<c10::StreamId> last{0};
    return stream_of(index_of(device), ++last);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool /*high*/ = false) const override {
    return getNewStream(device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const auto old = getStream(stream.device());
    this_stream.at(stream.device_index()) = stream.id();
    return old;
  }
  bool queryStream(const c10::Stream& /*stream*/) const override {
    forbid_in_capture("querying a stream");
    return true;
  }
  void synchronizeStream(const c10::Stream& /*stream*/) const override {
    forbid_in_capture("synchronizing a stream");
  }
  void synchronizeDevice(c10::DeviceIndex /*index*/) const override {
    initialise();
    forbid_in_capture("synchronizing the device");
  }
  bool isStreamCapturing(const c10::Stream& stream) const {  // NOLINT: torch 2.9 has none to override
    std::lock_guard lock(capture_mutex);
    return capture_state && capture_state->stream == stream.id() &&
        capture_state->capture.device == stream.device_index();
  }
  void record(void** event, const c10::Stream& /*stream*/, c10::DeviceIndex /*index*/, c10::EventFlag /*flag*/)
      const override {
    if (*event == nullptr) {
      *event = new RecordedEvent;
    }
    static_cast<RecordedEvent*>(*event)->at = std::chrono::steady_clock::now();
  }
  void block(void* /*event*/, const c10::Stream& /*stream*/) const override {}
  bool queryEvent(void* /*event*/) const override {
    forbid_in_capture("querying an event");
    return true;
  }
  void synchronizeEvent(void* /*event*/) const override {
    forbid_in_capture("synchronizing an event");
  }
  void destroyEvent(void* event, c10::DeviceIndex /*index*/) const noexcept override {
    delete static_cast<RecordedEvent*>(event);
  }
  double elapsedTime(void* from, void* to, c10::DeviceIndex /*index*/) const override {
    forbid_in_capture("reading an event's time");
    const auto elapsed = static_cast<RecordedEvent*>(to)->at - static_cast<RecordedEvent*>(from)->at;
    return std::chrono::duration<double, std::milli>(elapsed).count();
  }
};

struct NpuHooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return device_count() > 0;
  }
  void init() const override {
    initialise();
  }
  bool hasPrimaryContext(c10::DeviceIndex /*index*/) const override {
    return initialised;
  }
  c10::DeviceIndex deviceCount() const override {
    return device_count();
  }
  void setCurrentDevice(c10::DeviceIndex index) const override {
    check_index(index);
    this_device = index;
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return this_device;
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    const auto old = this_device;
    setCurrentDevice(index);
    return old;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return exchangeDevice(index);
  }
  c10::Device getDeviceFromPtr(void* data) const override {
    const auto block = block_at(data);
    TORCH_CHECK(block, "the pointer is not one of the device's");
    return {kNpu, block->device};
  }
  bool isPinnedPtr(const void* data) const override {
    return PinnedAllocator::instance().holds(data);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return &PinnedAllocator::instance();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
    grow(storage, nbytes);
  }
};

// Registers the three parts of a backend that torch asks for by its device type.
const bool registered = [] {
  pthread_atfork(nullptr, nullptr, &after_fork);
  c10::SetAllocator(kNpu, &allocator());
  at::RegisterPrivateUse1HooksInterface(new NpuHooks);
  return true;
}();
C10_REGISTER_GUARD_IMPL(PrivateUse1, NpuGuard)

}  // namespace

Settings& settings() {
  static Settings settings;
  return settings;
}

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

void log(const std::string& event) {
  static const auto path = variable("SIMULATED_NPU_LOG");
  if (!path.empty()) {
    static std::mutex mutex;
    std::lock_guard lock(mutex);
    std::ofstream(path, std::ios::app) << event << '\n';
  }
}

void initialise() {
  TORCH_CHECK(
      !forked_too_late,
      "Cannot re-initialize NPU in forked subprocess. To use NPU with multiprocessing, "
      "you must use the 'spawn' start method");
  if (!initialised) {
    TORCH_CHECK(device_count() > 0, "No NPUs are available");
    if (!initialised.exchange(true)) {
      log("init");
    }
  }
}

c10::DeviceIndex current_device() {
  return this_device;
}

c10::DeviceIndex index_of(c10::Device device) {
  const auto index = device.has_index() ? device.index() : this_device;
  check_index(index);
  return index;
}

c10::Allocator& allocator() {
  static auto* const leaked = new NpuAllocator;
  return *leaked;
}

c10::DataPtr allocate(size_t nbytes, c10::DeviceIndex device) {
  initialise();
  check_index(device);
  void* const address = memory().allocate(nbytes, device);
  return {address, address, &release, c10::Device(kNpu, device)};
}

void grow(const c10::Storage& storage, size_t nbytes) {
  auto* impl = storage.unsafeGetStorageImpl();
  if (nbytes <= impl->nbytes()) {
    return;
  }
  auto larger = allocate(nbytes, impl->device().index());
  if (impl->nbytes() > 0) {
    std::memcpy(larger.get(), impl->data(), impl->nbytes());
  }
  impl->set_data_ptr_noswap(std::move(larger));
  impl->set_nbytes(nbytes);
}

std::optional<Block> block_at(const void* address) {
  return memory().find(address);
}

void poison(void* address, size_t nbytes) {
  if (nbytes > 0) {
    std::memset(address, 0xFF, nbytes);
  }
}

uint64_t new_pool() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

void retain_pool(uint64_t pool) {
  memory().retain(pool);
}

void release_pool(uint64_t pool) {
  memory().release_pool(pool);
}

std::vector<Block> blocks_of_pool(uint64_t pool) {
  return memory().of_pool(pool);
}

void begin_capture(const Capture& capture) {
  TORCH_CHECK(
      variable("TASK_QUEUE_ENABLE") != "2",
      "A graph cannot be captured with TASK_QUEUE_ENABLE=2; export TASK_QUEUE_ENABLE=1 or 0.");
  const auto stream = this_stream.at(capture.device);
  TORCH_CHECK(stream != 0, "NPU graphs must be captured on a stream that is not the default one.");
  std::lock_guard lock(capture_mutex);
  TORCH_CHECK(!capture_state, "A capture is under way already; captures do not nest.");
  capture_state = {capture, stream, std::this_thread::get_id()};
}

bool end_capture() {
  std::lock_guard lock(capture_mutex);
  const bool valid = capture_state->valid;
  capture_state.reset();
  return valid;
}

const Capture* capture_of_this_thread() {
  std::lock_guard lock(capture_mutex);
  const bool ours = capture_state && capture_state->thread == std::this_thread::get_id() &&
      this_stream.at(capture_state->capture.device) == capture_state->stream;
  return ours ? &capture_state->capture : nullptr;  // only this thread ends it
}

void forbid_in_capture(const std::string& what) {
  std::lock_guard lock(capture_mutex);
  if (!capture_state) {
    return;
  }
  if (capture_state->capture.from_other_threads || capture_state->thread == std::this_thread::get_id()) {
    capture_state->valid = false;
    TORCH_CHECK(false, "NPU error: operation not permitted when stream is capturing: ", what);
  }
}

namespace {

c10::DeviceIndex checked(int64_t device) {
  check_index(device);
  return static_cast<c10::DeviceIndex>(device);
}

}  // namespace

// What torch_npu/npu calls. Operators need no header of Python's, which a machine with a compiler may lack.
TORCH_LIBRARY_FRAGMENT(simulated_npu, m) {
  m.def("log", [](const std::string& event) { log(event); });
  m.def("initialise", [] { initialise(); });
  m.def("is_initialised", [] { return initialised.load(); });
  m.def("is_forked_too_late", [] { return forked_too_late.load(); });
  m.def("device_count", [] { return static_cast<int64_t>(device_count()); });
  m.def("current_device", [] { return static_cast<int64_t>(this_device); });
  m.def("set_device", [](int64_t device) { this_device = checked(device); });
  m.def("synchronize", [](int64_t device) { NpuGuard().synchronizeDevice(checked(device)); });
  m.def("current_stream", [](int64_t device) { return this_stream.at(checked(device)); });
  m.def("set_stream", [](int64_t device, int64_t stream) { this_stream.at(checked(device)) = stream; });
  m.def("memory_allocated", [](int64_t device) {
    return static_cast<int64_t>(memory().usage(checked(device)).allocated);
  });
  m.def("max_memory_allocated", [](int64_t device) {
    return static_cast<int64_t>(memory().usage(checked(device)).peak);
  });
  m.def("memory_reserved", [](int64_t device) {
    const auto usage = memory().usage(checked(device));
    return static_cast<int64_t>(usage.held + usage.cached);
  });
  m.def("reset_peak_memory_stats", [](int64_t device) { memory().reset_peak(checked(device)); });
  m.def("empty_cache", [] {
    memory().empty_cache();
    log("empty_cache");
  });
  m.def("total_memory", [] { return static_cast<int64_t>(kTotalMemory); });
  m.def("conv_hf32", [] { return settings().conv_hf32.load(); });
  m.def("matmul_hf32", [] { return settings().matmul_hf32.load(); });
  m.def("compatible_impl", [] { return settings().compatible_impl.load(); });
  m.def("set_conv_hf32", [](bool value) { settings().conv_hf32 = value; });
  m.def("set_matmul_hf32", [](bool value) { settings().matmul_hf32 = value; });
  m.def("set_compatible_impl", [](bool value) { settings().compatible_impl = value; });
  m.def("let_fallback_be_disabled", [] { settings().fallback_can_be_disabled = true; });
}

}  // namespace npu
