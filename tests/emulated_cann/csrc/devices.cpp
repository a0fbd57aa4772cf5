// Devices, contexts, versions and the settings of a device: EMULATED_CANN_DEVICES of them (2 unless set), of the chip
// EMULATED_CANN_SOC (Ascend910B4), under the CANN EMULATED_CANN_VERSION (8.5.0).
#include "emulator.h"

#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace {

thread_local int current = -1;
std::mutex mutex;
std::map<int, int> contexts;  // &contexts[i] is the context of device i
std::vector<std::function<void()>> waiting;  // for the first device to be set
bool initialised = false, any_set = false;

constexpr uint32_t CUBE_CORES = 20, VECTOR_CORES = 40;  // of an Ascend910B4

const char* text(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? value : otherwise;
}

// Those that ASCEND_RT_VISIBLE_DEVICES names, where it is set: numbers that ascend and exist, up to the first that does not.
int device_count() {
  int installed = static_cast<int>(emulated::setting("EMULATED_CANN_DEVICES", 2));
  const char* visible = std::getenv("ASCEND_RT_VISIBLE_DEVICES");
  if (!visible) return installed;
  int count = 0, last = -1;
  for (char* end; *visible; visible = *end ? end + 1 : end, ++count) {
    long device = std::strtol(visible, &end, 10);
    if (end == visible || (*end && *end != ',') || device <= last || device >= installed) break;
    last = static_cast<int>(device);
  }
  return count;
}

uint32_t cores(aclrtDevResLimitType type) { return type == ACL_RT_DEV_RES_CUBE_CORE ? CUBE_CORES : VECTOR_CORES; }

}  // namespace

int emulated::current_device() { return current; }

void emulated::when_a_device_is_set(std::function<void()> action) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (!any_set) return waiting.push_back(std::move(action));
  }
  action();
}

API aclError aclInit(const char*) {
  CALLED(aclInit);
  if (initialised) return ACL_ERROR_REPEAT_INITIALIZE;
  initialised = true;
  return ACL_SUCCESS;
}

API aclError aclFinalize() {
  CALLED(aclFinalize);
  initialised = false;
  return ACL_SUCCESS;
}

API const char* aclrtGetSocName() { return text("EMULATED_CANN_SOC", "Ascend910B4"); }

API aclError aclsysGetCANNVersion(aclCANNPackageName, aclCANNPackageVersion* version) {
  CALLED(aclsysGetCANNVersion);
  std::memset(version, 0, sizeof *version);
  std::string number = text("EMULATED_CANN_VERSION", "8.5.0");
  auto first = number.find('.'), second = number.find('.', first + 1);
  std::strncpy(version->version, number.c_str(), sizeof version->version - 1);
  std::strncpy(version->majorVersion, number.substr(0, first).c_str(), sizeof version->majorVersion - 1);
  std::strncpy(version->minorVersion, number.substr(first + 1, second - first - 1).c_str(),
               sizeof version->minorVersion - 1);
  std::strncpy(version->releaseVersion, number.substr(second + 1).c_str(), sizeof version->releaseVersion - 1);
  return ACL_SUCCESS;
}

API aclError aclsysGetVersionStr(char*, char* version) {
  CALLED(aclsysGetVersionStr);
  std::strcpy(version, text("EMULATED_CANN_VERSION", "8.5.0"));
  return ACL_SUCCESS;
}

API aclError aclrtGetDeviceCount(uint32_t* count) {
  CALLED(aclrtGetDeviceCount);
  *count = device_count();
  return ACL_SUCCESS;
}

API aclError aclrtSetDevice(int32_t device) {
  CALLED(aclrtSetDevice);
  if (device < 0 || device >= device_count())
    return emulated::fail(ACL_ERROR_RT_INVALID_DEVICEID, "aclrtSetDevice: there is no device " + std::to_string(device));
  current = device;
  std::unique_lock<std::mutex> lock(mutex);
  contexts.emplace(device, device);
  any_set = true;
  auto actions = std::move(waiting);
  waiting.clear();
  lock.unlock();
  for (auto& action : actions) action();
  return ACL_SUCCESS;
}

API aclError aclrtResetDevice(int32_t device) {
  CALLED(aclrtResetDevice);
  return emulated::finish_device(device);
}

API aclError aclrtGetDevice(int32_t* device) {
  CALLED(aclrtGetDevice);
  if (current < 0) return ACL_ERROR_RT_CONTEXT_NULL;
  *device = current;
  return ACL_SUCCESS;
}

API aclError aclrtGetCurrentContext(aclrtContext* context) {
  CALLED(aclrtGetCurrentContext);
  if (current < 0) return ACL_ERROR_RT_CONTEXT_NULL;
  std::lock_guard<std::mutex> lock(mutex);
  *context = &contexts.at(current);
  return ACL_SUCCESS;
}

API aclError aclrtSetCurrentContext(aclrtContext context) {
  CALLED(aclrtSetCurrentContext);
  if (!context) return ACL_ERROR_RT_CONTEXT_NULL;
  current = *static_cast<int*>(context);
  return ACL_SUCCESS;
}

API aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t* flags, int32_t* active) {
  CALLED(aclrtGetPrimaryCtxState);
  std::lock_guard<std::mutex> lock(mutex);
  if (flags) *flags = 0;
  *active = contexts.count(device) > 0;
  return ACL_SUCCESS;
}

API aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) {
  CALLED(aclrtDeviceCanAccessPeer);
  *can = 1;
  return ACL_SUCCESS;
}

API aclError aclrtDeviceEnablePeerAccess(int32_t, uint32_t) {
  CALLED(aclrtDeviceEnablePeerAccess);
  return ACL_SUCCESS;
}

API aclError aclrtDeviceGetBareTgid(int32_t* process) {
  CALLED(aclrtDeviceGetBareTgid);
  *process = getpid();
  return ACL_SUCCESS;
}

API aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo info, int64_t* value) {
  CALLED(aclGetDeviceCapability);
  *value = info == ACL_DEVICE_INFO_AI_CORE_NUM ? CUBE_CORES : info == ACL_DEVICE_INFO_VECTOR_CORE_NUM ? VECTOR_CORES : 0;
  return ACL_SUCCESS;
}

API aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr attribute, int64_t* value) {
  CALLED(aclrtGetDeviceInfo);
  switch (attribute) {
    case ACL_DEV_ATTR_AICORE_CORE_NUM: case ACL_DEV_ATTR_CUBE_CORE_NUM: *value = CUBE_CORES; break;
    case ACL_DEV_ATTR_VECTOR_CORE_NUM: *value = VECTOR_CORES; break;
    default: *value = 0;
  }
  return ACL_SUCCESS;
}

API aclError aclrtGetDeviceResLimit(int32_t, aclrtDevResLimitType type, uint32_t* value) {
  CALLED(aclrtGetDeviceResLimit);
  *value = cores(type);
  return ACL_SUCCESS;
}

API aclError aclrtGetStreamResLimit(aclrtStream, aclrtDevResLimitType type, uint32_t* value) {
  CALLED(aclrtGetStreamResLimit);
  *value = cores(type);
  return ACL_SUCCESS;
}

API aclError aclrtGetResInCurrentThread(aclrtDevResLimitType type, uint32_t* value) {
  CALLED(aclrtGetResInCurrentThread);
  *value = cores(type);
  return ACL_SUCCESS;
}

API aclError aclrtGetDeviceUtilizationRate(int32_t, aclrtUtilizationInfo* rate) {
  CALLED(aclrtGetDeviceUtilizationRate);
  rate->cubeUtilization = rate->vectorUtilization = rate->aicpuUtilization = rate->memoryUtilization = 0;
  return ACL_SUCCESS;
}

API aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }
API aclError aclrtGetLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }

// Settings that change nothing here.
API aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { CALLED(aclrtSetDeviceSatMode); return ACL_SUCCESS; }
API aclError aclrtSetOpExecuteTimeOut(uint32_t) { CALLED(aclrtSetOpExecuteTimeOut); return ACL_SUCCESS; }
API aclError aclrtSetOpWaitTimeout(uint32_t) { CALLED(aclrtSetOpWaitTimeout); return ACL_SUCCESS; }
API aclError aclrtSetSysParamOpt(aclSysParamOpt, int64_t) { CALLED(aclrtSetSysParamOpt); return ACL_SUCCESS; }
API aclError aclrtCtxSetSysParamOpt(aclSysParamOpt, int64_t) { CALLED(aclrtCtxSetSysParamOpt); return ACL_SUCCESS; }

API aclError aclrtGetSysParamOpt(aclSysParamOpt, int64_t* value) {
  CALLED(aclrtGetSysParamOpt);
  *value = 0;
  return ACL_SUCCESS;
}
