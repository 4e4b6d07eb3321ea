// Products of a few tokens with kernels: the projections of a decoding step. A kernel is read once, at
// the speed of memory, whatever the number of tokens.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "rows.h"
#include "shapes.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// Rows of a kernel that stay in a near cache while groups of tokens go by; most of RowsBeside divide it.
constexpr int64_t kTile = 24;

struct Product {
  const float* kernel;
  float* y;
  int64_t outputs;
};

// A share of every kernel's rows with all tokens, in even groups of at most kMostTokens.
void Share(const std::vector<Product>& products, const float* x, int64_t tokens, int64_t inputs,
           int64_t share, int64_t shares) {
  const int64_t groups = (tokens + kMostTokens - 1) / kMostTokens;
  for (const Product& product : products) {
    const int64_t end = (share + 1) * product.outputs / shares;
    int64_t begin = share * product.outputs / shares;
    for (int64_t next; begin < end; begin = next) {
      next = groups == 1 ? end : std::min(begin + kTile, end);
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = group * tokens / groups;
        const int64_t count = (group + 1) * tokens / groups - first;
        kRowsTimes[count - 1](product.kernel + begin * inputs, inputs, next - begin,
                              x + first * inputs, inputs,
                              product.y + first * product.outputs + begin, product.outputs);
      }
    }
  }
}

// x[tokens, inputs] and kernels[outputs, inputs] -> for every kernel, [tokens, outputs].
ffi::Error Products(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::RemainingArgs kernels,
                    ffi::RemainingRets results) {
  const int64_t tokens = x.dimensions()[0], inputs = x.dimensions()[1];
  if (kernels.size() != results.size()) {
    return ffi::Error::InvalidArgument("products: not one result a kernel");
  }
  std::vector<Product> products;
  for (size_t i = 0; i < kernels.size(); ++i) {
    auto kernel = kernels.get<ffi::BufferR2<ffi::F32>>(i);
    auto result = results.get<ffi::BufferR2<ffi::F32>>(i);
    if (kernel.has_error()) return kernel.error();
    if (result.has_error()) return result.error();
    const int64_t outputs = kernel->dimensions()[0];
    if (!Shaped(*kernel, {outputs, inputs}) || !Shaped(**result, {tokens, outputs})) {
      return ffi::Error::InvalidArgument("products: sizes do not agree");
    }
    products.push_back({kernel->typed_data(), (*result)->typed_data(), outputs});
  }
  const float* rows = x.typed_data();
  // As many shares as threads: each reads a stretch of memory of its own.
  const int64_t shares = std::max<int64_t>(1, pool.num_threads());
  Parallel(pool, shares, [=](int64_t share) {
    Share(products, rows, tokens, inputs, share, shares);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(products, Products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets());
