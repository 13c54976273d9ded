#pragma once
#include "cpu/kernels.h"

namespace peftkern::cpu {

// Computes the product with these kernels on p.threads threads.
void run_product(const Kernels& kernels, const Product& p);

}  // namespace peftkern::cpu
