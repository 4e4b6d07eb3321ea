// Grouped-query attention of new tokens over a cache and over each other, reading what is visible.
//
// Scores are inner products whose order of sums is fixed; the softmax's total and the mix of values run
// over slots one by one, where one that is not visible adds zero. So a token's attention is the same to
// the last bit alone, in a chain, on a path of a tree, and in any batch.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "parallel.h"
#include "rows.h"
#include "shapes.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Keys or values of one key head: rows of `size` floats, `stride` apart.
struct Slots {
  const float* data;
  int64_t stride, count;
};

// total[t] = sum of weights[t, s] over s, one after the other.
template <int tokens>
void Totals(const float* weights, int64_t row, int64_t count, float* totals) {
  float sums[tokens] = {};
  for (int64_t s = 0; s < count; ++s) {
    UNROLL for (int token = 0; token < tokens; ++token) sums[token] += weights[token * row + s];
  }
  std::copy(sums, sums + tokens, totals);
}

// mixed[t, lane] = sum of weights[t, s] * values[s, lane] over s, for `vectors` vectors from lane
// `first` on; of the last of them only `lanes` are there.
template <int tokens, int vectors>
void MixLanes(const float* weights, int64_t row, const std::array<Slots, 2>& values, int64_t first,
              int64_t lanes, float* mixed, int64_t size) {
  Vector sums[tokens * vectors] = {};
  for (const Slots& part : values) {
    const float* value = part.data + first;
    for (int64_t s = 0; s < part.count; ++s, value += part.stride) {
      Vector right[vectors];
      UNROLL for (int v = 0; v < vectors; ++v) {
        right[v] = lanes == kLanes ? Load(value + v * kLanes) : LoadSome(value, lanes);
      }
      UNROLL for (int token = 0; token < tokens; ++token) {
        const Vector weight = Vector{} + weights[token * row + s];
        UNROLL for (int v = 0; v < vectors; ++v) {
          Vector& sum = sums[token * vectors + v];
          sum = MultiplyAdd(weight, right[v], sum);
        }
      }
    }
    weights += part.count;
  }
  UNROLL for (int token = 0; token < tokens; ++token) {
    UNROLL for (int v = 0; v < vectors; ++v) {
      float* to = mixed + token * size + first + v * kLanes;
      const Vector sum = sums[token * vectors + v];
      lanes == kLanes ? Store(to, sum) : StoreSome(to, sum, lanes);
    }
  }
}

// mixed[t] = the values of both parts, mixed by the weights[t] over their total.
template <int tokens>
void Mix(const float* weights, int64_t row, const std::array<Slots, 2>& values, float* mixed,
         int64_t size) {
  constexpr int vectors = tokens * 4 + 6 < kRegisters ? 4 : tokens * 2 + 4 < kRegisters ? 2 : 1;
  int64_t first = 0;
  for (; first + vectors * kLanes <= size; first += vectors * kLanes) {
    MixLanes<tokens, vectors>(weights, row, values, first, kLanes, mixed, size);
  }
  for (; first < size; first += kLanes) {
    const int64_t lanes = std::min<int64_t>(kLanes, size - first);
    MixLanes<tokens, 1>(weights, row, values, first, lanes, mixed, size);
  }
  float totals[tokens];
  Totals<tokens>(weights, row, values[0].count + values[1].count, totals);
  for (int token = 0; token < tokens; ++token) {
    for (int64_t i = 0; i < size; ++i) mixed[token * size + i] /= totals[token];
  }
}

template <int... tokens>
constexpr auto MixByTokens(std::integer_sequence<int, tokens...>) {
  return std::array{Mix<tokens + 1>...};
}
constexpr auto kMix = MixByTokens(std::make_integer_sequence<int, kMostTokens>());

// exp(score - largest score) in place; `count` is a multiple of kLanes.
void Exponentiate(float* scores, int64_t count) {
  Vector most = Load(scores);
  for (int64_t s = kLanes; s < count; s += kLanes) {
    const Vector other = Load(scores + s);
    most = most > other ? most : other;
  }
  float largest = most[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = std::max(largest, most[lane]);
  for (int64_t s = 0; s < count; s += kLanes) Store(scores + s, Exp(Load(scores + s) - largest));
}

// 1 + the last visible of `count` slots; 0 if none is.
int64_t Reach(const bool* visible, int64_t count) {
  while (count > 0 && !visible[count - 1]) --count;
  return count;
}

struct Attention {
  const float *query, *new_keys, *new_values, *old_keys, *old_values;
  const bool *old_mask, *new_mask;
  float* mixed;
  // T new tokens, S slots of the cache, of which no row holds anything beyond `filled`.
  int64_t batch, tokens, heads, key_heads, size, slots, filled;
  // Elements from one row, and from one token, to the next; 0 where all have the same mask.
  int64_t old_mask_row, old_mask_token, new_mask_row;

  int64_t queries() const { return heads / key_heads * tokens; }
  int64_t blocks() const { return (queries() + kMostTokens - 1) / kMostTokens; }

  // One block of the queries of one key head in one row.
  void Block(int64_t task) const {
    const int64_t block = task % blocks(), head = task / blocks() % key_heads;
    const int64_t row = task / blocks() / key_heads;
    const int64_t first = block * queries() / blocks();
    const int count = (block + 1) * queries() / blocks() - first;
    const int64_t groups = heads / key_heads;

    // A query is one token with one of the heads that share the key head; it lies at its offset.
    int64_t offset[kMostTokens];
    const bool *old_visible[kMostTokens], *new_visible[kMostTokens];
    int64_t old_count = 0, new_count = 0;
    for (int i = 0; i < count; ++i) {
      const int64_t token = (first + i) / groups, group = (first + i) % groups;
      offset[i] = ((row * tokens + token) * heads + head * groups + group) * size;
      old_visible[i] = old_mask + row * old_mask_row + token * old_mask_token;
      new_visible[i] = new_mask + row * new_mask_row + token * tokens;
      old_count = std::max(old_count, Reach(old_visible[i], filled));
      new_count = std::max(new_count, Reach(new_visible[i], tokens));
    }
    // At least one vector, even where nothing is visible.
    const int64_t width = (old_count + new_count) / kLanes * kLanes + kLanes;
    static thread_local std::vector<float> scratch;
    scratch.resize(count * (2 * size + width));
    float* const queried = scratch.data();
    float* const mixes = queried + count * size;
    float* const scores = mixes + count * size;

    for (int i = 0; i < count; ++i) {
      std::copy_n(query + offset[i], size, queried + i * size);
    }
    const int64_t old_first = (row * key_heads + head) * slots * size;
    const int64_t new_first = (row * tokens * key_heads + head) * size;
    kRowsTimes[count - 1](old_keys + old_first, size, old_count, queried, size, scores, width);
    kRowsTimes[count - 1](new_keys + new_first, key_heads * size, new_count, queried, size,
                          scores + old_count, width);
    for (int i = 0; i < count; ++i) {
      float* score = scores + i * width;
      for (int64_t s = 0; s < old_count; ++s) {
        score[s] = old_visible[i][s] ? score[s] : kMinusInfinity;
      }
      for (int64_t s = 0; s < new_count; ++s) {
        score[old_count + s] = new_visible[i][s] ? score[old_count + s] : kMinusInfinity;
      }
      std::fill(score + old_count + new_count, score + width, kMinusInfinity);
      Exponentiate(score, width);
    }
    const std::array values = {Slots{old_values + old_first, size, old_count},
                               Slots{new_values + new_first, key_heads * size, new_count}};
    kMix[count - 1](scores, width, values, mixes, size);
    for (int i = 0; i < count; ++i) std::copy_n(mixes + i * size, size, mixed + offset[i]);
  }
};

// query [B, T, heads, D], new keys and values [B, T, KV, D], those of the cache [B, KV, S, D], masks
// [B, 1 or T, S] and [1 or B, T, T], filled [] -> [B, T, heads, D].
ffi::Error Attend(ffi::ThreadPool pool, ffi::BufferR4<ffi::F32> query,
                  ffi::BufferR4<ffi::F32> new_keys, ffi::BufferR4<ffi::F32> new_values,
                  ffi::BufferR4<ffi::F32> old_keys, ffi::BufferR4<ffi::F32> old_values,
                  ffi::BufferR3<ffi::PRED> old_mask, ffi::BufferR3<ffi::PRED> new_mask,
                  ffi::BufferR0<ffi::S32> filled, ffi::ResultBufferR4<ffi::F32> mixed) {
  const int64_t batch = query.dimensions()[0], tokens = query.dimensions()[1];
  const int64_t heads = query.dimensions()[2], size = query.dimensions()[3];
  const int64_t key_heads = old_keys.dimensions()[1], slots = old_keys.dimensions()[2];
  const int64_t old_mask_tokens = old_mask.dimensions()[1], new_mask_rows = new_mask.dimensions()[0];
  if (key_heads < 1 || heads % key_heads != 0 || !Shaped(*mixed, {batch, tokens, heads, size}) ||
      !Shaped(new_keys, {batch, tokens, key_heads, size}) ||
      !Shaped(new_values, {batch, tokens, key_heads, size}) ||
      !Shaped(old_keys, {batch, key_heads, slots, size}) ||
      !Shaped(old_values, {batch, key_heads, slots, size}) ||
      !Shaped(old_mask, {batch, old_mask_tokens, slots}) ||
      !Shaped(new_mask, {new_mask_rows, tokens, tokens}) ||
      (old_mask_tokens != 1 && old_mask_tokens != tokens) ||
      (new_mask_rows != 1 && new_mask_rows != batch)) {
    return ffi::Error::InvalidArgument("attend: sizes do not agree");
  }
  const Attention attention = {
      .query = query.typed_data(),
      .new_keys = new_keys.typed_data(),
      .new_values = new_values.typed_data(),
      .old_keys = old_keys.typed_data(),
      .old_values = old_values.typed_data(),
      .old_mask = old_mask.typed_data(),
      .new_mask = new_mask.typed_data(),
      .mixed = mixed->typed_data(),
      .batch = batch,
      .tokens = tokens,
      .heads = heads,
      .key_heads = key_heads,
      .size = size,
      .slots = slots,
      .filled = std::clamp<int64_t>(*filled.typed_data(), 0, slots),
      .old_mask_row = old_mask_tokens * slots,
      .old_mask_token = old_mask_tokens == 1 ? 0 : slots,
      .new_mask_row = new_mask_rows == 1 ? 0 : tokens * tokens,
  };
  const int64_t tasks = attention.batch * attention.key_heads * attention.blocks();
  Parallel(pool, tasks, [attention](int64_t task) { attention.Block(task); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(attend, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<ffi::BufferR3<ffi::PRED>>()
                                  .Arg<ffi::BufferR3<ffi::PRED>>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .Ret<ffi::BufferR4<ffi::F32>>());
