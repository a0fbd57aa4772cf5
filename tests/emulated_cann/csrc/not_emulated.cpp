// Symbols that torch_npu links and no test here reaches; their declarations are left out, since they take nothing here.
#include <cstdio>
#include <cstdlib>

#define NOT_EMULATED(name)                                                   \
  extern "C" __attribute__((visibility("default"))) int name() {             \
    std::fprintf(stderr, "the emulated CANN does not have " #name "\n");     \
    return 500001;                                                           \
  }

NOT_EMULATED(aclmdlFinalizeDump)
NOT_EMULATED(aclmdlInitDump)
NOT_EMULATED(aclmdlSetDump)
NOT_EMULATED(aclrtBinaryGetFunction)
NOT_EMULATED(aclrtBinaryLoadFromData)
NOT_EMULATED(aclrtFreePhysical)
NOT_EMULATED(aclrtGetFunctionAddr)
NOT_EMULATED(aclrtMallocPhysical)
NOT_EMULATED(aclrtMapMem)
NOT_EMULATED(aclrtMemExportToShareableHandle)
NOT_EMULATED(aclrtMemImportFromShareableHandle)
NOT_EMULATED(aclrtMemSetPidToShareableHandle)
NOT_EMULATED(aclrtReleaseMemAddress)
NOT_EMULATED(aclrtReserveMemAddress)
NOT_EMULATED(aclrtUnmapMem)
NOT_EMULATED(rtDevBinaryRegister)
NOT_EMULATED(rtFunctionRegister)
NOT_EMULATED(rtGetC2cCtrlAddr)
NOT_EMULATED(rtKernelLaunch)
