// All C++ kernels, and the ops through which `cpu.py` of each kernel calls them. One translation unit: torch's headers
// take longer to compile than the kernels.
#include <torch/library.h>

#include <string>

#include "../block_mass/cpu.cpp"
#include "../block_sparse_attention/cpu.cpp"
#include "../kmeans/cpu.cpp"
#include "../permutation/cpu.cpp"
#include "../pooled_keys/cpu.cpp"

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
  m.def(
      "block_mass(Tensor q, Tensor k, Tensor? q_order, Tensor q_offsets, Tensor? k_order, Tensor k_offsets, Tensor lse,"
      " Tensor? heads, float scale, int row_stride, Tensor(a!) mass, Tensor(b!)? ratios) -> ()",
      sparse_compile::block_mass::block_mass);
  m.def(
      "log_sum_exp(Tensor q, Tensor k, Tensor? k_order, Tensor k_offsets, Tensor chosen, float scale, Tensor(a!) lse)"
      " -> ()",
      sparse_compile::block_mass::log_sum_exp);
  m.def("countable(Tensor x, Tensor(a!) result) -> ()", sparse_compile::kmeans::countable);
  m.def("assign(Tensor x, Tensor centroids, Tensor included, Tensor(a!) labels) -> ()", sparse_compile::kmeans::assign);
  m.def("update(Tensor x, Tensor labels, Tensor included, Tensor(a!) centroids) -> ()", sparse_compile::kmeans::update);
  m.def("sort_labels(Tensor labels, Tensor(a!) order, Tensor(b!) offsets) -> ()", sparse_compile::sort_labels);
  m.def(
      "pooled_keys(Tensor k, Tensor v, Tensor? order, Tensor offsets, Tensor visual, Tensor(a!) mean_k,"
      " Tensor(b!) mean_v, Tensor(c!) coupling) -> ()",
      sparse_compile::pooled_keys::pooled_keys);
}
