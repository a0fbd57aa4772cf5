// The objects of aclnn, and OPERATOR, which declares one operator.
//
// aclnn calls an operator twice: aclnnNameGetWorkspaceSize takes the arguments and gives an executor, aclnnName puts that
// on a stream. The caller destroys the arguments after the second call, so what runs later holds its own view of them.
#pragma once

#include "emulator.h"

#include <ATen/ATen.h>

using at::Scalar;
using at::Tensor;

struct aclTensor {
  std::vector<int64_t> sizes, strides;
  int64_t offset;  // in elements
  int type, format;
  void* data;
};
struct aclScalar { Scalar value; };
struct aclIntArray { std::vector<int64_t> values; };
struct aclFloatArray { std::vector<float> values; };
struct aclBoolArray { std::vector<bool> values; };
struct aclTensorList { std::vector<const aclTensor*> tensors; };
struct aclScalarList { std::vector<const aclScalar*> scalars; };
struct aclOpExecutor { std::string name; std::function<void()> run; };

namespace aclnn {

at::ScalarType dtype_of(int type);

// What an argument is to an operator's body: a tensor over the device's memory, a number, a list. Absent ones stay absent.
Tensor view(const aclTensor* tensor);
std::optional<Scalar> view(const aclScalar* scalar);
std::optional<std::vector<int64_t>> view(const aclIntArray* array);
std::vector<Tensor> view(const aclTensorList* list);
std::string view(const char* text);
inline std::string view(char* text) { return view(static_cast<const char*>(text)); }
template <class T> T view(T number) { return number; }

int plan(const char* name, uint64_t* workspace_size, aclOpExecutor** executor, const std::function<std::function<void()>()>& bind);
int launch(aclOpExecutor* executor, aclrtStream stream);

// Writes a result of the output's own shape; another shape is an error of this file or of the caller.
void write(const Tensor& output, const Tensor& value);

}  // namespace aclnn

#define SPREAD(...) __VA_ARGS__

// OPERATOR(aclnnName, (types and names), (names)) { body }. The parameters are in aclnn's order, without the two last.
// Their types are read twice: as C has them (in `given`), and as the body sees them (in `seen`).
namespace given {
using tensor = const aclTensor*;
using tensors = const aclTensorList*;
using scalar = const aclScalar*;
using ints = const aclIntArray*;
using text = const char*;
using raw = aclTensor*;
}  // namespace given
namespace seen {
using tensor = const Tensor&;
using tensors = const std::vector<Tensor>&;
using scalar = const std::optional<Scalar>&;
using ints = const std::optional<std::vector<int64_t>>&;
using text = const std::string&;
using raw = aclTensor*;  // an output whose size the operator finds out
}  // namespace seen

#define OPERATOR(name, parameters, names)                                                                      \
  namespace seen { static void name parameters; }                                                              \
  namespace given {                                                                                            \
  API int name##GetWorkspaceSize(SPREAD parameters, uint64_t* workspace_size, aclOpExecutor** executor) {      \
    auto bind = [&]<class... A>(A... argument) {                                                               \
      return aclnn::plan(#name, workspace_size, executor, [&]() -> std::function<void()> {                     \
        return [... held = aclnn::view(argument)] { seen::name(held...); };                                    \
      });                                                                                                      \
    };                                                                                                         \
    return bind(SPREAD names);                                                                                 \
  }                                                                                                            \
  }                                                                                                            \
  API int name(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) {                                 \
    return aclnn::launch(executor, stream);                                                                    \
  }                                                                                                            \
  static void seen::name parameters
