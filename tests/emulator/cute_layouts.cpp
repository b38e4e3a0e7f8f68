// Prints which element of a matrix each lane holds in which register, as CuTe has it: for each instruction
// its name, then a line for each table, of 32 lanes times so many values. `cases fragments` reads it. A: m +
// 16 k; B: n + 8 k; C: m + 16 n; rows, elements: the 16-byte row that a lane names, the 16-bit element of all
// rows that a lane's next 16 bits are.
#include <cstdio>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>

namespace {

template <class Layout>
void print(const char* name, Layout layout, int values, int step, int unit) {
  std::printf("%s", name);
  for (int lane = 0; lane < 32; ++lane)
    for (int value = 0; value < values; ++value) std::printf(" %d", int(layout(lane, value * step)) / unit);
  std::printf("\n");
}

template <class Operation>
void print_product(const char* name, int elements_of_register) {
  using Traits = cute::MMA_Traits<Operation>;
  std::printf("%s\n", name);
  print("A", typename Traits::ALayout{}, 4 * elements_of_register, 1, 1);
  print("B", typename Traits::BLayout{}, 2 * elements_of_register, 1, 1);
  print("C", typename Traits::CLayout{}, 4, 1, 1);
}

template <class Operation>
void print_load(const char* name) {
  using Traits = cute::Copy_Traits<Operation>;
  std::printf("%s\n", name);
  print("rows", typename Traits::SrcLayout{}, 1, 1, 128);
  print("elements", typename Traits::DstLayout{}, 8, 16, 16);
}

}  // namespace

int main() {
  print_product<cute::SM80_16x8x16_F32BF16BF16F32_TN>("bfloat16", 2);
  print_product<cute::SM80_16x8x16_F32F16F16F32_TN>("float16", 2);
  print_product<cute::SM80_16x8x8_F32TF32TF32F32_TN>("tf32", 1);
  print_load<cute::SM75_U32x4_LDSM_N>("ldmatrix");
  print_load<cute::SM75_U16x8_LDSM_T>("ldmatrix.trans");
}
