// Memory: a device's is host memory that is registered here, so a pointer of the wrong kind is refused. What nothing was
// written to holds NaN. Each device has EMULATED_CANN_MEMORY_MB (32768 unless set).
#include "emulator.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace {

struct Block {
  size_t nbytes;
  int device;  // HOST for pinned memory
};

constexpr int HOST = -1;
constexpr size_t ALIGNMENT = 512;

std::mutex mutex;
std::map<uintptr_t, Block> blocks;
std::map<int, size_t> used;

size_t capacity() { return static_cast<size_t>(emulated::setting("EMULATED_CANN_MEMORY_MB", 32768)) << 20; }

// The block that holds a range, if one does. With the mutex held.
const Block* find(const void* pointer, size_t nbytes) {
  auto address = reinterpret_cast<uintptr_t>(pointer);
  auto after = blocks.upper_bound(address);
  if (after == blocks.begin()) return nullptr;
  auto& [start, block] = *std::prev(after);
  return address + nbytes <= start + block.nbytes ? &block : nullptr;
}

bool is_pinned(const void* pointer, size_t nbytes) {
  std::lock_guard<std::mutex> lock(mutex);
  const Block* block = find(pointer, nbytes);
  return block && block->device == HOST;
}

aclError allocate(void** pointer, size_t nbytes, int device) {
  std::lock_guard<std::mutex> lock(mutex);
  if (device != HOST && used[device] + nbytes > capacity())
    return emulated::fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "out of device memory: " + std::to_string(nbytes) + " bytes asked, " +
                                           std::to_string(capacity() - used[device]) + " free");
  if (posix_memalign(pointer, ALIGNMENT, nbytes + ALIGNMENT)) return ACL_ERROR_RT_MEMORY_ALLOCATION;
  std::memset(*pointer, 0xFF, nbytes);
  blocks[reinterpret_cast<uintptr_t>(*pointer)] = {nbytes, device};
  used[device] += nbytes;
  return ACL_SUCCESS;
}

aclError release(void* pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = blocks.find(reinterpret_cast<uintptr_t>(pointer));
  if (found == blocks.end()) return emulated::fail(ACL_ERROR_RT_PARAM_INVALID, "freed memory that was not allocated");
  used[found->second.device] -= found->second.nbytes;
  blocks.erase(found);
  std::free(pointer);
  return ACL_SUCCESS;
}

const char* direction(aclrtMemcpyKind kind) {
  switch (kind) {
    case ACL_MEMCPY_HOST_TO_HOST: return "host_to_host";
    case ACL_MEMCPY_HOST_TO_DEVICE: return "host_to_device";
    case ACL_MEMCPY_DEVICE_TO_HOST: return "device_to_host";
    case ACL_MEMCPY_DEVICE_TO_DEVICE: return "device_to_device";
    default: return "other";
  }
}

aclError check(const void* to, size_t room, const void* from, size_t nbytes, aclrtMemcpyKind kind) {
  if (nbytes > room) return emulated::fail(ACL_ERROR_RT_PARAM_INVALID, "a copy is larger than its destination");
  bool to_device = kind == ACL_MEMCPY_HOST_TO_DEVICE || kind == ACL_MEMCPY_DEVICE_TO_DEVICE;
  bool from_device = kind == ACL_MEMCPY_DEVICE_TO_HOST || kind == ACL_MEMCPY_DEVICE_TO_DEVICE;
  if (to_device != emulated::is_device_memory(to, nbytes) || from_device != emulated::is_device_memory(from, nbytes))
    return emulated::fail(ACL_ERROR_RT_PARAM_INVALID, std::string("a copy ") + direction(kind) + " has other pointers");
  return ACL_SUCCESS;
}

}  // namespace

bool emulated::is_device_memory(const void* pointer, size_t nbytes) {
  std::lock_guard<std::mutex> lock(mutex);
  const Block* block = find(pointer, nbytes);
  return block && block->device != HOST;
}

API aclError aclrtMalloc(void** pointer, size_t nbytes, aclrtMemMallocPolicy) {
  CALLED(aclrtMalloc);
  int device = emulated::current_device();
  if (device < 0) return emulated::fail(ACL_ERROR_RT_CONTEXT_NULL, "aclrtMalloc before a device was set");
  emulated::log("allocated %zu", nbytes);
  return allocate(pointer, nbytes, device);
}

API aclError aclrtMallocAlign32(void** pointer, size_t nbytes, aclrtMemMallocPolicy policy) {
  return aclrtMalloc(pointer, nbytes, policy);
}

API aclError aclrtFree(void* pointer) {
  CALLED(aclrtFree);
  if (aclError code = emulated::finish_device(emulated::current_device())) return code;
  return release(pointer);
}

API aclError aclrtMallocHost(void** pointer, size_t nbytes) {
  CALLED(aclrtMallocHost);
  return allocate(pointer, nbytes, HOST);
}

API aclError aclrtFreeHost(void* pointer) {
  CALLED(aclrtFreeHost);
  return release(pointer);
}

API aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free, size_t* total) {
  CALLED(aclrtGetMemInfo);
  std::lock_guard<std::mutex> lock(mutex);
  *total = capacity();
  *free = *total - used[emulated::current_device()];
  return ACL_SUCCESS;
}

API aclError aclrtPointerGetAttributes(const void* pointer, aclrtPtrAttributes* attributes) {
  CALLED(aclrtPointerGetAttributes);
  std::memset(attributes, 0, sizeof *attributes);
  attributes->location.type = emulated::is_device_memory(pointer, 1) ? ACL_MEM_LOCATION_TYPE_DEVICE
                              : is_pinned(pointer, 1)                ? ACL_MEM_LOCATION_TYPE_HOST
                                                                     : ACL_MEM_LOCATION_TYPE_UNREGISTERED;
  return ACL_SUCCESS;
}

// Copies at once, after nothing but itself: whoever reads what a stream writes has to wait for the stream.
API aclError aclrtMemcpy(void* to, size_t room, const void* from, size_t nbytes, aclrtMemcpyKind kind) {
  CALLED(aclrtMemcpy);
  emulated::log("copied %s %zu", direction(kind), nbytes);
  if (aclError code = emulated::refuse_in_capture("aclrtMemcpy")) return code;
  if (aclError code = check(to, room, from, nbytes, kind)) return code;
  std::memmove(to, from, nbytes);
  return ACL_SUCCESS;
}

// In the stream's turn. Memory of the host that is not pinned is read at once and written before the call returns.
API aclError aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t nbytes, aclrtMemcpyKind kind,
                              aclrtStream stream) {
  CALLED(aclrtMemcpyAsync);
  emulated::log("copied %s %zu", direction(kind), nbytes);
  if (aclError code = check(to, room, from, nbytes, kind)) return code;
  if (kind == ACL_MEMCPY_HOST_TO_DEVICE && !is_pinned(from, nbytes) && !emulated::is_capturing(stream)) {
    std::string staged(static_cast<const char*>(from), nbytes);
    return emulated::submit(stream, {"copy", [=] { std::memcpy(to, staged.data(), nbytes); return ACL_SUCCESS; }});
  }
  aclError code = emulated::submit(stream, {"copy", [=] { std::memmove(to, from, nbytes); return ACL_SUCCESS; }});
  bool pageable = kind == ACL_MEMCPY_DEVICE_TO_HOST && !is_pinned(to, nbytes);
  return code || !pageable ? code : emulated::finish_stream(stream);
}

API aclError aclrtMemcpyAsyncWithCondition(void* to, size_t room, const void* from, size_t nbytes, aclrtMemcpyKind kind,
                                           aclrtStream stream) {
  return aclrtMemcpyAsync(to, room, from, nbytes, kind, stream);
}

API aclError aclrtMemset(void* pointer, size_t, int32_t value, size_t nbytes) {
  CALLED(aclrtMemset);
  std::memset(pointer, value, nbytes);
  return ACL_SUCCESS;
}

API aclError aclrtMemsetAsync(void* pointer, size_t, int32_t value, size_t nbytes, aclrtStream stream) {
  CALLED(aclrtMemsetAsync);
  return emulated::submit(stream, {"memset", [=] { std::memset(pointer, value, nbytes); return ACL_SUCCESS; }});
}
