// Backward of the memory read on the GPU, deterministic: every sum has a fixed order, nothing is added by
// atomics.
//
// A batch element and a chunk of the memory at a time, the weights are recomputed from the log-sum-exp and
// kept, so that all gradients are products of rows with rows:
//   weights_kernel:  W[m][p] = exp(score - lse) from keys and queries;
//   ds_kernel:       dS[m][p] = W (values . grad_out - delta), delta = out . grad_out - grad_lse, and dS
//   transposed;
//   product_kernel:  dV = grad_out W^T;  dK~ = Q~ dS^T;  dQ~ += (shrinkage K~) dS, a block 64 x 128 of the
//   result.
// Q~ carries two more rows, ones and the query's bias, and shrinkage K~ one more, the shrinkage: their
// products are the sums that the gradients of shrinkage and biases need. finish_kernel turns dK~ into those
// of key, shrinkage and key bias. A chunk gives each multiprocessor kTilesPerMultiprocessor tiles of the
// weights: 54 MB for all three arrays of float on an H100, whatever the sizes of query and memory. Where all
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

// The tile (of A's rows and B's) that a block works on.
struct BlockTile {
  int64_t first_a, first_b;

  __device__ explicit BlockTile(int64_t b) {
    const int64_t tiles = ceil_div(b, int64_t{kTileB});
    first_a = blockIdx.x / tiles * kTileA;
    first_b = blockIdx.x % tiles * kTileB;
  }
};

unsigned tile_blocks(int64_t a, int64_t b) {
  return checked_blocks(ceil_div(a, int64_t{kTileA}) * ceil_div(b, int64_t{kTileB}));
}

// One batch element and chunk: positions [begin, begin + count). Arrays of weights are [count][query_columns]
// and [P][memory_columns], with zeros behind the last column.
struct Chunk {
  int64_t n, begin, count;
  int query_columns, memory_columns;
};

template <class Tile, class G>
__global__ __launch_bounds__(kThreads) void weights_kernel(Scores<typename Tile::Element> in,
                                                           const float* lse, Chunk chunk, G* weights) {
  DYNAMIC_SHARED(typename Tile::Smem, s);
  const BlockTile tile(chunk.query_columns);
  float products[kOwnA][kOwnB];
  Tile::multiply(s, {in.keys_of(chunk.n), chunk.begin + tile.first_a, in.memory},
                 {in.queries_of(chunk.n), tile.first_b, in.queries}, in.row_columns, products);
  float bias[kOwnB], query_lse[kOwnB];
#pragma unroll
  for (int j = 0; j < kOwnB; ++j) {
    const int64_t p = min(tile.first_b + Tile::column(j), in.queries - 1);
    bias[j] = in.bias_of(chunk.n, p);
    query_lse[j] = lse[chunk.n * in.queries + p];
  }
#pragma unroll
  for (int i = 0; i < kOwnA; ++i) {
    const int64_t row = tile.first_a + Tile::row(i);
    if (row >= chunk.count) continue;
    const float shrinkage = in.shrinkage_of(chunk.n, chunk.begin + row),
                shift = in.shift_of(chunk.n, chunk.begin + row);
#pragma unroll
    for (int j = 0; j < kOwnB; ++j) {
      const int64_t p = tile.first_b + Tile::column(j);
      if (p >= chunk.query_columns) continue;
      const float score = fmaf(shrinkage, fmaf(in.scale, products[i][j], bias[j]), shift);
      const bool reads = p < in.queries && query_lse[j] != -INFINITY;
      weights[row * chunk.query_columns + p] =
          from_float<G>(reads ? exp2f((score - query_lse[j]) * kLog2E) : 0.f);
    }
  }
}

// Rows of values and of the output's gradient, [count][columns] and [P][columns].
template <class G>
struct Flow {
  const G *values, *grads;
  int columns;
  const float* delta;  // [P]
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
  using G = typename Tile::Element;
  using Shared = DsSmem<Tile>;
  DYNAMIC_SHARED(Shared, s);
  const BlockTile tile(chunk.query_columns);
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
      float ds = 0;
      if (row < chunk.count && p < queries) ds = to_float(flow.weights[at]) * (products[i][j] - delta);
      if (row < chunk.count && p < chunk.query_columns) flow.ds[at] = from_float<G>(ds);
      s.transposed[Tile::column(j)][Tile::row(i)] = ds;
    }
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < kTileA * kTileB; i += kThreads) {
    const int64_t p = tile.first_b + i / kTileA, m = tile.first_a + i % kTileA;
    if (p < queries && m < chunk.memory_columns)
      flow.transposed[p * chunk.memory_columns + m] = from_float<G>(s.transposed[i / kTileA][i % kTileA]);
  }
}

// result[a][b] = (or +=) rows of A times rows of B.
template <class T>
struct Result {
  T* data;
  int64_t row_stride;
  bool add;
};

template <class Tile, class T>
__global__ __launch_bounds__(kThreads) void product_kernel(const typename Tile::Element* a, int64_t count_a,
                                                           const typename Tile::Element* b, int64_t count_b,
                                                           int columns, Result<T> result) {
  DYNAMIC_SHARED(typename Tile::Smem, s);
  const BlockTile tile(count_b);
  float products[kOwnA][kOwnB];
  Tile::multiply(s, {a, tile.first_a, count_a}, {b, tile.first_b, count_b}, columns, products);
#pragma unroll
  for (int i = 0; i < kOwnA; ++i)
#pragma unroll
    for (int j = 0; j < kOwnB; ++j) {
      const int64_t row = tile.first_a + Tile::row(i), column = tile.first_b + Tile::column(j);
      if (row >= count_a || column >= count_b) continue;
      T& to = result.data[row * result.row_stride + column];
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

// Rows behind the others: ones and the queries' bias behind Q~.
template <class G>
__global__ __launch_bounds__(kThreads) void query_rows_kernel(const float* bias, int64_t queries, int columns,
                                                              G* ones, G* biases) {
  const int64_t p = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (p >= columns) return;
  ones[p] = from_float<G>(p < queries ? 1.f : 0.f);
  biases[p] = from_float<G>(p < queries && bias ? bias[p] : 0.f);
}

// Rows of keys [c][m] of a chunk times their shrinkage, and the shrinkage behind them.
template <class E, class G>
__global__ __launch_bounds__(kThreads) void key_rows_kernel(Scores<E> in, Chunk chunk, int channels,
                                                            G* rows) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t c = at / chunk.memory_columns, m = at % chunk.memory_columns;
  if (c > channels) return;
  float x = 0;
  if (m < chunk.count) {
    const int64_t position = chunk.begin + m;
    x = in.shrinkage_of(chunk.n, position);
    if (c < channels) x *= in.scale * to_float(in.keys_of(chunk.n)[position * in.row_columns + c]);
  }
  rows[at] = from_float<G>(x);
}

template <class K>
struct KeyGradients {
  K* key;                       // [C][M]
  float *shrinkage, *key_bias;  // [M], or null
};

// From products [channels + 2][count]: what Q~, ones and the bias make of dS.
template <class E, class K>
__global__ __launch_bounds__(kThreads) void finish_kernel(Scores<E> in, Chunk chunk, int key_channels,
                                                          int query_channels, const float* products,
                                                          KeyGradients<K> out) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= chunk.count) return;
  const int64_t m = chunk.begin + row;
  const float factor = in.scale * in.shrinkage_of(chunk.n, m);
  const E* keys = in.keys_of(chunk.n) + m * in.row_columns;
  float product = 0;
  for (int c = 0; c < key_channels; ++c) {
    const float key = to_float(keys[c]);
    float sum = products[c * chunk.count + row];
    product = fmaf(sum, key, product);
    if (query_channels > key_channels) {
      const float squared = products[(key_channels + c) * chunk.count + row];
      product = fmaf(squared, to_float(keys[key_channels + c]), product);
      sum = fmaf(2 * key, squared, sum);
    }
    out.key[c * in.memory + m] = from_float<K>(factor * sum);
  }
  if (out.shrinkage)
    out.shrinkage[m] = in.scale * product + products[(int64_t{query_channels} + 1) * chunk.count + row];
  if (out.key_bias) out.key_bias[m] = products[int64_t{query_channels} * chunk.count + row];
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

// Runs one batch element and chunk after the other.
template <class ScoreTile, class GradientTile>
void backward(const ScoreInputs& in, const Tensor& value, const Tensor& grad_out, const Tensor& delta,
              const Tensor& lse, Gradients& gradients, Stream stream) {
  using E = typename ScoreTile::Element;
  using G = typename GradientTile::Element;
  const int64_t queries = in.queries(), columns = value.size(1) * value.size(2);
  const int channels = int(in.query.size(1));
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
  const int64_t tiles = kTilesPerMultiprocessor * device_limits().multiprocessors;
  const int64_t longest = std::min(ceil_div(tiles * kTileA, int64_t{query_columns}) * kTileB, in.memory());
  const auto threads = [](int64_t count) { return dim3(checked_blocks(ceil_div(count, int64_t{kThreads}))); };
  const auto multiply = [&]<class T>(const G* a, int64_t count_a, const G* b, int64_t count_b, int depth,
                                     const Result<T>& result) {
    if (count_a == 0 || count_b == 0) return;
    LAUNCH((product_kernel<GradientTile, T>), dim3(tile_blocks(count_a, count_b)), dim3(kThreads),
           sizeof(typename GradientTile::Smem), stream, a, count_a, b, count_b, depth, result);
  };

  const Tensor grad_columns =
      torch::stable::view(grad_out, std::vector<int64_t>{in.batch(), columns, queries});
  Tensor weights = operands({longest, query_columns}), ds = operands({longest, query_columns});
  Tensor transposed = operands({queries, row_columns_of(longest)});
  Tensor query_sums = numbers({channels + 1, queries}), key_sums = numbers({channels + 2, longest});
  for (int64_t n = 0; n < in.batch(); ++n) {
    const Tensor grad = narrowed(grad_columns, 0, n, 1);
    const Tensor grad_by_query = rows_of<G>(grad, 2, 1, false, stream);   // [P][columns]
    const Tensor grad_by_column = rows_of<G>(grad, 1, 2, false, stream);  // [columns][P]
    const Tensor query = rows_of<G>(narrowed(in.query, 0, n, 1), 1, 2, false, stream);
    Tensor query_rows = operands({channels + 2, query_columns});
    Tensor plain_rows = narrowed(query_rows, 0, 0, channels);
    torch::stable::copy_(plain_rows,
                         torch::stable::view(query, std::vector<int64_t>{channels, query_columns}));
    G* extra = data_of(query_rows) + int64_t{channels} * query_columns;
    LAUNCH(query_rows_kernel<G>, threads(query_columns), dim3(kThreads), 0, stream,
           scores.query_bias ? scores.query_bias + n * queries : nullptr, queries, query_columns, extra,
           extra + query_columns);

    for (int64_t begin = 0; begin < in.memory(); begin += longest) {
      const int64_t count = std::min(longest, in.memory() - begin);
      const Chunk chunk{n, begin, count, query_columns, row_columns_of(count)};
      G* w = data_of(weights);
      LAUNCH((weights_kernel<ScoreTile, G>), dim3(tile_blocks(count, query_columns)), dim3(kThreads),
             sizeof(typename ScoreTile::Smem), stream, scores, lse.const_data_ptr<float>(), chunk, w);

      const int64_t objects = value.size(1), value_channels = value.size(2);
      const int value_columns = row_columns_of(columns);
      Tensor value_rows;
      if (objects == 1) {
        const Tensor part = narrowed(narrowed(value, 0, n, 1), 3, begin, count);
        value_rows = rows_of<G>(torch::stable::squeeze(part, 1), 2, 1, false, stream);
      } else {
        // (1, O, C, count) with its objects and channels as one dimension.
        const Tensor part = narrowed(narrowed(value, 0, n, 1), 3, begin, count);
        value_rows =
            rows_of<G>(torch::stable::reshape(part, std::vector<int64_t>{1, objects * value_channels, count}),
                       2, 1, false, stream);
      }
      const Flow<G> flow{data_of(value_rows),
                         data_of(grad_by_query),
                         value_columns,
                         delta.const_data_ptr<float>() + n * queries,
                         w,
                         data_of(ds),
                         data_of(transposed)};
      LAUNCH(ds_kernel<GradientTile>, dim3(tile_blocks(chunk.memory_columns, query_columns)), dim3(kThreads),
             sizeof(DsSmem<GradientTile>), stream, flow, chunk, queries);

      dispatch(value.scalar_type(), [&](auto sample) {
        using V = decltype(sample);
        auto* to = static_cast<V*>(gradients.value.mutable_data_ptr()) + n * columns * in.memory() + begin;
        multiply(data_of(grad_by_column), columns, w, count, query_columns,
                 Result<V>{to, in.memory(), false});
      });
      multiply(data_of(query_rows), channels + 2, flow.ds, count, query_columns,
               Result<float>{key_sums.mutable_data_ptr<float>(), count, false});
      Tensor key_rows = operands({channels + 1, chunk.memory_columns});
      LAUNCH((key_rows_kernel<E, G>), threads(int64_t{channels + 1} * chunk.memory_columns), dim3(kThreads),
             0, stream, scores, chunk, channels, data_of(key_rows));
      multiply(data_of(key_rows), channels + 1, flow.transposed, queries, chunk.memory_columns,
               Result<float>{query_sums.mutable_data_ptr<float>(), queries, begin > 0});
      dispatch(in.key.scalar_type(), [&](auto sample) {
        using K = decltype(sample);
        const auto row = [&](Tensor& tensor, bool given) {
          return given ? tensor.mutable_data_ptr<float>() + n * in.memory() : nullptr;
        };
        const KeyGradients<K> out{
            static_cast<K*>(gradients.key.mutable_data_ptr()) + n * in.key.size(1) * in.memory(),
            row(gradients.shrinkage, in.shrinkage.has_value()),
            row(gradients.key_bias, in.key_bias.has_value())};
        LAUNCH((finish_kernel<E, K>), threads(count), dim3(kThreads), 0, stream, scores, chunk,
               int(in.key.size(1)), channels, key_sums.const_data_ptr<float>(), out);
      });
    }
    const auto write = [&](Tensor& gradient, int64_t first, int64_t rows) {
      Tensor to = narrowed(gradient, 0, n, 1);
      const Tensor from = narrowed(query_sums, 0, first, rows);
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
