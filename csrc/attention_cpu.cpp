#include "cpu.h"

#include "attention.h"

#if defined(__AVX512BF16__)
namespace megalm {
inline namespace MEGALM_ISA {
namespace {

// Words are pairs of bfloat16 that one product sums: c[m][n] += a[m][2p] b[2p][n] + a[m][2p+1] b[2p+1][n]. The left
// side is read a word at a time, wherever it lies; the right side is packed as [pair][column].
using Word = uint32_t;

constexpr int kBlock = 64;  // queries, and keys, of a block
constexpr int kRows = 4, kVectors = 4;  // of a tile: 16 sums in registers

struct Left {
  const char* data;
  int64_t row, pair;  // bytes from one to the next
};
struct Right {
  const Word* data;
  int64_t pair;  // words from one to the next
};
struct Result {
  float* data;
  int64_t row;
};

template <int rows, int vectors>
void tile(const Left& a, const Right& b, const Result& c, int pairs, bool add) {
  __m512 sums[rows][vectors];
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < vectors; ++n) {
      sums[m][n] = add ? _mm512_loadu_ps(c.data + m * c.row + n * kLanes) : _mm512_setzero_ps();
    }
  }
  for (int p = 0; p < pairs; ++p) {
    __m512i right[vectors];
    for (int n = 0; n < vectors; ++n) right[n] = _mm512_loadu_si512(b.data + p * b.pair + n * kLanes);
    for (int m = 0; m < rows; ++m) {
      int32_t word;
      memcpy(&word, a.data + m * a.row + p * a.pair, sizeof word);
      const __m512i left = _mm512_set1_epi32(word);
      for (int n = 0; n < vectors; ++n) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], (__m512bh)left, (__m512bh)right[n]);
    }
  }
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < vectors; ++n) _mm512_storeu_ps(c.data + m * c.row + n * kLanes, sums[m][n]);
  }
}

template <int vectors>
void tiles(const Left& a, const Right& b, const Result& c, int rows, int pairs, bool add) {
  int m = 0;
  for (; m + kRows <= rows; m += kRows) {
    tile<kRows, vectors>({a.data + m * a.row, a.row, a.pair}, b, {c.data + m * c.row, c.row}, pairs, add);
  }
  for (; m < rows; ++m) {
    tile<1, vectors>({a.data + m * a.row, a.row, a.pair}, b, {c.data + m * c.row, c.row}, pairs, add);
  }
}

// c (rows, columns) = or += a b over `pairs` words; columns are a multiple of kLanes.
void product(const Left& a, const Right& b, const Result& c, int rows, int columns, int pairs, bool add) {
  for (int n = 0; n < columns; n += kVectors * kLanes) {
    const Right right{b.data + n, b.pair};
    const Result result{c.data + n, c.row};
    switch (columns - n < kVectors * kLanes ? (columns - n) / kLanes : kVectors) {
      case 1: tiles<1>(a, right, result, rows, pairs, add); break;
      case 2: tiles<2>(a, right, result, rows, pairs, add); break;
      case 3: tiles<3>(a, right, result, rows, pairs, add); break;
      default: tiles<kVectors>(a, right, result, rows, pairs, add);
    }
  }
}

// Rows of one head, from a position on.
struct RowsOf {
  const bf16* data;
  int64_t stride;

  RowsOf(const Heads& x, int64_t batch, int64_t head, int64_t start)
      : data(x.data + batch * x.strides[0] + start * x.strides[1] + head * x.strides[2]), stride(x.strides[1]) {}
  Left left() const { return {reinterpret_cast<const char*>(data), stride * static_cast<int64_t>(sizeof(bf16)), 4}; }
};

// Word [pair of channels][row] of `count` rows; rows beyond are zero.
void pack_transposed(const RowsOf& x, int count, int width, Word* out) {
  for (int row = 0; row < kBlock; ++row) {
    for (int p = 0; p < width / 2; ++p) {
      Word word = 0;
      if (row < count) memcpy(&word, x.data + row * x.stride + 2 * p, sizeof word);
      out[p * kBlock + row] = word;
    }
  }
}

__m512i halves(const bf16* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }

// Word [pair of rows][channel] of `count` rows; rows beyond are zero.
void pack_pairs(const RowsOf& x, int count, int width, Word* out) {
  for (int row = 0; row < kBlock; row += 2) {
    for (int i = 0; i < width; i += kLanes) {
      const bf16* p = x.data + row * x.stride + i;
      const __m512i low = row < count ? halves(p) : _mm512_setzero_si512();
      const __m512i high = row + 1 < count ? halves(p + x.stride) : _mm512_setzero_si512();
      _mm512_storeu_si512(out + row / 2 * width + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

__m512i rounded(Vec x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)); }
void store_pair(Word* out, Vec low, Vec high) {
  _mm512_storeu_si512(out, _mm512_or_si512(rounded(low), _mm512_slli_epi32(rounded(high), 16)));
}

// Which of kLanes queries from `first` on see the key `key`.
VecInt seeing(int first, int key) {
  VecInt query;
  for (int i = 0; i < kLanes; ++i) query[i] = first + i;
  return query >= key;
}

int rows_at(int64_t start, int64_t length) {
  return static_cast<int>(length - start < kBlock ? length - start : kBlock);
}

// Memory of a task, in cache lines.
struct Scratch {
  float* data;
  int64_t used = 0;

  explicit Scratch(int64_t floats) : data(new float[floats + kLanes]) {
    used = (64 - reinterpret_cast<uintptr_t>(data) % 64) % 64 / sizeof(float);
  }
  ~Scratch() { delete[] data; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* floats(int64_t size) {
    float* found = data + used;
    used += size;
    return found;
  }
  Word* words(int64_t size) { return reinterpret_cast<Word*>(floats(size)); }
  bf16* halves(int64_t size) { return reinterpret_cast<bf16*>(floats(size / 2)); }
};

// Softmax of the running kind (Milakov and Gimelshein 2018, arXiv:1805.02867): scores are (keys, queries), so that its
// maxima and sums run over vectors of queries. Writes the exponentials as words [pair of keys][query].
void exponentials(const float* scores, int keys, int diagonal, float scale, float* largest, float* total, float* shrink,
                  Word* out) {
  for (int g = 0; g < kBlock; g += kLanes) {
    const auto score = [&](int key) {
      const Vec x = load(scores + key * kBlock + g) * scale;
      return key > g + diagonal ? select(seeing(g + diagonal, key), x, splat(-INFINITY)) : x;
    };
    const Vec before = load(largest + g);
    Vec high = before, sum{};
    for (int key = 0; key < keys; ++key) high = max_(score(key), high);
    const Vec base = select(high == -INFINITY, Vec{}, high);  // nothing to see yet, and all exponentials 0
    const Vec factor = exp_(before - base);
    for (int key = 0; key < keys; key += 2) {
      const Vec low = exp_(score(key) - base), up = key + 1 < keys ? exp_(score(key + 1) - base) : Vec{};
      sum += low + up;
      store_pair(out + key / 2 * kBlock + g, low, up);
    }
    store(largest + g, high);
    store(total + g, load(total + g) * factor + sum);
    store(shrink + g, factor);
  }
}

int64_t forward_floats(int64_t width) { return kBlock * (width / 2 + kBlock + kBlock / 2 + width / 2 + width + 3); }

// One block of queries of one head.
void forward_block(const Attention& a, int64_t b, int64_t h, int64_t first, Scratch& scratch) {
  const int width = static_cast<int>(a.width), queries = rows_at(first, a.length);
  const int64_t group = h / (a.heads / a.groups);
  Word *q = scratch.words(kBlock * width / 2), *p = scratch.words(kBlock * kBlock / 2);
  Word* v = scratch.words(kBlock * width / 2);
  float *scores = scratch.floats(kBlock * kBlock), *sums = scratch.floats(kBlock * width);
  float *largest = scratch.floats(kBlock), *total = scratch.floats(kBlock), *shrink = scratch.floats(kBlock);
  for (int i = 0; i < kBlock; ++i) largest[i] = -INFINITY, total[i] = 0.0f;
  memset(sums, 0, kBlock * width * sizeof(float));
  pack_transposed(RowsOf(a.q, b, h, first), queries, width, q);
  for (int64_t at = 0; at <= first; at += kBlock) {
    const int keys = rows_at(at, a.length);
    product(RowsOf(a.k, b, group, at).left(), {q, kBlock}, {scores, kBlock}, keys, kBlock, width / 2, false);
    exponentials(scores, keys, static_cast<int>(first - at), a.scale, largest, total, shrink, p);
    for (int row = 0; row < queries && at > 0; ++row) {
      for (int i = 0; i < width; i += kLanes) store(sums + row * width + i, load(sums + row * width + i) * shrink[row]);
    }
    pack_pairs(RowsOf(a.v, b, group, at), keys, width, v);
    product({reinterpret_cast<const char*>(p), sizeof(Word), kBlock * sizeof(Word)}, {v, width}, {sums, width}, queries,
            width, (keys + 1) / 2, true);
  }
  for (int row = 0; row < queries; ++row) {
    bf16* y = a.y + ((b * a.length + first + row) * a.heads + h) * width;
    const float inverse = 1.0f / total[row];
    for (int i = 0; i < width; i += kLanes) store(y + i, load(sums + row * width + i) * inverse);
    a.logsumexp[(b * a.heads + h) * a.length + first + row] = largest[row] + logf(total[row]);
  }
}

// What the backward of one head needs of its queries, packed for both kinds of products: q and the gradient, by block.
struct Packed {
  Word *q, *q_pairs, *grad, *grad_pairs;
  float *logsumexp, *delta;  // delta: sum of y grad over the channels

  static int64_t floats(int64_t padded, int64_t width) { return padded * (2 * width + 2); }
  Packed(Scratch& scratch, int64_t padded, int64_t width)
      : q(scratch.words(padded * width / 2)),
        q_pairs(scratch.words(padded * width / 2)),
        grad(scratch.words(padded * width / 2)),
        grad_pairs(scratch.words(padded * width / 2)),
        logsumexp(scratch.floats(padded)),
        delta(scratch.floats(padded)) {}

  void fill(const AttentionBackward& a, int64_t b, int64_t h) {
    const Attention& f = a.forward;
    const int width = static_cast<int>(f.width);
    for (int64_t first = 0; first < f.length; first += kBlock) {
      const int rows = rows_at(first, f.length);
      const int64_t place = first * width / 2;
      const RowsOf q_rows(f.q, b, h, first), grad_rows(a.grad, b, h, first);
      pack_transposed(q_rows, rows, width, q + place);
      pack_pairs(q_rows, rows, width, q_pairs + place);
      pack_transposed(grad_rows, rows, width, grad + place);
      pack_pairs(grad_rows, rows, width, grad_pairs + place);
      for (int row = 0; row < kBlock; ++row) {
        Vec dot{};
        const bf16* y = f.y + ((b * f.length + first + row) * f.heads + h) * width;
        for (int i = 0; i < width && row < rows; i += kLanes) {
          dot += load(y + i) * load(grad_rows.data + row * grad_rows.stride + i);
        }
        delta[first + row] = sum(dot);
        logsumexp[first + row] = row < rows ? f.logsumexp[(b * f.heads + h) * f.length + first + row] : 0.0f;
      }
    }
  }
};

// Probabilities and gradients of the scores of a block, both (keys, queries); the latter as words [pair of keys][query]
// too.
struct Scores {
  float *scores, *grads;
  bf16 *p, *ds;
  Word* ds_pairs;

  static constexpr int64_t kFloats = 4 * kBlock * kBlock - kBlock * kBlock / 2;
  explicit Scores(Scratch& scratch)
      : scores(scratch.floats(kBlock * kBlock)),
        grads(scratch.floats(kBlock * kBlock)),
        p(scratch.halves(kBlock * kBlock)),
        ds(scratch.halves(kBlock * kBlock)),
        ds_pairs(scratch.words(kBlock * kBlock / 2)) {}

  void compute(const float* logsumexp, const float* delta, int keys, int diagonal, float scale) {
    for (int g = 0; g < kBlock; g += kLanes) {
      const Vec lse = load(logsumexp + g), sums = load(delta + g);
      for (int key = 0; key < keys; key += 2) {
        Vec both[2] = {};
        for (int k = key; k < key + 2 && k < keys; ++k) {
          Vec prob = exp_(load(scores + k * kBlock + g) * scale - lse);
          if (k > g + diagonal) prob = select(seeing(g + diagonal, k), prob, Vec{});
          both[k - key] = prob * (load(grads + k * kBlock + g) - sums) * scale;
          store(p + k * kBlock + g, prob);
          store(ds + k * kBlock + g, both[k - key]);
        }
        store_pair(ds_pairs + key / 2 * kBlock + g, both[0], both[1]);
      }
    }
  }
};

// Gradients of one head, in float32: rows of `width`, up to whole blocks.
struct Gradients {
  float *q, *k, *v;

  static int64_t floats(int64_t padded, int64_t width) { return 3 * padded * width; }
  Gradients(Scratch& scratch, int64_t padded, int64_t width)
      : q(scratch.floats(padded * width)), k(scratch.floats(padded * width)), v(scratch.floats(padded * width)) {}
};

// Adds what the keys from `at` on and all queries that see them give.
void backward_block(const Attention& a, int64_t b, int64_t group, int64_t at, const Packed& packed,
                    const Gradients& grads, Scores& scores, Word* k_pairs) {
  const int width = static_cast<int>(a.width), keys = rows_at(at, a.length);
  const RowsOf k(a.k, b, group, at), v(a.v, b, group, at);
  const auto rows = [](const bf16* x) {
    return Left{reinterpret_cast<const char*>(x), kBlock * sizeof(bf16), sizeof(Word)};
  };
  const Left ds_columns{reinterpret_cast<const char*>(scores.ds_pairs), sizeof(Word), kBlock * sizeof(Word)};
  pack_pairs(k, keys, width, k_pairs);
  for (int64_t first = at; first < a.length; first += kBlock) {
    const int queries = rows_at(first, a.length);
    const int64_t place = first * width / 2;
    product(k.left(), {packed.q + place, kBlock}, {scores.scores, kBlock}, keys, kBlock, width / 2, false);
    product(v.left(), {packed.grad + place, kBlock}, {scores.grads, kBlock}, keys, kBlock, width / 2, false);
    scores.compute(packed.logsumexp + first, packed.delta + first, keys, static_cast<int>(first - at), a.scale);
    product(rows(scores.p), {packed.grad_pairs + place, width}, {grads.v + at * width, width}, keys, width, kBlock / 2,
            true);
    product(rows(scores.ds), {packed.q_pairs + place, width}, {grads.k + at * width, width}, keys, width, kBlock / 2,
            true);
    product(ds_columns, {k_pairs, width}, {grads.q + first * width, width}, queries, width, (keys + 1) / 2, true);
  }
}

// One head of a contiguous (batch, length, heads, width).
void store_head(const float* x, bf16* out, int64_t b, int64_t h, int64_t length, int64_t heads, int64_t width) {
  for (int64_t t = 0; t < length; ++t) {
    bf16* row = out + ((b * length + t) * heads + h) * width;
    for (int64_t i = 0; i < width; i += kLanes) store(row + i, load(x + t * width + i));
  }
}

// The heads of one group of one sample: they share the gradients of k and v.
void backward_group(const AttentionBackward& a, int64_t b, int64_t group) {
  const Attention& f = a.forward;
  const int64_t padded = (f.length + kBlock - 1) / kBlock * kBlock, share = f.heads / f.groups;
  const int64_t pairs = kBlock * f.width / 2, size = padded * f.width * static_cast<int64_t>(sizeof(float));
  Scratch scratch(Packed::floats(padded, f.width) + Scores::kFloats + Gradients::floats(padded, f.width) + pairs);
  Packed packed(scratch, padded, f.width);
  Scores scores(scratch);
  const Gradients grads(scratch, padded, f.width);
  Word* k_pairs = scratch.words(pairs);
  memset(grads.k, 0, size);
  memset(grads.v, 0, size);
  for (int64_t h = group * share; h < (group + 1) * share; ++h) {
    packed.fill(a, b, h);
    memset(grads.q, 0, size);
    for (int64_t at = 0; at < f.length; at += kBlock) {
      backward_block(f, b, group, at, packed, grads, scores, k_pairs);
    }
    store_head(grads.q, a.grad_q, b, h, f.length, f.heads, f.width);
  }
  store_head(grads.k, a.grad_k, b, group, f.length, f.groups, f.width);
  store_head(grads.v, a.grad_v, b, group, f.length, f.groups, f.width);
}

}  // namespace

void attention_forward(const Attention& a) {
  const int64_t blocks = (a.length + kBlock - 1) / kBlock;
  parallel_for(a.batch * a.heads * blocks, 1, [&](int64_t start, int64_t stop) {
    Scratch scratch(forward_floats(a.width));
    const int64_t aligned = scratch.used;
    for (int64_t task = start; task < stop; ++task) {
      scratch.used = aligned;
      forward_block(a, task / blocks / a.heads, task / blocks % a.heads, task % blocks * kBlock, scratch);
    }
  });
}

void attention_backward(const AttentionBackward& a) {
  const int64_t groups = a.forward.groups;
  parallel_for(a.forward.batch * groups, 1, [&](int64_t start, int64_t stop) {
    for (int64_t task = start; task < stop; ++task) backward_group(a, task / groups, task % groups);
  });
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
#endif
