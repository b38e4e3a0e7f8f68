// Matrices of any strides as rows of contiguous columns, with zeros behind the last, so that inner loops copy
// 16 bytes at a time and know no strides. Bytes: each matrix is read and written once.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <type_traits>
#include <vector>

#include "host.cuh"
#include "tensor_core.cuh"

namespace vosops::cuda {

constexpr int kTileThreads = 256;

template <class S>
struct Matrix {
  const S* data;
  int64_t batch_stride, row_stride, column_stride;
  int64_t rows;
  int columns;
};

constexpr int kPackRows = 32, kPackColumns = 64;

struct PackRowsSmem {
  float tile[kPackRows][kPackColumns + 1];
};

// A block copies 32 rows x 64 columns; with `squares` the columns are followed by their squares. Zeros fill
// the rows.
template <class S, class E>
__global__ __launch_bounds__(kTileThreads) void rows_kernel(Matrix<S> source, bool squares, int row_columns,
                                                            E* out) {
  DYNAMIC_SHARED(PackRowsSmem, s);
  const int column_tiles = ceil_div(row_columns, kPackColumns);
  const int64_t row_tiles = ceil_div(source.rows, int64_t{kPackRows}), tile = blockIdx.x / column_tiles;
  const int64_t n = tile / row_tiles, first = tile % row_tiles * kPackRows;
  const int start = int(blockIdx.x % column_tiles) * kPackColumns;
  const bool columns_innermost = source.column_stride == 1;
  for (int i = int(threadIdx.x); i < kPackRows * kPackColumns; i += kTileThreads) {
    const int row = columns_innermost ? i / kPackColumns : i % kPackRows;
    const int column = columns_innermost ? i % kPackColumns : i / kPackRows;
    const bool squared = squares && start + column >= source.columns;
    const int from = start + column - (squared ? source.columns : 0);
    float x = 0;
    if (first + row < source.rows && from < source.columns)
      x = to_float(source.data[n * source.batch_stride + (first + row) * source.row_stride +
                               from * source.column_stride]);
    s.tile[row][column] = squared ? x * x : x;
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < kPackRows * kPackColumns; i += kTileThreads) {
    const int row = i / kPackColumns, column = i % kPackColumns;
    if (first + row < source.rows && start + column < row_columns)
      out[(n * source.rows + first + row) * row_columns + start + column] =
          from_float<E>(s.tile[row][column]);
  }
}

constexpr int kRowGranule16 = kStepBytes / 2;  // elements to which rows are filled up: whole steps of mma
constexpr int row_columns_of(int64_t columns) {
  return int(ceil_div(columns, int64_t{kRowGranule16})) * kRowGranule16;
}

// Rows of a (batch, rows, columns) tensor of any strides: [batch][rows][row_columns_of(columns)] of E.
template <class E>
Tensor rows_of(const Tensor& tensor, int row_dim, int column_dim, bool squares, Stream stream) {
  const int64_t rows = tensor.size(row_dim), columns = tensor.size(column_dim);
  STD_TORCH_CHECK(columns <= kMostPixels / 4, "too many channels");
  const int row_columns = row_columns_of(squares ? 2 * columns : columns);
  Tensor out = torch::stable::new_empty(tensor, std::vector<int64_t>{tensor.size(0), rows, row_columns},
                                        kScalarType<E>);
  const int64_t blocks =
      tensor.size(0) * ceil_div(rows, int64_t{kPackRows}) * ceil_div(row_columns, kPackColumns);
  const auto pack = [&](auto sample) {
    using S = decltype(sample);
    if constexpr (std::is_same_v<S, E> || std::is_same_v<E, float>) {
      const Matrix<S> source{static_cast<const S*>(tensor.const_data_ptr()),
                             tensor.stride(0),
                             tensor.stride(row_dim),
                             tensor.stride(column_dim),
                             rows,
                             int(columns)};
      LAUNCH((rows_kernel<S, E>), dim3(checked_blocks(blocks)), dim3(kTileThreads), sizeof(PackRowsSmem),
             stream, source, squares, row_columns, static_cast<E*>(out.mutable_data_ptr()));
    }
  };
  dispatch(tensor.scalar_type(), pack);
  return out;
}

// A batch that only repeats its first element, once.
inline Tensor without_repeats(const Tensor& tensor) {
  Tensor copy = tensor;
  return tensor.size(0) > 1 && tensor.stride(0) == 0 ? torch::stable::narrow(copy, 0, 0, 1) : copy;
}

}  // namespace vosops::cuda
