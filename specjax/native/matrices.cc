// Products of large matrices, as training has them: factors rounded to bfloat16, sums in float32, as
// TPUs multiply float32 by default. For CPUs that multiply bfloat16: on tile registers (Intel's AMX)
// where there are some and the system allows it, else by vectors (AVX-512 BF16).

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "parallel.h"
#include "shapes.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#if defined(__AMX_BF16__) && defined(__linux__)
#define SPECJAX_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace {

namespace ffi = xla::ffi;

// A factor as it lies in memory: its element (r, k) beside (r, k + 1) or beside (r + 1, k).
struct Factor {
  const float* data;
  int64_t rows, depth;
  bool deep;
};

#ifdef __AVX512BF16__

// Rows of a tile, and the pairs of bfloat16 that a row of it holds.
constexpr int64_t kSide = 16;
constexpr int64_t kTileDepth = 2 * kSide;
constexpr int64_t kTileWords = kSide * kSide;
// Two tiles by two are summed at a time: tile registers are eight.
constexpr int64_t kBlock = 2 * kSide;
// So deep and so wide is a product made at a time, of which the right factor takes eight megabytes;
// and so many rows of the left one stay in the near cache while all of that goes by.
constexpr int64_t kDepth = 1024;
constexpr int64_t kMostColumns = 4096;
constexpr int64_t kMostRows = 256;

int64_t Up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

__mmask16 Mask(int64_t count) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, kSide)) - 1);
}

struct Free {
  void operator()(uint32_t* tiles) const { ::operator delete[](tiles, std::align_val_t(64)); }
};
using Tiles = std::unique_ptr<uint32_t[], Free>;

// Memory for tiles; null where there is none.
Tiles Room(int64_t words) {
  return Tiles(new (std::align_val_t(64), std::nothrow) uint32_t[words]);
}

// One tile of a factor, zeros beyond its ends: `pairs_first` as the right factor of a product wants
// it, pairs of depth by rows; else rows by pairs.
void Pack(const Factor& factor, int64_t row, int64_t depth, int64_t end, bool pairs_first,
          uint32_t* tile) {
  alignas(64) uint32_t straight[kTileWords];
  const bool turned = factor.deep == pairs_first;
  uint32_t* made = turned ? straight : tile;
  const int64_t rows = factor.rows - row, left = end - depth;
  if (factor.deep) {
    for (int64_t i = 0; i < kSide; ++i) {
      const float* from = factor.data + (row + i) * factor.depth + depth;
      const bool some = i < rows;
      const __m512 low = _mm512_maskz_loadu_ps(some ? Mask(left) : 0, from);
      const __m512 high = _mm512_maskz_loadu_ps(some ? Mask(left - kSide) : 0, from + kSide);
      _mm512_store_si512(made + i * kSide, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  } else {
    alignas(64) uint16_t order[2 * kSide];
    for (int i = 0; i < kSide; ++i) order[2 * i] = i, order[2 * i + 1] = kSide + i;
    const __m512i interleaved = _mm512_load_si512(order);
    for (int64_t i = 0; i < kSide; ++i) {
      const float* from = factor.data + (depth + 2 * i) * factor.rows + row;
      const __m512 low = _mm512_maskz_loadu_ps(2 * i < left ? Mask(rows) : 0, from);
      const __m512 high =
          _mm512_maskz_loadu_ps(2 * i + 1 < left ? Mask(rows) : 0, from + factor.rows);
      _mm512_store_si512(made + i * kSide,
                         _mm512_permutexvar_epi16(
                             interleaved, (__m512i)_mm512_cvtne2ps_pbh(high, low)));
    }
  }
  if (turned) {
    const __m512i column = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm512_set1_epi32(kSide));
    for (int64_t i = 0; i < kSide; ++i) {
      _mm512_store_si512(tile + i * kSide, _mm512_i32gather_epi32(column, straight + i, 4));
    }
  }
}

// Tiles of some rows and depth, in the order in which they are multiplied: by blocks of rows.
void PackRows(const Factor& factor, int64_t row, int64_t rows, int64_t depth, int64_t end,
              bool pairs_first, uint32_t* tiles) {
  for (int64_t block = row; block < row + rows; block += kBlock) {
    for (int64_t k = depth; k < end; k += kTileDepth) {
      for (int64_t half = 0; half < 2; ++half, tiles += kTileWords) {
        Pack(factor, block + half * kSide, k, end, pairs_first, tiles);
      }
    }
  }
}

// out[32, 32] of this stride, plus what is there if `more`: both factors' tiles, two of each a step.
using Multiply = void(const uint32_t* left, const uint32_t* right, int64_t steps, bool more,
                      float* out, int64_t stride);

void MultiplyVectors(const uint32_t* left, const uint32_t* right, int64_t steps, bool more,
                     float* out, int64_t stride) {
  // Sixteen sums hide how long each product takes.
  constexpr int64_t kRows = 8;
  for (int64_t row = 0; row < kBlock; row += kRows) {
    __m512 sums[kRows][2];
    UNROLL for (int64_t i = 0; i < kRows; ++i) {
      const float* from = out + (row + i) * stride;
      sums[i][0] = more ? _mm512_loadu_ps(from) : _mm512_setzero_ps();
      sums[i][1] = more ? _mm512_loadu_ps(from + kSide) : _mm512_setzero_ps();
    }
    for (int64_t step = 0; step < steps; ++step) {
      const uint32_t* rows = left + 2 * step * kTileWords + row * kSide;
      const uint32_t* pairs = right + 2 * step * kTileWords;
      for (int64_t pair = 0; pair < kSide; ++pair) {
        const auto low = (__m512bh)_mm512_load_si512(pairs + pair * kSide);
        const auto high = (__m512bh)_mm512_load_si512(pairs + kTileWords + pair * kSide);
        UNROLL for (int64_t i = 0; i < kRows; ++i) {
          const auto own = (__m512bh)_mm512_set1_epi32(rows[i * kSide + pair]);
          sums[i][0] = _mm512_dpbf16_ps(sums[i][0], own, low);
          sums[i][1] = _mm512_dpbf16_ps(sums[i][1], own, high);
        }
      }
    }
    UNROLL for (int64_t i = 0; i < kRows; ++i) {
      float* to = out + (row + i) * stride;
      _mm512_storeu_ps(to, sums[i][0]);
      _mm512_storeu_ps(to + kSide, sums[i][1]);
    }
  }
}

#ifdef SPECJAX_TILES

struct alignas(64) Layout {
  uint8_t palette = 1, start = 0, none[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

void MultiplyTiles(const uint32_t* left, const uint32_t* right, int64_t steps, bool more,
                   float* out, int64_t stride) {
  // What lies in memory is read by instructions of which the compiler knows too little.
  asm volatile("" ::: "memory");
  const int64_t bytes = stride * sizeof(float);
  float* below = out + kSide * stride;
  if (more) {
    _tile_loadd(0, out, bytes);
    _tile_loadd(1, out + kSide, bytes);
    _tile_loadd(2, below, bytes);
    _tile_loadd(3, below + kSide, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t at = 2 * step * kTileWords;
    _tile_loadd(4, left + at, 4 * kSide);
    _tile_loadd(5, left + at + kTileWords, 4 * kSide);
    _tile_loadd(6, right + at, 4 * kSide);
    _tile_loadd(7, right + at + kTileWords, 4 * kSide);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, bytes);
  _tile_stored(1, out + kSide, bytes);
  _tile_stored(2, below, bytes);
  _tile_stored(3, below + kSide, bytes);
  asm volatile("" ::: "memory");
}

// The system's leave to use tiles, asked for once a process.
bool Allowed() {
  constexpr int kRequest = 0x1023, kTileData = 18;
  static const bool allowed = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return allowed;
}

// A thread's tile registers, for as long as this lives.
class Registers {
 public:
  Registers() {
    if (!Allowed()) return;
    Layout layout;
    std::fill_n(layout.bytes, 8, 4 * kSide);
    std::fill_n(layout.rows, 8, kSide);
    asm volatile("" ::"r"(&layout) : "memory");
    _tile_loadconfig(&layout);
  }
  ~Registers() {
    if (Allowed()) _tile_release();
  }
  Multiply* multiply() const { return Allowed() ? MultiplyTiles : MultiplyVectors; }
};

#else

struct Registers {
  Multiply* multiply() const { return MultiplyVectors; }
};

#endif

// As `multiply`, where only some rows and columns of the block are there.
void MultiplyEdge(Multiply* multiply, const uint32_t* left, const uint32_t* right, int64_t steps,
                  bool more, float* out, int64_t stride, int64_t rows, int64_t columns) {
  alignas(64) float whole[kBlock * kBlock] = {};
  for (int64_t i = 0; more && i < rows; ++i) {
    std::memcpy(whole + i * kBlock, out + i * stride, columns * sizeof(float));
  }
  multiply(left, right, steps, more, whole, kBlock);
  for (int64_t i = 0; i < rows; ++i) {
    std::memcpy(out + i * stride, whole + i * kBlock, columns * sizeof(float));
  }
}

// Whether there was memory for it.
bool Product(ffi::ThreadPool pool, const Factor left, const Factor right, float* out) {
  const int64_t columns = right.rows;
  // Two shares a thread, so that one that begins late holds nobody up for long.
  const int64_t shares = 2 * std::max<int64_t>(1, pool.num_threads());
  const int64_t most = std::clamp(Up((left.rows + shares - 1) / shares, kBlock), kBlock, kMostRows);
  const int64_t groups = (left.rows + most - 1) / most;
  if (left.depth == 0) std::fill_n(out, left.rows * columns, 0.0f);
  const int64_t deepest = 2 * kTileWords * Up(std::min(kDepth, left.depth), kTileDepth) / kTileDepth;
  const int64_t widest = std::min(kMostColumns, Up(columns, kBlock));
  const Tiles all = Room(widest / kBlock * deepest);
  std::atomic<bool> enough = all != nullptr;
  if (!enough) return false;
  uint32_t* const beside = all.get();
  for (int64_t first = 0; first < columns; first += kMostColumns) {
    const int64_t last = std::min(first + kMostColumns, columns);
    const int64_t blocks = Up(last - first, kBlock) / kBlock;
    for (int64_t depth = 0; depth < left.depth; depth += kDepth) {
      const int64_t end = std::min(depth + kDepth, left.depth);
      const int64_t steps = Up(end - depth, kTileDepth) / kTileDepth;
      const int64_t words = 2 * steps * kTileWords;
      Parallel(pool, blocks, [=](int64_t block) {
        const int64_t column = first + block * kBlock;
        PackRows(right, column, kBlock, depth, end, true, beside + block * words);
      });
      Parallel(pool, groups, [=, &enough](int64_t group) {
        const int64_t row = group * most, rows = std::min(most, left.rows - row);
        // The thread's own, half a megabyte.
        thread_local const Tiles kept = Room(kMostRows * kDepth / 2);
        uint32_t* own = kept.get();
        if (own == nullptr) {
          enough = false;
          return;
        }
        PackRows(left, row, rows, depth, end, false, own);
        const Registers registers;
        Multiply* multiply = registers.multiply();
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t column = first + block * kBlock, wide = std::min(kBlock, last - column);
          const uint32_t* others = beside + block * words;
          for (int64_t i = 0; i < rows; i += kBlock) {
            const int64_t high = std::min(kBlock, rows - i);
            float* to = out + (row + i) * columns + column;
            const uint32_t* tiles = own + i / kBlock * words;
            if (high == kBlock && wide == kBlock) {
              multiply(tiles, others, steps, depth > 0, to, columns);
            } else {
              MultiplyEdge(multiply, tiles, others, steps, depth > 0, to, columns, high, wide);
            }
          }
        }
      });
    }
  }
  return enough;
}

constexpr bool kHere = true;

#else

constexpr bool kHere = false;
bool Product(ffi::ThreadPool, Factor, Factor, float*) { return false; }

#endif

using Matrix = ffi::BufferR2<ffi::F32>;

// left[rows, depth] and right[columns, depth], either of them as its transpose, -> [rows, columns].
template <bool kLeftDeep, bool kRightDeep>
ffi::Error Make(ffi::ThreadPool pool, Matrix left, Matrix right, ffi::Result<Matrix> out) {
  const int64_t rows = left.dimensions()[kLeftDeep ? 0 : 1];
  const int64_t depth = left.dimensions()[kLeftDeep ? 1 : 0];
  const int64_t columns = right.dimensions()[kRightDeep ? 0 : 1];
  if (right.dimensions()[kRightDeep ? 1 : 0] != depth || !Shaped(*out, {rows, columns})) {
    return ffi::Error::InvalidArgument("matrices: sizes do not agree");
  }
  if (!kHere) {
    return ffi::Error::Internal(
        "matrices: this CPU does not multiply bfloat16; use Policy(rounded=False)");
  }
  const bool made = Product(pool, {left.typed_data(), rows, depth, kLeftDeep},
                            {right.typed_data(), columns, depth, kRightDeep}, out->typed_data());
  return made ? ffi::Error::Success() : ffi::Error::Internal("matrices: out of memory");
}

}  // namespace

// Whether the handlers of this file can be called here.
extern "C" bool multiplies_bfloat16() { return kHere; }

#define SPECJAX_MATRICES(name, left, right)                                          \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                     \
      name, (Make<left, right>),                                                     \
      ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Matrix>().Arg<Matrix>().Ret<Matrix>())

SPECJAX_MATRICES(times_transposed, true, true);
SPECJAX_MATRICES(times, true, false);
SPECJAX_MATRICES(transposed_times, false, false);
