#include "build_info.h"

#include "cpu/isa.h"

namespace twophase {

std::vector<std::pair<std::string, std::string>> build_info() {
  std::string supported;
  for (Isa candidate : {Isa::kBaseline, Isa::kX86V3, Isa::kX86V4})
    if (isa_supported(candidate))
      supported += std::string(supported.empty() ? "" : ";") + isa_name(candidate);
  return {{"version", TP_VERSION},
          {"torch_target", TP_TORCH_TARGET},
          {"compiler", TP_COMPILER},
          {"isa", isa_name(isa())},
          {"isa_variants", supported},
          {"cuda", TP_CUDA},
          {"cuda_architectures", TP_CUDA_ARCHS}};
}

std::string sources() { return TP_SOURCES; }

void set_isa_by_name(const std::string& name) { set_isa(isa_named(name.c_str(), "isa")); }

}  // namespace twophase
