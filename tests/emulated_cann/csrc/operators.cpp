// The operators of the encoders, of the checks when one is loaded and of the tests, on ATen's CPU kernels.
// What each computes is CANN's document of it; parameters are those with which op-plugin calls it.
#include "aclnn.h"

using aclnn::write;

namespace {

bool has(const std::optional<std::vector<int64_t>>& dims) { return dims && !dims->empty(); }

std::optional<Tensor> optional(const Tensor& tensor) {
  return tensor.defined() ? std::optional<Tensor>(tensor) : std::nullopt;
}

// cubeMathType of products and convolutions on float32: 0 keeps it, 2 asks for float16, 1 and 3 for HF32, which keeps
// 11 bits of the fraction.
Tensor operand(const Tensor& x, int8_t math) {
  if (x.scalar_type() != at::kFloat) return x;
  if (math == 2) return x.to(at::kHalf).to(at::kFloat);
  if (math == 0 && !emulated::fault("cube", "hf32")) return x;
  auto bits = x.contiguous().view(at::kInt);
  return at::bitwise_and(at::add(bits, 0x800), ~0xFFF).view(at::kFloat);
}

const char* gelu(bool by_tanh) { return by_tanh || emulated::fault("gelu", "tanh") ? "tanh" : "none"; }

}  // namespace

// --- one tensor in, one out

#define UNARY(name, function) \
  OPERATOR(aclnn##name, (tensor x, tensor out), (x, out)) { write(out, at::function(x)); }
#define UNARY_IN_PLACE(name, function) \
  OPERATOR(aclnnInplace##name, (tensor x), (x)) { write(x, at::function(x)); }

UNARY(Abs, abs)
UNARY(BitwiseNot, bitwise_not)
UNARY(Ceil, ceil)
UNARY(Cos, cos)
UNARY(Erf, erf)
UNARY(Exp, exp)
UNARY(Floor, floor)
UNARY(IsFinite, isfinite)
UNARY(Log, log)
UNARY(LogicalNot, logical_not)
UNARY(Max, max)
UNARY(Min, min)
UNARY(Neg, neg)
UNARY(Reciprocal, reciprocal)
UNARY(Relu, relu)
UNARY(Rsqrt, rsqrt)
UNARY(Sigmoid, sigmoid)
UNARY(Sign, sign)
UNARY(Silu, silu)
UNARY(Sin, sin)
UNARY(Sqrt, sqrt)
UNARY(Tanh, tanh)
UNARY_IN_PLACE(Exp, exp)
UNARY_IN_PLACE(Neg, neg)
UNARY_IN_PLACE(Relu, relu)
UNARY_IN_PLACE(Rsqrt, rsqrt)
UNARY_IN_PLACE(Sigmoid, sigmoid)
UNARY_IN_PLACE(Silu, silu)
UNARY_IN_PLACE(Sqrt, sqrt)

// GELU by tanh, as CANN documents it; GeluV2 is told which one.
OPERATOR(aclnnGelu, (tensor x, tensor out), (x, out)) { write(out, at::gelu(x, gelu(true))); }
OPERATOR(aclnnGeluV2, (tensor x, int64_t approximate, tensor out), (x, approximate, out)) {
  write(out, at::gelu(x, gelu(approximate == 1)));
}

// --- two in, one out

#define BINARY(name, function) \
  OPERATOR(aclnn##name, (tensor x, tensor y, tensor out), (x, y, out)) { write(out, at::function(x, y)); }
#define WITH_SCALAR(name, function) \
  OPERATOR(aclnn##name, (tensor x, scalar y, tensor out), (x, y, out)) { write(out, at::function(x, *y)); }

BINARY(Mul, mul)
WITH_SCALAR(Muls, mul)
BINARY(Div, div)
WITH_SCALAR(Divs, div)
BINARY(FloorDivide, floor_divide)
WITH_SCALAR(FloorDivides, floor_divide)
BINARY(Maximum, maximum)
BINARY(Minimum, minimum)
BINARY(PowTensorTensor, pow)
WITH_SCALAR(PowTensorScalar, pow)
BINARY(EqTensor, eq)
WITH_SCALAR(EqScalar, eq)
BINARY(NeTensor, ne)
WITH_SCALAR(NeScalar, ne)
BINARY(GtTensor, gt)
WITH_SCALAR(GtScalar, gt)
BINARY(GeTensor, ge)
WITH_SCALAR(GeScalar, ge)
BINARY(LtTensor, lt)
WITH_SCALAR(LtScalar, lt)
BINARY(LeTensor, le)
WITH_SCALAR(LeScalar, le)
BINARY(LogicalAnd, logical_and)
BINARY(LogicalOr, logical_or)
BINARY(BitwiseAndTensor, bitwise_and)
WITH_SCALAR(BitwiseAndScalar, bitwise_and)
BINARY(BitwiseOrTensor, bitwise_or)
WITH_SCALAR(BitwiseOrScalar, bitwise_or)
OPERATOR(aclnnEqual, (tensor x, tensor y, tensor out), (x, y, out)) { out.fill_(at::equal(x, y)); }

OPERATOR(aclnnAdd, (tensor x, tensor y, scalar alpha, tensor out), (x, y, alpha, out)) { write(out, at::add(x, y, *alpha)); }
OPERATOR(aclnnAdds, (tensor x, scalar y, scalar alpha, tensor out), (x, y, alpha, out)) { write(out, at::add(x, *y, *alpha)); }
OPERATOR(aclnnSub, (tensor x, tensor y, scalar alpha, tensor out), (x, y, alpha, out)) { write(out, at::sub(x, y, *alpha)); }
OPERATOR(aclnnSubs, (tensor x, scalar y, scalar alpha, tensor out), (x, y, alpha, out)) { write(out, at::sub(x, *y, *alpha)); }
OPERATOR(aclnnRsubs, (tensor x, scalar y, scalar alpha, tensor out), (x, y, alpha, out)) { write(out, at::rsub(x, *y, *alpha)); }

OPERATOR(aclnnInplaceAdd, (tensor x, tensor y, scalar alpha), (x, y, alpha)) { write(x, at::add(x, y, *alpha)); }
OPERATOR(aclnnInplaceAdds, (tensor x, scalar y, scalar alpha), (x, y, alpha)) { write(x, at::add(x, *y, *alpha)); }
OPERATOR(aclnnInplaceSub, (tensor x, tensor y, scalar alpha), (x, y, alpha)) { write(x, at::sub(x, y, *alpha)); }
OPERATOR(aclnnInplaceSubs, (tensor x, scalar y, scalar alpha), (x, y, alpha)) { write(x, at::sub(x, *y, *alpha)); }
OPERATOR(aclnnInplaceMul, (tensor x, tensor y), (x, y)) { write(x, at::mul(x, y)); }
OPERATOR(aclnnInplaceMuls, (tensor x, scalar y), (x, y)) { write(x, at::mul(x, *y)); }
OPERATOR(aclnnInplaceDiv, (tensor x, tensor y), (x, y)) { write(x, at::div(x, y)); }
OPERATOR(aclnnInplaceDivs, (tensor x, scalar y), (x, y)) { write(x, at::div(x, *y)); }

// --- making, moving and choosing

OPERATOR(aclnnInplaceZero, (tensor x), (x)) { x.zero_(); }
OPERATOR(aclnnInplaceOne, (tensor x), (x)) { x.fill_(1); }
OPERATOR(aclnnInplaceFillScalar, (tensor x, scalar value), (x, value)) { x.fill_(*value); }
OPERATOR(aclnnInplaceFillTensor, (tensor x, tensor value), (x, value)) { x.copy_(value.expand_as(x)); }
OPERATOR(aclnnInplaceCopy, (tensor x, tensor y), (x, y)) { x.copy_(y); }
OPERATOR(aclnnCast, (tensor x, int type, tensor out), (x, type, out)) { write(out, x.to(aclnn::dtype_of(type))); }
OPERATOR(aclnnCat, (tensors parts, int64_t dim, tensor out), (parts, dim, out)) { write(out, at::cat(parts, dim)); }
OPERATOR(aclnnStack, (tensors parts, int64_t dim, tensor out), (parts, dim, out)) { write(out, at::stack(parts, dim)); }
OPERATOR(aclnnArange, (scalar start, scalar end, scalar step, tensor out), (start, end, step, out)) {
  write(out, at::arange(*start, *end, *step, out.options()));
}
OPERATOR(aclnnClamp, (tensor x, scalar low, scalar high, tensor out), (x, low, high, out)) { write(out, at::clamp(x, low, high)); }
OPERATOR(aclnnClampMin, (tensor x, scalar low, tensor out), (x, low, out)) { write(out, at::clamp_min(x, *low)); }
OPERATOR(aclnnSWhere, (tensor condition, tensor x, tensor y, tensor out), (condition, x, y, out)) {
  write(out, at::where(condition, x, y));
}
OPERATOR(aclnnIndexSelect, (tensor x, int64_t dim, tensor index, tensor out), (x, dim, index, out)) {
  write(out, at::index_select(x, dim, index));
}
OPERATOR(aclnnEmbedding, (tensor weight, tensor index, tensor out), (weight, index, out)) {
  write(out, at::embedding(weight, index));
}
OPERATOR(aclnnConstantPadNd, (tensor x, ints padding, scalar value, tensor out), (x, padding, value, out)) {
  write(out, at::constant_pad_nd(x, *padding, *value));
}
OPERATOR(aclnnMaskedSelect, (tensor x, tensor mask, raw out), (x, mask, out)) {
  auto value = at::masked_select(x, mask);
  at::from_blob(out->data, value.sizes(), value.options()).copy_(value);
  out->sizes = value.sizes().vec();
}
OPERATOR(aclnnNonzero, (tensor x, raw out), (x, out)) {
  auto value = at::nonzero(x);
  at::from_blob(out->data, value.sizes(), value.options()).copy_(value);
  out->sizes = value.sizes().vec();
}

// --- products and convolutions

#define PRODUCT(name)                                                                                        \
  OPERATOR(aclnn##name, (tensor x, tensor y, tensor out, int8_t math), (x, y, out, math)) {                  \
    write(out, at::matmul(operand(x, math), operand(y, math)));                                              \
  }
#define PRODUCT_WITH_SUM(name, function)                                                                     \
  OPERATOR(aclnn##name, (tensor sum, tensor x, tensor y, scalar beta, scalar alpha, tensor out, int8_t math), \
           (sum, x, y, beta, alpha, out, math)) {                                                            \
    write(out, at::function(sum, operand(x, math), operand(y, math), *beta, *alpha));                        \
  }

PRODUCT(Matmul)
PRODUCT(Mm)
PRODUCT(BatchMatMul)
PRODUCT_WITH_SUM(Addmm, addmm)
PRODUCT_WITH_SUM(Baddbmm, baddbmm)

OPERATOR(aclnnConvolution,
         (tensor x, tensor weight, tensor bias, ints stride, ints padding, ints dilation, bool transposed,
          ints output_padding, int64_t groups, tensor out, int8_t math),
         (x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, out, math)) {
  write(out, at::convolution(operand(x, math), operand(weight, math), optional(bias), *stride, *padding, *dilation,
                             transposed, *output_padding, groups));
}
OPERATOR(aclnnConvDepthwise2d,
         (tensor x, tensor weight, ints kernel, tensor bias, ints stride, ints padding, ints dilation, tensor out, int8_t math),
         (x, weight, kernel, bias, stride, padding, dilation, out, math)) {
  write(out, at::conv2d(operand(x, math), operand(weight, math), optional(bias), *stride, *padding, *dilation, x.size(1)));
}

// --- norms, softmax and sums

#define LAYER_NORM(name)                                                                                      \
  OPERATOR(aclnn##name, (tensor x, ints shape, tensor weight, tensor bias, double eps, tensor out, tensor mean, \
                         tensor inverse), (x, shape, weight, bias, eps, out, mean, inverse)) {                \
    auto [y, m, r] = at::native_layer_norm(x, *shape, optional(weight), optional(bias), eps);                 \
    write(out, y);                                                                                            \
    if (mean.defined()) mean.copy_(m.view_as(mean));                                                          \
    if (inverse.defined()) inverse.copy_(r.view_as(inverse));                                                 \
  }
LAYER_NORM(LayerNorm)
LAYER_NORM(FastLayerNorm)

OPERATOR(aclnnRmsNorm, (tensor x, tensor weight, double eps, tensor out, tensor inverse), (x, weight, eps, out, inverse)) {
  std::vector<int64_t> dims;
  for (int64_t i = 1; i <= weight.dim(); ++i) dims.push_back(-i);
  auto wide = x.to(at::kFloat);
  auto r = at::rsqrt(at::mean(at::pow(wide, 2), dims, true) + eps);
  inverse.copy_(r.view_as(inverse));
  write(out, (wide * r).to(x.scalar_type()) * weight);
}
OPERATOR(aclnnSoftmax, (tensor x, int64_t dim, tensor out), (x, dim, out)) { write(out, at::softmax(x, dim)); }
OPERATOR(aclnnMean, (tensor x, ints dims, bool keep, int type, tensor out), (x, dims, keep, type, out)) {
  auto dtype = aclnn::dtype_of(type);
  write(out, has(dims) ? at::mean(x, *dims, keep, dtype) : at::mean(x, dtype));
}
OPERATOR(aclnnReduceSum, (tensor x, ints dims, bool keep, int type, tensor out), (x, dims, keep, type, out)) {
  auto dtype = aclnn::dtype_of(type);
  write(out, has(dims) ? at::sum(x, *dims, keep, dtype) : at::sum(x, dtype));
}
OPERATOR(aclnnNorm, (tensor x, scalar p, ints dims, bool keep, tensor out), (x, p, dims, keep, out)) {
  write(out, has(dims) ? at::norm(x, p, *dims, keep) : at::norm(x, *p));
}
OPERATOR(aclnnAll, (tensor x, ints dims, bool keep, tensor out), (x, dims, keep, out)) { write(out, at::all(x, *dims, keep)); }
OPERATOR(aclnnAny, (tensor x, ints dims, bool keep, tensor out), (x, dims, keep, out)) { write(out, at::any(x, *dims, keep)); }

// --- fused attention of [B, heads, N, D], without bias, dropout and the modes of sparse masks

OPERATOR(aclnnFlashAttentionScore,
         (tensor q, tensor k, tensor v, tensor bias, tensor drop, tensor padding, tensor mask, ints prefix, double scale,
          double keep, int64_t before, int64_t after, int64_t heads, text layout, int64_t precise, int64_t sparse,
          tensor maximum, tensor total, tensor softmax_out, tensor out),
         (q, k, v, bias, drop, padding, mask, prefix, scale, keep, before, after, heads, layout, precise, sparse, maximum,
          total, softmax_out, out)) {
  TORCH_CHECK(layout == "BNSD" && !bias.defined() && !drop.defined() && sparse == 0,
              "the emulated CANN has fused attention of BNSD alone, without bias, dropout and sparse masks");
  TORCH_CHECK(q.size(1) == k.size(1), "the emulated CANN has fused attention with as many heads of keys as of queries alone");
  auto masked = mask.defined() ? mask.to(at::kBool).expand({q.size(0), q.size(1), q.size(2), k.size(2)}) : Tensor();
  for (int64_t image = 0; image < q.size(0); ++image) {
    for (int64_t head = 0; head < q.size(1); ++head) {  // one after the other, so that the scores stay in the cache
      auto of = [&](const Tensor& x) { return x[image][head]; };
      auto scores = at::mm(of(q), of(k).t()).to(at::kFloat).mul_(scale);
      if (masked.defined()) scores.masked_fill_(of(masked), -INFINITY);
      if (emulated::fault("attention", "uniform")) scores.zero_();
      auto m = at::amax(scores, {-1}, true), z = at::sum(scores.sub_(m).exp_(), {-1}, true);
      of(out).copy_(at::mm(scores.div_(z).to(v.scalar_type()), of(v)));
      if (maximum.defined() && maximum.numel()) of(maximum).copy_(m.expand_as(of(maximum)));
      if (total.defined() && total.numel()) of(total).copy_(z.expand_as(of(total)));
    }
  }
}
