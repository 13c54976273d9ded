// The only file that knows Python. Tensors arrive as addresses, sizes and strides: peftkern/backends/cpu.py checks
// them, and the module works with every version of PyTorch. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/run.h"

namespace py = pybind11;
using namespace peftkern;

namespace {

template <class T>
const T* pointer(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

// (data, encoding, rows, columns, row_stride, codebook, block_shift,
//  scales, scale_codebook, scales_absmax, scales_offset, scales_block_shift)
using WeightTuple =
    std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, uintptr_t, int, uintptr_t, uintptr_t, uintptr_t, float, int>;

Weight to_weight(const WeightTuple& t) {
  Weight w;
  w.data = pointer<void>(std::get<0>(t));
  w.encoding = static_cast<Encoding>(std::get<1>(t));
  w.rows = std::get<2>(t);
  w.columns = std::get<3>(t);
  w.row_stride = std::get<4>(t);
  w.codebook = pointer<float>(std::get<5>(t));
  w.block_shift = std::get<6>(t);
  w.scales = pointer<void>(std::get<7>(t));
  w.scale_codebook = pointer<float>(std::get<8>(t));
  w.scales_absmax = pointer<float>(std::get<9>(t));
  w.scales_offset = std::get<10>(t);
  w.scales_block_shift = std::get<11>(t);
  return w;
}

// (seed, adapter, p); p = 0 drops nothing
using DropoutTuple = std::tuple<uint64_t, uint32_t, double>;

Dropout to_dropout(const DropoutTuple& t) {
  const double p = std::get<2>(t);
  Dropout d;
  d.seed = std::get<0>(t);
  d.adapter = std::get<1>(t);
  d.threshold = static_cast<uint64_t>(__builtin_nearbyint(p * 4294967296.0));
  d.keep_scale = p >= 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - p));
  return d;
}

// (left, left_stride, right, right_stride, rank, dropout)
using LowRankTuple = std::tuple<uintptr_t, int64_t, uintptr_t, int64_t, int64_t, DropoutTuple>;

std::vector<cpu::LowRank> to_low_rank(const std::vector<LowRankTuple>& tuples) {
  std::vector<cpu::LowRank> terms;
  for (const LowRankTuple& t : tuples)
    terms.push_back({pointer<float>(std::get<0>(t)), std::get<1>(t), pointer<float>(std::get<2>(t)), std::get<3>(t),
                     std::get<4>(t), to_dropout(std::get<5>(t))});
  return terms;
}

// (data, dtype, token_stride, feature_stride, dropout)
using ActivationsTuple = std::tuple<uintptr_t, int, int64_t, int64_t, DropoutTuple>;

// (bits, row_stride); an address of 0 keeps everything
using MaskTuple = std::tuple<uintptr_t, int64_t>;

BitMask to_mask(const MaskTuple& t) { return {pointer<uint8_t>(std::get<0>(t)), std::get<1>(t)}; }

void product(const std::string& isa, const ActivationsTuple& activations, int64_t tokens, const WeightTuple& weight,
             const MaskTuple& weight_mask, const DropoutTuple& weight_dropout, bool transposed, float alpha,
             const std::vector<LowRankTuple>& low_rank, uintptr_t bias, uintptr_t out, int out_dtype,
             int64_t out_stride, const MaskTuple& out_mask, int precision, int threads) {
  // Tensors without memory of their own (meta tensors, wrapper subclasses) have address 0.
  if (std::get<0>(activations) == 0 || std::get<0>(weight) == 0 || out == 0)
    throw std::invalid_argument("product: activations, weight and out must have memory on the CPU");
  const std::vector<cpu::LowRank> terms = to_low_rank(low_rank);
  cpu::Product p;
  p.activations = {pointer<void>(std::get<0>(activations)), static_cast<DType>(std::get<1>(activations)),
                   std::get<2>(activations), std::get<3>(activations), to_dropout(std::get<4>(activations))};
  p.weight = to_weight(weight);
  p.weight.mask = to_mask(weight_mask);
  p.weight_dropout = to_dropout(weight_dropout);
  p.transposed = transposed;
  p.tokens = tokens;
  p.alpha = alpha;
  p.low_rank = terms.data();
  p.low_rank_count = static_cast<int64_t>(terms.size());
  p.bias = pointer<float>(bias);
  p.out = reinterpret_cast<void*>(out);
  p.out_dtype = static_cast<DType>(out_dtype);
  p.out_stride = out_stride;
  p.out_mask = to_mask(out_mask);
  p.precision = static_cast<cpu::Precision>(precision);
  p.threads = threads;
  const cpu::Kernels& kernels = *cpu::find_instruction_set(isa.c_str()).kernels();
  const py::gil_scoped_release release;
  cpu::run_product(kernels, p);
}

void quantize(const std::string& isa, uintptr_t values, int dtype, int64_t elements, int64_t block_size, int encoding,
              uintptr_t bounds, uintptr_t codes, uintptr_t grid, uintptr_t packed, uintptr_t scales, int threads) {
  cpu::Quantization q;
  q.values = pointer<void>(values);
  q.dtype = static_cast<DType>(dtype);
  q.elements = elements;
  q.block_size = block_size;
  q.encoding = static_cast<Encoding>(encoding);
  q.bounds = pointer<float>(bounds);
  q.codes = pointer<uint8_t>(codes);
  q.grid = pointer<uint8_t>(grid);
  q.packed = reinterpret_cast<uint8_t*>(packed);
  q.scales = reinterpret_cast<float*>(scales);
  const cpu::Kernels& kernels = *cpu::find_instruction_set(isa.c_str()).kernels();
  const py::gil_scoped_release release;
  cpu::run_quantization(kernels, q, threads);
}

void dequantize(const std::string& isa, const WeightTuple& weight, int64_t elements, int64_t block_size, uintptr_t out,
                int dtype, int threads) {
  cpu::Dequantization d;
  d.weight = to_weight(weight);
  d.elements = elements;
  d.block_size = block_size;
  d.out = reinterpret_cast<void*>(out);
  d.dtype = static_cast<DType>(dtype);
  const cpu::Kernels& kernels = *cpu::find_instruction_set(isa.c_str()).kernels();
  const py::gil_scoped_release release;
  cpu::run_dequantization(kernels, d, threads);
}

void silu_mul(const std::string& isa, int activation, uintptr_t gate, uintptr_t up, uintptr_t out, int dtype,
              int64_t elements, int threads) {
  cpu::SiluMul s;
  s.activation = static_cast<cpu::Activation>(activation);
  s.gate = pointer<void>(gate);
  s.up = pointer<void>(up);
  s.out = reinterpret_cast<void*>(out);
  s.dtype = static_cast<DType>(dtype);
  s.elements = elements;
  const cpu::Kernels& kernels = *cpu::find_instruction_set(isa.c_str()).kernels();
  const py::gil_scoped_release release;
  cpu::run_silu_mul(kernels, s, threads);
}

void silu_mul_backward(const std::string& isa, int activation, uintptr_t grad, uintptr_t gate, uintptr_t up,
                       uintptr_t out, uintptr_t grad_gate, uintptr_t grad_up, int dtype, int64_t elements,
                       int threads) {
  cpu::SiluMul s;
  s.activation = static_cast<cpu::Activation>(activation);
  s.grad = pointer<void>(grad);
  s.gate = pointer<void>(gate);
  s.up = pointer<void>(up);
  s.out = reinterpret_cast<void*>(out);
  s.grad_gate = reinterpret_cast<void*>(grad_gate);
  s.grad_up = reinterpret_cast<void*>(grad_up);
  s.dtype = static_cast<DType>(dtype);
  s.elements = elements;
  const cpu::Kernels& kernels = *cpu::find_instruction_set(isa.c_str()).kernels();
  const py::gil_scoped_release release;
  cpu::run_silu_mul_backward(kernels, s, threads);
}

// (data, out, heads, strides, out_strides)
using RotaryStatesTuple = std::tuple<uintptr_t, uintptr_t, int64_t, std::array<int64_t, 3>, std::array<int64_t, 3>>;
// (data, strides)
using AnglesTuple = std::tuple<uintptr_t, std::array<int64_t, 2>>;

void rotary(const std::string& isa, const std::vector<RotaryStatesTuple>& states, const AnglesTuple& cos,
            const AnglesTuple& sin, int dtype, int angle_dtype, const std::array<int64_t, 4>& sizes, bool interleaved,
            bool inverse, int threads) {
  std::vector<cpu::RotaryStates> all;
  for (const RotaryStatesTuple& t : states) {
    if (std::get<0>(t) == 0) throw std::invalid_argument("rotary: q and k must have memory on the CPU");
    cpu::RotaryStates s;
    s.x = pointer<void>(std::get<0>(t));
    s.out = reinterpret_cast<void*>(std::get<1>(t));
    s.heads = std::get<2>(t);
    std::copy_n(std::get<3>(t).begin(), 3, s.strides);
    std::copy_n(std::get<4>(t).begin(), 3, s.out_strides);
    all.push_back(s);
  }
  cpu::Rotary r;
  r.states = all.data();
  r.state_count = static_cast<int64_t>(all.size());
  r.cos = pointer<void>(std::get<0>(cos));
  r.sin = pointer<void>(std::get<0>(sin));
  std::copy_n(std::get<1>(cos).begin(), 2, r.cos_strides);
  std::copy_n(std::get<1>(sin).begin(), 2, r.sin_strides);
  r.dtype = static_cast<DType>(dtype);
  r.angle_dtype = static_cast<DType>(angle_dtype);
  r.batch = sizes[0];
  r.tokens = sizes[1];
  r.head_dim = sizes[2];
  r.rotary_dim = sizes[3];
  r.interleaved = interleaved;
  r.inverse = inverse;
  const cpu::Kernels& kernels = *cpu::find_instruction_set(isa.c_str()).kernels();
  const py::gil_scoped_release release;
  cpu::run_rotary(kernels, r, threads);
}

// (data, strides); data 0: not there
using AttentionTensorTuple = std::tuple<uintptr_t, std::array<int64_t, 3>>;

cpu::AttentionTensor to_attention_tensor(const AttentionTensorTuple& t) {
  cpu::AttentionTensor tensor;
  tensor.data = reinterpret_cast<void*>(std::get<0>(t));
  std::copy_n(std::get<1>(t).begin(), 3, tensor.strides);
  return tensor;
}

// (data, boolean, dtype, strides); data 0: not there
using AttentionMaskTuple = std::tuple<uintptr_t, bool, int, std::array<int64_t, 4>>;
// (query, key, value, out, logsumexp, mask, dtype, sizes, scale, causal)
using AttentionTuple =
    std::tuple<AttentionTensorTuple, AttentionTensorTuple, AttentionTensorTuple, AttentionTensorTuple, uintptr_t,
               AttentionMaskTuple, int, std::array<int64_t, 6>, float, bool>;

cpu::Attention to_attention(const AttentionTuple& t) {
  cpu::Attention a;
  a.query = to_attention_tensor(std::get<0>(t));
  a.key = to_attention_tensor(std::get<1>(t));
  a.value = to_attention_tensor(std::get<2>(t));
  a.out = to_attention_tensor(std::get<3>(t));
  if (a.query.data == nullptr || a.key.data == nullptr || a.value.data == nullptr)
    throw std::invalid_argument("attention: query, key and value must have memory on the CPU");
  a.logsumexp = reinterpret_cast<float*>(std::get<4>(t));
  const AttentionMaskTuple& mask = std::get<5>(t);
  a.mask.data = pointer<void>(std::get<0>(mask));
  a.mask.boolean = std::get<1>(mask);
  a.mask.dtype = static_cast<DType>(std::get<2>(mask));
  std::copy_n(std::get<3>(mask).begin(), 4, a.mask.strides);
  a.dtype = static_cast<DType>(std::get<6>(t));
  const std::array<int64_t, 6>& sizes = std::get<7>(t);
  a.batch = sizes[0];
  a.heads = sizes[1];
  a.kv_heads = sizes[2];
  a.queries = sizes[3];
  a.keys = sizes[4];
  a.head_dim = sizes[5];
  a.scale = std::get<8>(t);
  a.causal = std::get<9>(t);
  return a;
}

void attention(const std::string& isa, const AttentionTuple& arguments, int threads) {
  const cpu::Attention a = to_attention(arguments);
  const cpu::Kernels& kernels = *cpu::find_instruction_set(isa.c_str()).kernels();
  const py::gil_scoped_release release;
  cpu::run_attention(kernels, a, threads);
}

void attention_backward(const std::string& isa, const AttentionTuple& arguments, const AttentionTensorTuple& grad_out,
                        const AttentionTensorTuple& grad_query, const AttentionTensorTuple& grad_key,
                        const AttentionTensorTuple& grad_value, int threads) {
  cpu::Attention a = to_attention(arguments);
  a.grad_out = to_attention_tensor(grad_out);
  if (a.grad_out.data == nullptr) throw std::invalid_argument("attention: grad must have memory on the CPU");
  a.grad_query = to_attention_tensor(grad_query);
  a.grad_key = to_attention_tensor(grad_key);
  a.grad_value = to_attention_tensor(grad_value);
  const cpu::Kernels& kernels = *cpu::find_instruction_set(isa.c_str()).kernels();
  const py::gil_scoped_release release;
  cpu::run_attention_backward(kernels, a, threads);
}

// (data, row_stride); data 0: not there
using RowsTuple = std::tuple<uintptr_t, int64_t>;

void norm(const std::string& isa, const RowsTuple& x, const RowsTuple& residual, uintptr_t weight, uintptr_t bias,
          uintptr_t y, uintptr_t total, uintptr_t mean, uintptr_t rstd, int dtype, int64_t rows, int64_t features,
          float eps, float weight_offset, bool round_first, int threads) {
  if (std::get<0>(x) == 0) throw std::invalid_argument("norm: x must have memory on the CPU");
  cpu::Norm n;
  n.x = pointer<void>(std::get<0>(x));
  n.x_stride = std::get<1>(x);
  n.residual = pointer<void>(std::get<0>(residual));
  n.residual_stride = std::get<1>(residual);
  n.weight = pointer<float>(weight);
  n.bias = pointer<float>(bias);
  n.y = reinterpret_cast<void*>(y);
  n.total = reinterpret_cast<void*>(total);
  n.mean = reinterpret_cast<float*>(mean);
  n.rstd = reinterpret_cast<float*>(rstd);
  n.dtype = static_cast<DType>(dtype);
  n.rows = rows;
  n.features = features;
  n.eps = eps;
  n.weight_offset = weight_offset;
  n.round_first = round_first;
  const cpu::Kernels& kernels = *cpu::find_instruction_set(isa.c_str()).kernels();
  const py::gil_scoped_release release;
  cpu::run_norm(kernels, n, threads);
}

void norm_backward(const std::string& isa, const RowsTuple& grad, const RowsTuple& grad_total, const RowsTuple& total,
                   uintptr_t weight, uintptr_t mean, uintptr_t rstd, uintptr_t grad_x, uintptr_t grad_weight,
                   uintptr_t grad_bias, int dtype, int64_t rows, int64_t features, float weight_offset, int threads) {
  if (std::get<0>(grad) == 0) throw std::invalid_argument("norm_backward: grad must have memory on the CPU");
  cpu::NormBackward n;
  n.grad = pointer<void>(std::get<0>(grad));
  n.grad_stride = std::get<1>(grad);
  n.grad_total = pointer<void>(std::get<0>(grad_total));
  n.grad_total_stride = std::get<1>(grad_total);
  n.total = pointer<void>(std::get<0>(total));
  n.total_stride = std::get<1>(total);
  n.weight = pointer<float>(weight);
  n.mean = pointer<float>(mean);
  n.rstd = pointer<float>(rstd);
  n.grad_x = reinterpret_cast<void*>(grad_x);
  n.grad_weight = reinterpret_cast<float*>(grad_weight);
  n.grad_bias = reinterpret_cast<float*>(grad_bias);
  n.dtype = static_cast<DType>(dtype);
  n.rows = rows;
  n.features = features;
  n.weight_offset = weight_offset;
  const cpu::Kernels& kernels = *cpu::find_instruction_set(isa.c_str()).kernels();
  const py::gil_scoped_release release;
  cpu::run_norm_backward(kernels, n, threads);
}

// (data, dtype, token_stride); data 0: not there
using TokenRowsTuple = std::tuple<uintptr_t, int, int64_t>;

cpu::TokenRows to_token_rows(const TokenRowsTuple& t) {
  return {reinterpret_cast<void*>(std::get<0>(t)), static_cast<DType>(std::get<1>(t)), std::get<2>(t)};
}

// (source_features, features, source_offsets, offsets, others, order)
using SparseOrderTuple = std::tuple<int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

void sparse_product(const std::string& isa, int64_t tokens, const TokenRowsTuple& source, const TokenRowsTuple& target,
                    const TokenRowsTuple& pair, const SparseOrderTuple& order, uintptr_t values, uintptr_t gradients,
                    float scaling, int threads) {
  cpu::SparseProduct p;
  p.source = to_token_rows(source);
  p.target = to_token_rows(target);
  p.pair = to_token_rows(pair);
  p.tokens = tokens;
  p.source_features = std::get<0>(order);
  p.features = std::get<1>(order);
  p.source_offsets = pointer<int64_t>(std::get<2>(order));
  p.offsets = pointer<int64_t>(std::get<3>(order));
  p.others = pointer<int32_t>(std::get<4>(order));
  p.order = pointer<int32_t>(std::get<5>(order));
  p.values = pointer<float>(values);
  p.gradients = reinterpret_cast<float*>(gradients);
  p.scaling = scaling;
  p.threads = threads;
  // Tensors without memory of their own (meta tensors, wrapper subclasses) have address 0.
  const bool has_result = p.target.data != nullptr || p.gradients != nullptr;
  const bool lacks_pair = p.gradients != nullptr && p.pair.data == nullptr;
  if (p.source.data == nullptr || p.values == nullptr || !has_result || lacks_pair)
    throw std::invalid_argument("sparse_product: source, target, pair and values must have memory on the CPU");
  const cpu::Kernels& kernels = *cpu::find_instruction_set(isa.c_str()).kernels();
  const py::gil_scoped_release release;
  cpu::run_sparse_product(kernels, p);
}

// (data, absmax, values, bounds, cells, first_cell, last_cell, has_sign)
using MomentTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int32_t, int32_t, bool>;

cpu::Moment to_moment(const MomentTuple& t) {
  cpu::Moment m;
  m.data = reinterpret_cast<void*>(std::get<0>(t));
  m.absmax = reinterpret_cast<float*>(std::get<1>(t));
  m.values = pointer<float>(std::get<2>(t));
  m.bounds = pointer<float>(std::get<3>(t));
  m.cells = pointer<uint8_t>(std::get<4>(t));
  m.first_cell = std::get<5>(t);
  m.last_cell = std::get<6>(t);
  m.has_sign = std::get<7>(t);
  return m;
}

void check_moment(const MomentTuple& moment, uintptr_t values) {
  if (values == 0 || std::get<0>(moment) == 0 || std::get<1>(moment) == 0)
    throw std::invalid_argument("moment: values, codes and scales must have memory on the CPU");
}

void encode_moment(const std::string& isa, const MomentTuple& moment, uintptr_t values, int64_t elements, int threads) {
  check_moment(moment, values);
  const cpu::Kernels& kernels = *cpu::find_instruction_set(isa.c_str()).kernels();
  const py::gil_scoped_release release;
  cpu::run_encode_moment(kernels, to_moment(moment), pointer<float>(values), elements, threads);
}

void decode_moment(const std::string& isa, const MomentTuple& moment, uintptr_t values, int64_t elements, int threads) {
  check_moment(moment, values);
  const cpu::Kernels& kernels = *cpu::find_instruction_set(isa.c_str()).kernels();
  const py::gil_scoped_release release;
  cpu::run_decode_moment(kernels, to_moment(moment), reinterpret_cast<float*>(values), elements, threads);
}

// (data, dtype)
using ValuesTuple = std::tuple<uintptr_t, int>;
// (age, corrections, last_age); an age of 0 means that entries have none
using AgesTuple = std::tuple<uintptr_t, uintptr_t, int32_t>;
// (scale, row_scales, mask, columns)
using ScaleTuple = std::tuple<float, uintptr_t, uintptr_t, int64_t>;

void adamw(const std::string& isa, const ValuesTuple& parameter, const ValuesTuple& gradient, int64_t elements,
           const MomentTuple& mean, const MomentTuple& square, const std::array<float, 8>& coefficients,
           const AgesTuple& ages, const ScaleTuple& scale, bool probe, int threads) {
  const bool lacks_moments = std::get<0>(mean) == 0 || std::get<0>(square) == 0;
  if (std::get<0>(parameter) == 0 || std::get<0>(gradient) == 0 || (lacks_moments && !probe))
    throw std::invalid_argument("adamw: parameter, gradient and moments must have memory on the CPU");
  cpu::AdamW a;
  a.probe = probe;
  a.parameter = reinterpret_cast<void*>(std::get<0>(parameter));
  a.parameter_dtype = static_cast<DType>(std::get<1>(parameter));
  a.gradient = reinterpret_cast<void*>(std::get<0>(gradient));
  a.gradient_dtype = static_cast<DType>(std::get<1>(gradient));
  a.elements = elements;
  a.mean = to_moment(mean);
  a.square = to_moment(square);
  a.lr = coefficients[0];
  a.mean_weight = coefficients[1];
  a.square_decay = coefficients[2];
  a.square_weight = coefficients[3];
  a.eps = coefficients[4];
  a.decay = coefficients[5];
  a.mean_correction = coefficients[6];
  a.root_correction = coefficients[7];
  a.age = reinterpret_cast<int32_t*>(std::get<0>(ages));
  a.corrections = pointer<float>(std::get<1>(ages));
  a.last_age = std::get<2>(ages);
  a.scale = std::get<0>(scale);
  a.row_scales = pointer<float>(std::get<1>(scale));
  a.mask = pointer<uint8_t>(std::get<2>(scale));
  a.columns = std::get<3>(scale);
  const cpu::Kernels& kernels = *cpu::find_instruction_set(isa.c_str()).kernels();
  const py::gil_scoped_release release;
  cpu::run_adamw(kernels, a, threads);
}

// (score, a, other, columns, elements, exclude, exclude_count); the address of `other` is 0 where there is none
using ScoresTuple = std::tuple<int, ValuesTuple, ValuesTuple, int64_t, int64_t, uintptr_t, int64_t>;

cpu::Scores to_scores(const ScoresTuple& t) {
  cpu::Scores s;
  s.score = static_cast<cpu::Score>(std::get<0>(t));
  s.a = pointer<void>(std::get<0>(std::get<1>(t)));
  s.a_dtype = static_cast<DType>(std::get<1>(std::get<1>(t)));
  s.other = pointer<void>(std::get<0>(std::get<2>(t)));
  s.other_dtype = static_cast<DType>(std::get<1>(std::get<2>(t)));
  s.columns = std::get<3>(t);
  s.elements = std::get<4>(t);
  s.exclude = pointer<int64_t>(std::get<5>(t));
  s.exclude_count = std::get<6>(t);
  if (s.a == nullptr) throw std::invalid_argument("scores: tensors must have memory on the CPU");
  return s;
}

void score_histogram(const std::string& isa, const ScoresTuple& scores, int shift, int bits, uint32_t prefix,
                     uintptr_t counts, int threads) {
  const cpu::Scores s = to_scores(scores);
  const cpu::Kernels& kernels = *cpu::find_instruction_set(isa.c_str()).kernels();
  const py::gil_scoped_release release;
  cpu::run_score_histogram(kernels, s, {shift, bits, prefix}, reinterpret_cast<int64_t*>(counts), threads);
}

void score_collect(const std::string& isa, const ScoresTuple& scores, uint32_t key, int64_t ties, uintptr_t out,
                   int64_t count, int threads) {
  const cpu::Scores s = to_scores(scores);
  const cpu::Kernels& kernels = *cpu::find_instruction_set(isa.c_str()).kernels();
  const py::gil_scoped_release release;
  cpu::run_score_collect(kernels, s, key, ties, reinterpret_cast<int64_t*>(out), count, threads);
}

// (term, gradient, other, saved, rows, columns); the address of `other` and that of `saved` are 0 where there is none
using ImportanceTuple = std::tuple<int, ValuesTuple, ValuesTuple, uintptr_t, int64_t, int64_t>;

cpu::Importance to_importance(const ImportanceTuple& t) {
  cpu::Importance p;
  p.term = static_cast<cpu::Term>(std::get<0>(t));
  p.gradient = pointer<void>(std::get<0>(std::get<1>(t)));
  p.gradient_dtype = static_cast<DType>(std::get<1>(std::get<1>(t)));
  p.other = pointer<void>(std::get<0>(std::get<2>(t)));
  p.other_dtype = static_cast<DType>(std::get<1>(std::get<2>(t)));
  p.saved = pointer<void>(std::get<3>(t));
  p.rows = std::get<4>(t);
  p.columns = std::get<5>(t);
  if (p.gradient == nullptr) throw std::invalid_argument("importance: tensors must have memory on the CPU");
  return p;
}

void add_importance(const std::string& isa, const ImportanceTuple& importance, uintptr_t total, int threads) {
  const cpu::Importance p = to_importance(importance);
  const cpu::Kernels& kernels = *cpu::find_instruction_set(isa.c_str()).kernels();
  const py::gil_scoped_release release;
  cpu::run_add_importance(kernels, p, reinterpret_cast<float*>(total), threads);
}

void sum_importance(const std::string& isa, const ImportanceTuple& importance, uintptr_t sums, int threads) {
  const cpu::Importance p = to_importance(importance);
  const cpu::Kernels& kernels = *cpu::find_instruction_set(isa.c_str()).kernels();
  const py::gil_scoped_release release;
  cpu::run_sum_importance(kernels, p, reinterpret_cast<double*>(sums), threads);
}

py::list instruction_sets() {
  py::list rows;
  for (const cpu::InstructionSet& set : cpu::instruction_sets()) {
    py::dict row;
    row["name"] = set.name;
    row["supported"] = set.supported;
    row["native_bfloat16"] = set.kernels()->native_bfloat16;  // a read of a constant table: runs on any processor
    row["native_float16"] = set.kernels()->native_float16;
    rows.append(row);
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "Native CPU kernels of peftkern";
  module.def("instruction_sets", &instruction_sets, "Built instruction sets, the most capable first.");
  module.def(
      "best_instruction_set",
      [](std::optional<std::string> name) {
        return std::string(cpu::find_instruction_set(name ? name->c_str() : nullptr).name);
      },
      py::arg("name"), "The one named, or the best that runs here; ValueError where it does not.");
  module.def("thread_source", &cpu::thread_source, "The OpenMP library whose threads are used, or 'std::thread'.");
  module.def(
      "advise_huge_pages",
      [](uintptr_t data, size_t bytes) { cpu::advise_huge_pages(reinterpret_cast<void*>(data), bytes); },
      py::arg("data"), py::arg("bytes"), "Hints that this buffer will be written as a whole.");
  module.def("product", &product, py::arg("isa"), py::arg("activations"), py::arg("tokens"), py::arg("weight"),
             py::arg("weight_mask"), py::arg("weight_dropout"), py::arg("transposed"), py::arg("alpha"),
             py::arg("low_rank"), py::arg("bias"), py::arg("out"), py::arg("out_dtype"), py::arg("out_stride"),
             py::arg("out_mask"), py::arg("precision"), py::arg("threads"),
             "csrc/cpu/kernels.h, struct Product, says what is computed.");
  module.def("quantize", &quantize, py::arg("isa"), py::arg("values"), py::arg("dtype"), py::arg("elements"),
             py::arg("block_size"), py::arg("encoding"), py::arg("bounds"), py::arg("codes"), py::arg("grid"),
             py::arg("packed"), py::arg("scales"), py::arg("threads"),
             "csrc/cpu/kernels.h, struct Quantization, says what is computed.");
  module.def("dequantize", &dequantize, py::arg("isa"), py::arg("weight"), py::arg("elements"), py::arg("block_size"),
             py::arg("out"), py::arg("dtype"), py::arg("threads"),
             "csrc/cpu/kernels.h, struct Dequantization, says what is computed.");
  module.def("silu_mul", &silu_mul, py::arg("isa"), py::arg("activation"), py::arg("gate"), py::arg("up"),
             py::arg("out"), py::arg("dtype"), py::arg("elements"), py::arg("threads"),
             "csrc/cpu/kernels.h, struct SiluMul, says what is computed.");
  module.def("silu_mul_backward", &silu_mul_backward, py::arg("isa"), py::arg("activation"), py::arg("grad"),
             py::arg("gate"), py::arg("up"), py::arg("out"), py::arg("grad_gate"), py::arg("grad_up"), py::arg("dtype"),
             py::arg("elements"), py::arg("threads"), "csrc/cpu/kernels.h, struct SiluMul, says what is computed.");
  module.def("rotary", &rotary, py::arg("isa"), py::arg("states"), py::arg("cos"), py::arg("sin"), py::arg("dtype"),
             py::arg("angle_dtype"), py::arg("sizes"), py::arg("interleaved"), py::arg("inverse"), py::arg("threads"),
             "csrc/cpu/kernels.h, struct Rotary, says what is computed; sizes: batch, tokens, head_dim, rotary_dim.");
  module.def(
      "attention", &attention, py::arg("isa"), py::arg("arguments"), py::arg("threads"),
      "csrc/cpu/kernels.h, struct Attention, says what is computed; sizes: batch, heads, kv_heads, queries, keys, "
      "head_dim.");
  module.def("attention_backward", &attention_backward, py::arg("isa"), py::arg("arguments"), py::arg("grad_out"),
             py::arg("grad_query"), py::arg("grad_key"), py::arg("grad_value"), py::arg("threads"),
             "csrc/cpu/kernels.h, struct Attention, says what is computed.");
  module.def("norm", &norm, py::arg("isa"), py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("bias"),
             py::arg("y"), py::arg("total"), py::arg("mean"), py::arg("rstd"), py::arg("dtype"), py::arg("rows"),
             py::arg("features"), py::arg("eps"), py::arg("weight_offset"), py::arg("round_first"), py::arg("threads"),
             "csrc/cpu/kernels.h, struct Norm, says what is computed.");
  module.def("norm_backward", &norm_backward, py::arg("isa"), py::arg("grad"), py::arg("grad_total"), py::arg("total"),
             py::arg("weight"), py::arg("mean"), py::arg("rstd"), py::arg("grad_x"), py::arg("grad_weight"),
             py::arg("grad_bias"), py::arg("dtype"), py::arg("rows"), py::arg("features"), py::arg("weight_offset"),
             py::arg("threads"), "csrc/cpu/kernels.h, struct NormBackward, says what is computed.");
  module.def("sparse_product", &sparse_product, py::arg("isa"), py::arg("tokens"), py::arg("source"), py::arg("target"),
             py::arg("pair"), py::arg("order"), py::arg("values"), py::arg("gradients"), py::arg("scaling"),
             py::arg("threads"), "csrc/cpu/kernels.h, struct SparseProduct, says what is computed.");
  module.def("adamw", &adamw, py::arg("isa"), py::arg("parameter"), py::arg("gradient"), py::arg("elements"),
             py::arg("mean"), py::arg("square"), py::arg("coefficients"), py::arg("ages"), py::arg("scale"),
             py::arg("probe"), py::arg("threads"), "csrc/cpu/kernels.h, struct AdamW, says what is computed.");
  for (const auto& [name, function] : {std::pair{"encode_moment", &encode_moment}, {"decode_moment", &decode_moment}})
    module.def(name, function, py::arg("isa"), py::arg("moment"), py::arg("values"), py::arg("elements"),
               py::arg("threads"), "csrc/cpu/kernels.h, struct Moment, says what the codes are.");
  module.def("score_histogram", &score_histogram, py::arg("isa"), py::arg("scores"), py::arg("shift"), py::arg("bits"),
             py::arg("prefix"), py::arg("counts"), py::arg("threads"),
             "csrc/cpu/kernels.h, structs Scores and Digit, says what is counted.");
  module.def("score_collect", &score_collect, py::arg("isa"), py::arg("scores"), py::arg("key"), py::arg("ties"),
             py::arg("out"), py::arg("count"), py::arg("threads"), "csrc/cpu/run.h says what is collected.");
  module.def("add_importance", &add_importance, py::arg("isa"), py::arg("importance"), py::arg("total"),
             py::arg("threads"), "csrc/cpu/kernels.h, struct Importance, says what is added.");
  module.def("sum_importance", &sum_importance, py::arg("isa"), py::arg("importance"), py::arg("sums"),
             py::arg("threads"), "csrc/cpu/kernels.h, struct Importance, says what is summed.");
}
