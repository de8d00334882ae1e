// What every kernel source shares: element types, conversions, and the float overloads that the formulas call.
// No torch header: nvcc and a bare C++ compiler can both read it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MEGALM_HD __host__ __device__ __forceinline__
#else
#define MEGALM_HD inline __attribute__((always_inline))
#endif

// <op>.h states each of its kernels by MEGALM_KERNEL(name, Arguments). What that declares depends on who reads it: for
// kernels of the CPU the copy at hand, for others see cuda.h and dispatch.h, which come before.
#ifndef MEGALM_KERNEL
#define MEGALM_KERNEL(name, Arguments) \
  inline namespace MEGALM_ISA {        \
  void name(const Arguments& arguments); \
  }
#endif

// Sources are compiled once for each instruction set; the inline namespace keeps the linker from mixing the copies.
#ifndef MEGALM_ISA
#define MEGALM_ISA device
#endif

namespace megalm {

enum class Dtype : int32_t { kFloat32, kBFloat16, kFloat16 };

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline namespace MEGALM_ISA {

MEGALM_HD float as_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

MEGALM_HD uint32_t as_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

MEGALM_HD float to_float(float x) { return x; }
MEGALM_HD float to_float(bf16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
MEGALM_HD float to_float(fp16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Scaling by 2^112 turns the exponent's bias of 15 into 127, subnormal numbers included.
  return as_float(sign | as_bits(as_float(rest << 13) * 0x1p112f));
#endif
}

template <class T>
MEGALM_HD T from_float(float x);
template <>
MEGALM_HD float from_float<float>(float x) {
  return x;
}
template <>
MEGALM_HD bf16 from_float<bf16>(float x) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = as_bits(x);
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}
template <>
MEGALM_HD fp16 from_float<fp16>(float x) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (rest < 0x38800000u) {  // subnormal: adding 0.5 lets the float unit round at 2^-24
    return {static_cast<uint16_t>(sign | (as_bits(as_float(rest) + 0.5f) - 0x3f000000u))};
  }
  return {static_cast<uint16_t>(sign | (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13)};
#endif
}

// The functions that formulas use, for one float; simd.h has them for a vector of floats.
#if defined(__CUDA_ARCH__)
// The device's own instructions, right to 2 ulp and the rounding of the exponent, at an eighth of the library's cost.
MEGALM_HD float exp_(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
}
MEGALM_HD float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
MEGALM_HD float exp_(float x) { return expf(x); }
MEGALM_HD float reciprocal(float x) { return 1.0f / x; }
#endif
MEGALM_HD float sqrt_(float x) { return sqrtf(x); }
MEGALM_HD float max_(float a, float b) { return a > b ? a : b; }
MEGALM_HD float abs_(float x) { return fabsf(x); }
MEGALM_HD float select(bool condition, float yes, float no) { return condition ? yes : no; }
// Both halves of a product of 32-bit numbers.
MEGALM_HD void multiply(uint32_t a, uint32_t b, uint32_t& low, uint32_t& high) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  low = static_cast<uint32_t>(product);
  high = static_cast<uint32_t>(product >> 32);
}

}  // inline namespace MEGALM_ISA
}  // namespace megalm

// Calls `body` with `scalar` naming the element type of `dtype`.
#define MEGALM_DISPATCH(dtype, scalar, ...)                                          \
  switch (dtype) {                                                                   \
    case ::megalm::Dtype::kFloat32: { using scalar = float; __VA_ARGS__; break; }            \
    case ::megalm::Dtype::kBFloat16: { using scalar = ::megalm::bf16; __VA_ARGS__; break; }  \
    case ::megalm::Dtype::kFloat16: { using scalar = ::megalm::fp16; __VA_ARGS__; break; }   \
  }
