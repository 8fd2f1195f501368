// The scoring kernel against float64 without Python: what a planted fault must not survive (test_score_faults.py).
// Exit status: 0 right, 1 wrong numbers or bank conflicts, 2 the simulator found threads that wait for ever.
#include <cmath>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <vector>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/numbers.cuh"

using namespace longgrpo;

namespace longgrpo {
Chip use_device(int) { return {132, 100 << 10, 80}; }
}  // namespace longgrpo

namespace {

std::vector<Bf16> random_numbers(int64_t n, float deviation, std::mt19937& random) {
  std::normal_distribution<float> normal(0, deviation);
  std::vector<Bf16> out(static_cast<size_t>(n));
  for (Bf16& x : out) round_to(normal(random), x);
  return out;
}

bool right(int64_t rows, int64_t size, int64_t vocabulary, int64_t splits) {
  std::mt19937 random(uint32_t(rows + size + vocabulary));
  const std::vector<Bf16> hidden = random_numbers(rows * size, 1, random);
  const std::vector<Bf16> weight = random_numbers(vocabulary * size, 2.0f / std::sqrt(float(size)), random);
  std::vector<int64_t> target;
  for (int64_t i = 0; i < rows; ++i) target.push_back(i * 37 % vocabulary);
  std::vector<float> logp(size_t(rows), NAN), entropy(size_t(rows), NAN), target_x(size_t(rows), NAN);
  std::vector<float> parts(size_t(rows * score_parts(vocabulary) * kPartBytes) / sizeof(float), NAN);

  const RowTile tile{
      0, rows, 0, nullptr, nullptr, {vocabulary, 1, 0, nullptr}, nullptr, 1, target.data(), ExactKl::none, {}};
  launch_score({tile, hidden.data(), weight.data(), size, reinterpret_cast<PartSums*>(parts.data()), target_x.data()},
               Dtype::bf16, splits, {logp.data(), entropy.data(), nullptr, nullptr, nullptr}, nullptr);

  for (int64_t i = 0; i < rows; ++i) {
    std::vector<double> z(static_cast<size_t>(vocabulary));
    double sum = 0, weighted = 0;
    for (int64_t j = 0; j < vocabulary; ++j) {
      for (int64_t k = 0; k < size; ++k)
        z[size_t(j)] += double(widen(hidden[size_t(i * size + k)])) * widen(weight[size_t(j * size + k)]);
      sum += std::exp(z[size_t(j)]), weighted += std::exp(z[size_t(j)]) * z[size_t(j)];
    }
    const double expected = z[size_t(target[size_t(i)])] - std::log(sum);
    if (!(std::abs(logp[size_t(i)] - expected) < 1e-5)) return false;
    if (!(std::abs(entropy[size_t(i)] - (std::log(sum) - weighted / sum)) < 1e-5)) return false;
  }
  return true;
}

}  // namespace

int main() try {
  for (const sim::Schedule schedule : {sim::Schedule::forward, sim::Schedule::reverse, sim::Schedule::shuffled}) {
    sim::schedule = schedule;
    if (!right(30, 168, 300, 1) || !right(131, 37, 140, 1) || !right(3, 8, 600, 2)) {
      std::printf("wrong numbers: schedule %d\n", int(schedule));
      return 1;
    }
  }
  if (sim::shared_accesses.conflicts == 0) return 0;
  std::printf("bank conflicts\n");
  return 1;
} catch (const std::runtime_error& error) {
  std::printf("%s\n", error.what());
  return 2;
}
