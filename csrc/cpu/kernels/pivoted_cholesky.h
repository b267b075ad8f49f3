#pragma once

#include <cstdint>

#include "../isa.h"

// Cholesky with diagonal pivoting, the largest remaining diagonal element first, of the symmetric
// matrix with this diagonal [ld] and the upper triangle of rows [n, ld] as the rest, ld a multiple
// of kGramLanes (gram_logdet.h), columns [n, ld) zero; both are overwritten. column: [ld], scratch.
// Returns the number of positive pivots before the first that is not.
TP_KERNEL(int64_t, pivoted_cholesky,
          (int64_t n, int64_t ld, double* rows, double* diagonal, double* column))
