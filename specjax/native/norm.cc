// RMSNorm of rows, one by one, so that a row's norm does not depend on those beside it.

#include <cmath>
#include <cstdint>

#include "shapes.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// x[rows, size] times scale[size] over the root of each row's mean square.
ffi::Error RmsNorm(ffi::BufferR2<ffi::F32> x, ffi::BufferR1<ffi::F32> scale,
                   ffi::BufferR0<ffi::F32> epsilon, ffi::ResultBufferR2<ffi::F32> result) {
  const int64_t rows = x.dimensions()[0], size = x.dimensions()[1];
  if (!Shaped(scale, {size}) || !Shaped(*result, {rows, size})) {
    return ffi::Error::InvalidArgument("rms_norm: sizes do not agree");
  }
  const float* factors = scale.typed_data();
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = x.typed_data() + row * size;
    float* to = result->typed_data() + row * size;
    Vector squares[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
      squares[0] = MultiplyAdd(Load(from + i), Load(from + i), squares[0]);
    }
    if (i < size) {
      const Vector rest = LoadSome(from + i, size - i);
      squares[0] = MultiplyAdd(rest, rest, squares[0]);
    }
    const float mean = SumEach(squares)[0] / size;
    const float factor = 1.0f / std::sqrt(mean + *epsilon.typed_data());
    for (i = 0; i < size; ++i) to[i] = from[i] * factor * factors[i];
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(rms_norm, RmsNorm,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR1<ffi::F32>>()
                                  .Arg<ffi::BufferR0<ffi::F32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>());
