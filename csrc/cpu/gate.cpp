#include "gate.h"

#include <algorithm>
#include <cmath>

#include "convert.h"
#include "simd.h"

namespace longgrpo {
namespace {

constexpr int64_t kBlock = 64;  // whole vectors, the last of a row too: what fills them up is not read

struct Slope {
  float value, slope;  // act(x), act'(x)
};

LONGGRPO_INLINE Slope silu(float x) {
  const float e = simd::exp_nonpositive(x < 0 ? x : -x);
  const float sigmoid = (x < 0 ? e : 1.0f) / (1.0f + e);
  return {x * sigmoid, sigmoid * (1.0f + x * (1.0f - sigmoid))};
}

// Hendrycks and Gimpel 2016, by tanh.
LONGGRPO_INLINE Slope gelu_tanh(float x) {
  constexpr float c = 0.797884561f, cubic = 0.044715f;  // sqrt(2 / pi)
  const float t = simd::tanh(c * (x + cubic * x * x * x));
  const float inner = c * (1.0f + 3.0f * cubic * x * x);
  return {0.5f * x * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner};
}

template <Activation kActivation>
LONGGRPO_INLINE Slope act(float x) {
  return kActivation == Activation::silu ? silu(x) : gelu_tanh(x);
}

template <Activation kActivation>
LONGGRPO_INLINE void values(const float* gate, const float* up, float* y) {
#pragma omp simd
  for (int64_t i = 0; i < kBlock; ++i) y[i] = act<kActivation>(gate[i]).value * up[i];
}
LONGGRPO_CLONES void silu_values(const float* gate, const float* up, float* y) {
  values<Activation::silu>(gate, up, y);
}
LONGGRPO_CLONES void gelu_values(const float* gate, const float* up, float* y) {
  values<Activation::gelu_tanh>(gate, up, y);
}

template <Activation kActivation>
LONGGRPO_INLINE void slopes(const float* gate, const float* up, const float* dy, float* dgate, float* dup) {
#pragma omp simd
  for (int64_t i = 0; i < kBlock; ++i) {
    const Slope at = act<kActivation>(gate[i]);
    dgate[i] = dy[i] * up[i] * at.slope;
    dup[i] = dy[i] * at.value;
  }
}
LONGGRPO_CLONES void silu_slopes(const float* gate, const float* up, const float* dy, float* dgate, float* dup) {
  slopes<Activation::silu>(gate, up, dy, dgate, dup);
}
LONGGRPO_CLONES void gelu_slopes(const float* gate, const float* up, const float* dy, float* dgate, float* dup) {
  slopes<Activation::gelu_tanh>(gate, up, dy, dgate, dup);
}

const void* at(const void* x, int64_t i, Dtype dtype) { return static_cast<const char*>(x) + i * size_of(dtype); }
void* at(void* x, int64_t i, Dtype dtype) { return static_cast<char*>(x) + i * size_of(dtype); }

}  // namespace

void gated(Activation activation, Dtype dtype, const void* gate, const void* up, void* y, int64_t n) {
  float g[kBlock] = {}, u[kBlock] = {}, out[kBlock];
  const auto block = activation == Activation::silu ? silu_values : gelu_values;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t count = std::min(kBlock, n - i);
    to_float(at(gate, i, dtype), dtype, g, count), to_float(at(up, i, dtype), dtype, u, count);
    block(g, u, out);
    from_float(out, 1.0f, at(y, i, dtype), dtype, count);
  }
}

void gated_backward(Activation activation, Dtype dtype, const void* gate, const void* up, const void* dy, void* dgate,
                    void* dup, int64_t n) {
  float g[kBlock] = {}, u[kBlock] = {}, d[kBlock] = {}, to_gate[kBlock], to_up[kBlock];
  const auto block = activation == Activation::silu ? silu_slopes : gelu_slopes;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t count = std::min(kBlock, n - i);
    to_float(at(gate, i, dtype), dtype, g, count), to_float(at(up, i, dtype), dtype, u, count);
    to_float(at(dy, i, dtype), dtype, d, count);
    block(g, u, d, to_gate, to_up);
    from_float(to_gate, 1.0f, at(dgate, i, dtype), dtype, count);
    from_float(to_up, 1.0f, at(dup, i, dtype), dtype, count);
  }
}

}  // namespace longgrpo
