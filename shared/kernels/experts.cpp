// Gated feed-forward experts over a few rows each, at the speed at which memory gives their weights.
//
// Weights are read as they are stored (float32, bfloat16, or int8 with a scale per output) and widened in registers;
// all sums are float32. An output is summed over its inputs one after another, in one order for any number of rows,
// and a token's experts are added in ascending order: so a token's result does not depend on the rest of the call.
//
// Needs GCC or Clang (vector extensions), C++20. Built by shared/kernels/build.py.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
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

typedef float Vec __attribute__((vector_size(64)));
typedef float LooseVec __attribute__((vector_size(64), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef uint32_t UintVec __attribute__((vector_size(64)));
typedef uint16_t ShortVec __attribute__((vector_size(32), aligned(2)));
typedef int8_t ByteVec __attribute__((vector_size(16), aligned(1)));

using Bfloat16 = uint16_t;

inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
#if defined(__AVX512F__)  // what compilers make of the general form below is several times slower
inline Vec load(const Bfloat16* p) {
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
}
inline Vec load(const int8_t* p) {
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(narrow));
}
#else
inline Vec load(const Bfloat16* p) {
  return (Vec)(__builtin_convertvector(*reinterpret_cast<const ShortVec*>(p), UintVec) << 16);
}
inline Vec load(const int8_t* p) {
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const ByteVec*>(p), IntVec), Vec);
}
#endif
inline void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }

// e^x, to 2 units in the last place. Range reduction by powers of two, then the Taylor series on [-ln 2 / 2, ln 2 / 2].
inline Vec exponential(Vec x) {
  const Vec low = Vec{} - 87.0f, high = Vec{} + 88.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec shift = Vec{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (x * 1.44269504f + shift) - shift;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = Vec{} + 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const IntVec power = (__builtin_convertvector(n, IntVec) + 127) << 23;
  return p * (Vec)power;
}

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

// The sums of R rows x[r] [inputs] with one tile of weights, [inputs][TILE].
template <class W, int R>
inline void sums(const W* w, const float* const* x, int64_t inputs, Vec (&acc)[R][VECTORS]) {
  for (auto& row : acc)
    for (auto& v : row) v = Vec{};
  for (int64_t k = 0; k < inputs; k++, w += TILE) {
    for (size_t line = 0; line < TILE * sizeof(W); line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(w) + AHEAD + line, 0, 2);
    Vec wide[VECTORS];
    for (int j = 0; j < VECTORS; j++) wide[j] = load(w + j * LANES);
    for (int r = 0; r < R; r++)
      for (int j = 0; j < VECTORS; j++) acc[r][j] += wide[j] * x[r][k];
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

// Threads that wait in the kernel, not on the processor: their neighbours compute too.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; i++) threads_.emplace_back([this] { work(); });
  }
  // task(0), ..., task(count - 1), in any order, on all threads; returns when all are done.
  void run(int64_t count, const std::function<void(int64_t)>& task) {
    if (threads_.empty() || count == 1) {
      for (int64_t i = 0; i < count; i++) task(i);
      return;
    }
    task_ = &task;
    count_ = count;
    next_ = 0;
    busy_ = static_cast<int>(threads_.size());
    round_++;
    round_.notify_all();
    take();
    for (int busy = busy_; busy; busy = busy_) busy_.wait(busy);
  }

 private:
  void take() {
    for (int64_t i; (i = next_++) < count_;) (*task_)(i);
  }
  void work() {
    for (uint32_t seen = 0;;) {
      round_.wait(seen);
      seen++;
      take();
      if (--busy_ == 0) busy_.notify_one();
    }
  }
  std::vector<std::thread> threads_;  // they are as old as the process
  const std::function<void(int64_t)>* task_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<int> busy_{0};
  std::atomic<uint32_t> round_{0};
};

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

}  // namespace

extern "C" {

// Lays gate_up [2 * inner][hidden] or down [hidden][inner] out as the kernel reads it; what is padded becomes zero.
void moe_pack(int itemsize, int is_down, const void* weight, void* packed, int64_t rows, int64_t inputs,
              int64_t padded_inputs, int64_t tiles) {
  auto go = [&](auto* w, auto* p) {
    if (is_down)
      pack(w, w, p, TILE, 0, rows, 0, inputs, padded_inputs, tiles);
    else
      pack(w, w + rows / 2 * inputs, p, HALF, HALF, rows / 2, rows / 2, inputs, padded_inputs, tiles);
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
