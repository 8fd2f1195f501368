#include "rows.h"

#include <algorithm>

#include "simd.h"

namespace longgrpo {
namespace {

constexpr int64_t kBlock = 4096;  // partial sums of one block stay in fp32, blocks are added in double

LONGGRPO_CLONES float max_of(const float* x, int64_t n) {
  float best = -INFINITY;
#pragma omp simd reduction(max : best)
  for (int64_t j = 0; j < n; ++j) best = x[j] > best ? x[j] : best;
  return best;
}

// With `kKeep` the exponentials take the place of the logits.
template <bool kKeep>
LONGGRPO_INLINE void exp_sums_of(float* x, int64_t n, float factor, float max_x, double* sum, double* weighted) {
  float s = 0, w = 0;
#pragma omp simd reduction(+ : s, w)
  for (int64_t j = 0; j < n; ++j) {
    const float d = factor * (x[j] - max_x);
    const float e = simd::exp_nonpositive(d);
    s += e;
    w += e * (d < kLowestLogP ? kLowestLogP : d);
    if (kKeep) x[j] = e;
  }
  *sum += s;
  *weighted += w;
}

LONGGRPO_CLONES void exp_sums(float* x, int64_t n, float factor, float max_x, double* sum, double* weighted) {
  exp_sums_of<false>(x, n, factor, max_x, sum, weighted);
}
LONGGRPO_CLONES void exp_sums_keep(float* x, int64_t n, float factor, float max_x, double* sum, double* weighted) {
  exp_sums_of<true>(x, n, factor, max_x, sum, weighted);
}

LONGGRPO_CLONES void scale_logits(float* x, const float* bias, int64_t n, float scale) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) x[j] = scaled_logit(x[j], bias[j], scale);
}

LONGGRPO_CLONES void cap_logits(float* x, int64_t n, float cap, float to_cap) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) x[j] = capped_logit<simd::Math>(x[j], cap, to_cap);
}

LONGGRPO_CLONES void multiply_cap_slope(float* gradient, const float* x, int64_t n, float inverse_cap) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) gradient[j] *= cap_slope(x[j], inverse_cap);
}

// log p of the columns of one row, as arguments of a vector loop
struct LogP {
  float factor, max_x, offset;
  explicit LogP(const RowStatistics& row) : factor(row.factor), max_x(row.max_x), offset(row.softmax.offset) {}
  LONGGRPO_INLINE float operator()(float x) const { return factor * (x - max_x) - offset; }
};

LONGGRPO_CLONES void sign(const float* x, float* out, int64_t n, LogP logp, RowGradient g, float entropy) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = logit_gradient<simd::Math>(g, logp(x[j]), entropy);
}

LONGGRPO_CLONES void add_reverse_kl(const float* x, const float* ref, float* out, int64_t n, LogP logp, LogP ref_logp,
                                    float weight, float kl) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] += reverse_kl_gradient<simd::Math>(weight, logp(x[j]), ref_logp(ref[j]), kl);
}

LONGGRPO_CLONES void add_forward_kl(const float* x, const float* ref, float* out, int64_t n, LogP logp, LogP ref_logp,
                                    float weight) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] += forward_kl_gradient<simd::Math>(weight, logp(x[j]), ref_logp(ref[j]));
}

// KL(a || b) over one block
LONGGRPO_CLONES float divergence(const float* a, const float* b, int64_t n, LogP a_logp, LogP b_logp) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += divergence_term<simd::Math>(a_logp(a[j]), b_logp(b[j]));
  return sum;
}

template <class F>
void blocks(int64_t n, F&& f) {
  for (int64_t begin = 0; begin < n; begin += kBlock) f(begin, std::min(kBlock, n - begin));
}

}  // namespace

float prepare_row(const LogitTransform& t, float temperature, float* x) {
  float factor = t.logit_scale;
  if (t.bias) {
    scale_logits(x, t.bias, t.vocabulary, factor);
    factor = 1.0f;
  }
  if (t.softcap > 0) {
    cap_logits(x, t.vocabulary, t.softcap, factor / t.softcap);
    factor = 1.0f;
  }
  return factor / temperature;
}

RowStatistics read_row(float* x, int64_t vocabulary, int64_t target, float factor, bool entropy, bool keep) {
  const float target_x = x[target];
  x[target] = -INFINITY;  // leaves the maximum and adds exp(-inf) = 0 to the sums
  float max_x = max_of(x, vocabulary);
  if (max_x == -INFINITY) max_x = 0;
  double sum = 0, weighted = 0;
  blocks(vocabulary, [&](int64_t j, int64_t n) {
    (keep ? exp_sums_keep(x + j, n, factor, max_x, &sum, &weighted)
          : exp_sums(x + j, n, factor, max_x, &sum, &weighted));
  });
  x[target] = keep ? float(-sum) : target_x;
  RowSoftmax softmax = finish_row({float(sum), float(weighted)}, factor * (target_x - max_x));
  if (!entropy) softmax.entropy = 0;
  return {factor, max_x, softmax};
}

float exact_kl(const float* x, int64_t vocabulary, const RowStatistics& row, const ReferenceRow& reference) {
  const LogP logp(row), ref_logp(reference.statistics);
  const bool reverse = reference.kind == ExactKl::reverse;
  double sum = 0;
  blocks(vocabulary, [&](int64_t j, int64_t n) {
    sum += reverse ? divergence(x + j, reference.x + j, n, logp, ref_logp)
                   : divergence(reference.x + j, x + j, n, ref_logp, logp);
  });
  return float(sum);
}

void sign_row(const LogitTransform& transform, float* x, int64_t target, const RowStatistics& row,
              const RowGradient& gradient, const ReferenceRow& reference) {
  const LogP logp(row), ref_logp(reference.statistics);
  float block[kBlock];
  blocks(transform.vocabulary, [&](int64_t j, int64_t n) {
    sign(x + j, block, n, logp, gradient, row.softmax.entropy);
    if (j <= target && target < j + n)
      block[target - j] = target_logit_gradient(gradient, row.softmax.logp, row.softmax.entropy);
    if (reference.kind == ExactKl::reverse)
      add_reverse_kl(x + j, reference.x + j, block, n, logp, ref_logp, gradient.kl, reference.divergence);
    if (reference.kind == ExactKl::forward)
      add_forward_kl(x + j, reference.x + j, block, n, logp, ref_logp, gradient.kl);
    if (transform.softcap > 0) multiply_cap_slope(block, x + j, n, 1.0f / transform.softcap);
    std::copy(block, block + n, x + j);
  });
}

}  // namespace longgrpo
