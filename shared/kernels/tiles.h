// Weights in tiles of 64 outputs, and the sums of a few rows with one tile.

#pragma once

#include <algorithm>

#include "vectors.h"

constexpr int VECTORS = 4;
constexpr int TILE = LANES * VECTORS;  // outputs that are summed together
constexpr int HALF = TILE / 2;         // of gate_up: so many of gate, then as many of up
constexpr int AHEAD = 8192;            // bytes that are fetched into the L2 cache before they are needed

// Rows that are summed together: as many sums as fit into the registers.
#if defined(__AVX512F__)
constexpr int ROWS = 6;
#else
constexpr int ROWS = 2;
#endif

// Add to acc the sums of R rows x[r] [inputs] with V vectors of each row of w, [inputs][stride].
template <class W, int R, int V>
inline void add_sums(const W* w, int64_t stride, const float* const* x, int64_t inputs, Vec (&acc)[R][V]) {
  for (int64_t k = 0; k < inputs; k++, w += stride) {
    for (size_t line = 0; line < V * LANES * sizeof(W); line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(w) + AHEAD + line, 0, 2);
    Vec wide[V];
    for (int j = 0; j < V; j++) wide[j] = load(w + j * LANES);
    for (int r = 0; r < R; r++)
      for (int j = 0; j < V; j++) acc[r][j] += wide[j] * x[r][k];
  }
}

// The sums of R rows x[r] [inputs] with one tile of weights, [inputs][TILE].
template <class W, int R>
inline void sums(const W* w, const float* const* x, int64_t inputs, Vec (&acc)[R][VECTORS]) {
  for (auto& row : acc)
    for (auto& v : row) v = Vec{};
  add_sums<W, R, VECTORS>(w, TILE, x, inputs, acc);
}

// Rows of `in` [outputs][inputs] -> [outputs / TILE][inputs][TILE], a tile made of rows of `a` and then of `b`.
template <class W>
void pack(const W* a, const W* b, W* packed, int64_t from_a, int64_t from_b, int64_t rows_a, int64_t rows_b,
          int64_t inputs, int64_t padded, int64_t tiles) {
  constexpr int64_t BLOCK = 64;
  for (int64_t tile = 0; tile < tiles; tile++)
    for (int64_t k0 = 0; k0 < padded; k0 += BLOCK)
      for (int64_t j = 0; j < TILE; j++) {
        const bool of_a = j < from_a;
        const int64_t row = of_a ? tile * from_a + j : tile * from_b + j - from_a;
        const W* source = row < (of_a ? rows_a : rows_b) ? (of_a ? a : b) + row * inputs : nullptr;
        W* target = packed + tile * padded * TILE + j;
        for (int64_t k = k0; k < std::min(padded, k0 + BLOCK); k++)
          target[k * TILE] = source && k < inputs ? source[k] : W{};
      }
}

