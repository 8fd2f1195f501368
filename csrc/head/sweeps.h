// The sweeps over the tokens of a loss: which tokens a pass visits, and from logp the sums and c = dL/d(logp).
//
// A team is one thread or many that work together: team.first() and team.step() say which tokens are a thread's own,
// team.reduce(x) merges every thread's x in one fixed order and gives all of them the result.
#pragma once

#include <cstdint>

#include "../math/sequence_loss.h"
#include "../math/token_batch.h"

namespace longgrpo {

struct Sequences {
  const int32_t* bounds;  // [count + 1], or null
  int64_t count;
};

struct OneThread {
  int64_t first() const { return 0; }
  int64_t step() const { return 1; }
  template <class T>
  T reduce(const T& x) const {
    return x;
  }
};

struct Any {
  int value;
  LONGGRPO_HD void merge(Any other) { value |= other.value; }
};

// ---- which tokens a pass visits ----

struct Visits {
  LossConfig config;
  TokenBatch batch;
  const int64_t* target;  // [tokens] or null: all have one
  Sequences sequences;
  bool report;  // whether tokens without a gradient are visited too, for their metrics

  LONGGRPO_HD bool in_loss(int64_t t) const { return batch.weight[t] != 0 && (!target || target[t] >= 0); }
  LONGGRPO_HD bool moves(int64_t t) const { return in_loss(t) && batch.moves(config, t); }
  // The weight under which a pass visits a token, 0 if it does not.
  LONGGRPO_HD float weight(int64_t t, bool moves) const {
    return in_loss(t) && (report || moves) ? batch.weight[t] : 0.0f;
  }

  // Whether any token of a sequence moves: then all of them do.
  template <class Team>
  LONGGRPO_TEAM bool sequence_moves(const Team& team, int64_t begin, int64_t end) const {
    Any any{0};
    for (int64_t t = begin + team.first(); t < end && !any.value; t += team.step()) any.value = moves(t);
    return team.reduce(any).value;
  }
};

// ---- the loss from logp ----

struct LossOutputs {
  float* loss;           // [1]
  LossMetrics* metrics;  // [1]
};

struct CorrectionSums {  // over the tokens of a sequence that are in the loss
  double count = 0, log_ratio = 0, moved = 0;
  LONGGRPO_HD void merge(const CorrectionSums& other) {
    count += other.count, log_ratio += other.log_ratio, moved += other.moved;
  }
};

struct LossArguments {
  LossConfig config;
  TokenBatch batch;
  Sequences sequences;    // read if the loss looks at sequences
  const float* logp;      // [tokens], and so are the others
  const float* entropy;   // or null
  const float* exact_kl;  // or null
  float* logp_gradient;   // receives c

  LONGGRPO_HD void token(LossSums& sums, int64_t t) const {
    const float weight = batch.weight[t];
    if (weight == 0) {
      logp_gradient[t] = 0;
      return;
    }
    const Token token = batch.at(config, t, logp[t]);
    const TokenTerm term = token_term(config, token);
    finish_token(sums, t, token, term, ::longgrpo::logp_gradient(config, term, token, weight));
  }

  // Three sweeps over the tokens of a sequence: its ratio, what its tokens share, every token's gradient.
  template <class Team>
  LONGGRPO_TEAM void sequence(const Team& team, LossSums& sums, int64_t begin, int64_t end) const {
    SequenceSums own;
    for (int64_t t = begin + team.first(); t < end; t += team.step())
      if (batch.weight[t] != 0) own.add(config, batch.at(config, t, logp[t]));
    const Sequence sequence = finish_sequence(config, team.reduce(own));

    Shared shared;
    for (int64_t t = begin + team.first(); t < end; t += team.step()) {
      if (batch.weight[t] == 0) continue;
      const Token token = batch.at(config, t, logp[t]);
      shared.merge(shared_part(config, token, sequence_term(config, token, sequence), batch.weight[t]));
    }
    shared = team.reduce(shared);

    for (int64_t t = begin + team.first(); t < end; t += team.step()) {
      const float weight = batch.weight[t];
      if (weight == 0) {
        logp_gradient[t] = 0;
        continue;
      }
      const Token token = batch.at(config, t, logp[t]);
      const SequenceTerm term = sequence_term(config, token, sequence);
      finish_token(sums, t, token, term.token, sequence_logp_gradient(config, term, token, weight, shared, sequence));
    }
  }

  // What the whole sequence says of the policy term of each of its tokens: the correction's ratio, and whether the
  // sequence has moved too far. Either array may be null. logp is read on policy, and for `kept`.
  template <class Team>
  LONGGRPO_TEAM void correct(const Team& team, float* sequence_ratio, float* kept, int64_t begin, int64_t end) const {
    CorrectionSums own;
    for (int64_t t = begin + team.first(); t < end; t += team.step()) {
      if (batch.weight[t] == 0) continue;
      const double old = batch.old_logp ? batch.old_logp[t] : logp[t];
      own.count += 1;
      if (sequence_ratio) own.log_ratio += old - batch.sampling_logp[t];
      if (kept) own.moved += old - logp[t];
    }
    own = team.reduce(own);
    const double count = own.count > 0 ? own.count : 1;
    const float ratio = importance_ratio(float(own.log_ratio / count));
    const bool far = own.moved / count > config.threshold;
    for (int64_t t = begin + team.first(); t < end; t += team.step()) {
      if (sequence_ratio) sequence_ratio[t] = ratio;
      if (kept) kept[t] = far && batch.advantage[t] < 0 ? 0.0f : 1.0f;
    }
  }

 private:
  LONGGRPO_HD void finish_token(LossSums& sums, int64_t t, const Token& token, const TokenTerm& term, float c) const {
    logp_gradient[t] = c;
    sums.add(config, term, token, batch.weight[t], exact_kl ? exact_kl[t] : term.kl, entropy ? entropy[t] : 0.0f, c);
  }
};

}  // namespace longgrpo
