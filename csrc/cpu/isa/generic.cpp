#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"

namespace peftkern::cpu::generic {
#include "cpu/isa/simd_generic.h"
//
#include "cpu/isa/kernels.inl.h"
}  // namespace peftkern::cpu::generic
