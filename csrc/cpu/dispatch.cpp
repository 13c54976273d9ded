#include "cpu/dispatch.h"

#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace peftkern::cpu {

namespace generic {
const Kernels* kernels();
}
#ifdef PEFTKERN_BUILD_X86
namespace avx2 {
const Kernels* kernels();
}
namespace avx512 {
const Kernels* kernels();
}
#endif
#ifdef PEFTKERN_BUILD_AVX512BF16
namespace avx512bf16 {
const Kernels* kernels();
}
#endif
#ifdef PEFTKERN_BUILD_AVX512FP16
namespace avx512fp16 {
const Kernels* kernels();
}
#endif

namespace {

#ifdef PEFTKERN_BUILD_X86
struct Cpuid {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  Cpuid(unsigned leaf, unsigned subleaf) {
    if (!__get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx)) eax = ebx = ecx = edx = 0;
  }
};

bool bit(unsigned word, int index) { return (word >> index) & 1u; }

// Whether the operating system saves these register states (XCR0 bits) on a context switch.
bool saved_by_system(unsigned long long states) {
  const Cpuid leaf(1, 0);
  if (!bit(leaf.ecx, 27)) return false;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return ((static_cast<unsigned long long>(high) << 32 | low) & states) == states;
}

bool has_avx2() {
  const Cpuid leaf(1, 0), extended(7, 0);
  const bool fma = bit(leaf.ecx, 12), avx = bit(leaf.ecx, 28), f16c = bit(leaf.ecx, 29);
  return fma && avx && f16c && bit(extended.ebx, 5) && saved_by_system(0x6);
}

bool has_avx512() {
  const Cpuid extended(7, 0);
  const bool f = bit(extended.ebx, 16), dq = bit(extended.ebx, 17), bw = bit(extended.ebx, 30);
  return has_avx2() && f && dq && bw && bit(extended.ebx, 31) && saved_by_system(0xE6);
}

[[maybe_unused]] bool has_avx512bf16() { return has_avx512() && bit(Cpuid(7, 1).eax, 5); }

#ifdef PEFTKERN_BUILD_AVX512FP16
bool has_avx512fp16() { return has_avx512bf16() && bit(Cpuid(7, 0).edx, 23); }
#endif
#endif

}  // namespace

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> table = {
#ifdef PEFTKERN_BUILD_AVX512FP16
      {"avx512fp16", has_avx512fp16(), avx512fp16::kernels},
#endif
#ifdef PEFTKERN_BUILD_AVX512BF16
      {"avx512bf16", has_avx512bf16(), avx512bf16::kernels},
#endif
#ifdef PEFTKERN_BUILD_X86
      {"avx512", has_avx512(), avx512::kernels},
      {"avx2", has_avx2(), avx2::kernels},
#endif
      {"generic", true, generic::kernels},
  };
  return table;
}

const InstructionSet& find_instruction_set(const char* name) {
  std::string supported;
  for (const InstructionSet& set : instruction_sets()) {
    if (!set.supported) continue;
    if (name == nullptr || std::string(name) == set.name) return set;
    supported += supported.empty() ? set.name : std::string(", ") + set.name;
  }
  throw std::invalid_argument("PEFTKERN_CPU_ISA is '" + std::string(name) +
                              "', which was not built or does not run on this processor; it runs " + supported);
}

}  // namespace peftkern::cpu
