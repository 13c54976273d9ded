// The only file of the CUDA module that knows Python. Tensors arrive as addresses and sizes: peftkern/backends/cuda.py
// checks them, and the module works with every version of PyTorch.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/kernels.h"

namespace py = pybind11;
using namespace peftkern;

#ifndef PEFTKERN_CUDA_ARCHITECTURES
#error "PEFTKERN_CUDA_ARCHITECTURES must list what the kernels are built for"
#endif

namespace {

template <class T>
const T* pointer(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// The device and stream of a call, as PyTorch has them. The module's own CUDA runtime must be told.
class Place {
 public:
  Place(int device, uintptr_t stream) : stream_(reinterpret_cast<cudaStream_t>(stream)) {
    check(cudaGetDevice(&previous_), "the current device");
    check(cudaSetDevice(device), "selecting the device");
  }
  ~Place() { cudaSetDevice(previous_); }
  Place(const Place&) = delete;
  Place& operator=(const Place&) = delete;

  cudaStream_t stream() const { return stream_; }

 private:
  cudaStream_t stream_;
  int previous_ = 0;
};

// (device, stream)
using PlaceTuple = std::tuple<int, uintptr_t>;

// (values, codebook, absmax, offset, block_shift)
using ScalesTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int>;

// (codes, encoding, rows, columns, codebook, block_shift, scales)
using WeightTuple = std::tuple<uintptr_t, int, int64_t, int64_t, uintptr_t, int, ScalesTuple>;

// (lora_A, dtype, lora_B, dtype, rank, scaling)
using AdapterTuple = std::tuple<uintptr_t, int, uintptr_t, int, int64_t, float>;

cuda::QuantizedWeight to_weight(const WeightTuple& t) {
  const ScalesTuple& scales = std::get<6>(t);
  cuda::QuantizedWeight w;
  w.codes = pointer<void>(std::get<0>(t));
  w.encoding = static_cast<Encoding>(std::get<1>(t));
  w.rows = std::get<2>(t);
  w.columns = std::get<3>(t);
  w.codebook = pointer<float>(std::get<4>(t));
  w.block_shift = std::get<5>(t);
  w.scales = {pointer<void>(std::get<0>(scales)), pointer<float>(std::get<1>(scales)),
              pointer<float>(std::get<2>(scales)), pointer<float>(std::get<3>(scales)), std::get<4>(scales)};
  return w;
}

cuda::Adapters to_adapters(const std::vector<AdapterTuple>& tuples) {
  if (tuples.size() > cuda::kMaxAdapters) throw std::invalid_argument("too many adapters");
  cuda::Adapters adapters;
  for (const AdapterTuple& t : tuples)
    adapters.entries[adapters.count++] = {pointer<void>(std::get<0>(t)),
                                          static_cast<DType>(std::get<1>(t)),
                                          pointer<void>(std::get<2>(t)),
                                          static_cast<DType>(std::get<3>(t)),
                                          std::get<4>(t),
                                          std::get<5>(t)};
  return adapters;
}

void quantize(const PlaceTuple& where, uintptr_t values, int dtype, int64_t elements, int64_t block_size, int encoding,
              uintptr_t bounds, uintptr_t codes, uintptr_t grid, uintptr_t packed, uintptr_t scales) {
  cuda::Quantization q;
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
  const Place place(std::get<0>(where), std::get<1>(where));
  check(cuda::quantize(q, place.stream()), "quantize");
}

void dequantize(const PlaceTuple& where, const WeightTuple& weight, uintptr_t out, int dtype) {
  cuda::Dequantization d;
  d.weight = to_weight(weight);
  d.out = reinterpret_cast<void*>(out);
  d.dtype = static_cast<DType>(dtype);
  const Place place(std::get<0>(where), std::get<1>(where));
  check(cuda::dequantize(d, place.stream()), "dequantize");
}

void few_token_product(const PlaceTuple& where, uintptr_t x, int64_t x_stride, int dtype, int64_t tokens,
                       const WeightTuple& weight, const std::vector<AdapterTuple>& adapters, uintptr_t bias,
                       int bias_dtype, uintptr_t h, uintptr_t y) {
  cuda::FewTokenProduct p;
  p.x = pointer<void>(x);
  p.x_stride = x_stride;
  p.dtype = static_cast<DType>(dtype);
  p.tokens = tokens;
  p.weight = to_weight(weight);
  p.adapters = to_adapters(adapters);
  p.bias = pointer<void>(bias);
  p.bias_dtype = static_cast<DType>(bias_dtype);
  p.h = reinterpret_cast<float*>(h);
  p.y = reinterpret_cast<void*>(y);
  const Place place(std::get<0>(where), std::get<1>(where));
  check(cuda::few_token_product(p, place.stream()), "few_token_product");
}

void check_device(int device) {
  const Place place(device, 0);
  check(cuda::check_device(), "loading the kernels");
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of peftkern";
  module.attr("architectures") = PEFTKERN_CUDA_ARCHITECTURES;
  module.attr("max_tokens") = cuda::kMaxFewTokens;
  module.attr("max_adapters") = cuda::kMaxAdapters;
  module.def("check_device", &check_device, py::arg("device"), "RuntimeError where the kernels cannot run.");
  module.def("quantize", &quantize, py::arg("where"), py::arg("values"), py::arg("dtype"), py::arg("elements"),
             py::arg("block_size"), py::arg("encoding"), py::arg("bounds"), py::arg("codes"), py::arg("grid"),
             py::arg("packed"), py::arg("scales"), "csrc/cuda/kernels.h, struct Quantization, says what is computed.");
  module.def("dequantize", &dequantize, py::arg("where"), py::arg("weight"), py::arg("out"), py::arg("dtype"),
             "csrc/cuda/kernels.h, struct Dequantization, says what is computed.");
  module.def("few_token_product", &few_token_product, py::arg("where"), py::arg("x"), py::arg("x_stride"),
             py::arg("dtype"), py::arg("tokens"), py::arg("weight"), py::arg("adapters"), py::arg("bias"),
             py::arg("bias_dtype"), py::arg("h"), py::arg("y"),
             "csrc/cuda/kernels.h, struct FewTokenProduct, says what is computed.");
}
