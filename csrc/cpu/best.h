// The k greatest scores of each lane with their indices, kept sorted while a matrix of scores streams past.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace vosops::cpu {

// The bits of the lanes in which a >= b; a NaN is at least nothing.
template <class V>
uint32_t lanes_at_least(typename V::Reg a, typename V::Reg b) {
  [[maybe_unused]] constexpr bool is_float = std::is_same_v<typename V::T, float>;
#if defined(__AVX512F__)
  if constexpr (sizeof a == 64) {
    if constexpr (is_float) return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
    if constexpr (!is_float) return _mm512_cmp_pd_mask(a, b, _CMP_GE_OQ);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof a == 32) {
    if constexpr (is_float) return _mm256_movemask_ps((__m256)(a >= b));
    if constexpr (!is_float) return _mm256_movemask_pd((__m256d)(a >= b));
  }
#elif defined(__SSE2__)
  if constexpr (sizeof a == 16) {
    if constexpr (is_float) return _mm_movemask_ps((__m128)(a >= b));
    if constexpr (!is_float) return _mm_movemask_pd((__m128d)(a >= b));
  }
#elif defined(__aarch64__)
  if constexpr (sizeof a == 16 && is_float) {
    const uint32x4_t bit = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32((uint32x4_t)(a >= b), bit));
  }
#endif
  uint32_t bits = 0;
  for (int i = 0; i < V::kLanes; ++i) bits |= static_cast<uint32_t>(a[i] >= b[i]) << i;
  return bits;
}

// `lists` lists of the k greatest (score, index): greatest score first, on a tie the lowest index. A list's
// bar is the score that a newcomer must at least reach; a NaN reaches none.
template <class T>
class BestLists {
 public:
  static constexpr T kNoScore = std::numeric_limits<T>::lowest();
  static constexpr int64_t kNoIndex = std::numeric_limits<int64_t>::max();

  BestLists(int64_t lists, int64_t k)
      : lists_(lists), k_(k), bars_(lists), scores_(lists * k), indices_(lists * k) {}

  void clear() {
    std::fill_n(bars_.data(), lists_, kNoScore);
    std::fill_n(scores_.data(), lists_ * k_, kNoScore);
    std::fill_n(indices_.data(), lists_ * k_, kNoIndex);
  }

  // Shuts a list that nobody reads, so that no candidate costs time.
  void close(int64_t list) { bars_[list] = std::numeric_limits<T>::infinity(); }

  const T* bars() { return bars_.data(); }
  const T* scores(int64_t list) { return scores_.data() + list * k_; }
  const int64_t* indices(int64_t list) { return indices_.data() + list * k_; }

  // Takes a score that reaches the bar.
  void insert(int64_t list, T score, int64_t index) {
    T* scores = scores_.data() + list * k_;
    int64_t* indices = indices_.data() + list * k_;
    int64_t at = k_;
    while (at > 0 && (score > scores[at - 1] || (score == scores[at - 1] && index < indices[at - 1]))) {
      --at;
      if (at + 1 < k_) {
        scores[at + 1] = scores[at];
        indices[at + 1] = indices[at];
      }
    }
    if (at == k_) return;
    scores[at] = score;
    indices[at] = index;
    bars_[list] = scores[k_ - 1];
  }

 private:
  int64_t lists_, k_;
  Workspace<T> bars_, scores_;
  Workspace<int64_t> indices_;
};

}  // namespace vosops::cpu
