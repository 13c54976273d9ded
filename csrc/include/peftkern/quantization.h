// Numbers that every backend's quantize and dequantize share; peftkern/ops says what they are for.
#pragma once

namespace peftkern {

constexpr float kSmallestDivisor = 1e-38f;
constexpr float kOneOver127 = 0.007874015718698502f;

}  // namespace peftkern
