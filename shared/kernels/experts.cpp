// Gated feed-forward experts over a few rows each, at the speed at which memory gives their weights.
//
// Weights are read as they are stored (float32, bfloat16, or int8 with a scale per output) and widened in registers;
// all sums are float32. An output is summed over its inputs one after another, in one order for any number of rows,
// and a token's experts are added in ascending order: so a token's result does not depend on the rest of the call.
//
// A pair is a token and one of its experts.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "pool.h"
#include "tiles.h"

namespace {

enum Activation : int { SILU, GELU, GELU_TANH, RELU };

inline Vec each(Vec x, float (*f)(float)) {
  for (int i = 0; i < LANES; i++) x[i] = f(x[i]);
  return x;
}

inline Vec activate(Vec x, int activation) {
  switch (activation) {
    case SILU:
      return x / (exponential(-x) + 1.0f);
    case GELU:
      return x * (each(x * 0.70710678f, [](float v) { return std::erf(v); }) + 1.0f) * 0.5f;
    case GELU_TANH: {
      const Vec inner = (x + x * x * x * 0.044715f) * 0.79788456f;
      return x * (each(inner, [](float v) { return std::tanh(v); }) + 1.0f) * 0.5f;
    }
    default:
      return x > Vec{} ? x : Vec{};
  }
}

template <int R>
inline void rescale(Vec (&acc)[R][VECTORS], const float* scale) {
  if (!scale) return;
  for (int j = 0; j < VECTORS; j++) {
    const Vec s = load(scale + j * LANES);
    for (int r = 0; r < R; r++) acc[r][j] *= s;
  }
}

struct Expert {
  const void* gate_up;           // [inner / HALF][hidden][TILE]
  const float* gate_up_scale;    // [inner / HALF][TILE], or null
  const void* down;              // [outputs / TILE][inner][TILE]
  const float* down_scale;       // [outputs], or null
};

struct Call {
  const Expert* experts;
  int activation;
  int64_t hidden, outputs, inner;  // inner and outputs are padded to whole tiles
  const float* x;                  // [T][hidden]
  float* out;                      // [T][hidden], zeros
  float* h;                        // [P][inner]
  const int64_t* starts;           // [E + 1]: the pairs of each expert, in `pairs`
  const int64_t* pairs;            // [P], sorted by expert
  const int32_t* token;            // [P]
  const float* weight;             // [P]
};

template <class W, int R>
void gate_up_rows(const Call& c, const Expert& e, int64_t tile, int64_t first) {
  const float* x[R];
  for (int r = 0; r < R; r++) x[r] = c.x + c.token[c.pairs[first + r]] * c.hidden;
  Vec acc[R][VECTORS];
  sums<W, R>(static_cast<const W*>(e.gate_up) + tile * c.hidden * TILE, x, c.hidden, acc);
  rescale<R>(acc, e.gate_up_scale ? e.gate_up_scale + tile * TILE : nullptr);
  for (int r = 0; r < R; r++)
    for (int j = 0; j < VECTORS / 2; j++)
      store(c.h + (first + r) * c.inner + tile * HALF + j * LANES,
            activate(acc[r][j], c.activation) * acc[r][j + VECTORS / 2]);
}

template <class W, int R>
void down_rows(const Call& c, const Expert& e, int64_t tile, int64_t first) {
  const float* h[R];
  for (int r = 0; r < R; r++) h[r] = c.h + (first + r) * c.inner;
  Vec acc[R][VECTORS];
  sums<W, R>(static_cast<const W*>(e.down) + tile * c.inner * TILE, h, c.inner, acc);
  rescale<R>(acc, e.down_scale ? e.down_scale + tile * TILE : nullptr);
  for (int r = 0; r < R; r++) {
    const int64_t pair = c.pairs[first + r];
    float* out = c.out + c.token[pair] * c.hidden + tile * TILE;
    const int64_t width = std::min<int64_t>(TILE, c.hidden - tile * TILE);
    if (width == TILE) {
      for (int j = 0; j < VECTORS; j++) store(out + j * LANES, load(out + j * LANES) + acc[r][j] * c.weight[pair]);
    } else {  // the same, with what is beyond the last output
      float padded[TILE] = {};
      std::memcpy(padded, out, width * sizeof(float));
      for (int j = 0; j < VECTORS; j++)
        store(padded + j * LANES, load(padded + j * LANES) + acc[r][j] * c.weight[pair]);
      std::memcpy(out, padded, width * sizeof(float));
    }
  }
}

// All rows of one expert with one tile: ROWS at a time, then the rest.
template <class W, bool DOWN, int R = ROWS>
void all_rows(const Call& c, const Expert& e, int64_t tile, int64_t first, int64_t last) {
  for (; last - first >= R; first += R) {
    if constexpr (DOWN)
      down_rows<W, R>(c, e, tile, first);
    else
      gate_up_rows<W, R>(c, e, tile, first);
  }
  if constexpr (R > 1)
    if (first < last) all_rows<W, DOWN, R - 1>(c, e, tile, first, last);
}

template <class W>
void forward(const Call& c, int64_t num_experts, Pool& pool, int threads) {
  const int64_t inner_tiles = c.inner / HALF, output_tiles = c.outputs / TILE;
  std::vector<int64_t> present;
  for (int64_t e = 0; e < num_experts; e++)
    if (c.starts[e] < c.starts[e + 1]) present.push_back(e);
  pool.run(static_cast<int64_t>(present.size()) * inner_tiles, [&](int64_t item) {
    const int64_t e = present[item / inner_tiles];
    all_rows<W, false>(c, c.experts[e], item % inner_tiles, c.starts[e], c.starts[e + 1]);
  });
  // Each part has outputs of its own, so that the order of a token's experts is that of this loop.
  const int64_t parts = std::min<int64_t>(output_tiles, threads == 1 ? 1 : 4 * threads);
  pool.run(parts, [&](int64_t part) {
    for (int64_t e : present)
      for (int64_t tile = part * output_tiles / parts; tile < (part + 1) * output_tiles / parts; tile++)
        all_rows<W, true>(c, c.experts[e], tile, c.starts[e], c.starts[e + 1]);
  });
}

}  // namespace

extern "C" {

// Lays a matrix [rows][inputs] out in tiles; what is padded becomes zero. in_halves: it is gate_up, whose tiles are half
// gate and half up.
void pack_tiles(int itemsize, int in_halves, const void* weight, void* packed, int64_t rows, int64_t inputs,
              int64_t padded_inputs, int64_t tiles) {
  auto go = [&](auto* w, auto* p) {
    if (in_halves)
      pack(w, w + rows / 2 * inputs, p, HALF, HALF, rows / 2, rows / 2, inputs, padded_inputs, tiles);
    else
      pack(w, w, p, TILE, 0, rows, 0, inputs, padded_inputs, tiles);
  };
  if (itemsize == 4)
    go(static_cast<const uint32_t*>(weight), static_cast<uint32_t*>(packed));
  else if (itemsize == 2)
    go(static_cast<const uint16_t*>(weight), static_cast<uint16_t*>(packed));
  else
    go(static_cast<const uint8_t*>(weight), static_cast<uint8_t*>(packed));
}

// out [T][hidden] = for each token the sum over its pairs of weight * expert(x[token]).
// One call at a time per process. itemsize of the weights: 4 float32, 2 bfloat16, 1 int8.
// Returns 0, or 1 if a pair names a token or an expert that is not there.
int moe_forward(const Expert* experts, int64_t num_experts, int itemsize, int activation, int64_t hidden,
                 int64_t outputs, int64_t inner, const float* x, int64_t tokens, const int32_t* token,
                 const int32_t* expert, const float* weight, int64_t pairs, float* out, int threads) {
  static std::vector<float> h;
  static std::vector<int64_t> starts, order;
  static Pool* pool = nullptr;  // never destroyed: its threads wait until the process ends
  static int pool_threads = 0;
  if (pool_threads != threads) {
    pool = new Pool(threads);
    pool_threads = threads;
  }
  for (int64_t p = 0; p < pairs; p++)
    if (token[p] < 0 || token[p] >= tokens || expert[p] < 0 || expert[p] >= num_experts || !experts[expert[p]].down)
      return 1;
  std::memset(out, 0, sizeof(float) * tokens * hidden);
  if (static_cast<int64_t>(h.size()) < pairs * inner) h.resize(pairs * inner);
  starts.assign(num_experts + 1, 0);
  order.resize(pairs);
  for (int64_t p = 0; p < pairs; p++) starts[expert[p] + 1]++;
  for (int64_t e = 0; e < num_experts; e++) starts[e + 1] += starts[e];
  for (int64_t p = 0; p < pairs; p++) order[starts[expert[p]]++] = p;
  for (int64_t e = num_experts; e > 0; e--) starts[e] = starts[e - 1];
  starts[0] = 0;
  const Call call{experts, activation, hidden,        outputs,      inner, x,
                  out,     h.data(),   starts.data(), order.data(), token, weight};
  if (itemsize == 4)
    forward<float>(call, num_experts, *pool, threads);
  else if (itemsize == 2)
    forward<Bfloat16>(call, num_experts, *pool, threads);
  else
    forward<int8_t>(call, num_experts, *pool, threads);
  return 0;
}
}
