#include <cstring>

#include "cpu/kernels.h"

#define PEFTKERN_ISA_NAME "generic"

namespace peftkern::cpu::generic {
#include "cpu/isa/simd_generic.h"
//
#include "cpu/isa/kernels.inl.h"
}  // namespace peftkern::cpu::generic
