// The dense part of a layer for all rows of a step: norms, projections, rotation, attention over the KV cache, gate.
//
// Weights are read as they are stored (float32 or bfloat16) and widened in registers; everything else is float32. Each
// number is computed in one order, whatever the rest of the call: an output is summed over its inputs one after
// another, a row attends to its positions tile by tile, in order (online softmax: FlashAttention, arXiv 2205.14135).

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "pool.h"
#include "tiles.h"

namespace {

constexpr float NOTHING = -1e30f;              // below any score
constexpr int64_t MOST_DIM = 512;              // of a head
constexpr int64_t ROWS_TOGETHER = 96;          // rows that stay in the cache while weights pass by
constexpr int64_t QUERIES_TOGETHER = 48;       // of one sequence and head: a piece of work for one thread
constexpr double WORTH_WAKING = 50e3;          // nanoseconds of work for each thread, from which they are woken
constexpr double PER_NANOSECOND = 50;          // multiplications
constexpr double BYTES_PER_NANOSECOND = 10;

struct Matrix {
  const void* weights;  // [outputs / TILE][inputs][TILE]; what pads the last tile is zero
  const float* bias;    // [outputs], or null
  int64_t inputs, outputs;
};

struct Shape {
  int64_t hidden, heads, kv_heads, dim, experts, top_k;
  int32_t itemsize;        // of the weights: 4 float32, 2 bfloat16
  int32_t norm_of_heads;   // of queries and keys: 0 none, 1 each head, 2 all heads together
  int32_t normalize;       // the weights of a token's experts add up to 1
  int32_t round_weights;   // to bfloat16
  float epsilon, clip;     // clip: 0 for none
};

struct Layer {
  const float *input_norm, *query_norm, *key_norm, *post_norm;
  Matrix qkv, output, gate;
  int64_t window;  // positions that a row sees, itself included; 0: all
};

struct Cache {
  float* keys;    // [tiles][kv_heads][dim][TILE]
  float* values;  // [tiles][kv_heads][TILE][padded dim]
};

struct Sequence {
  int64_t row, count, start;  // rows [row, row + count) are its positions from `start` on
  const int32_t* tiles;       // of TILE positions each
};

struct Step {
  int64_t rows, sequences;
  const Sequence* sequence;
  const int64_t* slots;    // [rows]: tile * TILE + place in it, where a row's key and value go
  const float *cos, *sin;  // [rows][dim]
};

inline int64_t whole(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

inline float rounded(float x) {  // to bfloat16, to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = x != x ? 0x7fc00000u : (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The threads of this process, for one call at a time: a call that finds them busy does its work alone.
class Crew {
 public:
  Crew(int threads, double nanoseconds) {
    int wanted = 1;  // doubled, so that there are few pools
    while (wanted < threads && nanoseconds >= 2 * wanted * WORTH_WAKING) wanted = std::min(2 * wanted, threads);
    if (wanted > 1 && !busy().exchange(true)) pool_ = &pool(wanted);
  }
  ~Crew() { release(); }
  Crew(const Crew&) = delete;
  void release() {
    if (pool_) busy() = false;
    pool_ = nullptr;
  }
  template <class Task>
  void run(int64_t count, const Task& task) {
    if (pool_)
      pool_->run(count, task);
    else
      for (int64_t i = 0; i < count; i++) task(i);
  }
  bool alone() const { return !pool_; }

 private:
  static std::atomic<bool>& busy() {
    static std::atomic<bool> flag{false};
    return flag;
  }
  static Pool& pool(int threads) {
    static std::vector<Pool*> pools;  // never destroyed: their threads wait until the process ends
    if (static_cast<int>(pools.size()) <= threads) pools.resize(threads + 1);
    if (!pools[threads]) pools[threads] = new Pool(threads);
    return *pools[threads];
  }
  Pool* pool_ = nullptr;
};

// -- products ---------------------------------------------------------------------------------------------------------

enum Into { SET, ADD };

template <class W, int R>
void product_rows(const Matrix& m, int64_t tile, const float* x, float* out, int64_t stride, Into into) {
  const float* rows[R];
  for (int r = 0; r < R; r++) rows[r] = x + r * m.inputs;
  Vec acc[R][VECTORS];
  sums<W, R>(static_cast<const W*>(m.weights) + tile * m.inputs * TILE, rows, m.inputs, acc);
  const int64_t width = std::min<int64_t>(TILE, m.outputs - tile * TILE);
  for (int r = 0; r < R; r++) {
    float* y = out + r * stride + tile * TILE;
    float edge[TILE] = {}, bias[TILE] = {};
    if (width < TILE && into == ADD) std::memcpy(edge, y, width * sizeof(float));
    if (m.bias) std::memcpy(bias, m.bias + tile * TILE, width * sizeof(float));
    float* target = width < TILE ? edge : y;
    for (int j = 0; j < VECTORS; j++) {
      Vec v = acc[r][j];
      if (m.bias) v += load(bias + j * LANES);
      if (into == ADD) v += load(target + j * LANES);
      store(target + j * LANES, v);
    }
    if (width < TILE) std::memcpy(y, edge, width * sizeof(float));
  }
}

template <class W, int R = ROWS>
void product_tile(const Matrix& m, int64_t tile, const float* x, int64_t rows, float* out, int64_t stride, Into into) {
  for (; rows >= R; rows -= R, x += R * m.inputs, out += R * stride) product_rows<W, R>(m, tile, x, out, stride, into);
  if constexpr (R > 1)
    if (rows) product_tile<W, R - 1>(m, tile, x, rows, out, stride, into);
}

double nanoseconds(const Matrix& m, int64_t rows, int itemsize) {
  const double size = static_cast<double>(m.inputs) * m.outputs;
  return std::max(size * rows / PER_NANOSECOND, size * itemsize / BYTES_PER_NANOSECOND);
}

// out [rows][stride] = or += x [rows][inputs] times the matrix, plus its bias.
void product(const Matrix& m, int itemsize, const float* x, int64_t rows, float* out, int64_t stride, Into into,
             int threads) {
  const int64_t tiles = whole(m.outputs, TILE) / TILE, pieces = whole(rows, ROWS_TOGETHER) / ROWS_TOGETHER;
  Crew crew(threads, nanoseconds(m, rows, itemsize));
  crew.run(tiles * pieces, [&](int64_t item) {
    const int64_t tile = item % tiles, first = item / tiles * ROWS_TOGETHER;
    const int64_t count = std::min(ROWS_TOGETHER, rows - first);
    const float* from = x + first * m.inputs;
    float* to = out + first * stride;
    if (itemsize == 4)
      product_tile<float>(m, tile, from, count, to, stride, into);
    else
      product_tile<Bfloat16>(m, tile, from, count, to, stride, into);
  });
}

// -- row by row -------------------------------------------------------------------------------------------------------

// out [n] = weight [n] * x [n] / sqrt(mean of squares + epsilon): RMSNorm, arXiv 1910.07467. out may be x.
void normed(const float* x, const float* weight, int64_t n, float epsilon, float* out) {
  Vec squares{};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const Vec v = load(x + i);
    squares += v * v;
  }
  float total = sum(squares);
  for (; i < n; i++) total += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(total / static_cast<float>(n) + epsilon);
  for (i = 0; i + LANES <= n; i += LANES) store(out + i, load(weight + i) * (load(x + i) * scale));
  for (; i < n; i++) out[i] = weight[i] * (x[i] * scale);
}

// out [dim] = x [dim] rotated (RoFormer, arXiv 2104.09864; halves, not pairs, are turned together), times scale.
void rotated(const float* x, const float* cos, const float* sin, int64_t dim, float scale, float* out) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i++) {
    const float low = x[i] * cos[i] - x[i + half] * sin[i];
    const float high = x[i + half] * cos[i + half] + x[i] * sin[i + half];
    out[i] = low * scale;
    out[i + half] = high * scale;
  }
}

// One row's queries, rotated and scaled, into `query` [heads][dim]; its key and value into the cache.
void prepare(const Shape& s, const Layer& l, const Cache& c, const Step& step, int64_t row, float* qkv, float* query) {
  const int64_t q_size = s.heads * s.dim, kv_size = s.kv_heads * s.dim, wide = whole(s.dim, LANES);
  float *q = qkv, *k = qkv + q_size, *v = k + kv_size;
  if (s.norm_of_heads == 2) {
    normed(q, l.query_norm, q_size, s.epsilon, q);
    normed(k, l.key_norm, kv_size, s.epsilon, k);
  }
  if (s.clip > 0)
    for (int64_t i = 0; i < q_size + 2 * kv_size; i++) qkv[i] = std::min(std::max(qkv[i], -s.clip), s.clip);
  if (s.norm_of_heads == 1) {
    for (int64_t h = 0; h < s.heads; h++) normed(q + h * s.dim, l.query_norm, s.dim, s.epsilon, q + h * s.dim);
    for (int64_t h = 0; h < s.kv_heads; h++) normed(k + h * s.dim, l.key_norm, s.dim, s.epsilon, k + h * s.dim);
  }
  const float *cos = step.cos + row * s.dim, *sin = step.sin + row * s.dim;
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.dim));
  for (int64_t h = 0; h < s.heads; h++) rotated(q + h * s.dim, cos, sin, s.dim, scale, query + h * s.dim);
  const int64_t tile = step.slots[row] / TILE, place = step.slots[row] % TILE;
  float turned[MOST_DIM];
  for (int64_t h = 0; h < s.kv_heads; h++) {
    rotated(k + h * s.dim, cos, sin, s.dim, 1.0f, turned);
    float* keys = c.keys + (tile * s.kv_heads + h) * s.dim * TILE + place;
    for (int64_t i = 0; i < s.dim; i++) keys[i * TILE] = turned[i];
    float* values = c.values + ((tile * s.kv_heads + h) * TILE + place) * wide;
    std::memcpy(values, v + h * s.dim, s.dim * sizeof(float));
  }
}

// -- attention --------------------------------------------------------------------------------------------------------

template <int R, int V>
inline void add_values(const float* values, int64_t stride, const float (&p)[R][TILE], int64_t positions,
                       const float (&keep)[R], float (&out)[R][MOST_DIM], int64_t at) {
  const float* weights[R];
  Vec acc[R][V];
  for (int r = 0; r < R; r++) {
    weights[r] = p[r];
    for (int j = 0; j < V; j++) acc[r][j] = load(out[r] + at + j * LANES) * keep[r];
  }
  add_sums<float, R, V>(values + at, stride, weights, positions, acc);
  for (int r = 0; r < R; r++)
    for (int j = 0; j < V; j++) store(out[r] + at + j * LANES, acc[r][j]);
}

// R queries of one sequence and one head of keys; those from `first` on, counted position by position and, in a
// position, over the heads that share these keys.
template <int R>
void attend_rows(const Shape& s, const Layer& l, const Cache& c, const Sequence& q, const float* query,
                 int64_t kv_head, int64_t first, float* out) {
  const int64_t group = s.heads / s.kv_heads, wide = whole(s.dim, LANES);
  const float* x[R];
  int64_t place[R], at[R];
  float most[R], keep[R], sum_of[R], y[R][MOST_DIM], p[R][TILE];
  int64_t begin = INT64_MAX, end = 0;
  for (int r = 0; r < R; r++) {
    const int64_t row = (first + r) / group;
    place[r] = ((q.row + row) * s.heads + kv_head * group + (first + r) % group) * s.dim;
    x[r] = query + place[r];
    at[r] = q.start + row;
    end = std::max(end, at[r] + 1);
    begin = std::min(begin, l.window ? std::max<int64_t>(0, at[r] - l.window + 1) : 0);
    most[r] = NOTHING;
    sum_of[r] = 0;
    std::memset(y[r], 0, wide * sizeof(float));
  }
  IntVec lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  for (int64_t tile = begin / TILE; tile * TILE < end; tile++) {
    const int64_t block = q.tiles[tile] * s.kv_heads + kv_head, base = tile * TILE;
    Vec score[R][VECTORS];
    sums<float, R>(c.keys + block * s.dim * TILE, x, s.dim, score);
    for (int r = 0; r < R; r++) {
      const int64_t last = at[r] - base, before = l.window ? last - l.window : -1;  // lanes in (before, last] are seen
      const Vec nothing = Vec{} + NOTHING;
      if (last < TILE - 1 || before >= 0) {
        const int low = static_cast<int>(std::clamp<int64_t>(before, -1, TILE));
        const int high = static_cast<int>(std::clamp<int64_t>(last, -1, TILE));
        for (int j = 0; j < VECTORS; j++) {
          const IntVec here = lane + j * LANES;
          score[r][j] = (here > low) & (here <= high) ? score[r][j] : nothing;
        }
      }
      Vec top = score[r][0];
      for (int j = 1; j < VECTORS; j++) top = score[r][j] > top ? score[r][j] : top;
      const float now = std::max(most[r], largest(top));
      keep[r] = exponential(Vec{} + (most[r] - now))[0];
      most[r] = now;
      Vec total{};
      for (int j = 0; j < VECTORS; j++) {
        const Vec e = score[r][j] > nothing ? exponential(score[r][j] - now) : Vec{};
        total += e;
        store(p[r] + j * LANES, e);
      }
      sum_of[r] = sum_of[r] * keep[r] + sum(total);
    }
    const float* values = c.values + block * TILE * wide;
    const int64_t positions = std::min<int64_t>(TILE, end - base);
    int64_t d = 0;
    for (; d + 4 * LANES <= wide; d += 4 * LANES) add_values<R, 4>(values, wide, p, positions, keep, y, d);
    if (wide - d == 3 * LANES) add_values<R, 3>(values, wide, p, positions, keep, y, d);
    if (wide - d == 2 * LANES) add_values<R, 2>(values, wide, p, positions, keep, y, d);
    if (wide - d == LANES) add_values<R, 1>(values, wide, p, positions, keep, y, d);
  }
  for (int r = 0; r < R; r++)
    for (int64_t i = 0; i < s.dim; i++) out[place[r] + i] = y[r][i] / sum_of[r];
}

template <int R = ROWS>
void attend(const Shape& s, const Layer& l, const Cache& c, const Sequence& q, const float* query, int64_t kv_head,
            int64_t first, int64_t last, float* out) {
  for (; last - first >= R; first += R) attend_rows<R>(s, l, c, q, query, kv_head, first, out);
  if constexpr (R > 1)
    if (first < last) attend<R - 1>(s, l, c, q, query, kv_head, first, last, out);
}

// -- gate -------------------------------------------------------------------------------------------------------------

// Softmax of `logits` [experts], which becomes their probabilities, and its top_k, the largest first.
void choose(const Shape& s, float* logits, int64_t* index, float* weight) {
  const int64_t padded = whole(s.experts, LANES);
  std::fill(logits + s.experts, logits + padded, NOTHING);
  Vec top = Vec{} + NOTHING;
  for (int64_t i = 0; i < padded; i += LANES) top = load(logits + i) > top ? load(logits + i) : top;
  const float most = largest(top);
  Vec total{};
  for (int64_t i = 0; i < padded; i += LANES) {
    const Vec e = exponential(load(logits + i) - most);
    total += e;
    store(logits + i, e);
  }
  float all = sum(total), chosen = 0;
  for (int64_t k = 0; k < s.top_k; k++) {
    int64_t best = -1;
    for (int64_t i = 0; i < s.experts; i++)
      if (logits[i] >= 0 && (best < 0 || logits[i] > logits[best])) best = i;
    for (int64_t i = 0; best < 0; i++)  // what is left is no number
      if (logits[i] != -1) best = i;
    index[k] = best;
    weight[k] = logits[best] / all;
    chosen += weight[k];
    logits[best] = -1;
  }
  for (int64_t k = 0; k < s.top_k; k++) {
    if (s.normalize) weight[k] /= chosen;
    if (s.round_weights) weight[k] = rounded(weight[k]);
  }
}

// Each call's own scratch memory, kept for the thread's next call.
float* scratch(int which, int64_t size) {
  static thread_local std::vector<float> kept[4];
  if (static_cast<int64_t>(kept[which].size()) < size) kept[which].resize(size);
  return kept[which].data();
}

void in_pieces(Crew& crew, int64_t rows, const std::function<void(int64_t)>& row) {
  const int64_t each = crew.alone() ? rows : 16;
  crew.run(whole(rows, each) / each, [&](int64_t piece) {
    for (int64_t r = piece * each; r < std::min(rows, (piece + 1) * each); r++) row(r);
  });
}

}  // namespace

extern "C" {

// out [rows][outputs] = x [rows][inputs] times the matrix, plus its bias.
void dense_product(const Matrix* m, int itemsize, const float* x, int64_t rows, float* out, int threads) {
  product(*m, itemsize, x, rows, out, m->outputs, SET, threads);
}

// hidden [rows][hidden] += the layer's attention; writes the rows' keys and values to the cache.
void dense_attention(const Shape* shape, const Layer* layer, const Step* step, float* keys, float* values,
                     float* hidden, int threads) {
  const Shape& s = *shape;
  const Layer& l = *layer;
  const Cache c{keys, values};
  const int64_t rows = step->rows, q_size = s.heads * s.dim, all = q_size + 2 * s.kv_heads * s.dim;
  float *x = scratch(0, rows * std::max(s.hidden, q_size)), *qkv = scratch(1, rows * all);
  float* query = scratch(2, rows * q_size);
  {
    Crew crew(threads, static_cast<double>(rows) * s.hidden);
    in_pieces(crew, rows, [&](int64_t r) {
      normed(hidden + r * s.hidden, l.input_norm, s.hidden, s.epsilon, x + r * s.hidden);
    });
  }
  product(l.qkv, s.itemsize, x, rows, qkv, all, SET, threads);
  const int64_t group = s.heads / s.kv_heads;
  struct Item {
    const Sequence* sequence;
    int64_t kv_head, first, last;
  };
  static thread_local std::vector<Item> items;
  items.clear();
  double seen = 0;
  for (int64_t i = 0; i < step->sequences; i++) {
    const Sequence& q = step->sequence[i];
    const int64_t queries = q.count * group;
    const int64_t context = q.start + q.count;
    seen += static_cast<double>(queries) * (l.window ? std::min(context, l.window) : context);
    for (int64_t h = 0; h < s.kv_heads; h++)
      for (int64_t first = 0; first < queries; first += QUERIES_TOGETHER)
        items.push_back({&q, h, first, std::min(queries, first + QUERIES_TOGETHER)});
  }
  Crew crew(threads, 2 * seen * s.kv_heads * s.dim / 20);
  in_pieces(crew, rows, [&](int64_t r) { prepare(s, l, c, *step, r, qkv + r * all, query + r * q_size); });
  const Item* item = items.data();
  crew.run(static_cast<int64_t>(items.size()), [&](int64_t i) {
    attend(s, l, c, *item[i].sequence, query, item[i].kv_head, item[i].first, item[i].last, x);
  });
  crew.release();
  product(l.output, s.itemsize, x, rows, hidden, s.hidden, ADD, threads);
}

// The top_k experts of normed [rows][hidden] (float32, or bfloat16 where that is the weights' itemsize).
void dense_gate(const Shape* shape, const Layer* layer, const void* normed_rows, int64_t rows, int64_t* index,
                float* weight, int threads) {
  const Shape& s = *shape;
  const float* x = static_cast<const float*>(normed_rows);
  if (s.itemsize == 2) {
    float* wide = scratch(0, rows * s.hidden);
    const auto* narrow = static_cast<const Bfloat16*>(normed_rows);
    for (int64_t i = 0; i < rows * s.hidden; i++) {
      const uint32_t bits = static_cast<uint32_t>(narrow[i]) << 16;
      std::memcpy(wide + i, &bits, 4);
    }
    x = wide;
  }
  const int64_t stride = whole(s.experts, LANES);
  float* logits = scratch(1, rows * stride);
  product(layer->gate, s.itemsize, x, rows, logits, stride, SET, threads);
  for (int64_t r = 0; r < rows; r++) choose(s, logits + r * stride, index + r * s.top_k, weight + r * s.top_k);
}

// hidden [rows][hidden], normed as the experts get it, in the dtype of the weights; and its top_k experts.
void dense_route(const Shape* shape, const Layer* layer, const float* hidden, int64_t rows, void* normed_rows,
                 int64_t* index, float* weight, int threads) {
  const Shape& s = *shape;
  for (int64_t r = 0; r < rows; r++) {
    if (s.itemsize == 4) {
      normed(hidden + r * s.hidden, layer->post_norm, s.hidden, s.epsilon,
             static_cast<float*>(normed_rows) + r * s.hidden);
      continue;
    }
    float* one = scratch(2, s.hidden);
    normed(hidden + r * s.hidden, layer->post_norm, s.hidden, s.epsilon, one);
    auto* out = static_cast<Bfloat16*>(normed_rows) + r * s.hidden;
    for (int64_t i = 0; i < s.hidden; i++) {
      uint32_t bits;
      const float value = rounded(one[i]);
      std::memcpy(&bits, &value, 4);
      out[i] = static_cast<Bfloat16>(bits >> 16);
    }
  }
  dense_gate(shape, layer, normed_rows, rows, index, weight, threads);
}
}
