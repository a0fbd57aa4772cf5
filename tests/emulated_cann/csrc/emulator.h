// What the parts of the emulated CANN share: faults on request, a log of calls, device memory and streams.
#pragma once

#include <acl/acl.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))
#define SHARED __attribute__((visibility("default")))

// The first line of every emulated call: it goes into the log, and fails where EMULATED_CANN_FAULTS asks for it.
#define CALLED(name)                                          \
  do {                                                        \
    if (aclError code = emulated::called(#name)) return code; \
  } while (false)

namespace emulated {

// faults.cpp: what EMULATED_CANN_FAULTS asks for, and the log in EMULATED_CANN_LOG.
SHARED bool fault(const std::string& kind, const std::string& value);         // whether `kind:value` is listed
SHARED std::vector<std::string> faults(const std::string& kind);              // the values listed for a kind
SHARED aclError called(const char* name);                                     // logs; the code asked for, or 0
SHARED void log(const char* format, ...) __attribute__((format(printf, 1, 2)));
SHARED aclError fail(aclError code, const std::string& message);              // keeps the text for aclGetRecentErrMsg
SHARED long setting(const char* name, long otherwise);                        // a number from the environment

// devices.cpp
int current_device();                                                         // -1 before aclrtSetDevice
SHARED void when_a_device_is_set(std::function<void()> action);               // at once where one is

// memory.cpp
SHARED bool is_device_memory(const void* pointer, size_t nbytes);

// streams.cpp: the work of a stream, in order, on the device's thread.
struct Task {
  std::string name;
  std::function<aclError()> run;
};

struct Graph {
  std::vector<Task> tasks;
  bool invalid = false;
};

SHARED aclError submit(aclrtStream stream, Task task);  // queues it, or adds it to the graph that is captured
aclError finish_device(int device);                     // runs everything that its streams hold
aclError finish_stream(aclrtStream stream);
aclError refuse_in_capture(const char* name);           // of a call that waits: it invalidates this thread's capture
SHARED bool is_capturing(aclrtStream stream);

}  // namespace emulated
