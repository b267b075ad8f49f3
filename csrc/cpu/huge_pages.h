// A fresh allocation of tens of megabytes comes from mmap: writing it first faults in every 4 KiB
// page, which costs several times the arithmetic of an elementwise kernel.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace twophase {

// Ask for 2 MiB pages within [data, data + bytes). A hint: without effect where the system has none
// or the memory has been touched before.
inline void hint_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kHuge = 2u << 20;
  // glibc reuses smaller blocks (its mmap threshold grows to 32 MiB), whose pages are there
  // already.
  if (bytes < (32u << 20)) return;
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge;
  const std::uintptr_t last = (begin + bytes) / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace twophase
