// Sequences of the convolutional LSTM with 3x3 gates on the CPU in float32, by Winograd's F(4x4,3x3)
// (winograd.h).
//
// A step convolves [x; h] with the filters of the gates. A task owns the four gates of six hidden channels in
// a band of tiles: their 24 rows of products, then plane by plane the output transform and at once the cell's
// update, so that the gates (four times the state) stay in the second-level cache. Forward writes the new
// state and cell only; backward computes the gates of a step again from the states, turns them into their
// gradients in the same place, convolves those with the flipped filters into the gradients of x and h, and
// after some steps adds their share to the weights' gradient: for each position one product, over the tiles
// of those steps, of the transformed gradients with the transformed inputs. Operations of a step, forward: 72
// / 16 (C + hidden) 4 hidden per pixel; backward three times as many. What is kept for the backward: h and c
// of every step.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "common/checks.h"
#include "cpu/conv_lstm.h"
#include "cpu/winograd.h"

namespace vosops::cpu {
namespace {

using namespace winograd;

constexpr int64_t kGradTiles = 224;  // tiles of the steps that enter the weights' gradient at once
constexpr int64_t kGradFloats = int64_t{1} << 21;  // transformed input that is held for it

// A tensor (N,C,H,W), or the steps (N,T,C,H,W), in dense memory.
struct States {
  float* data = nullptr;
  int64_t image_stride = 0, step_stride = 0;

  float* at(int64_t image, int64_t step = 0) const {
    return data + image * image_stride + step * step_stride;
  }
  explicit operator bool() const { return data != nullptr; }
};

States states_of(const Tensor& tensor) {
  const bool steps = tensor.dim() == 5;
  return {const_cast<float*>(tensor.const_data_ptr<float>()), tensor.stride(0), steps ? tensor.stride(1) : 0};
}

// Sizes of a call, checked.
struct Problem {
  int64_t images, steps, inputs, hidden;
  Plane plane;

  int64_t columns() const { return inputs + hidden; }
  Problem(const Tensor& x, int64_t hidden_channels)
      : images(x.size(0)),
        steps(x.size(1)),
        inputs(x.size(2)),
        hidden(hidden_channels),
        plane{x.size(3), x.size(4)} {}
};

void check_steps(const char* name, const Tensor& tensor, int64_t hidden, const Tensor& x) {
  check_shape(name, tensor, {x.size(0), x.size(1), hidden, x.size(3), x.size(4)});
  check_dtype(name, tensor, ScalarType::Float);
}

void check_state(const char* name, const std::optional<Tensor>& state, int64_t hidden, const Tensor& x) {
  if (!state) return;
  check_shape(name, *state, {x.size(0), hidden, x.size(3), x.size(4)});
  check_dtype(name, *state, ScalarType::Float);
}

// The input and weights of a call in dense memory, and its optional tensors.
struct Arguments {
  Tensor x;
  std::optional<Tensor> bias, hidden, cell;

  Arguments(const Tensor& x, const std::optional<Tensor>& bias, const std::optional<Tensor>& hidden,
            const std::optional<Tensor>& cell, int64_t hidden_channels)
      : x(dense(x)), bias(dense(bias)), hidden(dense(hidden)), cell(dense(cell)) {
    check_shape("x", x, {kAnySize, kAnySize, kAnySize, kAnySize, kAnySize});
    check_dtype("x", x, ScalarType::Float);
    if (bias) {
      check_shape("bias", *bias, {kGates * hidden_channels});
      check_dtype("bias", *bias, ScalarType::Float);
    }
    check_state("hidden", hidden, hidden_channels, x);
    check_state("cell", cell, hidden_channels, x);
  }

  static Tensor dense(const Tensor& tensor) { return torch::stable::contiguous(tensor); }
  static std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
    return tensor ? std::optional<Tensor>(dense(*tensor)) : std::nullopt;
  }
  const float* biases() const { return bias ? bias->const_data_ptr<float>() : nullptr; }
  States initial(const std::optional<Tensor>& state) const { return state ? states_of(*state) : States{}; }
};

void check_weight(const Tensor& weight, int64_t columns) {
  check_shape("weight", weight, {kAnySize, columns, kTaps, kTaps});
  check_dtype("weight", weight, ScalarType::Float);
}

// Filters of the gates, for the first `channels` columns of [x; h].
Filters gate_filters(const float* weight, int64_t hidden, int64_t columns, int64_t channels) {
  return {weight, kGates * hidden, channels, columns * kFilter, kFilter, kGates};
}

// [x of a step; h], or x alone where h is zero.
Source source_of(const Problem& problem, const States& x, int64_t step, const States& hidden,
                 int64_t before) {
  const Plane& plane = problem.plane;
  const Maps input{x.at(0, step), x.image_stride, plane.size(), problem.inputs, Rows::of(plane)};
  if (!hidden) return {plane, {input}};
  const Maps state{hidden.at(0, before), hidden.image_stride, plane.size(), problem.hidden, Rows::of(plane)};
  return {plane, {input, state}};
}

// Calls visit(channel, gates before activation, entry, count) for every register of the states that a block
// made: `count` entries from `entry` of the channel's plane on.
template <class Visit>
void for_each_state(Block& block, const Band& band, const Problem& problem, const float* bias,
                    int64_t first_key, int64_t keys, const Visit& visit) {
  const Plane& plane = problem.plane;
  const int64_t first_row = kTile * band.first_row;
  const int64_t rows = std::min(kTile * band.rows, plane.height - first_row);
  for (int64_t key = 0; key < keys; key += kGates) {
    const int64_t channel = (first_key + key) / kGates;
    Reg biases[kGates] = {};
    for (int g = 0; g < kGates; ++g) {
      block.transform(key + g, band, g);
      if (bias) biases[g] = Lanes::set1(bias[g * problem.hidden + channel]);
    }
    for (int64_t y = 0; y < rows; ++y) {
      for (int64_t x = 0; x < plane.width; x += Lanes::kLanes) {
        Reg gates[kGates];
        for (int g = 0; g < kGates; ++g)
          gates[g] = Lanes::load(block.output(g) + y * block.pitch() + x) + biases[g];
        visit(channel, gates, channel * plane.size() + (first_row + y) * plane.width + x, plane.width - x);
      }
    }
  }
}

Reg load_or_zero(const float* state, int64_t entry, int64_t count) {
  return state ? load_lanes<Lanes>(state + entry, count) : Reg{};
}

// All steps; cells has a place for every step or, with a step stride of 0, for the last.
void run_forward(const Problem& problem, const Arguments& arguments, const float* weight, const float* packed,
                 float forget_bias, const States& output, const States& cells) {
  const States x = states_of(arguments.x);
  const States hidden = arguments.initial(arguments.hidden), cell = arguments.initial(arguments.cell);
  for (int64_t t = 0; t < problem.steps; ++t) {
    const Source source = source_of(problem, x, t, t ? output : hidden, t ? t - 1 : 0);
    const int64_t channels = packed ? problem.columns() : source.channels();
    const Filters filters = gate_filters(weight, problem.hidden, problem.columns(), channels);
    const auto finish = [&](Block& block, const Band& band, int64_t first_key, int64_t keys) {
      const States& previous = t ? cells : cell;
      const float* before = previous ? previous.at(band.image, t ? t - 1 : 0) : nullptr;
      float* h = output.at(band.image, t);
      float* c = cells.at(band.image, t);
      for_each_state(block, band, problem, arguments.biases(), first_key, keys,
                     [&](int64_t, const Reg(&z)[kGates], int64_t entry, int64_t count) {
                       const auto gates = CellGates<Lanes>::activate(z[0], z[1], z[2], z[3], forget_bias);
                       const Reg next = gates.update(load_or_zero(before, entry, count));
                       store_lanes<Lanes>(c + entry, next, count);
                       store_lanes<Lanes>(h + entry, gates.hidden(next), count);
                     });
    };
    convolve(source, problem.images, filters, packed, kGates, finish);
  }
}

Tensor conv_lstm_winograd_pack(const Tensor& weight) {
  check_shape("weight", weight, {kAnySize, kAnySize, kTaps, kTaps});
  check_dtype("weight", weight, ScalarType::Float);
  const Tensor dense = torch::stable::contiguous(weight);
  const int64_t hidden = weight.size(0) / kGates, columns = weight.size(1);
  const Filters filters = gate_filters(dense.const_data_ptr<float>(), hidden, columns, columns);
  Tensor packed = torch::stable::new_empty(weight, {filters.panels() * panel_floats(columns)});
  float* to = packed.mutable_data_ptr<float>();
  parallel_tasks(filters.panels(), [&] {
    return [&](int64_t panel) { transform_filters(filters, panel, to + panel * panel_floats(columns)); };
  });
  return packed;
}

std::tuple<Tensor, Tensor> conv_lstm_winograd_packed(const Tensor& x, const Tensor& packed,
                                                     const std::optional<Tensor>& bias,
                                                     const std::optional<Tensor>& hidden,
                                                     const std::optional<Tensor>& cell, double forget_bias,
                                                     int64_t hidden_channels) {
  const Arguments arguments(x, bias, hidden, cell, hidden_channels);
  const Problem problem(x, hidden_channels);
  const Filters filters = gate_filters(nullptr, hidden_channels, problem.columns(), problem.columns());
  check_shape("packed", packed, {filters.panels() * panel_floats(problem.columns())});
  const int64_t h = problem.plane.height, w = problem.plane.width;
  Tensor output = torch::stable::new_empty(x, {problem.images, problem.steps, hidden_channels, h, w});
  Tensor new_cell = torch::stable::new_empty(x, {problem.images, hidden_channels, h, w});
  run_forward(problem, arguments, nullptr, packed.const_data_ptr<float>(), static_cast<float>(forget_bias),
              states_of(output), states_of(new_cell));
  return {output, new_cell};
}

std::tuple<Tensor, Tensor> conv_lstm_winograd(const Tensor& x, const Tensor& weight,
                                              const std::optional<Tensor>& bias,
                                              const std::optional<Tensor>& hidden,
                                              const std::optional<Tensor>& cell, double forget_bias) {
  const int64_t hidden_channels = weight.size(0) / kGates;
  const Arguments arguments(x, bias, hidden, cell, hidden_channels);
  const Problem problem(x, hidden_channels);
  check_weight(weight, problem.columns());
  const Tensor weights = torch::stable::contiguous(weight);
  const int64_t h = problem.plane.height, w = problem.plane.width;
  Tensor output = torch::stable::new_empty(x, {problem.images, problem.steps, hidden_channels, h, w});
  Tensor cells = torch::stable::new_empty(x, {problem.images, problem.steps, hidden_channels, h, w});
  run_forward(problem, arguments, weights.const_data_ptr<float>(), nullptr, static_cast<float>(forget_bias),
              states_of(output), states_of(cells));
  return {output, cells};
}

// Some steps of the whole batch as products over tiles: the share of the weights' gradient that they have.
class WeightGradient {
 public:
  WeightGradient(const Problem& problem, const States& x, const States& hidden, const States& output,
                 float* grad_weight)
      : problem_(problem),
        bands_(problem.plane, problem.images),
        x_(x),
        hidden_(hidden),
        output_(output),
        grad_weight_(grad_weight) {
    for (const Band& band : bands_.all) image_tiles_ += band.tiles;
  }

  // The steps at a time, which hold about kGradTiles tiles.
  int64_t steps() const {
    return std::clamp<int64_t>(kGradTiles / std::max<int64_t>(1, image_tiles_), 1, problem_.steps);
  }

  // Adds the share of steps [first, first + count); the gradients of step t's gates lie at place t - first.
  void add(const States& grad_gates, int64_t first, int64_t count) {
    const int64_t tiles = count * image_tiles_, room = tiles + Lanes::kLanes;
    const int64_t columns = problem_.columns();
    const int64_t panel_room = kPositions * room * kPanel;
    const int64_t most = std::max<int64_t>(1, kGradFloats / panel_room);
    const int64_t panels = (columns + kPanel - 1) / kPanel;
    const int64_t held = std::min(most, panels);
    Workspace<float> input(held * panel_room);
    for (int64_t panel = 0; panel < panels; panel += held) {
      const int64_t now = std::min(held, panels - panel);
      parallel_tasks(now * kTileRegisters, [&] {
        return [&, transform = transformer(1),
                rows = Workspace<float>(Lanes::kLanes * row_floats())](int64_t task) mutable {
          const int64_t c = (panel + task / kTileRegisters) * kPanel + task % kTileRegisters * Lanes::kLanes;
          float* to =
              input.data() + task / kTileRegisters * panel_room + task % kTileRegisters * Lanes::kLanes;
          gather<kPanel, Lanes::kLanes>(
              transform, rows.data(), first, count, room, to,
              [&](int64_t n, int64_t t, int64_t i) { return input_plane(n, t, c + i); });
        };
      });
      const int64_t keys = kGates * problem_.hidden;
      parallel_tasks((keys + kKeyPanel - 1) / kKeyPanel, [&] {
        return [&, transform = transformer(0), rows = Workspace<float>(kKeyRows * row_floats()),
                grads = Workspace<float>(kPositions * room * kKeyPanel + Lanes::kLanes),
                sums = Workspace<float>(kPositions * kKeyPanel * kPanel)](int64_t task) mutable {
          const int64_t key = task * kKeyPanel;
          gather<kKeyPanel, kKeyRows>(transform, rows.data(), first, count, room, grads.data(),
                                      [&](int64_t n, int64_t t, int64_t i) -> const float* {
                                        if (i >= kKeyPanel || key + i >= keys) return nullptr;
                                        return grad_gates.at(n, t - first) +
                                               (key + i) * problem_.plane.size();
                                      });
          for (int64_t i = 0; i < now; ++i) {
            multiply_positions(input.data() + i * panel_room, grads.data(), room, tiles, sums.data());
            add_filters(sums.data(), key, std::min<int64_t>(kKeyPanel, keys - key), (panel + i) * kPanel);
          }
        };
      });
    }
  }

 private:
  static constexpr int kPanel = kLanePanel<Lanes>;
  static constexpr int kKeyRows = (kKeyPanel + Lanes::kLanes - 1) / Lanes::kLanes * Lanes::kLanes;

  BandTransform transformer(int halo) const {
    return BandTransform(problem_.plane, bands_.most_rows, bands_.most_lanes, halo);
  }
  int64_t row_floats() const { return kPositions * (bands_.most_lanes + Lanes::kLanes); }

  // Channel c of [x; h] at step t, or null where it is zero or does not exist.
  const float* input_plane(int64_t n, int64_t t, int64_t c) const {
    const int64_t size = problem_.plane.size();
    if (c < problem_.inputs) return x_.at(n, t) + c * size;
    if (c >= problem_.columns()) return nullptr;
    if (t > 0) return output_.at(n, t - 1) + (c - problem_.inputs) * size;
    return hidden_ ? hidden_.at(n) + (c - problem_.inputs) * size : nullptr;
  }

  // Transforms planes plane(n, t, 0 .. kRows), null ones to zeros, and transposes them to (position, tile,
  // plane) with kWidth floats per tile, of which kRows may exceed those that are wanted.
  template <int kWidth, int kRows, class PlaneOf>
  void gather(BandTransform& transform, float* rows, int64_t first, int64_t count, int64_t room, float* to,
              const PlaneOf& plane) {
    const int64_t stride = transform.stride();
    int64_t tile = 0;
    for (int64_t t = first; t < first + count; ++t) {
      for (const Band& band : bands_.all) {
        for (int64_t i = 0; i < kRows; ++i) {
          const float* from = plane(band.image, t, i);
          if (from) {
            transform({from, Rows::of(problem_.plane)}, band, rows + i * row_floats());
          } else {
            std::fill_n(rows + i * row_floats(), row_floats(), 0.f);
          }
        }
        for (int64_t p = 0; p < kPositions; ++p) {
          float* position = to + (p * room + tile) * kWidth;
          for (int64_t k = 0; k < band.tiles; k += Lanes::kLanes) {
            const float* from = rows + p * stride + k;
            if constexpr (kRows == Lanes::kLanes) {
              // A row may overrun into the next tile, which is written after it.
              transpose_lanes<Lanes>(from, row_floats(), position + k * kWidth, kWidth);
            } else {
              const int64_t tiles = std::min<int64_t>(Lanes::kLanes, band.tiles - k);
              for (int64_t j = 0; j < tiles; ++j) {
                for (int i = 0; i < kWidth; ++i) position[(k + j) * kWidth + i] = from[i * row_floats() + j];
              }
            }
          }
        }
        tile += band.tiles;
      }
    }
  }

  static void multiply_positions(const float* input, const float* grads, int64_t room, int64_t tiles,
                                 float* sums) {
    for (int64_t p = 0; p < kPositions; ++p) {
      multiply<Element>(
          input + p * room * kPanel, grads + p * room * kKeyPanel, tiles, [](int, int) { return Reg{}; },
          [&](const TileSums<Element>& tile) {
#pragma GCC unroll 16
            for (int j = 0; j < kKeyPanel; ++j) {
#pragma GCC unroll 16
              for (int r = 0; r < kTileRegisters; ++r)
                Lanes::store(sums + (p * kKeyPanel + j) * kPanel + r * Lanes::kLanes, tile[j][r]);
            }
          });
    }
  }

  void add_filters(const float* sums, int64_t key, int64_t keys, int64_t channel) {
    const int64_t columns = problem_.columns();
    for (int64_t j = 0; j < keys; ++j) {
      for (int r = 0; r < kTileRegisters; ++r) {
        const int64_t c = channel + r * Lanes::kLanes;
        float taps[kFilter][Lanes::kLanes];
        transform_both<kPatch, kTaps, Reg>(
            [](const auto& u, auto& g) { transform_filter_grad(u, g); },
            [&](int a, int b) {
              return Lanes::load(sums + ((a * kPatch + b) * kKeyPanel + j) * kPanel + r * Lanes::kLanes);
            },
            [&](int a, int b, Reg value) { Lanes::store(taps[a * kTaps + b], value); });
        float* to = grad_weight_ + ((key + j) * columns + c) * kFilter;
        for (int64_t i = 0; i < std::min<int64_t>(Lanes::kLanes, columns - c); ++i) {
          for (int tap = 0; tap < kFilter; ++tap) to[i * kFilter + tap] += taps[tap][i];
        }
      }
    }
  }

  const Problem& problem_;
  Bands bands_;
  States x_, hidden_, output_;
  float* grad_weight_;
  int64_t image_tiles_ = 0;
};

// Adds the sums of planes to the bias' gradient.
void add_bias_gradient(const Problem& problem, const States& grad_gates, int64_t steps, float* grad_bias) {
  parallel_tasks(kGates * problem.hidden, [&] {
    return [&](int64_t row) {
      Reg sum = {};
      for (int64_t n = 0; n < problem.images; ++n) {
        for (int64_t t = 0; t < steps; ++t) {
          const float* plane = grad_gates.at(n, t) + row * problem.plane.size();
          for (int64_t i = 0; i < problem.plane.size(); i += Lanes::kLanes)
            sum += load_lanes<Lanes>(plane + i, problem.plane.size() - i);
        }
      }
      for (int i = 0; i < Lanes::kLanes; ++i) grad_bias[row] += sum[i];
    };
  });
}

// Copies what a block made of one key to a dense plane.
void copy_plane(Block& block, const Band& band, const Plane& plane, int64_t scratch, float* to) {
  const int64_t first_row = kTile * band.first_row;
  const int64_t rows = std::min(kTile * band.rows, plane.height - first_row);
  for (int64_t y = 0; y < rows; ++y) {
    const float* from = block.output(scratch) + y * block.pitch();
    std::copy_n(from, plane.width, to + (first_row + y) * plane.width);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_lstm_winograd_backward(
    const Tensor& grad_output, const Tensor& grad_cells, const Tensor& x, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& hidden, const std::optional<Tensor>& cell,
    double forget_bias, const Tensor& output, const Tensor& cells) {
  const int64_t hidden_channels = weight.size(0) / kGates;
  const Arguments arguments(x, bias, hidden, cell, hidden_channels);
  const Problem problem(x, hidden_channels);
  check_weight(weight, problem.columns());
  check_steps("grad_output", grad_output, hidden_channels, x);
  check_steps("grad_cells", grad_cells, hidden_channels, x);
  check_steps("output", output, hidden_channels, x);
  check_steps("cells", cells, hidden_channels, x);
  const Tensor weights = torch::stable::contiguous(weight);
  const Tensor from_output = torch::stable::contiguous(grad_output);
  const Tensor from_cells = torch::stable::contiguous(grad_cells);
  const Tensor all_hidden = torch::stable::contiguous(output), all_cells = torch::stable::contiguous(cells);
  const int64_t h = problem.plane.height, w = problem.plane.width, size = problem.plane.size();
  Tensor grad_x = torch::stable::new_empty(x, {problem.images, problem.steps, problem.inputs, h, w});
  Tensor grad_weight = torch::stable::new_zeros(weight, {weight.size(0), weight.size(1), kTaps, kTaps});
  Tensor grad_bias = torch::stable::new_zeros(weight, {weight.size(0)});
  Tensor grad_hidden = torch::stable::new_zeros(x, {problem.images, hidden_channels, h, w});
  Tensor grad_cell = torch::stable::new_zeros(x, {problem.images, hidden_channels, h, w});

  const States initial = arguments.initial(arguments.hidden), first_cell = arguments.initial(arguments.cell);
  const States xs = states_of(arguments.x), hs = states_of(all_hidden), cs = states_of(all_cells);
  const States dhs = states_of(from_output), dcs = states_of(from_cells), dxs = states_of(grad_x);
  const States dh = states_of(grad_hidden), dc = states_of(grad_cell);
  WeightGradient of_weight(problem, xs, initial, hs, grad_weight.mutable_data_ptr<float>());
  const int64_t together = of_weight.steps(), gates_size = kGates * hidden_channels * size;
  Workspace<float> gates(problem.images * together * gates_size);
  const States dz{gates.data(), together * gates_size, gates_size};
  const Filters backwards{weights.const_data_ptr<float>(),
                          problem.columns(),
                          kGates * hidden_channels,
                          kFilter,
                          problem.columns() * kFilter,
                          1,
                          true};

  for (int64_t last = problem.steps; last > 0; last -= std::min(last, together)) {
    const int64_t first = std::max<int64_t>(0, last - together);
    for (int64_t t = last - 1; t >= first; --t) {
      const Source source = source_of(problem, xs, t, t ? hs : initial, t ? t - 1 : 0);
      const auto finish_gates = [&](Block& block, const Band& band, int64_t first_key, int64_t keys) {
        const int64_t n = band.image;
        const float* before = t ? cs.at(n, t - 1) : first_cell ? first_cell.at(n) : nullptr;
        float* grads = dz.at(n, t - first);
        for_each_state(
            block, band, problem, arguments.biases(), first_key, keys,
            [&](int64_t channel, const Reg(&z)[kGates], int64_t entry, int64_t count) {
              const auto a =
                  CellGates<Lanes>::activate(z[0], z[1], z[2], z[3], static_cast<float>(forget_bias));
              const auto load = [&](const float* at) { return load_lanes<Lanes>(at + entry, count); };
              const auto grad = CellGrads<Lanes>::of(a, load_or_zero(before, entry, count), load(cs.at(n, t)),
                                                     load(dhs.at(n, t)) + load(dh.at(n)),
                                                     load(dcs.at(n, t)) + load(dc.at(n)));
              const Reg of_gates[kGates] = {grad.i, grad.f, grad.g, grad.o};
              for (int g = 0; g < kGates; ++g)
                store_lanes<Lanes>(grads + g * hidden_channels * size + entry, of_gates[g], count);
              store_lanes<Lanes>(dc.at(n) + entry, grad.cell, count);
            });
      };
      convolve(source, problem.images,
               gate_filters(weights.const_data_ptr<float>(), hidden_channels, problem.columns(),
                            source.channels()),
               nullptr, kGates, finish_gates);
      Filters filters = backwards;
      if (t == 0 && !initial) filters.keys = problem.inputs;  // nobody asks for the gradient of h
      const Source from_gates{problem.plane,
                              {Maps{dz.at(0, t - first), dz.image_stride, size, kGates * hidden_channels,
                                    Rows::of(problem.plane)}}};
      convolve(from_gates, problem.images, filters, nullptr, 1,
               [&](Block& block, const Band& band, int64_t first_key, int64_t keys) {
                 for (int64_t key = 0; key < keys; ++key) {
                   const int64_t column = first_key + key;
                   const bool of_x = column < problem.inputs;
                   float* to = of_x ? dxs.at(band.image, t) + column * size
                                    : dh.at(band.image) + (column - problem.inputs) * size;
                   block.transform(key, band, 0);
                   copy_plane(block, band, problem.plane, 0, to);
                 }
               });
    }
    of_weight.add(dz, first, last - first);
    add_bias_gradient(problem, dz, last - first, grad_bias.mutable_data_ptr<float>());
  }
  return {grad_x, grad_weight, grad_bias, grad_hidden, grad_cell};
}

}  // namespace
}  // namespace vosops::cpu

STABLE_TORCH_LIBRARY_IMPL(vosops, CPU, m) {
  m.impl("conv_lstm_winograd_pack", TORCH_BOX(&vosops::cpu::conv_lstm_winograd_pack));
  m.impl("conv_lstm_winograd_packed", TORCH_BOX(&vosops::cpu::conv_lstm_winograd_packed));
  m.impl("conv_lstm_winograd", TORCH_BOX(&vosops::cpu::conv_lstm_winograd));
  m.impl("conv_lstm_winograd_backward", TORCH_BOX(&vosops::cpu::conv_lstm_winograd_backward));
}
