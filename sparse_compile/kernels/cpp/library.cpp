// All C++ kernels, and the ops through which `cpu.py` of each kernel calls them. One translation unit: torch's headers
// take longer to compile than the kernels.
#include <torch/library.h>

#include <string>

#include "../block_sparse_attention/cpu.cpp"

// Either expands its argument, which the macros it is for would not.
#define SPARSE_COMPILE_REGISTER(name, m) TORCH_LIBRARY(name, m)
#define SPARSE_COMPILE_TEXT(name) C10_STRINGIZE(name)

SPARSE_COMPILE_REGISTER(SPARSE_COMPILE_LIBRARY, m) {
  m.def("isa() -> str", [] { return std::string(SPARSE_COMPILE_TEXT(SPARSE_COMPILE_LIBRARY)); });
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? q_order, Tensor q_offsets, Tensor? k_order, Tensor k_offsets,"
      " Tensor keep, Tensor? mean_k, Tensor? mean_v, Tensor? log_size, Tensor? coupling, float scale, Tensor(a!) out,"
      " Tensor(b!) lse) -> ()",
      sparse_compile::attention);
}
