// Faults on request and the log of calls. EMULATED_CANN_FAULTS is a list with commas:
//   missing:aclnnGelu            libopapi.so lacks the operator
//   no-kernel:aten::gelu         torch_npu has no kernel for it (missing_kernels.cpp)
//   replay:nothing               a replay of a graph runs none of its launches; replay:incomplete leaves one out
//   attention:uniform            fused attention averages all values
//   gelu:tanh                    GELU by the tanh formula where the exact one was asked for
//   cube:hf32                    products and convolutions in HF32 where float32 was asked for
//   aclrtSetDevice=507033        this runtime call fails with this code, always; aclrtMalloc@5=207001 from its fifth on
#include "emulator.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace {

struct FailingCall {
  long from;
  aclError code;
};

struct Faults {
  std::multimap<std::string, std::string> kinds;
  std::map<std::string, FailingCall> calls;

  Faults() {
    const char* text = std::getenv("EMULATED_CANN_FAULTS");
    std::string rest = text ? text : "";
    while (!rest.empty()) {
      auto comma = std::min(rest.find(','), rest.size());
      add(rest.substr(0, comma));
      rest.erase(0, comma + 1);
    }
  }

  void add(const std::string& fault) {
    auto equals = fault.find('='), at = fault.find('@'), colon = fault.find(':');
    if (equals != std::string::npos) {
      long from = at == std::string::npos ? 1 : std::atol(fault.c_str() + at + 1);
      calls[fault.substr(0, std::min(at, equals))] = {from, std::atoi(fault.c_str() + equals + 1)};
    } else if (colon != std::string::npos) {
      kinds.emplace(fault.substr(0, colon), fault.substr(colon + 1));
    } else {
      std::fprintf(stderr, "EMULATED_CANN_FAULTS: %s is neither kind:value nor call=code\n", fault.c_str());
      std::abort();
    }
  }
};

const Faults& asked() {
  static const Faults faults;
  return faults;
}

std::mutex mutex;
thread_local std::string last_message;

}  // namespace

namespace emulated {

bool fault(const std::string& kind, const std::string& value) {
  for (auto [i, end] = asked().kinds.equal_range(kind); i != end; ++i)
    if (i->second == value) return true;
  return false;
}

std::vector<std::string> faults(const std::string& kind) {
  std::vector<std::string> values;
  for (auto [i, end] = asked().kinds.equal_range(kind); i != end; ++i) values.push_back(i->second);
  return values;
}

aclError called(const char* name) {
  log("%s", name);
  auto found = asked().calls.find(name);
  if (found == asked().calls.end()) return ACL_SUCCESS;
  std::lock_guard<std::mutex> lock(mutex);
  static std::map<std::string, long> counts;
  if (++counts[name] < found->second.from) return ACL_SUCCESS;
  return fail(found->second.code, std::string(name) + " fails, as EMULATED_CANN_FAULTS asks");
}

void log(const char* format, ...) {
  static FILE* file = [] {
    const char* path = std::getenv("EMULATED_CANN_LOG");
    return path && *path ? std::fopen(path, "a") : nullptr;
  }();
  if (!file) return;
  char line[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  std::string text = std::string(line) + "\n";
  std::fwrite(text.data(), 1, text.size(), file);  // one call, so that lines of several threads do not mix
  std::fflush(file);
}

aclError fail(aclError code, const std::string& message) {
  last_message = message;
  log("error %d %s", code, message.c_str());
  return code;
}

long setting(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::atol(text) : otherwise;
}

}  // namespace emulated

API const char* aclGetRecentErrMsg() {
  static thread_local std::string given;
  given.swap(last_message);
  last_message.clear();
  return given.empty() ? nullptr : given.c_str();
}

API void aclAppLog(aclLogLevel, const char*, const char*, uint32_t, const char*, ...) {}
