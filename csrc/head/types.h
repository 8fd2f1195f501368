// What a head pass reads and writes, the same on every device.
#pragma once

#include <cstdint>

namespace longgrpo {

enum class Dtype { f32, bf16, f16 };

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

enum class ExactKl { none, reverse, forward };

// z = cap(logit_scale (h.w + bias)) / temperature, cap(x) = softcap tanh(x / softcap).
struct LogitTransform {
  int64_t vocabulary;
  float logit_scale;
  float softcap;      // 0: none
  const float* bias;  // [vocabulary] or null
};

struct HeadShape {
  int64_t tokens, hidden, vocabulary;
};

struct HeadInputs {
  const void* hidden;            // [tokens, hidden]
  const void* reference_hidden;  // the same, or null
  Dtype hidden_dtype;
  const void* weight;            // [vocabulary, hidden]
  const void* reference_weight;  // the same; may be `weight`
  Dtype weight_dtype;
  const int64_t* target;           // [tokens]
  const float* token_temperature;  // [tokens] or null
  float temperature;
  LogitTransform transform;
  ExactKl exact_kl;
  bool alone = false;  // logp meets no other pass's in a ratio: its last bits are free

  bool reference() const { return exact_kl != ExactKl::none && reference_hidden; }
};

// What makes a probability of a logit, from one pass to the next: p_j = exp(z_j - highest) inverse.
struct RowNormalizer {
  float highest;  // before the temperature
  float inverse;
};

struct HeadOutputs {          // null if not wanted
  float* logp = nullptr;      // [tokens]
  float* entropy = nullptr;   // [tokens]
  float* kl = nullptr;        // [tokens]
  void* direction = nullptr;  // [tokens, hidden] in the hidden states' dtype: dL/dhidden = scale * direction
  float* scale = nullptr;     // [tokens]; null: direction is dL/dhidden itself
  // [vocabulary, hidden]; f32 on the CPU, where the first active tile writes it; zeroed on CUDA.
  void* dweight = nullptr;
  Dtype dweight_dtype = Dtype::f32;
  float* dbias = nullptr;               // [vocabulary], zeroed
  RowNormalizer* normalizer = nullptr;  // [tokens], for a pass for only the weight's gradient

  bool scores() const { return logp || entropy || kl; }
  bool gradient() const { return direction || dweight || dbias; }
};

}  // namespace longgrpo
