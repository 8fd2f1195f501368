// Kernels against float64 without Python: what a planted fault must not survive (test_faults.py).
//   probe rows | flash | matrix | token_loss
// Exit status: 0 right, 1 wrong numbers, 2 the simulator found threads that wait for ever.
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
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

bool rows_are_right(int64_t vocabulary) {
  constexpr int64_t kRows = 2;
  const int64_t stride = round_up(vocabulary, kStrideUnit);
  const std::unique_ptr<float[]> logits(new float[size_t(kRows * stride)]);  // exactly as long as the tile
  std::mt19937 random{uint32_t(vocabulary)};
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

// Exactly so many numbers: AddressSanitizer sees the end.
template <class T>
std::unique_ptr<T[]> exactly(size_t n, T value = {}) {
  std::unique_ptr<T[]> memory(new T[n]);
  std::fill_n(memory.get(), n, value);
  return memory;
}

bool close(double actual, double expected, double tolerance) {
  return std::abs(actual - expected) <= tolerance * (1 + std::abs(expected));
}

// Two rows in chunks, bf16: their logp, their direction, and the rewritten logits of the weight's pass. The logits rise
// from chunk to chunk and fall within one, by more than a reference has room for.
bool flash_is_right(int64_t vocabulary) {
  constexpr int64_t kRows = 2, kHidden = 4, kChunk = 5120;
  std::mt19937 random{uint32_t(vocabulary) + 1};
  std::normal_distribution<float> normal(0, 1);
  std::vector<float> logits(size_t(kRows * vocabulary)), weight(size_t(vocabulary * kHidden));
  for (int64_t i = 0; i < kRows; ++i)
    for (int64_t j = 0; j < vocabulary; ++j)
      logits[size_t(i * vocabulary + j)] =
          normal(random) + float(i) * (45.0f * float(j / kChunk) - 14.0f * float(j % kChunk / 4096));
  for (float& w : weight) w = normal(random);
  const int64_t target[kRows] = {vocabulary / 3, 7};
  const float c[kRows] = {0.5f, -1};
  float logp[kRows];
  RowNormalizer normalizer[kRows];
  const int64_t chunks = (vocabulary + kChunk - 1) / kChunk, segments = (vocabulary + kSegment - 1) / kSegment;
  const auto state = exactly<ChunkState>(kRows, {NAN, NAN});
  const auto parts = exactly<float>(size_t(kRows * segments * kPartBytes / 4), NAN);
  const auto sums = exactly<float>(kRows * kHidden, NAN);
  const auto direction = exactly<float>(kRows * kHidden);
  const auto tile_logits = exactly<float>(kRows * kChunk);
  RowTile tile{0,       kRows, kChunk, tile_logits.get(), nullptr, {vocabulary, 1, 0, nullptr},
               nullptr, 1,     target, ExactKl::none,     {}};
  tile.loss.kind = RowLoss::given, tile.loss.c = c;
  const auto load = [&](int64_t column, int64_t columns) {
    for (int64_t i = 0; i < kRows; ++i)
      for (int64_t j = 0; j < kChunk; ++j)
        tile_logits[size_t(i * kChunk + j)] = j < columns ? logits[size_t(i * vocabulary + column + j)] : NAN;
  };
  const auto rewritten = [&](int64_t i) { return reinterpret_cast<Bf16*>(&tile_logits[size_t(i * kChunk)]) + kChunk; };

  Chunks all{state.get(), reinterpret_cast<PartSums*>(parts.get()), segments, sums.get(), kHidden};
  for (int64_t k = 0; k < chunks; ++k) {
    const int64_t column = k * kChunk, columns = std::min(kChunk, vocabulary - column);
    load(column, columns);
    all.before = column / kSegment;
    launch_chunk(tile, column, columns, all, Dtype::bf16, nullptr);
    for (int64_t i = 0; i < kRows; ++i)
      for (int64_t h = 0; h < kHidden; ++h) {
        double sum = k ? sums[size_t(i * kHidden + h)] : 0;
        for (int64_t j = 0; j < columns; ++j)
          sum += double(widen(rewritten(i)[j])) * weight[size_t((column + j) * kHidden + h)];
        sums[size_t(i * kHidden + h)] = float(sum);
      }
  }
  launch_finish(tile, {logp, nullptr, nullptr, nullptr, nullptr, normalizer}, all,
                {weight.data(), Dtype::f32, direction.get(), Dtype::f32}, nullptr);

  for (int64_t i = 0; i < kRows; ++i) {
    const std::vector<double> p = log_softmax(&logits[size_t(i * vocabulary)], vocabulary);
    if (!close(logp[i], p[size_t(target[i])], 1e-5)) return false;
    for (int64_t h = 0; h < kHidden; ++h) {
      double expected = 0;
      for (int64_t j = 0; j < vocabulary; ++j)
        expected += c[i] * ((j == target[i]) - std::exp(p[size_t(j)])) * weight[size_t(j * kHidden + h)];
      if (!close(direction[size_t(i * kHidden + h)], expected, 0.005)) return false;
    }
  }
  for (int64_t column = 0; column < vocabulary; column += kChunk) {
    const int64_t columns = std::min(kChunk, vocabulary - column);
    load(column, columns);
    launch_weight_rows(tile, column, columns, c, logp, normalizer, Dtype::bf16, nullptr);
    for (int64_t i = 0; i < kRows; ++i) {
      const std::vector<double> p = log_softmax(&logits[size_t(i * vocabulary)], vocabulary);
      for (int64_t j = 0; j < columns; ++j) {
        const double dx = c[i] * ((column + j == target[i]) - std::exp(p[size_t(column + j)]));
        if (!(std::abs(widen(rewritten(i)[j]) - dx) <= 0.005 * std::abs(dx) + 1e-9)) return false;
      }
    }
  }
  return true;
}

bool matrices_are_right(int64_t columns) {
  constexpr int64_t kRows = 3;
  const int64_t stride = round_up(columns, kStrideUnit), n = kRows * columns;
  const auto x = exactly<float>(size_t(kRows * stride)), sums = exactly<float>(size_t(columns), 1.0f);
  const auto half = exactly<Bf16>(size_t(n));
  for (int64_t i = 0; i < kRows * stride; ++i) x[size_t(i)] = float(i % 7) - 2;
  const float scale[kRows] = {2, 0, -1}, factor = 0.5f;
  launch_add_columns(sums.get(), x.get(), Dtype::f32, scale, &factor, kRows, columns, stride, nullptr);
  for (int64_t j = 0; j < columns; ++j) {
    double expected = 1;
    for (int64_t i = 0; i < kRows; ++i) expected += double(factor) * scale[i] * x[size_t(i * stride + j)];
    if (!close(sums[size_t(j)], expected, 1e-6)) return false;
  }
  launch_scale(x.get(), half.get(), Dtype::bf16, &factor, n, nullptr);
  for (int64_t i = 0; i < n; ++i)
    if (widen(half[size_t(i)]) != factor * x[size_t(i)]) return false;
  return true;
}

// On policy, and one weight in a sequence: the loss is -sum w A, and c = -w A.
bool token_loss_is_right(bool sequence_level) {
  constexpr int64_t kTokens = 601;
  const int32_t bounds[] = {0, 200, 201, kTokens};
  const auto weight = exactly<float>(kTokens, 0.25f), advantage = exactly<float>(kTokens),
             logp = exactly<float>(kTokens, -1.0f);
  const auto c = exactly<float>(kTokens, NAN);
  for (int64_t s = 0; s < 3; ++s)
    for (int64_t t = bounds[s]; t < bounds[s + 1]; ++t) advantage[size_t(t)] = float(s) + 1;
  constexpr float kNone = std::numeric_limits<float>::infinity();
  LossConfig config{};
  config.sequence_level = sequence_level, config.detach = true;
  config.epsilon = config.epsilon_high = 0.2f, config.delta = config.cap = config.threshold = kNone;
  const LossArguments arguments{
      config,      {kTokens, weight.get(), advantage.get(), nullptr, nullptr, nullptr, nullptr},
      {bounds, 3}, logp.get(),
      nullptr,     nullptr,
      c.get()};
  const auto partials = exactly<LossSums>(size_t(loss_partials(arguments)));
  float loss;
  LossMetrics metrics;
  launch_token_loss(arguments, partials.get(), {&loss, &metrics}, nullptr);
  double expected = 0;
  for (int64_t t = 0; t < kTokens; ++t) {
    expected -= double(weight[size_t(t)]) * advantage[size_t(t)];
    if (!close(c[size_t(t)], -double(weight[size_t(t)]) * advantage[size_t(t)], 1e-5)) return false;
  }
  return close(loss, expected, 1e-6) && metrics.tokens == kTokens;
}

bool is_right(const std::string& what) {
  bool right = true;
  if (what == "rows")
    for (const int64_t vocabulary : {5, 96, 1000, 4096, 9000, 33000}) right = right && rows_are_right(vocabulary);
  if (what == "flash")
    for (const int64_t vocabulary : {100, 5120, 11000}) right = right && flash_is_right(vocabulary);
  if (what == "matrix")
    for (const int64_t columns : {3, 8, 1030}) right = right && matrices_are_right(columns);
  if (what == "token_loss") right = token_loss_is_right(false) && token_loss_is_right(true);
  return right;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 2) return 3;
  for (const sim::Schedule schedule : {sim::Schedule::forward, sim::Schedule::reverse, sim::Schedule::shuffled}) {
    sim::schedule = schedule;
    if (is_right(argv[1])) continue;
    std::printf("wrong numbers: schedule %d\n", int(schedule));
    return 1;
  }
  return 0;
} catch (const std::runtime_error& error) {
  std::printf("%s\n", error.what());
  return 2;
}
