// Normalisation of rows and its gradients; peftkern/ops/norm.py has the formulas. A row is walked more than once, in
// short buffers: it stays in a cache meanwhile.
#pragma once

constexpr int64_t kNormBuffer = 256;

// The elements as floats: in place where they are floats.
static const float* floats_of(const void* data, DType dtype, int64_t begin, int64_t count, float* buffer) {
  if (dtype == DType::float32) return static_cast<const float*>(data) + begin;
  read_floats(data, dtype, begin, count, buffer);
  return buffer;
}

static void round_floats(DType dtype, int64_t count, float* values) {
  if (dtype == DType::float32) return;
  uint16_t halves[kNormBuffer];
  write_floats(halves, dtype, 0, count, values);
  read_floats(halves, dtype, 0, count, values);
}

static float sum_floats(const float* a, int64_t count) {
  Float sums[kLanes];  // of which four take part: `sum_lanes` reads as many as there are lanes
  for (Float& sum : sums) sum = zero();
  int64_t j = 0;
  for (; j + 4 * kLanes <= count; j += 4 * kLanes)
    for (int k = 0; k < 4; ++k) sums[k] = add(sums[k], load(a + j + k * kLanes));
  alignas(64) float lanes[kLanes];
  store(lanes, sum_lanes(sums));
  float sum = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  for (; j < count; ++j) sum += a[j];
  return sum;
}

static float dot_floats(const float* a, const float* b, int64_t count) {
  Float sums[kLanes];  // of which four take part: `sum_lanes` reads as many as there are lanes
  for (Float& sum : sums) sum = zero();
  int64_t j = 0;
  for (; j + 4 * kLanes <= count; j += 4 * kLanes)
    for (int k = 0; k < 4; ++k) sums[k] = fma(load(a + j + k * kLanes), load(b + j + k * kLanes), sums[k]);
  alignas(64) float lanes[kLanes];
  store(lanes, sum_lanes(sums));
  float sum = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  for (; j < count; ++j) sum += a[j] * b[j];
  return sum;
}

// The sum of row and residual, rounded and written.
static void add_residual(const Norm& n, int64_t row) {
  alignas(64) float xs[kNormBuffer], others[kNormBuffer], total[kNormBuffer];
  for (int64_t f = 0; f < n.features; f += kNormBuffer) {
    const int64_t count = n.features - f < kNormBuffer ? n.features - f : kNormBuffer;
    const float* x = floats_of(n.x, n.dtype, row * n.x_stride + f, count, xs);
    const float* residual = floats_of(n.residual, n.dtype, row * n.residual_stride + f, count, others);
    for (int64_t j = 0; j < count; ++j) total[j] = x[j] + residual[j];
    write_floats(n.total, n.dtype, row * n.features + f, count, total);
  }
}

// Below, what a loop reads and writes never overlaps, and its scalars are arguments: the compiler vectorises it.
static void normalize_floats(const float* __restrict values, float mean, float rstd, int64_t count,
                             float* __restrict out) {
  for (int64_t j = 0; j < count; ++j) out[j] = (values[j] - mean) * rstd;
}

static void scale_floats(const float* __restrict weight, float offset, int64_t count, float* __restrict out) {
  for (int64_t j = 0; j < count; ++j) out[j] *= weight[j] + offset;
}

static void add_floats(const float* __restrict values, int64_t count, float* __restrict out) {
  for (int64_t j = 0; j < count; ++j) out[j] += values[j];
}

static void add_products(const float* __restrict a, const float* __restrict b, int64_t count, float* __restrict out) {
  for (int64_t j = 0; j < count; ++j) out[j] += a[j] * b[j];
}

static float row_mean(const void* data, DType dtype, int64_t begin, int64_t features) {
  alignas(64) float buffer[kNormBuffer];
  float sum = 0.0f;
  for (int64_t f = 0; f < features; f += kNormBuffer) {
    const int64_t count = features - f < kNormBuffer ? features - f : kNormBuffer;
    sum += sum_floats(floats_of(data, dtype, begin + f, count, buffer), count);
  }
  return sum / static_cast<float>(features);
}

static float row_mean_square(const void* data, DType dtype, int64_t begin, int64_t features, float mean) {
  alignas(64) float buffer[kNormBuffer], centered[kNormBuffer];
  float sum = 0.0f;
  for (int64_t f = 0; f < features; f += kNormBuffer) {
    const int64_t count = features - f < kNormBuffer ? features - f : kNormBuffer;
    const float* values = floats_of(data, dtype, begin + f, count, buffer);
    if (mean != 0.0f) {
      normalize_floats(values, mean, 1.0f, count, centered);
      values = centered;
    }
    sum += dot_floats(values, values, count);
  }
  return sum / static_cast<float>(features);
}

static void norm_rows(const Norm& n, int64_t begin, int64_t end) {
  alignas(64) float buffer[kNormBuffer], rounded[kNormBuffer];
  for (int64_t row = begin; row < end; ++row) {
    if (n.residual != nullptr) add_residual(n, row);
    const void* data = n.residual != nullptr ? n.total : n.x;
    const int64_t first = row * (n.residual != nullptr ? n.features : n.x_stride);
    const float mean = n.mean != nullptr ? row_mean(data, n.dtype, first, n.features) : 0.0f;
    const float square = row_mean_square(data, n.dtype, first, n.features, mean);
    const float rstd = 1.0f / __builtin_sqrtf(square + n.eps);
    for (int64_t f = 0; f < n.features; f += kNormBuffer) {
      const int64_t count = n.features - f < kNormBuffer ? n.features - f : kNormBuffer, at = row * n.features + f;
      float* out = n.dtype == DType::float32 ? static_cast<float*>(n.y) + at : rounded;
      normalize_floats(floats_of(data, n.dtype, first + f, count, buffer), mean, rstd, count, out);
      if (n.round_first) round_floats(n.dtype, count, out);
      if (n.weight != nullptr) scale_floats(n.weight + f, n.weight_offset, count, out);
      if (n.bias != nullptr) add_floats(n.bias + f, count, out);
      if (out == rounded) write_floats(n.y, n.dtype, at, count, out);
    }
    n.rstd[row] = rstd;
    if (n.mean != nullptr) n.mean[row] = mean;
  }
}

// One buffer of one row in the backward pass: what arrives at y, the normalised values, and what arrives at those.
struct NormBuffer {
  alignas(64) float totals[kNormBuffer], grads[kNormBuffer], normal[kNormBuffer], scaled[kNormBuffer];
  const float* grad;

  void fill(const NormBackward& n, int64_t row, int64_t f, int64_t count) {
    const float* total = floats_of(n.total, n.dtype, row * n.total_stride + f, count, totals);
    grad = floats_of(n.grad, n.dtype, row * n.grad_stride + f, count, grads);
    normalize_floats(total, n.mean != nullptr ? n.mean[row] : 0.0f, n.rstd[row], count, normal);
    std::memcpy(scaled, grad, static_cast<size_t>(count) * sizeof(float));
    if (n.weight != nullptr) scale_floats(n.weight + f, n.weight_offset, count, scaled);
  }
};

// out = rstd (scaled - sum - along normal)
static void norm_gradient(const NormBuffer& b, float rstd, float sum, float along, int64_t count,
                          float* __restrict out) {
  for (int64_t j = 0; j < count; ++j) out[j] = rstd * (b.scaled[j] - sum - b.normal[j] * along);
}

static void norm_backward_rows(const NormBackward& n, int64_t begin, int64_t end, float* weight_sums,
                               float* bias_sums) {
  NormBuffer b;
  alignas(64) float arriving[kNormBuffer], rounded[kNormBuffer];
  for (int64_t row = begin; row < end; ++row) {
    float along = 0.0f, sum = 0.0f;
    for (int64_t f = 0; f < n.features; f += kNormBuffer) {
      const int64_t count = n.features - f < kNormBuffer ? n.features - f : kNormBuffer;
      b.fill(n, row, f, count);
      along += dot_floats(b.scaled, b.normal, count);
      if (n.mean != nullptr) sum += sum_floats(b.scaled, count);
      if (weight_sums != nullptr) add_products(b.grad, b.normal, count, weight_sums + f);
      if (bias_sums != nullptr) add_floats(b.grad, count, bias_sums + f);
    }
    if (n.grad_x == nullptr) continue;
    along /= static_cast<float>(n.features);
    sum /= static_cast<float>(n.features);
    for (int64_t f = 0; f < n.features; f += kNormBuffer) {
      const int64_t count = n.features - f < kNormBuffer ? n.features - f : kNormBuffer, at = row * n.features + f;
      float* out = n.dtype == DType::float32 ? static_cast<float*>(n.grad_x) + at : rounded;
      b.fill(n, row, f, count);
      norm_gradient(b, n.rstd[row], sum, along, count, out);
      if (n.grad_total != nullptr)
        add_floats(floats_of(n.grad_total, n.dtype, row * n.grad_total_stride + f, count, arriving), count, out);
      if (out == rounded) write_floats(n.grad_x, n.dtype, at, count, out);
    }
  }
}
