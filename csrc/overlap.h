// Memory that an operator writes belongs to one element alone: views of one storage may overlap.
#pragma once

#include "check.h"

namespace twophase {

struct Argument {
  const Tensor* tensor;
  Name name;
};

// Where the elements of a tensor lie; torch's strides are never negative.
struct Layout {
  const Argument* argument;
  bool written;
  uintptr_t begin, end;                           // bytes
  int64_t width;                                  // bytes of an element
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride in bytes, size), size > 1

  Layout(const Argument& a, bool written_) : argument(&a), written(written_) {
    const Tensor& t = *a.tensor;
    begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    width = static_cast<int64_t>(t.element_size());
    if (t.is_contiguous()) width *= t.numel();  // as one element
    end = begin + width;
    if (t.is_contiguous()) return;
    for (int64_t d = 0; d < t.dim(); ++d) {
      if (t.size(d) < 2) continue;
      dims.emplace_back(t.stride(d) * width, t.size(d));
      end += (t.size(d) - 1) * t.stride(d) * width;
    }
    std::sort(dims.begin(), dims.end());
  }

  // Enough for elements apart: a stride leaps over everything that the smaller ones reach.
  bool apart() const {
    int64_t reach = width;
    for (const auto& [stride, size] : dims) {
      if (stride < reach) return false;
      reach += stride * (size - 1);
    }
    return true;
  }

  // Calls f with the first byte of every element.
  template <class F>
  void each(const F& f, uintptr_t from, size_t dim) const {
    if (dim == dims.size()) return f(from);
    for (int64_t i = 0; i < dims[dim].second; ++i) each(f, from + i * dims[dim].first, dim + 1);
  }
};

// Refuses the first argument with an element, written or beside a written one, in shared memory.
// Exact. Where spans of bytes do not meet, as nearly always, only they are looked at.
inline void require_own_memory(const std::vector<Argument>& written,
                               const std::vector<Argument>& read = {}) {
  std::vector<Layout> layouts;
  for (const auto* list : {&written, &read})
    for (const Argument& a : *list)
      if (a.tensor->numel() > 0) layouts.emplace_back(a, list == &written);
  std::stable_sort(layouts.begin(), layouts.end(),
                   [](const Layout& a, const Layout& b) { return a.begin < b.begin; });
  for (size_t i = 0, next = 0; i < layouts.size(); i = next) {
    uintptr_t end = layouts[i].end;
    bool writes = layouts[i].written;
    for (next = i + 1; next < layouts.size() && layouts[next].begin < end; ++next) {
      end = std::max(end, layouts[next].end);
      writes = writes || layouts[next].written;
    }
    if (!writes || (next == i + 1 && layouts[i].apart())) continue;
    std::vector<bool> taken(end - layouts[i].begin);
    for (const bool write : {true, false})
      for (size_t k = i; k < next; ++k) {
        const Layout& layout = layouts[k];
        if (layout.written != write) continue;
        layout.each(
            [&](uintptr_t at) {
              for (int64_t byte = 0; byte < layout.width; ++byte) {
                auto here = taken[at - layouts[i].begin + byte];
                require(!here, layout.argument->name,
                        ": expected memory of its own, got elements that share it with others");
                if (write) here = true;
              }
            },
            layout.begin, 0);
      }
  }
}

}  // namespace twophase
