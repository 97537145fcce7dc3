// Vectors of 16 numbers, as GCC and Clang have them on any CPU.

#pragma once

#include <cstdint>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

constexpr int LANES = 16;

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


inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
#endif
}

inline float largest(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float most = v[0];
  for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
  return most;
#endif
}
