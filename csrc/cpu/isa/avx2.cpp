#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"

#define PEFTKERN_VECTOR_DECODE
namespace peftkern::cpu::avx2 {
#include "cpu/isa/simd_avx2.h"
//
#include "cpu/isa/kernels.inl.h"
}  // namespace peftkern::cpu::avx2
