// Tensors, lists and executors of aclnn. An executor's operands are checked to lie in device memory.
#include "aclnn.h"

#include <c10/core/InferenceMode.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

namespace {

constexpr int PLAN_FAILED = 161002, LAUNCH_FAILED = 561000;  // ACLNN_ERR_PARAM_INVALID, ACLNN_ERR_INNER

// Formats in which elements lie as the strides say.
bool is_plain(int format) {
  return format == ACL_FORMAT_NCHW || format == ACL_FORMAT_NHWC || format == ACL_FORMAT_ND || format == ACL_FORMAT_NCDHW ||
         format == ACL_FORMAT_NDHWC || format == ACL_FORMAT_NCL;
}

template <class T> auto numbers(const T* first, uint64_t count) { return std::vector<T>(first, first + count); }

// The names that EMULATED_CANN_FAULTS calls missing are made unreadable in this library's own table of symbols.
__attribute__((constructor)) void hide_missing_operators() {
  auto missing = emulated::faults("missing");
  if (missing.empty()) return;
  Dl_info here;
  link_map* map;
  if (!dladdr1(reinterpret_cast<void*>(&hide_missing_operators), &here, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP)) abort();
  char* names = nullptr;
  size_t nbytes = 0;
  for (auto* entry = map->l_ld; entry->d_tag != DT_NULL; ++entry) {
    if (entry->d_tag == DT_STRTAB) names = reinterpret_cast<char*>(entry->d_un.d_ptr);
    if (entry->d_tag == DT_STRSZ) nbytes = entry->d_un.d_val;
  }
  auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  auto start = reinterpret_cast<uintptr_t>(names) / page * page;
  if (mprotect(reinterpret_cast<void*>(start), reinterpret_cast<uintptr_t>(names) + nbytes - start, PROT_READ | PROT_WRITE | PROT_EXEC)) abort();
  for (auto& operator_name : missing)
    for (auto& symbol : {operator_name, operator_name + "GetWorkspaceSize"})
      for (size_t i = 0; i < nbytes; i += std::strlen(names + i) + 1)
        if (symbol == names + i) names[i] = '?';
}

}  // namespace

namespace aclnn {

at::ScalarType dtype_of(int type) {
  switch (type) {
    case ACL_FLOAT: return at::kFloat;
    case ACL_FLOAT16: return at::kHalf;
    case ACL_BF16: return at::kBFloat16;
    case ACL_DOUBLE: return at::kDouble;
    case ACL_INT8: return at::kChar;
    case ACL_UINT8: return at::kByte;
    case ACL_INT16: return at::kShort;
    case ACL_INT32: return at::kInt;
    case ACL_INT64: return at::kLong;
    case ACL_BOOL: return at::kBool;
  }
  TORCH_CHECK(false, "the emulated CANN has no aclDataType ", type);
}

Tensor view(const aclTensor* tensor) {
  if (!tensor) return {};
  auto dtype = dtype_of(tensor->type);
  auto item = static_cast<int64_t>(at::elementSize(dtype));
  auto* first = static_cast<char*>(tensor->data) + tensor->offset * item;
  int64_t last = 0;
  bool empty = false;
  for (size_t i = 0; i < tensor->sizes.size(); ++i) {
    empty |= tensor->sizes[i] == 0;
    last += (tensor->sizes[i] - 1) * tensor->strides[i];
  }
  TORCH_CHECK(empty || emulated::is_device_memory(first, (last + 1) * item), "an operand lies outside of device memory");
  TORCH_CHECK(is_plain(tensor->format), "the emulated CANN has no format ", tensor->format);
  return at::from_blob(first, tensor->sizes, tensor->strides, at::TensorOptions(dtype));
}

std::optional<Scalar> view(const aclScalar* scalar) {
  return scalar ? std::optional<Scalar>(scalar->value) : std::nullopt;
}

std::optional<std::vector<int64_t>> view(const aclIntArray* array) {
  return array ? std::optional(array->values) : std::nullopt;
}

std::vector<Tensor> view(const aclTensorList* list) {
  std::vector<Tensor> tensors;
  if (list)
    for (auto* tensor : list->tensors) tensors.push_back(view(tensor));
  return tensors;
}

std::string view(const char* text) { return text ? text : ""; }

int plan(const char* name, uint64_t* workspace_size, aclOpExecutor** executor,
         const std::function<std::function<void()>()>& bind) {
  *workspace_size = 0;
  if (aclError code = emulated::called((std::string(name) + "GetWorkspaceSize").c_str())) return code;
  try {
    *executor = new aclOpExecutor{name, bind()};
    return ACL_SUCCESS;
  } catch (const std::exception& error) {
    return emulated::fail(PLAN_FAILED, std::string(name) + ": " + error.what());
  }
}

int launch(aclOpExecutor* executor, aclrtStream stream) {
  std::unique_ptr<aclOpExecutor> owned(executor);
  if (aclError code = emulated::called(owned->name.c_str())) return code;
  emulated::log("%s %s", emulated::is_capturing(stream) ? "capture" : "launch", owned->name.c_str());
  return emulated::submit(stream, {owned->name, [name = owned->name, run = owned->run]() -> aclError {
    try {
      c10::InferenceMode without_gradients;
      run();
      return ACL_SUCCESS;
    } catch (const std::exception& error) {
      return emulated::fail(LAUNCH_FAILED, name + ": " + error.what());
    }
  }});
}

void write(const Tensor& output, const Tensor& value) {
  TORCH_CHECK(output.sizes() == value.sizes(), "the output is ", output.sizes(), ", the result ", value.sizes());
  output.copy_(value);
}

}  // namespace aclnn

API aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t rank, aclDataType type, const int64_t* strides, int64_t offset,
                               aclFormat format, const int64_t*, uint64_t, void* data) {
  return new aclTensor{numbers(sizes, rank), numbers(strides, rank), offset, type, format, data};
}
API aclScalar* aclCreateScalar(void* value, aclDataType type) {
  return new aclScalar{at::from_blob(value, {}, at::TensorOptions(aclnn::dtype_of(type))).item()};
}
API aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t count) { return new aclIntArray{numbers(values, count)}; }
API aclFloatArray* aclCreateFloatArray(const float* values, uint64_t count) { return new aclFloatArray{numbers(values, count)}; }
API aclBoolArray* aclCreateBoolArray(const bool* values, uint64_t count) { return new aclBoolArray{numbers(values, count)}; }
API aclTensorList* aclCreateTensorList(const aclTensor* const* tensors, uint64_t count) {
  return new aclTensorList{{tensors, tensors + count}};
}
API aclScalarList* aclCreateScalarList(const aclScalar* const* scalars, uint64_t count) {
  return new aclScalarList{{scalars, scalars + count}};
}

API int aclDestroyTensor(const aclTensor* tensor) { delete tensor; return ACL_SUCCESS; }
API int aclDestroyScalar(const aclScalar* scalar) { delete scalar; return ACL_SUCCESS; }
API int aclDestroyIntArray(const aclIntArray* array) { delete array; return ACL_SUCCESS; }
API int aclDestroyFloatArray(const aclFloatArray* array) { delete array; return ACL_SUCCESS; }
API int aclDestroyBoolArray(const aclBoolArray* array) { delete array; return ACL_SUCCESS; }
API int aclDestroyTensorList(const aclTensorList* list) {
  if (list) for (auto* tensor : list->tensors) delete tensor;
  delete list;
  return ACL_SUCCESS;
}
API int aclDestroyScalarList(const aclScalarList* list) {
  if (list) for (auto* scalar : list->scalars) delete scalar;
  delete list;
  return ACL_SUCCESS;
}
API int aclDestroyAclOpExecutor(aclOpExecutor* executor) { delete executor; return ACL_SUCCESS; }

API int aclGetViewShape(const aclTensor* tensor, int64_t** sizes, uint64_t* rank) {
  *rank = tensor->sizes.size();
  *sizes = new int64_t[*rank];
  std::copy(tensor->sizes.begin(), tensor->sizes.end(), *sizes);
  return ACL_SUCCESS;
}
