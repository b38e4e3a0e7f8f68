// Backward of the memory read on the GPU, deterministic: every sum has a fixed order, nothing is added by
// atomics.
//
// Some batch elements and a chunk of the memory at a time, the weights are recomputed from the log-sum-exp
// and kept, so that all gradients are products of rows with rows:
//   weights_kernel:  W[m][p] = exp(score - lse) from keys and queries;
//   ds_kernel:       dS[m][p] = W (values . grad_out - delta), delta = out . grad_out - grad_lse, and dS
//   transposed;
//   product_kernel:  dV = grad_out W^T;  dK~ = Q~ dS^T;  dQ~ += (shrinkage K~) dS, a block 64 x 128 of the
//   result.
// Q~ carries two more rows, ones and the query's bias, and shrinkage K~ one more, the shrinkage: their
// products are the sums that the gradients of shrinkage and biases need. finish_kernel turns dK~ into those
// of key, shrinkage and key bias. A chunk gives each multiprocessor kTilesPerMultiprocessor tiles of the
// weights, of as many batch elements as that takes: 54 MB for all three arrays of float on an H100, whatever
// the sizes of query and memory. Where all
// inputs are bfloat16, so are the operands of gradients, with the weights and their derivatives rounded to it
// as PyTorch's own operators do. Otherwise they are rows of float: float16 is exact in TF32, which multiplies
// it, while its range would lose small derivatives. Products bound the time: four for the forward's two.
#include <algorithm>
#include <tuple>

#include "memory_scores.cuh"

namespace vosops::cuda {
namespace {

constexpr int kThreads = kTileThreads;
constexpr int64_t kTilesPerMultiprocessor = 4;

// The tile (of A's rows and B's, of one of the elements) that a block works on.
struct BlockTile {
  int64_t element, first_a, first_b;

  __device__ BlockTile(int64_t a, int64_t b) {
    const int64_t tiles_a = ceil_div(a, int64_t{kTileA}), tiles_b = ceil_div(b, int64_t{kTileB});
    first_b = blockIdx.x % tiles_b * kTileB;
    first_a = blockIdx.x / tiles_b % tiles_a * kTileA;
    element = blockIdx.x / tiles_b / tiles_a;
  }
};

unsigned tile_blocks(int64_t elements, int64_t a, int64_t b) {
  return checked_blocks(elements * ceil_div(a, int64_t{kTileA}) * ceil_div(b, int64_t{kTileB}));
}

// Batch elements [n, n + elements) and a chunk of their memories: positions [begin, begin + count). Arrays of
// weights are [elements][count][query_columns] and [elements][P][memory_columns], with zeros behind the last
// column.
struct Chunk {
  int64_t n, elements, begin, count;
  int query_columns, memory_columns;
};

template <class Tile, class G>
__global__ __launch_bounds__(kThreads) void weights_kernel(Scores<typename Tile::Element> in,
                                                           const float* lse, Chunk chunk, G* weights) {
  VISIT(tile, 1);
  DYNAMIC_SHARED(typename Tile::Smem, s);
  const BlockTile tile(chunk.count, chunk.query_columns);
  const int64_t n = chunk.n + tile.element;
  weights += tile.element * chunk.count * chunk.query_columns;
  float products[kOwnA][kOwnB];
  Tile::multiply(s, {in.keys_of(n), chunk.begin + tile.first_a, in.memory},
                 {in.queries_of(n), tile.first_b, in.queries}, in.row_columns, products);
  float bias[kOwnB], query_lse[kOwnB];
#pragma unroll
  for (int j = 0; j < kOwnB; ++j) {
    const int64_t p = min(tile.first_b + Tile::column(j), in.queries - 1);
    bias[j] = in.bias_of(n, p);
    query_lse[j] = lse[n * in.queries + p];
  }
#pragma unroll
  for (int i = 0; i < kOwnA; ++i) {
    const int64_t row = tile.first_a + Tile::row(i);
    if (row >= chunk.count) continue;
    const float shrinkage = in.shrinkage_of(n, chunk.begin + row), shift = in.shift_of(n, chunk.begin + row);
    const bool is_read = in.reads(n, chunk.begin + row);
#pragma unroll
    for (int j = 0; j < kOwnB; ++j) {
      const int64_t p = tile.first_b + Tile::column(j);
      if (p >= chunk.query_columns) continue;
      const float score = fmaf(shrinkage, fmaf(in.scale, products[i][j], bias[j]), shift);
      const bool reads = is_read && p < in.queries && query_lse[j] != -INFINITY;
      weights[row * chunk.query_columns + p] =
          from_float<G>(reads ? exp2f((score - query_lse[j]) * kLog2E) : 0.f);
    }
  }
}

// Rows of values and of the output's gradient, [elements][count][columns] and [elements][P][columns].
template <class G>
struct Flow {
  const G *values, *grads;
  int columns;
  const float* delta;  // [elements][P]
  const G* weights;
  G *ds, *transposed;
};

template <class Tile>
struct DsSmem {
  typename Tile::Smem tile;
  float transposed[kTileB][kTileA + 1];
};

template <class Tile>
__global__ __launch_bounds__(kThreads) void ds_kernel(Flow<typename Tile::Element> flow, Chunk chunk,
                                                      int64_t queries) {
  VISIT(tile, 1);
  using G = typename Tile::Element;
  using Shared = DsSmem<Tile>;
  DYNAMIC_SHARED(Shared, s);
  const BlockTile tile(chunk.memory_columns, chunk.query_columns);
  flow.values += tile.element * chunk.count * flow.columns;
  flow.grads += tile.element * queries * flow.columns;
  flow.delta += tile.element * queries;
  flow.weights += tile.element * chunk.count * chunk.query_columns;
  flow.ds += tile.element * chunk.count * chunk.query_columns;
  flow.transposed += tile.element * queries * chunk.memory_columns;
  float products[kOwnA][kOwnB];
  Tile::multiply(s.tile, {flow.values, tile.first_a, chunk.count}, {flow.grads, tile.first_b, queries},
                 flow.columns, products);
#pragma unroll
  for (int j = 0; j < kOwnB; ++j) {
    const int64_t p = tile.first_b + Tile::column(j);
    const float delta = flow.delta[min(p, queries - 1)];
#pragma unroll
    for (int i = 0; i < kOwnA; ++i) {
      const int64_t row = tile.first_a + Tile::row(i), at = row * chunk.query_columns + p;
      // Values of no weight count for nothing, whatever they are.
      const float weight = row < chunk.count && p < queries ? to_float(flow.weights[at]) : 0.f;
      const float ds = weight != 0 ? weight * (products[i][j] - delta) : 0.f;
      if (row < chunk.count && p < chunk.query_columns) flow.ds[at] = from_float<G>(ds);
      s.transposed[Tile::column(j)][Tile::row(i)] = ds;
    }
  }
  __syncthreads();
#pragma unroll 4
  for (int first = 0; first < kTileA * kTileB; first += kThreads) {
    VISIT(transposed_store, 4);
    const int i = first + int(threadIdx.x);
    const int64_t p = tile.first_b + i / kTileA, m = tile.first_a + i % kTileA;
    if (p < queries && m < chunk.memory_columns)
      flow.transposed[p * chunk.memory_columns + m] = from_float<G>(s.transposed[i / kTileA][i % kTileA]);
  }
}

// Rows of a factor, [elements][count][columns].
template <class E>
struct Factor {
  const E* rows;
  int64_t count;
};

// result[element][a][b] = (or +=) rows of A times rows of B.
template <class T>
struct Result {
  T* data;
  int64_t element_stride, row_stride;
  bool add;
};

template <class Tile, class T>
__global__ __launch_bounds__(kThreads) void product_kernel(Factor<typename Tile::Element> a,
                                                           Factor<typename Tile::Element> b, int columns,
                                                           Result<T> result) {
  DYNAMIC_SHARED(typename Tile::Smem, s);
  const BlockTile tile(a.count, b.count);
  float products[kOwnA][kOwnB];
  Tile::multiply(s, {a.rows + tile.element * a.count * columns, tile.first_a, a.count},
                 {b.rows + tile.element * b.count * columns, tile.first_b, b.count}, columns, products);
#pragma unroll
  for (int i = 0; i < kOwnA; ++i)
#pragma unroll
    for (int j = 0; j < kOwnB; ++j) {
      const int64_t row = tile.first_a + Tile::row(i), column = tile.first_b + Tile::column(j);
      if (row >= a.count || column >= b.count) continue;
      T& to = result.data[tile.element * result.element_stride + row * result.row_stride + column];
      to = from_float<T>(result.add ? to_float(to) + products[i][j] : products[i][j]);
    }
}

// ---- Around the products ----
constexpr int kDeltaLanes = kThreads / kWarp;

struct DeltaSmem {
  float sums[kDeltaLanes][kWarp];
};

// delta of 32 queries: lanes are queries, warps share the columns. Both tensors are contiguous (N, columns,
// P).
template <class V>
__global__ __launch_bounds__(kThreads) void delta_kernel(const V* out, const V* grad_out,
                                                         const float* grad_lse, int columns, int64_t queries,
                                                         float* delta) {
  DYNAMIC_SHARED(DeltaSmem, s);
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int64_t tiles = ceil_div(queries, int64_t{kWarp}), n = blockIdx.x / tiles;
  const int64_t p = blockIdx.x % tiles * kWarp + lane, read = min(p, queries - 1);
  float sum = 0;
  for (int64_t c = warp; c < columns; c += kDeltaLanes) {
    const int64_t at = (n * columns + c) * queries + read;
    sum = fmaf(to_float(out[at]), to_float(grad_out[at]), sum);
  }
  s.sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || p >= queries) return;
  sum = -grad_lse[n * queries + p];
  for (int i = 0; i < kDeltaLanes; ++i) sum += s.sums[i][lane];
  delta[n * queries + p] = sum;
}

// Rows behind the `channels` others of Q~, of every element: ones and the queries' bias.
template <class G>
__global__ __launch_bounds__(kThreads) void query_rows_kernel(const float* bias, int64_t elements,
                                                              int64_t queries, int columns, int channels,
                                                              G* rows) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x, p = at % columns, element = at / columns;
  if (element >= elements) return;
  G* ones = rows + (element * (channels + 2) + channels) * columns;
  ones[p] = from_float<G>(p < queries ? 1.f : 0.f);
  ones[columns + p] = from_float<G>(p < queries && bias ? bias[element * queries + p] : 0.f);
}

// Rows of keys [c][m] of a chunk times their shrinkage, and the shrinkage behind them.
template <class E, class G>
__global__ __launch_bounds__(kThreads) void key_rows_kernel(Scores<E> in, Chunk chunk, int channels,
                                                            G* rows) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t m = at % chunk.memory_columns, c = at / chunk.memory_columns % (channels + 1);
  const int64_t element = at / chunk.memory_columns / (channels + 1), n = chunk.n + element;
  if (element >= chunk.elements) return;
  float x = 0;
  if (m < chunk.count) {
    const int64_t position = chunk.begin + m;
    x = in.reads(n, position) ? in.shrinkage_of(n, position) : 0.f;
    if (c < channels && x != 0) x *= in.scale * to_float(in.keys_of(n)[position * in.row_columns + c]);
  }
  rows[at] = from_float<G>(x);
}

template <class K>
struct KeyGradients {
  K* key;                       // [N][C][M]
  float *shrinkage, *key_bias;  // [N][M], or null
};

// From products [elements][channels + 2][count]: what Q~, ones and the bias make of dS.
template <class E, class K>
__global__ __launch_bounds__(kThreads) void finish_kernel(Scores<E> in, Chunk chunk, int key_channels,
                                                          int query_channels, const float* products,
                                                          KeyGradients<K> out) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = at % chunk.count, element = at / chunk.count, n = chunk.n + element;
  if (element >= chunk.elements) return;
  const int64_t m = chunk.begin + row;
  const bool reads = in.reads(n, m);
  const float factor = reads ? in.scale * in.shrinkage_of(n, m) : 0.f;
  const E* keys = in.keys_of(n) + m * in.row_columns;
  products += element * (int64_t{query_channels} + 2) * chunk.count;
  K* key_gradients = out.key + n * key_channels * in.memory;
  float product = 0;
  for (int c = 0; c < key_channels; ++c) {
    const float key = reads ? to_float(keys[c]) : 0.f;
    float sum = products[c * chunk.count + row];
    product = fmaf(sum, key, product);
    if (query_channels > key_channels) {
      const float squared = products[(key_channels + c) * chunk.count + row];
      product = fmaf(squared, reads ? to_float(keys[key_channels + c]) : 0.f, product);
      sum = fmaf(2 * key, squared, sum);
    }
    key_gradients[c * in.memory + m] = from_float<K>(factor * sum);
  }
  if (out.shrinkage)
    out.shrinkage[n * in.memory + m] =
        in.scale * product + products[(int64_t{query_channels} + 1) * chunk.count + row];
  if (out.key_bias) out.key_bias[n * in.memory + m] = products[int64_t{query_channels} * chunk.count + row];
}

// ---- Host ----
struct Gradients {
  Tensor query, key, value, shrinkage, query_bias, key_bias;

  void zero() {
    for (Tensor* tensor : {&query, &key, &value, &shrinkage, &query_bias, &key_bias})
      torch::stable::fill_(*tensor, 0);
  }
};

Tensor narrowed(Tensor tensor, int64_t dim, int64_t start, int64_t length) {
  return torch::stable::narrow(tensor, dim, start, length);
}

// How much is done at once: a chunk of one memory, or several whole memories.
struct Pass {
  int64_t elements, positions;
};

Pass choose_pass(const ScoreInputs& in, int query_columns) {
  const int64_t tiles = kTilesPerMultiprocessor * device_limits().multiprocessors;
  const int64_t positions = std::min(ceil_div(tiles * kTileA, int64_t{query_columns}) * kTileB, in.memory());
  if (positions < in.memory()) return {1, positions};
  const int64_t fit = tiles * kTileA * kTileB / (in.memory() * query_columns);
  return {std::clamp<int64_t>(fit, 1, in.batch()), positions};
}

// Runs one pass after the other.
template <class ScoreTile, class GradientTile>
void backward(const ScoreInputs& in, const Tensor& value, const Tensor& grad_out, const Tensor& delta,
              const Tensor& lse, Gradients& gradients, Stream stream) {
  using E = typename ScoreTile::Element;
  using G = typename GradientTile::Element;
  const int64_t queries = in.queries(), columns = value.size(1) * value.size(2);
  const int channels = int(in.query.size(1)), key_channels = int(in.key.size(1));
  ScoreMemory memory;
  const Scores<E> scores = pack_scores<E>(in, stream, memory);
  const auto numbers = [&](std::vector<int64_t> shape) {
    return torch::stable::new_empty(in.query, shape, ScalarType::Float);
  };
  const auto operands = [&](std::vector<int64_t> shape) {
    return torch::stable::new_empty(in.query, shape, kScalarType<G>);
  };
  const auto data_of = [](const Tensor& tensor) { return static_cast<G*>(tensor.mutable_data_ptr()); };
  const int query_columns = row_columns_of(queries);
  const Pass most = choose_pass(in, query_columns);
  const auto threads = [](int64_t count) { return dim3(checked_blocks(ceil_div(count, int64_t{kThreads}))); };

  const Tensor grad_columns =
      torch::stable::view(grad_out, std::vector<int64_t>{in.batch(), columns, queries});
  Tensor weights = operands({most.elements, most.positions, query_columns});
  Tensor ds = operands({most.elements, most.positions, query_columns});
  Tensor transposed = operands({most.elements, queries, row_columns_of(most.positions)});
  Tensor key_sums = numbers({most.elements, channels + 2, most.positions});
  for (int64_t n = 0; n < in.batch(); n += most.elements) {
    const int64_t elements = std::min(most.elements, in.batch() - n);
    const auto multiply = [&]<class T>(const Factor<G>& a, const Factor<G>& b, int depth,
                                       const Result<T>& result) {
      if (a.count == 0 || b.count == 0) return;
      LAUNCH((product_kernel<GradientTile, T>), dim3(tile_blocks(elements, a.count, b.count)), dim3(kThreads),
             sizeof(typename GradientTile::Smem), stream, a, b, depth, result);
    };
    const Tensor grad = narrowed(grad_columns, 0, n, elements);
    const Tensor grad_by_query = rows_of<G>(grad, 2, 1, false, stream);   // [P][columns]
    const Tensor grad_by_column = rows_of<G>(grad, 1, 2, false, stream);  // [columns][P]
    const Tensor query = rows_of<G>(narrowed(in.query, 0, n, elements), 1, 2, false, stream);
    Tensor query_rows = operands({elements, channels + 2, query_columns});
    Tensor plain_rows = narrowed(query_rows, 1, 0, channels);
    torch::stable::copy_(plain_rows, query);
    LAUNCH(query_rows_kernel<G>, threads(elements * query_columns), dim3(kThreads), 0, stream,
           scores.query_bias ? scores.query_bias + n * queries : nullptr, elements, queries, query_columns,
           channels, data_of(query_rows));
    Tensor query_sums = numbers({elements, channels + 1, queries});

    for (int64_t begin = 0; begin < in.memory(); begin += most.positions) {
      const int64_t count = std::min(most.positions, in.memory() - begin);
      const Chunk chunk{n, elements, begin, count, query_columns, row_columns_of(count)};
      G* w = data_of(weights);
      LAUNCH((weights_kernel<ScoreTile, G>), dim3(tile_blocks(elements, count, query_columns)),
             dim3(kThreads), sizeof(typename ScoreTile::Smem), stream, scores, lse.const_data_ptr<float>(),
             chunk, w);

      // (elements, O, C, count) with its objects and channels as one dimension.
      const int64_t objects = value.size(1);
      const Tensor part = narrowed(narrowed(value, 0, n, elements), 3, begin, count);
      const Tensor value_rows = rows_of<G>(
          objects == 1 ? torch::stable::squeeze(part, 1)
                       : torch::stable::reshape(part, std::vector<int64_t>{elements, columns, count}),
          2, 1, false, stream);
      const Flow<G> flow{data_of(value_rows),
                         data_of(grad_by_query),
                         row_columns_of(columns),
                         delta.const_data_ptr<float>() + n * queries,
                         w,
                         data_of(ds),
                         data_of(transposed)};
      LAUNCH(ds_kernel<GradientTile>, dim3(tile_blocks(elements, chunk.memory_columns, query_columns)),
             dim3(kThreads), sizeof(DsSmem<GradientTile>), stream, flow, chunk, queries);

      dispatch(value.scalar_type(), [&](auto sample) {
        using V = decltype(sample);
        auto* to = static_cast<V*>(gradients.value.mutable_data_ptr()) + n * columns * in.memory() + begin;
        multiply({data_of(grad_by_column), columns}, {w, count}, query_columns,
                 Result<V>{to, columns * in.memory(), in.memory(), false});
      });
      multiply({data_of(query_rows), channels + 2}, {flow.ds, count}, query_columns,
               Result<float>{key_sums.mutable_data_ptr<float>(), (channels + 2) * count, count, false});
      Tensor key_rows = operands({elements, channels + 1, chunk.memory_columns});
      LAUNCH((key_rows_kernel<E, G>), threads(elements * (channels + 1) * chunk.memory_columns),
             dim3(kThreads), 0, stream, scores, chunk, channels, data_of(key_rows));
      multiply(
          {data_of(key_rows), channels + 1}, {flow.transposed, queries}, chunk.memory_columns,
          Result<float>{query_sums.mutable_data_ptr<float>(), (channels + 1) * queries, queries, begin > 0});
      dispatch(in.key.scalar_type(), [&](auto sample) {
        using K = decltype(sample);
        const auto row = [](Tensor& tensor, bool given) {
          return given ? tensor.mutable_data_ptr<float>() : nullptr;
        };
        const KeyGradients<K> out{static_cast<K*>(gradients.key.mutable_data_ptr()),
                                  row(gradients.shrinkage, in.shrinkage.has_value()),
                                  row(gradients.key_bias, in.key_bias.has_value())};
        LAUNCH((finish_kernel<E, K>), threads(elements * count), dim3(kThreads), 0, stream, scores, chunk,
               key_channels, channels, key_sums.const_data_ptr<float>(), out);
      });
    }
    const auto write = [&](Tensor& gradient, int64_t first, int64_t rows) {
      Tensor to = narrowed(gradient, 0, n, elements);
      const Tensor from = narrowed(query_sums, 1, first, rows);
      torch::stable::copy_(to, torch::stable::view(from, to.sizes()));
    };
    write(gradients.query, 0, channels);
    if (in.query_bias) write(gradients.query_bias, channels, 1);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> memory_read_backward(
    const Tensor& grad_out, const Tensor& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const std::optional<Tensor>& shrinkage, const std::optional<Tensor>& query_bias,
    const std::optional<Tensor>& key_bias, double scale, std::string_view precision, const Tensor& out,
    const Tensor& lse) {
  const ScoreInputs in{query, key, shrinkage, query_bias, key_bias, scale};
  check_scores(in);
  check_shape("value", value, {in.batch(), kAnySize, kAnySize, in.memory()});
  for (const Tensor* tensor : {&grad_out, &out}) {
    check_shape("out", *tensor, {in.batch(), value.size(1), value.size(2), in.queries()});
    check_dtype("out", *tensor, value.scalar_type());
  }
  for (const Tensor* tensor : {&grad_lse, &lse}) {
    check_shape("lse", *tensor, {in.batch(), in.queries()});
    check_dtype("lse", *tensor, ScalarType::Float);
  }
  const Precision arithmetic = parse_precision(precision);
  const auto vector = [&](const std::optional<Tensor>& input, int64_t size) {
    return torch::stable::new_empty(query, std::vector<int64_t>{in.batch(), input ? size : 0},
                                    ScalarType::Float);
  };
  Gradients gradients{torch::stable::new_empty(query, query.sizes()),
                      torch::stable::new_empty(key, key.sizes()),
                      torch::stable::new_empty(value, value.sizes()),
                      vector(shrinkage, in.memory()),
                      vector(query_bias, in.queries()),
                      vector(key_bias, in.memory())};
  const DeviceScope device(query);
  const Stream stream = device.stream();
  if (in.batch() == 0 || in.queries() == 0 || in.memory() == 0) {
    gradients.zero();
  } else {
    const Tensor grads = torch::stable::contiguous(grad_out), outs = torch::stable::contiguous(out),
                 lses = torch::stable::contiguous(lse), lse_grads = torch::stable::contiguous(grad_lse);
    Tensor delta = torch::stable::new_empty(lses, lses.sizes());
    dispatch(value.scalar_type(), [&](auto sample) {
      using V = decltype(sample);
      LAUNCH(delta_kernel<V>, dim3(checked_blocks(in.batch() * ceil_div(in.queries(), int64_t{kWarp}))),
             dim3(kThreads), sizeof(DeltaSmem), stream, static_cast<const V*>(outs.const_data_ptr()),
             static_cast<const V*>(grads.const_data_ptr()), lse_grads.const_data_ptr<float>(),
             int(value.size(1) * value.size(2)), in.queries(), delta.mutable_data_ptr<float>());
    });
    const bool sixteen_bit = is_16_bit(key.scalar_type()) && is_16_bit(value.scalar_type());
    const Products products = sixteen_bit || arithmetic == Precision::kTf32 ? Products::kTf32
                              : arithmetic == Precision::kIeee              ? Products::kFma
                                                                            : Products::kSplit;
    const Products of_scores = score_products(in, arithmetic);
    if (of_scores == Products::kSixteenBit && key.scalar_type() == ScalarType::BFloat16 &&
        value.scalar_type() == ScalarType::BFloat16) {
      using Tile = TensorTile<bfloat16, Arithmetic::kPlain>;
      backward<Tile, Tile>(in, value, grads, delta, lses, gradients, stream);
    } else {
      with_tile(of_scores, key.scalar_type(), [&](auto score_tile) {
        with_float_tile(products, [&](auto gradient_tile) {
          backward<decltype(score_tile), decltype(gradient_tile)>(in, value, grads, delta, lses, gradients,
                                                                  stream);
        });
      });
    }
  }
  return {gradients.query,     gradients.key,        gradients.value,
          gradients.shrinkage, gradients.query_bias, gradients.key_bias};
}

}  // namespace
}  // namespace vosops::cuda

VOSOPS_CUDA_LIBRARY(m) {
  m.impl("memory_read_backward", TORCH_BOX(&vosops::cuda::memory_read_backward));
}
