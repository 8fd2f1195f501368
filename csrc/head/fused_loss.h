// The fused loss of one call, on every device. How many passes of the head it takes depends on when c = dL/d(logp) is
// known: in the row (one pass), or once a sequence is whole (a frozen head: the direction first and its factor later; a
// trained one: a scoring pass first). A device that can have the weight's gradient by itself takes a trained head as a
// frozen one and adds a pass for it, as far as that is the faster way.
//
// Device lends the parts:
//   auto memory = device.scratch(bytes);          memory.data() is freed with `memory`
//   auto rows = device.visit(visits, weight);     weight [tokens] receives visits.weight of each token; rows is what
//                                                 the device knows of the rows to visit
//   device.pass(in, out, row_loss, rows);         one pass of the head
//   Device::kWeightByItself                       whether it has the next two
//   device.weight_by_itself(in, out, beyond_logp, c_in_row)   whether it is to be called for the weight's gradient
//   device.weight_pass(in, out, c, rows)          the gradient of weight and bias from c [tokens] and what a pass left
//                                                 in out.logp and out.normalizer
//   device.correct(arguments, ratio, kept);       LossArguments::correct of every sequence
//   device.sum(arguments, outputs);               the loss, its metrics and c from logp
//   device.copy(from, to, n);                     n floats
#pragma once

#include <algorithm>

#include "row_loss.h"
#include "sweeps.h"
#include "types.h"

namespace longgrpo {

// The arrays of a batch that a sweep over sequences makes, and their memory.
template <class Device>
class SequenceFactors {
 public:
  // `batch` will read the arrays.
  SequenceFactors(Device& device, const LossConfig& config, TokenBatch& batch)
      : ratios_(batch.corrects_sequences(config) ? batch.tokens : 0),
        cuts_(batch.cuts_sequences(config) ? batch.tokens : 0),
        memory_(device.scratch((1 + ratios_ + cuts_) * int64_t(sizeof(float)))),
        ratio_(ratios_ ? static_cast<float*>(memory_.data()) : nullptr),
        kept_(cuts_ ? static_cast<float*>(memory_.data()) + ratios_ : nullptr) {
    batch.sequence_ratio = ratio_, batch.kept = kept_;
  }
  void make(Device& device, const LossArguments& arguments) const {
    if (ratio_ || kept_) device.correct(arguments, ratio_, kept_);
  }

 private:
  const int64_t ratios_, cuts_;  // entries of the two arrays
  const decltype(std::declval<Device&>().scratch(0)) memory_;
  float *const ratio_, *const kept_;
};

// The loss from logp, without a head.
template <class Device>
void token_loss(Device& device, LossArguments arguments, const LossOutputs& out) {
  const SequenceFactors<Device> factors(device, arguments.config, arguments.batch);
  factors.make(device, arguments);
  device.sum(arguments, out);
}

template <class Device>
class FusedLoss {
 public:
  // `out` names the gradients that are wanted; its logp and entropy [tokens] are zeroed and always there. With `report`
  // tokens without a gradient are counted in the metrics, and the entropy is one of them.
  FusedLoss(Device& device, const LossConfig& config, const HeadShape& shape, const HeadInputs& in,
            const TokenBatch& batch, const Sequences& sequences, const HeadOutputs& out, bool report)
      : device_(device),
        config_(config),
        in_(in),
        batch_(batch),
        sequences_(sequences),
        needs_sequence_(batch.needs_sequence(config)),
        exact_(in.exact_kl != ExactKl::none),
        with_entropy_(report || config.entropy_coef != 0),
        scores_{.logp = out.logp, .entropy = with_entropy_ ? out.entropy : nullptr},
        gradients_(out),
        weight_by_itself_(by_itself()),
        memory_(device.scratch(std::max<int64_t>(1, arrays() * shape.tokens) * int64_t(sizeof(float)))),
        kl_(array(0)),
        c_(array(1)),
        visited_(array(2)),
        factors_(device, config, batch_),
        rows_(device.visit({config, batch, in.target, sequences, report}, visited_)) {
    // A correction that is known already counts every token of the loss, those without a gradient included.
    if (!needs_sequence_) factors_.make(device_, arguments());
    batch_.weight = visited_;  // the rest is outside the loss, its metrics included
    gradients_.logp = gradients_.entropy = nullptr;
    gradients_.kl = exact_ ? kl_ : nullptr;
  }

  void run(const LossOutputs& out) {
    const bool frozen = gradients_.direction && !gradients_.dweight && !gradients_.dbias;
    if (weight_by_itself_) return direction_then_factor(out);
    if (!needs_sequence_) return one_pass(out);
    if (frozen && !config_.beyond_logp()) return direction_then_factor(out);
    score_then_gradients(out);
  }

 private:
  bool by_itself() {
    if constexpr (Device::kWeightByItself)
      return (gradients_.dweight || gradients_.dbias) &&
             device_.weight_by_itself(in_, gradients_, config_.beyond_logp(), !needs_sequence_);
    return false;
  }
  // Of floats a token: kl, c, visited, and the normalizer.
  int64_t arrays() const { return weight_by_itself_ ? 5 : 3; }

  // c is known in the row.
  void one_pass(const LossOutputs& out) {
    HeadOutputs all = gradients_;
    all.logp = scores_.logp, all.entropy = scores_.entropy;
    pass(all, RowLoss::token, true);
    sum(out);
  }

  // dlogp/dhidden now, its factor c once the sequences are whole; then the weight's gradient, if there is one.
  void direction_then_factor(const LossOutputs& out) {
    HeadOutputs directions = scores_;
    directions.direction = gradients_.direction;
    if (weight_by_itself_) directions.normalizer = reinterpret_cast<RowNormalizer*>(array(3));
    pass(directions, RowLoss::direction, false);
    sum(out);
    if (gradients_.direction) device_.copy(c_, gradients_.scale, batch_.tokens);
    if constexpr (Device::kWeightByItself) {
      if (!weight_by_itself_) return;
      HeadOutputs weight = gradients_;
      weight.direction = nullptr;
      weight.logp = scores_.logp, weight.normalizer = directions.normalizer;
      device_.weight_pass(in_, weight, c_, rows_);
    }
  }

  // A scoring pass, then a pass in which every gradient is given.
  void score_then_gradients(const LossOutputs& out) {
    pass(scores_, RowLoss::direction, false);
    sum(out);
    if (!gradients_.gradient() && !exact_) return;
    pass(gradients_, RowLoss::sequence, true);
    sum(out);
  }

  void pass(const HeadOutputs& out, RowLoss::Kind kind, bool with_reference) {
    HeadInputs in = in_;
    if (!with_reference) in.exact_kl = ExactKl::none;
    device_.pass(in, out, {kind, c_, nullptr, visited_, batch_, config_}, rows_);
  }

  void sum(const LossOutputs& out) {
    if (needs_sequence_) factors_.make(device_, arguments());
    device_.sum(arguments(), out);
  }

  LossArguments arguments() const {
    return {config_, batch_, sequences_, scores_.logp, scores_.entropy, exact_ ? kl_ : nullptr, c_};
  }

  float* array(int64_t i) const { return static_cast<float*>(memory_.data()) + i * batch_.tokens; }

  Device& device_;
  const LossConfig config_;
  const HeadInputs in_;
  TokenBatch batch_;
  const Sequences sequences_;
  const bool needs_sequence_, exact_, with_entropy_;
  const HeadOutputs scores_;
  HeadOutputs gradients_;
  const bool weight_by_itself_;
  const decltype(std::declval<Device&>().scratch(0)) memory_;
  float *kl_, *c_, *visited_;
  const SequenceFactors<Device> factors_;
  const typename Device::Rows rows_;
};

}  // namespace longgrpo
