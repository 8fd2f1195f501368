// The row kernel against float64 without Python: what a planted fault must not survive (test_faults.py).
// Exit status: 0 right, 1 wrong numbers, 2 the simulator found threads that wait for ever.
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/numbers.cuh"

using namespace longgrpo;

namespace longgrpo {
Chip use_device(int) { return {132, 100 << 10}; }
}  // namespace longgrpo

namespace {

// log p of every column, in float64.
std::vector<double> log_softmax(const float* x, int64_t n) {
  double highest = -INFINITY, sum = 0;
  for (int64_t j = 0; j < n; ++j) highest = std::max(highest, double(x[j]));
  for (int64_t j = 0; j < n; ++j) sum += std::exp(x[j] - highest);
  std::vector<double> out(static_cast<size_t>(n));
  for (int64_t j = 0; j < n; ++j) out[size_t(j)] = x[j] - highest - std::log(sum);
  return out;
}

bool right(int64_t vocabulary, uint32_t seed) {
  constexpr int64_t kRows = 2;
  const int64_t stride = round_up(vocabulary, kStrideUnit);
  const std::unique_ptr<float[]> logits(new float[size_t(kRows * stride)]);  // exactly as long as the tile
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 3);
  for (int64_t i = 0; i < kRows * stride; ++i) logits[size_t(i)] = normal(random);
  const std::vector<float> before(logits.get(), logits.get() + kRows * stride);
  const int64_t target[kRows] = {vocabulary / 3, vocabulary - 1};
  const float c[kRows] = {0.5f, -2.0f};
  float logp[kRows], row_scale[kRows];

  RowTile tile{0,       kRows, stride, logits.get(),  nullptr, {vocabulary, 1, 0, nullptr},
               nullptr, 1,     target, ExactKl::none, {}};
  tile.loss.kind = RowLoss::given, tile.loss.c = c;
  launch_rows(tile, {logp, nullptr, nullptr, nullptr, row_scale}, Dtype::bf16, use_device(0), nullptr);

  for (int64_t i = 0; i < kRows; ++i) {
    const std::vector<double> expected = log_softmax(&before[size_t(i * stride)], vocabulary);
    if (!(std::abs(logp[i] - expected[size_t(target[i])]) < 1e-5)) return false;
    const Bf16* const row = reinterpret_cast<const Bf16*>(logits.get() + i * stride) + stride;
    for (int64_t j = 0; j < vocabulary; ++j) {
      const double p = std::exp(expected[size_t(j)]), dx = c[i] * ((j == target[i]) - p);
      if (!(std::abs(double(row_scale[i]) * widen(row[j]) - dx) <= 0.005 * std::abs(dx) + 1e-9)) return false;
    }
  }
  return true;
}

}  // namespace

int main() try {
  for (const sim::Schedule schedule : {sim::Schedule::forward, sim::Schedule::reverse, sim::Schedule::shuffled}) {
    sim::schedule = schedule;
    for (const int64_t vocabulary : {5, 96, 1000, 4096, 9000, 33000})
      if (!right(vocabulary, uint32_t(vocabulary))) {
        std::printf("wrong numbers: schedule %d, vocabulary %d\n", int(schedule), int(vocabulary));
        return 1;
      }
  }
  return 0;
} catch (const std::runtime_error& error) {
  std::printf("%s\n", error.what());
  return 2;
}
