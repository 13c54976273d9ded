// Terms of importance and their sums; peftkern/ops/importance.py says what is computed. Sums run in double over a fixed
// number of lanes: the same order, and the same bits, on every instruction set.
#pragma once

constexpr int64_t kSumLanes = 16;

struct TermBuffer {
  alignas(64) float gradient[kKeyBuffer] = {};
  alignas(64) float other[kKeyBuffer] = {};
  alignas(64) float terms[kKeyBuffer] = {};
};

// The terms of `count` elements; returns where they are.
static const float* read_terms(const Importance& p, int64_t begin, int64_t count, TermBuffer* buffer) {
  const float* gradient = floats_at(p.gradient, p.gradient_dtype, begin, count, buffer->gradient);
  if (p.term == Term::sum) return gradient;
  const float* other =
      p.term == Term::square ? gradient : floats_at(p.other, p.other_dtype, begin, count, buffer->other);
  for (int64_t j = 0; j < kKeyBuffer; ++j) buffer->terms[j] = gradient[j] * other[j];
  return buffer->terms;
}

static void add_importance(const Importance& p, float* total, int64_t begin, int64_t end) {
  TermBuffer buffer;
  for (int64_t i = begin; i < end; i += kKeyBuffer) {
    const int64_t count = end - i < kKeyBuffer ? end - i : kKeyBuffer;
    const float* terms = read_terms(p, i, count, &buffer);
    for (int64_t j = 0; j < count; ++j) total[i + j] += terms[j];
  }
}

static double sum_importance(const Importance& p, int64_t begin, int64_t end) {
  TermBuffer buffer;
  alignas(64) double lanes[kSumLanes] = {};
  for (int64_t i = begin; i < end; i += kKeyBuffer) {
    const int64_t count = end - i < kKeyBuffer ? end - i : kKeyBuffer;
    const float* terms = read_terms(p, i, count, &buffer);
    int64_t j = 0;
    for (; j + kSumLanes <= count; j += kSumLanes)
      for (int64_t lane = 0; lane < kSumLanes; ++lane) lanes[lane] += static_cast<double>(terms[j + lane]);
    for (; j < count; ++j) lanes[j % kSumLanes] += static_cast<double>(terms[j]);
  }
  double sum = 0.0;
  for (int64_t lane = 0; lane < kSumLanes; ++lane) sum += lanes[lane];
  return sum;
}
