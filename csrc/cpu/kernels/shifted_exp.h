#pragma once

#include <cstdint>

#include "../isa.h"

// z[j] = exp(z[j] - max) for z[j] <= max, within 2 ulp; 0 below exp(-708), NaN stays NaN.
TP_KERNEL(void, shifted_exp, (double* z, int64_t k, double max))
