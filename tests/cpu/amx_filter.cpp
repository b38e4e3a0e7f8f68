// csrc/cpu/amx_filter.h: its bound holds for every score and every kind of vectors, half of it does not; its
// lists keep the best. test_amx_filter.py compiles this program for the matrix engine and for its twin.
#include "cpu/amx_filter.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "expect.h"

namespace vosops::cpu::amx {
namespace {

using Exact = long double;

// 16 queries and 16 keys, element by element.
struct Problem {
  int64_t channels;
  bool exact;  // of bfloat16, not shifted
  std::vector<float> query, key, shift;

  explicit Problem(int64_t channels_)
      : channels(channels_),
        exact(false),
        query(channels_ * kRows),
        key(channels_ * kRows),
        shift(channels_) {}
  float* at(std::vector<float>& side, int64_t e, int i) { return &side[e * kRows + i]; }
};

float normal() {
  return std::normal_distribution<float>()(random_bits);
}

// What the filter and the float32 kernel make of it, and the exact difference of the two.
struct Scores {
  float approximate[kRows][kRows], in_float32[kRows][kRows];  // [key][query]
  Exact difference[kRows];                                    // of a query
  float bound[kRows][kRows], panel_bound[kRows];              // of a key and a query, of the panel
  Reg greatest;
};

// The squared length that gemm.h's pack_panel() computes.
float squared(const std::vector<float>& side, int64_t channels, int i) {
  float sum = 0;
  for (int64_t e = 0; e < channels; ++e) sum = std::fma(side[e * kRows + i], side[e * kRows + i], sum);
  return sum;
}

Scores scores_of(const Problem& p, bool norms_inside) {
  Scores out;
  const int64_t steps = steps_for(p.channels);
  const float* shift = p.exact ? nullptr : p.shift.data();
  const Columns queries{p.query.data(), p.channels, shift}, keys{p.key.data(), p.channels, shift};
  std::vector<uint16_t> a(steps * kTile), b(steps * kTile);
  const Reg one = Lanes::set1(1), ones[kNormPieces] = {one, one, one};
  const Reg query_squares = squared_lengths(queries), key_squares = squared_lengths(keys);
  const Reg half = key_squares * -0.5f;
  Reg pieces[kNormPieces];
  split_number(half, pieces);
  const Reg query_loss = round_panel<true>(queries, norms_inside ? ones : nullptr, b.data());
  const Reg key_loss = round_panel<false>(keys, norms_inside ? pieces : nullptr, a.data());
  alignas(64) float norms[kRows], tile[kSums];
  Lanes::store(norms, half);

  Side query[kRows], key[kRows], panel{0, 0, 0};
  Reg length, lost, rest;
  for (int i = 0; i < kRows; ++i) {
    query[i] = side_of(query_squares[i], query_loss[i], p.channels, p.exact);
    query[i].rest = rest_of_query(query[i], squared(p.query, p.channels, i), p.channels, steps);
    length[i] = query[i].length, lost[i] = query[i].lost, rest[i] = query[i].rest;
    key[i] = side_of(key_squares[i], key_loss[i], p.channels, p.exact);
    key[i].rest = rest_of_key(key[i], squared(p.key, p.channels, i), p.channels, steps);
    panel.length = std::max(panel.length, key[i].length);
    panel.lost = std::max(panel.lost, key[i].lost);
    panel.rest = std::max(panel.rest, key[i].rest);
  }
  {
    const Region region;
    tile_zero<0>();
    for (int64_t s = 0; s < steps; ++s) {
      tile_load<4>(a.data() + s * kTile);
      tile_load<6>(b.data() + s * kTile);
      tile_dot<0, 4, 6>();
    }
    tile_store<0>(tile);
    out.greatest = greatest_row(tile, norms_inside ? nullptr : norms);
    Lanes::store(out.panel_bound, error_bound(length, lost, rest, panel));
    for (int m = 0; m < kRows; ++m) Lanes::store(out.bound[m], error_bound(length, lost, rest, key[m]));
  }
  for (int i = 0; i < kRows; ++i) {
    Exact query_squared = 0, shifted_squared = 0;
    for (int64_t e = 0; e < p.channels; ++e) {
      const Exact q = p.query[e * kRows + i], x = q - (p.exact ? Exact{0} : Exact{p.shift[e]});
      query_squared += q * q, shifted_squared += x * x;
    }
    for (int m = 0; m < kRows; ++m) {
      out.approximate[m][i] = tile[m * kRows + i] + (norms_inside ? 0 : norms[m]);
      float sum = squared(p.key, p.channels, m) / -2;
      for (int64_t e = 0; e < p.channels; ++e)
        sum = std::fma(p.query[e * kRows + i], p.key[e * kRows + m], sum);
      out.in_float32[m][i] = sum;
    }
    out.difference[i] = (shifted_squared - query_squared) / 2;
  }
  return out;
}

// How many of the scores are further from float32's, and from the exact ones, than `share` of the bound.
int violations(const Problem& p, bool norms_inside, float share) {
  const Scores s = scores_of(p, norms_inside);
  int count = 0;
  for (int i = 0; i < kRows; ++i) {
    for (int m = 0; m < kRows; ++m) {
      Exact exact = 0;
      for (int64_t e = 0; e < p.channels; ++e) {
        const Exact moved = p.exact ? Exact{0} : Exact{p.shift[e]};
        const Exact x = p.query[e * kRows + i] - moved, y = p.key[e * kRows + m] - moved;
        exact += y * (x - y / 2);
      }
      const Exact most = Exact{share} * s.bound[m][i];
      const Exact approximate = s.approximate[m][i];
      count += std::abs(approximate - exact) > most;
      count += std::abs(approximate - s.in_float32[m][i] - s.difference[i]) > most;
    }
  }
  return count;
}

// ---- Vectors

float of_magnitude(int power) {
  return std::ldexp(normal(), power);
}

struct Kind {
  const char* name;
  std::function<void(Problem&)> make;
};

template <class F>
void fill(Problem& p, const F& f) {
  for (float& x : p.query) x = f();
  for (float& x : p.key) x = f();
}

const std::vector<Kind> kKinds = {
    {"normal", [](Problem& p) { fill(p, normal); }},
    {"positive", [](Problem& p) { fill(p, [] { return std::abs(normal()); }); }},
    {"offset", [](Problem& p) { fill(p, [] { return 3 + normal(); }); }},
    {"large offset", [](Problem& p) { fill(p, [] { return 1000 + normal(); }); }},
    {"small integers", [](Problem& p) { fill(p, [] { return std::round(2 * normal()); }); }},
    {"equal keys",
     [](Problem& p) {
       fill(p, normal);
       for (int64_t e = 0; e < p.channels; ++e) std::fill_n(p.at(p.key, e, 0), kRows, p.key[e * kRows]);
     }},
    {"one ulp apart",
     [](Problem& p) {
       fill(p, normal);
       for (int64_t e = 0; e < p.channels; ++e)
         for (int m = 1; m < kRows; ++m)
           *p.at(p.key, e, m) = std::nextafter(*p.at(p.key, e, m - 1), normal() > 0 ? kInfinity : -kInfinity);
     }},
    {"keys that are the queries", [](Problem& p) { fill(p, normal), p.key = p.query; }},
    {"opposite",
     [](Problem& p) {
       fill(p, normal);
       std::transform(p.query.begin(), p.query.end(), p.key.begin(), std::negate<float>());
     }},
    {"long", [](Problem& p) { fill(p, [] { return of_magnitude(45); }); }},
    {"short", [](Problem& p) { fill(p, [] { return of_magnitude(-45); }); }},
    {"whose squares are denormal", [](Problem& p) { fill(p, [] { return of_magnitude(-63); }); }},
    {"denormal", [](Problem& p) { fill(p, [] { return of_magnitude(-128); }); }},
    {"partly denormal",
     [](Problem& p) { fill(p, [] { return random_bits() % 2 ? normal() : of_magnitude(-130); }); }},
    {"of any magnitude",
     [](Problem& p) { fill(p, [] { return of_magnitude(static_cast<int>(random_bits() % 160) - 120); }); }},
    {"one element dominates",
     [](Problem& p) {
       fill(p, normal);
       for (int i = 0; i < kRows; ++i) *p.at(p.query, 0, i) = 1e6f, *p.at(p.key, 0, i) = -1e6f;
     }},
    // Every element halfway between two bfloat16: as far from its rounding as can be, to the same side.
    {"halfway",
     [](Problem& p) {
       fill(p, [] { return std::ldexp(1 + 0x1p-8f, static_cast<int>(random_bits() % 3)); });
     }},
};

bool is_filtered(const Problem& p) {
  float most = 0;
  for (int i = 0; i < kRows; ++i)
    most = std::max({most, squared(p.query, p.channels, i), squared(p.key, p.channels, i)});
  return most <= kMostSquared;
}

void check_bounds() {
  const int rounds = std::getenv("VOSOPS_EXHAUSTIVE") ? 6 : 2;
  for (const Kind& kind : kKinds) {
    for (int64_t channels : {1, 2, 29, 30, 32, 33, 61, 64, 100, 128, 300}) {
      for (int round = 0; round < rounds; ++round) {
        Problem p(channels);
        kind.make(p);
        p.exact = round % 3 == 2;
        if (p.exact) {
          for (std::vector<float>* side : {&p.query, &p.key})
            for (float& x : *side) x = float_of(bits_of(x) & 0xffff0000u);
        } else if (round % 3 == 1) {
          for (int64_t e = 0; e < channels; ++e)
            for (int m = 0; m < kRows; ++m) p.shift[e] += p.key[e * kRows + m] / kRows;
        }
        expect(is_filtered(p), "a length that is filtered", 0, 1);
        for (bool inside : {false, true}) {
          if (inside && !holds_norms(channels)) continue;
          const int broken = violations(p, inside, 1);
          for (int i = 0; i < 2 * kSums; ++i) expect(i >= broken, kind.name, broken, 0);
          const Scores s = scores_of(p, inside);
          for (int i = 0; i < kRows; ++i) {
            Exact most = -HUGE_VALL;
            for (int m = 0; m < kRows; ++m) {
              most = std::max(most, s.in_float32[m][i] + s.difference[i]);
              expect(s.bound[m][i] <= s.panel_bound[i], "a panel's bound", s.bound[m][i], s.panel_bound[i]);
            }
            const float upper = s.greatest[i] + s.panel_bound[i], lower = s.greatest[i] - s.panel_bound[i];
            expect(upper >= most, "upper", upper, static_cast<double>(most));
            expect(lower <= most, "lower", lower, static_cast<double>(most));
          }
        }
      }
    }
  }
}

// Vectors for which Cauchy and Schwarz's inequality is an equation: what rounding takes from the query is
// parallel to the key.
void check_that_half_the_bound_fails() {
  for (int64_t channels : {5, 100}) {
    Problem p(channels);
    fill(p, [] { return 1 + 0x1p-8f; });  // rounded to 1: the tie goes to even
    for (float& x : p.key) x = 1;
    expect(violations(p, true, 1) == 0, "the bound", violations(p, true, 1), 0);
    expect(violations(p, true, 0.5f) > 0, "half the bound", 0, 1);
    fill(p, [] { return 1 + 0x1p-8f; });
    for (float& x : p.query) x = 1;
    expect(violations(p, true, 1) == 0, "the bound of keys", violations(p, true, 1), 0);
    expect(violations(p, true, 0.5f) > 0, "half the bound of keys", 0, 1);
  }
}

// ---- Lists

void check_pieces() {
  for (int round = 0; round < 20000; ++round) {
    Reg x;
    for (int i = 0; i < kRows; ++i) x[i] = of_magnitude(static_cast<int>(random_bits() % 200) - 80);
    x[3] = 0, x[5] = -kInfinity;
    Reg pieces[kNormPieces];
    split_number(x, pieces);
    for (int i = 0; i < kRows; ++i) {
      expect_same("pieces", (pieces[0][i] + pieces[1][i]) + pieces[2][i], x[i]);
      for (const Reg& piece : pieces) expect((bits_of(piece[i]) & 0xffffu) == 0, "a piece", piece[i], 0);
    }
  }
}

void check_rows() {
  alignas(64) float tile[kSums], norms[kRows];
  for (int round = 0; round < 1000; ++round) {
    for (float& x : tile) x = std::round(4 * normal());
    for (float& x : norms) x = std::round(normal());
    for (bool inside : {false, true}) {
      const Reg greatest = greatest_row(tile, inside ? nullptr : norms);
      for (int lane = 0; lane < kRows; ++lane) {
        float most = -kInfinity;
        uint32_t rows = 0;
        for (int m = 0; m < kRows; ++m) {
          const float score = tile[m * kRows + lane] + (inside ? 0 : norms[m]);
          most = std::max(most, score);
          rows |= static_cast<uint32_t>(score >= 2) << m;
        }
        expect_same("greatest row", greatest[lane], most);
        expect_same("rows", rows_at_least(tile, inside ? nullptr : norms, lane, 2), rows);
      }
    }
  }
}

// Panels of one key each with scores of which only bounds are known: the k greatest are noted at the end.
void check_lists() {
  int overflows = 0;
  for (int round = 0; round < 600; ++round) {
    const int64_t k = 1 + round % NoteLists::kMostNeighbors, panels = 20 + 7 * (round % 90);
    const float error = round % 5 == 4 ? 3.f : 0.05f;
    NoteLists lists(3, k);
    for (int64_t l = 0; l < 3; ++l) lists.clear(l);
    lists.close(0);
    std::vector<float> scores(panels);
    bool full = false;
    for (int32_t i = 0; i < panels; ++i) {
      scores[i] = normal() + (round % 2 ? 0.01f * static_cast<float>(i) : 0);
      const float middle = scores[i] + error * random_float();
      expect(!(kInfinity >= lists.bars()[0]), "a closed list", 1, 0);
      if (full || !(middle + error >= lists.bars()[1])) continue;
      lists.raise(1, middle - error);
      full = !lists.add(1, {middle + error, i, 1});
    }
    overflows += full;
    if (full) continue;
    std::vector<char> noted(panels, 0);
    lists.each(1, [&](const NoteLists::Note& note) { noted[note.panel] = 1; });
    std::vector<float> sorted = scores;
    std::sort(sorted.begin(), sorted.end(), std::greater<float>());
    const float least = sorted[std::min(k, panels) - 1];
    for (int64_t i = 0; i < panels; ++i) expect(noted[i] || scores[i] < least, "noted", scores[i], least);
  }
  expect(overflows > 0, "a list that overflows", overflows, 1);
}

int run() {
#if !defined(VOSOPS_AMX_TWIN)
  if (!ready()) {
    std::printf("0 comparisons, 0 failed; no tiles: %s\n", refusal());
    return 0;
  }
#endif
  check_bounds();
  check_that_half_the_bound_fails();
  check_pieces();
  check_rows();
  check_lists();
  std::printf("%lld comparisons, %lld failed\n", static_cast<long long>(compared),
              static_cast<long long>(failed));
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace vosops::cpu::amx

int main() {
  return vosops::cpu::amx::run();
}
