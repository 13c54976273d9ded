#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"

#define PEFTKERN_VECTOR_DECODE
#define PEFTKERN_VECTOR_FORMS
namespace peftkern::cpu::avx512fp16 {
#include "cpu/isa/simd_avx512.h"
//
#include "cpu/isa/kernels.inl.h"
}  // namespace peftkern::cpu::avx512fp16
