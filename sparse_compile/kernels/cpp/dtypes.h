// From the dtype of a tensor to the types that kernels are written in.
#pragma once

#include <ATen/core/Tensor.h>

#include "panels.h"

namespace sparse_compile {

// `run(M{}, T{})` with the element type T of tokens and M, what their products are taken in.
template <class Run>
void with_types_of(const at::Tensor& tokens, Run run) {
  switch (tokens.scalar_type()) {
    case at::kFloat: return run(Float32{}, float{});
    case at::kHalf: return run(Float32{}, at::Half{});
    case at::kBFloat16: return run(Bfloat16{}, at::BFloat16{});
    default: TORCH_CHECK(false, "tokens must be float32, float16 or bfloat16, not ", tokens.scalar_type());
  }
}

}  // namespace sparse_compile
