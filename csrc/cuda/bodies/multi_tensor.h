// Many tensors in one launch: a table of them travels in the kernel's parameters, and blocks walk
// over chunks of all their elements.
#pragma once

#include "context.h"

namespace twophase {

constexpr int64_t kChunk = 4096;                  // elements: one block's step
constexpr size_t kParameterBytes = 32764 - 1024;  // of 32,764 (sm_70 and later, CUDA 12.1)

// Entry: {..., int64_t n; int64_t chunks_before;}
template <class Entry>
struct TensorTable {
  static constexpr int kCapacity = static_cast<int>(kParameterBytes / sizeof(Entry));
  int64_t chunks = 0;
  int32_t count = 0;
  Entry entries[kCapacity];

  void add(Entry entry) {
    entry.chunks_before = chunks;
    chunks += ceil_div(entry.n, kChunk);
    entries[count++] = entry;
  }
  void clear() { chunks = count = 0; }
};

// f(entry, begin, end) for every chunk of elements of every tensor that this block owns.
template <class Ctx, class Entry, class F>
TP_BODY void for_each_chunk(const Ctx& ctx, const TensorTable<Entry>& table, const F& f) {
  for (int64_t chunk = ctx.block(); chunk < table.chunks; chunk += ctx.blocks()) {
    int low = 0, high = table.count - 1;  // the last entry with chunks_before <= chunk
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (table.entries[middle].chunks_before <= chunk)
        low = middle;
      else
        high = middle - 1;
    }
    const Entry& entry = table.entries[low];
    const int64_t begin = (chunk - entry.chunks_before) * kChunk;
    f(entry, begin, smaller(begin + kChunk, entry.n));
  }
}

}  // namespace twophase
