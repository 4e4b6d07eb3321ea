// The sizes of buffers, which XLA leaves to the handler: one that read on regardless would read beyond.

#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

template <typename Buffer>
bool Shaped(const Buffer& buffer, std::initializer_list<int64_t> sizes) {
  const auto found = buffer.dimensions();
  return std::equal(found.begin(), found.end(), sizes.begin(), sizes.end());
}
