// What twophase_ext._C asks of the operator library.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace twophase {

// Ordered (key, value) pairs; lists are joined by ';'.
__attribute__((visibility("default"))) std::vector<std::pair<std::string, std::string>>
build_info();
// twophase_ext/_sources.py's digest of the sources; "" where CMake was called by hand.
__attribute__((visibility("default"))) std::string sources();
__attribute__((visibility("default"))) void set_isa_by_name(const std::string& name);

}  // namespace twophase
