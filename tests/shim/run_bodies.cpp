// Runs every CUDA kernel body on the CPU and compares it with a plain reference.
// Usage: run_bodies [op ...]; prints one line per op; exit code 1 where a check failed.
#include <cstring>

#include "check_gram_logdet.h"
#include "check_last_layer_epoch.h"
#include "check_last_layer_step.h"
#include "check_multi.h"
#include "check_smooth_max_pool.h"
#include "check_softplus.h"

int main(int count, char** names) {
  using namespace twophase;
  const struct {
    const char* name;
    void (*check)(Checks&);
  } ops[] = {{"softplus", check_softplus},
             {"smooth_max_pool", check_smooth_max_pool},
             {"perturb_", check_perturb},
             {"sgd_", check_sgd},
             {"last_layer_step_", check_last_layer_step},
             {"last_layer_epoch_", check_last_layer_epoch},
             {"gram_logdet", check_gram_logdet}};
  bool failed = false;
  for (const auto& op : ops) {
    bool wanted = count == 1;
    for (int i = 1; i < count; ++i) wanted = wanted || std::strcmp(names[i], op.name) == 0;
    if (!wanted) continue;
    Checks checks;
    op.check(checks);
    std::printf("%s: %d checks, %d failed\n", op.name, checks.done, checks.failed);
    failed = failed || checks.failed || !checks.done;
  }
  return failed;
}
