// Vectors of floats as wide as the instruction set that this is compiled for.

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define UNROLL _Pragma("GCC unroll 32")

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vector Load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void Store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }

// a * b + c, rounded once where the machine can. Spelled out, and the compiler told to fuse nothing by
// itself, since it would fuse the same sum in one loop and not in another.
inline Vector MultiplyAdd(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX__) && defined(__FMA__)
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vector)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// The first `count` lanes from memory, the others 0.
inline Vector LoadSome(const float* from, int64_t count) {
  Vector value = {};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

// The first `count` lanes into memory.
inline void StoreSome(float* to, Vector value, int64_t count) {
  std::memcpy(to, &value, count * sizeof(float));
}

// Into the second-level cache; an address that is nobody's does no harm.
inline void Prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

// Adds the halves of every group of 2 * half lanes; groups of a and of b alternate in the result.
template <int half, int... lane>
inline Vector Fold(Vector a, Vector b, std::integer_sequence<int, lane...>) {
  constexpr auto source = [](int i, int offset) {
    const int group = i / (2 * half) * 2 * half, place = i % (2 * half);
    return (place < half ? group + place : kLanes + group + place - half) + offset;
  };
  return __builtin_shufflevector(a, b, source(lane, 0)...) +
         __builtin_shufflevector(a, b, source(lane, half)...);
}

// Lane i of the result is the sum of the lanes of sums[i], for kLanes of them, which are used up.
// Lanes are added pairwise, in the same order for every i.
template <int half = kLanes / 2>
__attribute__((always_inline)) inline Vector SumEach(Vector* sums) {
  UNROLL for (int i = 0; i < half; ++i) {
    sums[i] = Fold<half>(sums[i], sums[i + half], std::make_integer_sequence<int, kLanes>());
  }
  if constexpr (half > 1) return SumEach<half / 2>(sums);
  return sums[0];
}

// e^x for x <= 0, to the last bit or two; 0 below -87, where floats run out; NaN for NaN.
inline Vector Exp(Vector x) {
  const Vector least = Vector{} - 87.0f;
  const Vector bounded = x < least ? least : x;
  // e^x = 2^whole * e^rest with |rest| <= log(2) / 2; adding 1.5 * 2^23 rounds to a whole number and
  // leaves it in the low bits.
  const Vector rounder = Vector{} + 12582912.0f;
  const Vector shifted = MultiplyAdd(bounded, Vector{} + 1.44269504f, rounder);
  const Vector whole = shifted - rounder;
  Vector rest = MultiplyAdd(whole, Vector{} - 0.693145752f, bounded);
  rest = MultiplyAdd(whole, Vector{} - 1.42860677e-6f, rest);
  Vector series = Vector{} + 1.0f / 5040.0f;
  series = MultiplyAdd(series, rest, Vector{} + 1.0f / 720.0f);
  series = MultiplyAdd(series, rest, Vector{} + 1.0f / 120.0f);
  series = MultiplyAdd(series, rest, Vector{} + 1.0f / 24.0f);
  series = MultiplyAdd(series, rest, Vector{} + 1.0f / 6.0f);
  series = MultiplyAdd(series, rest, Vector{} + 0.5f);
  series = MultiplyAdd(series, rest, Vector{} + 1.0f);
  series = MultiplyAdd(series, rest, Vector{} + 1.0f);
  const Integers exponent = ((Integers)shifted - (Integers)rounder) << 23;
  const Vector power = (Vector)((Integers)series + exponent);
  return x < least ? Vector{} : x == x ? power : x;
}
