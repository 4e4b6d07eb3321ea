// Inner products of some rows with others, Y[t, r] = sum over i of X[t, i] * K[r, i].
//
// A sum runs over i in the same order whatever stands beside it, so that a token's products are the
// same to the last bit in a pass of one token and in a pass of many.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "vectors.h"

// Rows of X at a time: as many as leave registers for their sums with some rows of K.
constexpr int kMostTokens = kRegisters == 32 ? 9 : 4;

// Rows of K at a time: their sums, the rows themselves and a few more fit the registers.
constexpr int RowsBeside(int tokens) { return std::clamp((kRegisters - 5) / tokens, 1, 8); }

// What is read next is asked for so many floats ahead, or arithmetic would hold the reading up.
constexpr int64_t kAhead = 1 << 14;

template <int rows, int tokens>
void InnerProducts(const float* k, int64_t stride, const float* x, int64_t inputs, float* y,
                   int64_t outputs) {
  constexpr int count = rows * tokens;
  constexpr int padded = (count + kLanes - 1) / kLanes * kLanes;
  Vector sums[padded] = {};
  int64_t i = 0;
  for (; i + kLanes <= inputs; i += kLanes) {
    Vector left[rows];
    UNROLL for (int row = 0; row < rows; ++row) {
      left[row] = Load(k + row * stride + i);
      Prefetch(k + row * stride + i + kAhead);
    }
    UNROLL for (int token = 0; token < tokens; ++token) {
      const Vector right = Load(x + token * inputs + i);
      UNROLL for (int row = 0; row < rows; ++row) {
        Vector& sum = sums[row * tokens + token];
        sum = MultiplyAdd(left[row], right, sum);
      }
    }
  }
  if (i < inputs) {
    UNROLL for (int row = 0; row < rows; ++row) {
      const Vector left = LoadSome(k + row * stride + i, inputs - i);
      UNROLL for (int token = 0; token < tokens; ++token) {
        Vector& sum = sums[row * tokens + token];
        sum = MultiplyAdd(left, LoadSome(x + token * inputs + i, inputs - i), sum);
      }
    }
  }
  float totals[padded];
  UNROLL for (int first = 0; first < count; first += kLanes) {
    Store(totals + first, SumEach(sums + first));
  }
  UNROLL for (int token = 0; token < tokens; ++token) {
    UNROLL for (int row = 0; row < rows; ++row) {
      y[token * outputs + row] = totals[row * tokens + token];
    }
  }
}

template <int tokens>
void RowsTimes(const float* k, int64_t stride, int64_t rows, const float* x, int64_t inputs,
               float* y, int64_t outputs) {
  constexpr int together = RowsBeside(tokens);
  int64_t row = 0;
  for (; row + together <= rows; row += together) {
    InnerProducts<together, tokens>(k + row * stride, stride, x, inputs, y + row, outputs);
  }
  for (; row < rows; ++row) {
    InnerProducts<1, tokens>(k + row * stride, stride, x, inputs, y + row, outputs);
  }
}

template <int... tokens>
constexpr auto ByTokens(std::integer_sequence<int, tokens...>) {
  return std::array{RowsTimes<tokens + 1>...};
}

// kRowsTimes[n - 1](k, stride, rows, x, inputs, y, outputs): n rows of x, `inputs` floats apart, with
// `rows` rows of k, `stride` apart; the products of a row of x lie in a row of y, `outputs` apart.
constexpr auto kRowsTimes = ByTokens(std::make_integer_sequence<int, kMostTokens>());
