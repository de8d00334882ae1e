// A vector of floats as wide as the instruction set that this copy is compiled for, in the compiler's vector extension.
#pragma once
#include "common.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace megalm {
inline namespace MEGALM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecInt __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecUint __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * kLanes)));

MEGALM_HD Vec splat(float x) { return x - Vec{}; }
MEGALM_HD Vec select(VecInt condition, Vec yes, Vec no) { return condition ? yes : no; }
MEGALM_HD Vec max_(Vec a, Vec b) { return a > b ? a : b; }
MEGALM_HD Vec abs_(Vec x) { return (Vec)((VecInt)x & 0x7fffffff); }
MEGALM_HD Vec sqrt_(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = sqrtf(x[i]);
  return x;
#endif
}

MEGALM_HD float sum(Vec x) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}
MEGALM_HD float max_lane(Vec x) {
  float largest = x[0];
  for (int i = 1; i < kLanes; ++i) largest = max_(largest, x[i]);
  return largest;
}

// 1 / x to 1e-7 relative.
MEGALM_HD Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  // 14 bits, doubled by a step of Newton's where x has a reciprocal that is not tiny: a division takes three times as long
  const __m512 r = _mm512_rcp14_ps((__m512)x), error = _mm512_fnmadd_ps((__m512)x, r, _mm512_set1_ps(1.0f));
  return (Vec)_mm512_mask_fmadd_ps(r, _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(8e37f), _CMP_LT_OQ), error, r);
#else
  return 1.0f / x;
#endif
}

// e^r to 1e-7 relative for |r| <= ln 2 / 2 (Cephes expf).
MEGALM_HD Vec exp_near_zero(Vec r) {
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r + 1.0f;
}

// e^x: x = n ln 2 + r, e^r scaled by 2^n.
MEGALM_HD Vec exp_(Vec x) {
#if defined(__AVX512F__)
  // the order of the operands lets NaN through; the scaling gives 0 and infinity at the ends
  const Vec inside = (Vec)_mm512_max_ps(_mm512_set1_ps(-104.0f), _mm512_min_ps(_mm512_set1_ps(89.0f), (__m512)x));
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)(inside * 1.44269504f), _MM_FROUND_TO_NEAREST_INT);
  const Vec p = exp_near_zero(inside - n * 0.693359375f + n * 2.12194440e-4f);
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const Vec low = splat(-86.6f), high = splat(88.72f);
  const Vec inside = x > high ? high : (x < low ? low : x);
  const Vec shifted = inside * 1.44269504f + 12582912.0f;
  const Vec n = shifted - 12582912.0f;
  const Vec p = exp_near_zero(inside - n * 0.693359375f + n * 2.12194440e-4f);
  // 2^n in two factors: n may be 128
  const VecInt half_scale = ((VecInt)shifted - (0x4b400000 - 126)) << 23;
  const Vec result = p * (Vec)half_scale * 2.0f;
  return x < low ? Vec{} : (x > high ? splat(INFINITY) : result);
#endif
}

MEGALM_HD void multiply(VecUint a, uint32_t b, VecUint& low, VecUint& high) {
#if defined(__AVX512F__)
  const __m512i x = (__m512i)a, m = _mm512_set1_epi32(static_cast<int32_t>(b));
  const __m512i even = _mm512_mul_epu32(x, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), m);
  low = (VecUint)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  high = (VecUint)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
#elif defined(__AVX2__)
  const __m256i x = (__m256i)a, m = _mm256_set1_epi32(static_cast<int32_t>(b));
  const __m256i even = _mm256_mul_epu32(x, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), m);
  low = (VecUint)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  high = (VecUint)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
  for (int i = 0; i < kLanes; ++i) {
    uint32_t halves[2];
    multiply(static_cast<uint32_t>(a[i]), b, halves[0], halves[1]);
    low[i] = halves[0];
    high[i] = halves[1];
  }
#endif
}

MEGALM_HD Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
MEGALM_HD void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }

MEGALM_HD Vec load(const bf16* p) {
  VecHalf h;
  memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, VecUint) << 16);
}
MEGALM_HD void store(bf16* p, Vec v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &h, sizeof h);
#else
  const VecUint bits = (VecUint)v;
  const VecUint rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const VecHalf h = __builtin_convertvector(v != v ? VecUint{} + 0x7fc0u : rounded, VecHalf);
  memcpy(p, &h, sizeof h);
#endif
}

MEGALM_HD Vec load(const fp16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
MEGALM_HD void store(fp16* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<fp16>(v[i]);
#endif
}

// The first n lanes only; the others are `rest`, and are not stored. Through memory: the ends of rows want little code.
template <class T>
MEGALM_HD Vec load(const T* p, int n, float rest = 0.0f) {
  if (n == kLanes) return load(p);
  T lanes[kLanes] = {};
  memcpy(lanes, p, n * sizeof(T));
  VecInt number;
  for (int i = 0; i < kLanes; ++i) number[i] = i;
  return select(number < n, load(lanes), splat(rest));
}
template <class T>
MEGALM_HD void store(T* p, Vec v, int n) {
  if (n == kLanes) return store(p, v);
  T lanes[kLanes];
  store(lanes, v);
  memcpy(p, lanes, n * sizeof(T));
}

// body(i, n) for lanes i .. i + n of each vector of a row; n is kLanes but for the last.
template <class Body>
MEGALM_HD void for_lanes(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, kLanes);
  if (i < size) body(i, static_cast<int>(size - i));
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm
