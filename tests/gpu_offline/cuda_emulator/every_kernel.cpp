// Runs every kernel over sizes that reach its branches, with buffers that end where their data ends.
//
//   every_kernel ORDER SEED WORKERS
//
// Prints a line for each call: what it was, and a number made of all bytes of its results. The numbers must be the same
// in every order and in every build. Results are computed twice, over different bytes: none may be left unwritten.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/kernels.h"

using namespace peftkern;
using namespace peftkern::cuda;

namespace {

// As many bytes as asked for, `offset` bytes behind a multiple of 16.
class Buffer {
 public:
  Buffer(int64_t bytes, int fill, int64_t offset = 0)
      : bytes_(bytes), offset_(offset), memory_(std::malloc(static_cast<size_t>(bytes + offset)), &std::free) {
    std::memset(data(), fill, static_cast<size_t>(bytes));
  }

  void* data() const { return static_cast<char*>(memory_.get()) + offset_; }
  int64_t size() const { return bytes_; }

  template <class T>
  T* as() const {
    return static_cast<T*>(data());
  }

 private:
  int64_t bytes_, offset_;
  std::unique_ptr<void, decltype(&std::free)> memory_;
};

constexpr int64_t bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

Buffer random_values(int64_t count, DType dtype, int64_t offset = 0) {
  std::mt19937 generator(static_cast<unsigned>(count));
  std::uniform_real_distribution<float> uniform(-2.0f, 2.0f);
  Buffer values(count * bytes_of(dtype), 0, offset);
  for (int64_t i = 0; i < count; ++i) store_float(values.data(), dtype, i, uniform(generator));
  return values;
}

Buffer random_bytes(int64_t count, int64_t offset = 0) {
  std::mt19937 generator(static_cast<unsigned>(count));
  Buffer bytes(count, 0, offset);
  for (int64_t i = 0; i < count; ++i) bytes.as<uint8_t>()[i] = static_cast<uint8_t>(generator());
  return bytes;
}

Buffer ascending(int64_t count) {
  Buffer values(count * 4, 0);
  for (int64_t i = 0; i < count; ++i) values.as<float>()[i] = -1.0f + 2.0f * static_cast<float>(i + 1) / (count + 1);
  return values;
}

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::puts(cudaGetErrorString(status));
  std::exit(2);
}

uint64_t number_of(const Buffer& results, uint64_t number = 14695981039346656037u) {
  for (int64_t i = 0; i < results.size(); ++i) number = (number ^ results.as<uint8_t>()[i]) * 1099511628211u;
  return number;
}

// `run` takes the byte that the results are filled with, and returns their number.
template <class Run>
void report(const std::string& name, Run run) {
  const uint64_t number = run(0xFF), again = run(0x55);
  if (number != again) {
    std::printf("%s: some bytes of the result were not written\n", name.c_str());
    std::exit(2);
  }
  std::printf("%s: %016llx\n", name.c_str(), static_cast<unsigned long long>(number));
}

constexpr DType kDTypes[] = {DType::float32, DType::bfloat16, DType::float16};

std::string text(DType dtype) { return " dtype " + std::to_string(static_cast<int>(dtype)); }

// ---- quantize

void quantize_values(Encoding encoding, DType dtype, int64_t elements, int64_t block_size, int64_t offset) {
  const std::string name = "quantize encoding " + std::to_string(static_cast<int>(encoding)) + text(dtype) +
                           " blocks " + std::to_string(block_size) + " elements " + std::to_string(elements) +
                           " offset " + std::to_string(offset);
  report(name, [&](int fill) {
    const Buffer values = random_values(elements, dtype, offset), bounds = ascending(15), codes = random_bytes(16),
                 grid = random_bytes(65536);
    const Buffer packed(encoding == Encoding::code4 ? (elements + 1) / 2 : elements, fill);
    const Buffer scales((elements + block_size - 1) / block_size * 4, fill);
    for (int i = 0; i < 16; ++i) codes.as<uint8_t>()[i] &= 15;
    Quantization q;
    q.values = values.data();
    q.dtype = dtype;
    q.elements = elements;
    q.block_size = block_size;
    q.encoding = encoding;
    q.bounds = bounds.as<float>();
    q.codes = codes.as<uint8_t>();
    q.grid = grid.as<uint8_t>();
    q.packed = packed.as<uint8_t>();
    q.scales = scales.as<float>();
    check(quantize(q, nullptr));
    return number_of(scales, number_of(packed));
  });
}

void quantize_everything() {
  for (const Encoding encoding : {Encoding::code4, Encoding::code8}) {
    for (const DType dtype : kDTypes) {
      quantize_values(encoding, dtype, 4096 + 71, 32, 0);
      quantize_values(encoding, dtype, 1025, 64, bytes_of(dtype));
    }
    quantize_values(encoding, DType::bfloat16, 2 * 512 + 8, 512, 0);
    quantize_values(encoding, DType::bfloat16, 4096 + 1, 4096, 0);
    quantize_values(encoding, DType::float32, 1, 64, 0);
  }
  for (const DType dtype : kDTypes) {
    quantize_values(Encoding::int8, dtype, 3 * 33, 33, 0);
    quantize_values(Encoding::int8, dtype, 2 * 2056, 2056, 0);
    quantize_values(Encoding::int8, dtype, 2 * 64, 64, bytes_of(dtype));
  }
}

// ---- weights

// A weight with random codes and scales; the scales are codes too where `nested`.
struct RandomWeight {
  RandomWeight(Encoding encoding, int64_t rows, int64_t columns, int block_shift, bool nested, int64_t offset = 0)
      : codes(random_bytes(encoding == Encoding::code4 ? (rows * columns + 1) / 2 : rows * columns, offset)),
        codebook(ascending(encoding == Encoding::code4 ? 16 : 256)),
        scale_codebook(ascending(256)) {
    const int64_t blocks = encoding == Encoding::int8 ? rows : ((rows * columns - 1) >> block_shift) + 1;
    weight.codes = codes.data();
    weight.encoding = encoding;
    weight.rows = rows;
    weight.columns = columns;
    weight.codebook = encoding == Encoding::int8 ? nullptr : codebook.as<float>();
    weight.block_shift = block_shift;
    tensors.push_back(nested ? random_bytes(blocks) : random_values(blocks, DType::float32));
    weight.scales.values = tensors[0].data();
    if (!nested) return;
    constexpr int kScalesShift = 5;
    tensors.push_back(random_values(((blocks - 1) >> kScalesShift) + 1, DType::float32));
    tensors.push_back(random_values(1, DType::float32));
    weight.scales.codebook = scale_codebook.as<float>();
    weight.scales.absmax = tensors[1].as<float>();
    weight.scales.offset = tensors[2].as<float>();
    weight.scales.block_shift = kScalesShift;
  }

  Buffer codes, codebook, scale_codebook;
  std::vector<Buffer> tensors;
  QuantizedWeight weight;
};

void dequantize_weight(Encoding encoding, DType dtype, int64_t rows, int64_t columns, int block_shift, bool nested,
                       int64_t offset) {
  const std::string name = "dequantize encoding " + std::to_string(static_cast<int>(encoding)) + text(dtype) +
                           " rows " + std::to_string(rows) + " columns " + std::to_string(columns) + " offset " +
                           std::to_string(offset) + (nested ? " nested" : "");
  report(name, [&](int fill) {
    const RandomWeight random(encoding, rows, columns, block_shift, nested, offset);
    const Buffer out(rows * columns * bytes_of(dtype), fill);
    check(dequantize({random.weight, out.data(), dtype}, nullptr));
    return number_of(out);
  });
}

void dequantize_everything() {
  for (const DType dtype : kDTypes) {
    for (const bool nested : {false, true}) {
      dequantize_weight(Encoding::code4, dtype, 1, 8192 + 1024 + 75, 5, nested, 0);
      dequantize_weight(Encoding::code8, dtype, 1, 4096 + 512 + 77, 6, nested, 0);
    }
    dequantize_weight(Encoding::code4, dtype, 1, 1100, 6, false, 1);
    dequantize_weight(Encoding::int8, dtype, 3, 33, 0, false, 0);
    dequantize_weight(Encoding::int8, dtype, 3, 528, 0, false, 0);
  }
}

// ---- the product of few tokens

void multiply(DType dtype, int64_t tokens, int64_t rows, int64_t columns, int block_shift, bool nested,
              const std::vector<int64_t>& ranks) {
  const std::string name = "product" + text(dtype) + " tokens " + std::to_string(tokens) + " rows " +
                           std::to_string(rows) + " columns " + std::to_string(columns) + " adapters " +
                           std::to_string(ranks.size());
  report(name, [&](int fill) {
    const int64_t stride = columns + 16 / bytes_of(dtype);  // the last row ends where it ends
    const Buffer x = random_values((tokens - 1) * stride + columns, dtype), bias = random_values(rows, DType::float32);
    const RandomWeight random(Encoding::code4, rows, columns, block_shift, nested);
    std::vector<Buffer> factors;
    FewTokenProduct p;
    int64_t total = 0;
    for (size_t i = 0; i < ranks.size(); ++i) {
      const DType of_factors = kDTypes[i % 3];
      factors.push_back(random_values(ranks[i] * columns, of_factors));
      factors.push_back(random_values(rows * ranks[i], of_factors));
      const void *lora_A = factors[2 * i].data(), *lora_B = factors[2 * i + 1].data();
      p.adapters.entries[i] = {lora_A, of_factors, lora_B, of_factors, ranks[i], 0.5f};
      total += ranks[i];
    }
    p.adapters.count = static_cast<int32_t>(ranks.size());
    const Buffer h(tokens * total * 4, fill), y(tokens * rows * bytes_of(dtype), fill);
    p.x = x.data();
    p.x_stride = stride;
    p.dtype = dtype;
    p.tokens = tokens;
    p.weight = random.weight;
    p.bias = ranks.empty() ? nullptr : bias.data();
    p.h = h.as<float>();
    p.y = y.data();
    check(few_token_product(p, nullptr));
    return number_of(h, number_of(y));
  });
}

void multiply_everything() {
  for (const DType dtype : kDTypes) {
    multiply(dtype, 1, 5, 96, 5, false, {});
    multiply(dtype, 3, 4, 4160, 6, true, {3, 130});
    multiply(dtype, 16, 3, 64, 6, false, {2, 1, 1});
  }
}

}  // namespace

int main(int, char** arguments) {
  emulator::options() = {static_cast<emulator::Order>(std::atoi(arguments[1])),
                         std::strtoull(arguments[2], nullptr, 10), std::atoi(arguments[3]), 0};
  quantize_everything();
  dequantize_everything();
  multiply_everything();
}
