#include "../gram_logdet.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "huge_pages.h"
#include "kernels/gram_logdet.h"
#include "kernels/pivoted_cholesky.h"
#include "team.h"

namespace twophase {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Most roundings of a product on its way into G, and into l_ij l_jj (kernels/gram_logdet.h): those
// of its panel or block, then one for each addition or subtraction, and two for a root.
int64_t gram_terms(int64_t p) {
  return std::min(p, kGramPanel) + (p + kGramPanel - 1) / kGramPanel;
}
int64_t cholesky_terms(int64_t n) {
  return std::min(n + 2, kGramBlock + n / kGramBlock + kGramLanes + 2);
}

// Scratch of one matrix at a time
class Workspace {
 public:
  explicit Workspace(int64_t n) : padded_(gram_padded(n)), exponents_(n) {
    const int64_t rows = n <= kGramSmall ? n * padded_ : 0;
    const int64_t count = kGramPanel * padded_ + 2 * gram_triangle(n) + rows + 5 * padded_;
    memory_.reset(new double[count + kLine]);
    hint_huge_pages(memory_.get(), count * sizeof(double));
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
    next_ = memory_.get() + (kLine - address / sizeof(double) % kLine) % kLine;
    matrix.panel = take(kGramPanel * padded_);
    matrix.gram = take(gram_triangle(n));
    matrix.factor = take(gram_triangle(n));
    matrix.scale = take(padded_);
    matrix.exponents = exponents_.data();
    pivots = take(padded_), shifted_pivots = take(padded_);
    diagonal = take(padded_), column = take(padded_);
    pivoted = take(rows);
  }

  GramMatrix matrix{};
  double *pivots, *shifted_pivots, *diagonal, *column;  // [padded]
  double* pivoted;                                      // [n, padded], n <= kGramSmall

 private:
  static constexpr int64_t kLine = 8;  // doubles of a cache line

  double* take(int64_t count) {
    double* begin = next_;
    next_ += count;  // every count but the last is a multiple of kLine
    return begin;
  }

  int64_t padded_;
  std::vector<int> exponents_;
  std::unique_ptr<double[]> memory_;
  double* next_;
};

// One thread alone: what Team is to many.
struct Alone {
  void barrier() {}
};

// One matrix, by all members of a team: each calls `run`.
class Certificate {
 public:
  void run(const GramLogdet& g, int64_t item, Workspace& w, auto& team, int64_t part,
           int64_t parts) {
    const GramMatrix& a = w.matrix;
    const int64_t p = g.m + (g.append_ones ? 1 : 0);
    if (!TP_DISPATCH(gram_scale)(a, g.n * part / parts, g.n * (part + 1) / parts))
      finite_.store(false, std::memory_order_relaxed);
    team.barrier();
    if (!finite_.load(std::memory_order_relaxed)) {
      if (part == 0) not_finite(g, item);
      return;
    }
    for (int64_t c = 0; c == 0 || c < p; c += kGramPanel) {
      const int64_t width = std::min(p - c, kGramPanel);
      TP_DISPATCH(gram_pack)(a, c, width, part, parts);
      team.barrier();
      TP_DISPATCH(gram_add)(a, width, c == 0, part, parts);
      team.barrier();
    }
    if (part == 0) trace_ = trace(a, w.diagonal);
    factor(a, w.pivots, failed_[0], team, part, parts);
    if (g.n <= p) {
      const double s = certificate_shift(gram_terms(p), cholesky_terms(g.n), trace_);
      if (part == 0) set_shifted(a, w, s);
      factor(a, w.shifted_pivots, failed_[1], team, part, parts);
    }
    if (part == 0) result(g, item, w, p);
  }

 private:
  static double trace(const GramMatrix& a, double* diagonal) {
    TP_DISPATCH(gram_get_diagonal)(a, diagonal);
    double sum = 0;
    for (int64_t i = 0; i < a.n; ++i) sum += diagonal[i];
    return sum;
  }

  static void set_shifted(const GramMatrix& a, Workspace& w, double s) {
    for (int64_t i = 0; i < a.n; ++i) w.column[i] = shifted_down(w.diagonal[i], s);
    TP_DISPATCH(gram_set_diagonal)(a, w.column);
  }

  // failed: -1, or the first row whose pivot is not positive
  static void factor(const GramMatrix& a, double* pivots, int64_t& failed, auto& team, int64_t part,
                     int64_t parts) {
    for (int64_t c = 0; c < a.n; c += kGramBlock) {
      if (part == 0) failed = TP_DISPATCH(gram_factor_block)(a, c, pivots);
      team.barrier();
      if (failed >= 0) return;
      TP_DISPATCH(gram_factor_below)(a, c, part, parts);
      team.barrier();
    }
  }

  void result(const GramLogdet& g, int64_t item, Workspace& w, int64_t p) const {
    const GramMatrix& a = w.matrix;
    const auto [low, high] = std::minmax_element(a.exponents, a.exponents + a.n);
    int64_t exponents = 0, roundings = cholesky_terms(g.n);
    for (int64_t i = 0; i < a.n; ++i) exponents += a.exponents[i];

    const bool complete = failed_[0] < 0, proved = g.n <= p && failed_[1] < 0;
    const double logarithm = complete ? sum_of_logarithms(w.pivots, g.n) : -kInfinity;
    g.info[item] = failed_[0] + 1;
    g.logabsdet[item] = logarithm + 2.0 * std::log(2.0) * static_cast<double>(exponents);
    g.logabsdet_error[item] =
        complete && proved ? logarithm - sum_of_logarithms(w.shifted_pivots, g.n) : kInfinity;
    if (proved) {
      g.rank[item] = g.n;
    } else if (g.n <= kGramSmall) {
      roundings = g.n + 2;
      g.rank[item] = pivoted_rank(a, w, certificate_shift(gram_terms(p), roundings, trace_));
    } else {
      g.rank[item] = 0;
    }
    g.rcond[item] =
        g.rank[item] > 0 ? certificate_rcond(gram_terms(p), roundings, *high - *low) : 0.0;
  }

  static int64_t pivoted_rank(const GramMatrix& a, Workspace& w, double s) {
    const int64_t padded = gram_padded(a.n);
    TP_DISPATCH(gram_unpack)(a, w.pivoted);
    for (int64_t i = 0; i < a.n; ++i) w.diagonal[i] = shifted_down(w.diagonal[i], s);
    std::fill(w.diagonal + a.n, w.diagonal + padded, 0.0);
    return TP_DISPATCH(pivoted_cholesky)(a.n, padded, w.pivoted, w.diagonal, w.column);
  }

  static double sum_of_logarithms(const double* x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += std::log(x[i]);
    return sum;
  }

  static void not_finite(const GramLogdet& g, int64_t item) {
    g.rank[item] = 0, g.info[item] = -1, g.rcond[item] = 0;
    g.logabsdet[item] = std::numeric_limits<double>::quiet_NaN();
    g.logabsdet_error[item] = kInfinity;
  }

  std::atomic<bool> finite_{true};
  double trace_ = 0;
  int64_t failed_[2] = {-1, -1};
};

struct Cpu {
  static constexpr int64_t most_rows = std::numeric_limits<int64_t>::max();

  static void run(const Tensor&, const GramLogdet& g) {
    if (g.n == 0) {
      for (int64_t i = 0; i < g.batch; ++i) {
        g.rank[i] = g.info[i] = 0;
        g.logabsdet[i] = g.logabsdet_error[i] = g.rcond[i] = 0;
      }
    } else if (g.n <= kGramSmall) {
      one_thread_each(g);
    } else {
      all_threads_together(g);
    }
  }

 private:
  static void place(const GramLogdet& g, int64_t item, GramMatrix& a) {
    a.dtype = g.dtype, a.n = g.n, a.m = g.m, a.append_ones = g.append_ones;
    a.features = static_cast<const char*>(g.features) + item * g.n * g.m * size_of(g.dtype);
  }

  static void one_thread_each(const GramLogdet& g) {
    // About 20 microseconds of work a thread at least.
    const int64_t flops = g.n * g.n * (g.m + 1 + g.n);
    torch::stable::parallel_for(0, g.batch, std::max<int64_t>(1, 200000 / flops),
                                [&](int64_t begin, int64_t end) {
                                  Workspace workspace(g.n);
                                  Alone alone;
                                  for (int64_t i = begin; i < end; ++i) {
                                    place(g, i, workspace.matrix);
                                    Certificate().run(g, i, workspace, alone, 0, 1);
                                  }
                                });
  }

  static void all_threads_together(const GramLogdet& g) {
    Workspace workspace(g.n);
    std::vector<Certificate> items(g.batch);
    Team::run(team_size(g.n / kGramBlock), [&](int member, Team& team) {
      for (int64_t i = 0; i < g.batch; ++i) {
        if (member == 0) place(g, i, workspace.matrix);
        team.barrier();
        items[i].run(g, i, workspace, team, member, team.size());
      }
    });
  }
};

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CPU, m) {
  m.impl("gram_logdet", TORCH_BOX(&twophase::gram_logdet_op<twophase::Cpu>));
}
