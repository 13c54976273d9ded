// Which instruction sets were built, which of them this processor and its operating system run, which one is in use.
#pragma once
#include <vector>

#include "cpu/kernels.h"

namespace peftkern::cpu {

struct InstructionSet {
  const char* name;
  bool supported;  // asked once: in a virtual machine CPUID leaves it, which takes tens of microseconds
  const Kernels* (*kernels)();
};

// From the most to the least capable.
const std::vector<InstructionSet>& instruction_sets();

// The one named, or the best that runs here for a null name. Throws std::invalid_argument for a name that was not built
// or does not run here; the text lists those that do.
const InstructionSet& find_instruction_set(const char* name);

}  // namespace peftkern::cpu
