// What torch_npu links or looks up and no test here needs. The old path of operators (aclop) describes tensors before it
// runs one, so descriptions are kept and running fails by the operator's name.
#include "emulator.h"

#include <acl/acl_op_compiler.h>

#include <cstring>

struct aclTensorDesc {
  aclDataType type;
  aclFormat format;
  std::vector<int64_t> dims;
};
struct aclDataBuffer {};
struct aclopAttr {};

API aclTensorDesc* aclCreateTensorDesc(aclDataType type, int count, const int64_t* dims, aclFormat format) {
  return new aclTensorDesc{type, format, {dims, dims + count}};
}
API void aclDestroyTensorDesc(const aclTensorDesc* description) { delete description; }
API aclError aclGetTensorDescDimV2(const aclTensorDesc* description, size_t index, int64_t* size) {
  *size = description->dims.at(index);
  return ACL_SUCCESS;
}
API aclFormat aclGetTensorDescFormat(const aclTensorDesc* description) { return description->format; }
API aclDataType aclGetTensorDescType(const aclTensorDesc* description) { return description->type; }
API size_t aclGetTensorDescNumDims(const aclTensorDesc* description) { return description->dims.size(); }
API void aclSetTensorDescName(aclTensorDesc*, const char*) {}
API aclError aclSetTensorFormat(aclTensorDesc*, aclFormat) { return ACL_SUCCESS; }
API aclError aclSetTensorPlaceMent(aclTensorDesc*, aclMemType) { return ACL_SUCCESS; }
API aclError aclSetTensorShape(aclTensorDesc*, int, const int64_t*) { return ACL_SUCCESS; }
API aclDataBuffer* aclCreateDataBuffer(void*, size_t) { return new aclDataBuffer; }
API aclError aclDestroyDataBuffer(const aclDataBuffer* buffer) { delete buffer; return ACL_SUCCESS; }
API aclopAttr* aclopCreateAttr() { return new aclopAttr; }
API void aclopDestroyAttr(const aclopAttr* attributes) { delete attributes; }
API aclError aclopSetAttrBool(aclopAttr*, const char*, uint8_t) { return ACL_SUCCESS; }
API aclError aclopSetAttrDataType(aclopAttr*, const char*, aclDataType) { return ACL_SUCCESS; }
API aclError aclopSetAttrFloat(aclopAttr*, const char*, float) { return ACL_SUCCESS; }
API aclError aclopSetAttrInt(aclopAttr*, const char*, int64_t) { return ACL_SUCCESS; }
API aclError aclopSetAttrListBool(aclopAttr*, const char*, int, const uint8_t*) { return ACL_SUCCESS; }
API aclError aclopSetAttrListFloat(aclopAttr*, const char*, int, const float*) { return ACL_SUCCESS; }
API aclError aclopSetAttrListInt(aclopAttr*, const char*, int, const int64_t*) { return ACL_SUCCESS; }
API aclError aclopSetAttrListListInt(aclopAttr*, const char*, int, const int*, const int64_t* const*) { return ACL_SUCCESS; }
API aclError aclopSetAttrString(aclopAttr*, const char*, const char*) { return ACL_SUCCESS; }

static aclError without_aclop(const char* name) {
  return emulated::fail(ACL_ERROR_OP_NOT_FOUND, std::string("the emulated CANN has no aclop ") + name);
}
API aclError aclopCompileAndExecute(const char* name, int, const aclTensorDesc* const*, const aclDataBuffer* const*, int,
                                    const aclTensorDesc* const*, aclDataBuffer* const*, const aclopAttr*,
                                    aclopEngineType, aclopCompileType, const char*, aclrtStream) {
  return without_aclop(name);
}
API aclError aclopCompileAndExecuteV2(const char* name, int, aclTensorDesc**, aclDataBuffer**, int, aclTensorDesc**,
                                      aclDataBuffer**, aclopAttr*, aclopEngineType, aclopCompileType, const char*,
                                      aclrtStream) {
  return without_aclop(name);
}
API aclError aclSetCompileopt(aclCompileOpt, const char*) { CALLED(aclSetCompileopt); return ACL_SUCCESS; }
API size_t aclGetCompileoptSize(aclCompileOpt) { return sizeof "disable"; }
API aclError aclGetCompileopt(aclCompileOpt, char* value, size_t size) {  // operators are not compiled at their first use
  std::strncpy(value, "disable", size);
  return ACL_SUCCESS;
}

// The profiler is told nothing.
API uint64_t MsprofGetHashId(const char*, size_t) { return 0; }
API int32_t MsprofRegisterCallback(uint32_t, void*) { return 0; }
API int32_t MsprofReportAdditionalInfo(uint32_t, const void*, uint32_t) { return 0; }
API int32_t MsprofReportApi(uint32_t, const void*) { return 0; }
API int32_t MsprofReportCompactInfo(uint32_t, const void*, uint32_t) { return 0; }
API uint64_t MsprofSysCycleTime() { return 0; }

