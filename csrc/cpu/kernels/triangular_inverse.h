#pragma once

#include <cstdint>

#include "../isa.h"

// csrc/triangular_inverse.h for columns first, first + 1, ..., `count` <= kInverseColumns of them.
// scratch [n * kInverseColumns]; on [n]: zeros, and zeros afterwards.
TP_KERNEL(void, triangular_inverse,
          (int64_t n, const int64_t* starts, const int64_t* columns, const double* values,
           int64_t first, int64_t count, double* scratch, uint8_t* on, double* squares))
