// Terms of importance and their sums; peftkern/ops/importance.py says what is computed. Sums run in double over a fixed
// number of lanes: the same order, and the same bits, on every instruction set.
#pragma once

constexpr int64_t kSumLanes = 16;

struct TermBuffer {
  alignas(64) float gradient[kKeyBuffer] = {};
  alignas(64) float other[kKeyBuffer] = {};
  alignas(64) float saved[kKeyBuffer] = {};
  alignas(64) float total[kKeyBuffer] = {};
};

// What the terms of `count` elements are products of; without a product both are the gradient.
static void read_operands(const Importance& p, int64_t begin, int64_t count, TermBuffer* buffer, const float** gradient,
                          const float** other) {
  *gradient = floats_at(p.gradient, p.gradient_dtype, begin, count, buffer->gradient);
  *other = p.other == nullptr ? *gradient : floats_at(p.other, p.other_dtype, begin, count, buffer->other);
  if (p.term != Term::difference) return;
  const float* saved = floats_at(p.saved, p.other_dtype, begin, count, buffer->saved);
  for (int64_t j = 0; j < count; ++j) buffer->other[j] = (*other)[j] - saved[j];
  *other = buffer->other;
}

// A whole buffer.
template <bool kProduct>
static void add_terms(const float* __restrict gradient, const float* __restrict other, float* __restrict total) {
  for (int64_t j = 0; j < kKeyBuffer; ++j) total[j] += kProduct ? gradient[j] * other[j] : gradient[j];
}

static void add_importance(const Importance& p, float* total, int64_t begin, int64_t end) {
  TermBuffer buffer;
  for (int64_t i = begin; i < end; i += kKeyBuffer) {
    const int64_t count = end - i < kKeyBuffer ? end - i : kKeyBuffer;
    const float *gradient, *other;
    read_operands(p, i, count, &buffer, &gradient, &other);
    float* sums = count == kKeyBuffer ? total + i : buffer.total;
    if (sums == buffer.total) read_floats(total, DType::float32, i, count, sums);
    if (p.term == Term::sum)
      add_terms<false>(gradient, other, sums);
    else
      add_terms<true>(gradient, other, sums);
    if (sums == buffer.total) write_floats(total, DType::float32, i, count, sums);
  }
}

template <bool kProduct>
static void add_to_lanes(const float* gradient, const float* other, int64_t count, double* __restrict lanes) {
  int64_t j = 0;
  for (; j + kSumLanes <= count; j += kSumLanes)
    for (int64_t lane = 0; lane < kSumLanes; ++lane)
      lanes[lane] += static_cast<double>(kProduct ? gradient[j + lane] * other[j + lane] : gradient[j + lane]);
  for (; j < count; ++j) lanes[j % kSumLanes] += static_cast<double>(kProduct ? gradient[j] * other[j] : gradient[j]);
}

static double sum_importance(const Importance& p, int64_t begin, int64_t end) {
  TermBuffer buffer;
  alignas(64) double lanes[kSumLanes] = {};
  for (int64_t i = begin; i < end; i += kKeyBuffer) {
    const int64_t count = end - i < kKeyBuffer ? end - i : kKeyBuffer;
    const float *gradient, *other;
    read_operands(p, i, count, &buffer, &gradient, &other);
    if (p.term == Term::sum)
      add_to_lanes<false>(gradient, other, count, lanes);
    else
      add_to_lanes<true>(gradient, other, count, lanes);
  }
  double sum = 0.0;
  for (int64_t lane = 0; lane < kSumLanes; ++lane) sum += lanes[lane];
  return sum;
}
