// Everything that is compiled once per instruction set. The including file has opened the namespace of that set and
// included one of the simd_*.h files.
#pragma once
#include "cpu/isa/convert.inl.h"
//
#include "cpu/isa/tiles.inl.h"
//
#include "cpu/isa/panels.inl.h"
//
#include "cpu/isa/narrow.inl.h"
//
#include "cpu/isa/product.inl.h"
//
#include "cpu/isa/quantize.inl.h"
//
#include "cpu/isa/silu_mul.inl.h"
//
#include "cpu/isa/norm.inl.h"
//
#include "cpu/isa/rotary.inl.h"
//
#include "cpu/isa/attention.inl.h"
//
#include "cpu/isa/sparse_delta.inl.h"
//
#include "cpu/isa/adamw.inl.h"
//
#include "cpu/isa/select.inl.h"
//
#include "cpu/isa/importance.inl.h"

const Kernels* kernels() {
  static constexpr Kernels table = {
      kNativeBfloat16,
      kNativeFloat16,
      product_scratch,
      product_tasks,
      product_task,
      quantize_blocks,
      dequantize_blocks,
      silu_mul_elements,
      silu_mul_backward_elements,
      rotary_rows,
      attention_scratch,
      attention_group,
      attention_backward_part,
      attention_gradients,
      norm_rows,
      norm_backward_rows,
      sparse_blocks,
      sparse_gradients,
      adamw_elements,
      encode_moments,
      decode_moments,
      adamw_probe_elements,
      score_counts,
      score_compare,
      score_collect,
      add_importance,
      sum_importance,
  };
  return &table;
}
