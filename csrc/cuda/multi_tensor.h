// Hands lists of tensors to kernels in tables (bodies/multi_tensor.h).
#pragma once

#include <memory>
#include <vector>

#include "bodies/multi_tensor.h"
#include "launch.h"

namespace twophase {

// launch_one(table) with entry(target) of every target of `dtype`: one launch for a few hundred
// tensors, further ones only where a table is full.
template <class Entry, class Target, class MakeEntry, class Launch>
void launch_tables(const std::vector<Target>& targets, Dtype dtype, const MakeEntry& entry,
                   const Launch& launch_one) {
  const auto table = std::make_unique<TensorTable<Entry>>();  // 32 KB
  for (const Target& target : targets) {
    if (target.dtype != dtype) continue;
    table->add(entry(target));
    if (table->count < TensorTable<Entry>::kCapacity) continue;
    launch_one(*table);
    table->clear();
  }
  if (table->count) launch_one(*table);
}

}  // namespace twophase
