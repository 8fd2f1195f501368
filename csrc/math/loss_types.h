// The table of the loss types, the KL estimators and the off-policy corrections: one line each, from which C++ has its
// enums and properties and Python its names and properties (the op `loss_tables`, read by
// python/longgrpo/loss/types.py).
#pragma once

#include "portable.h"

// X(name, mean, divides_by, whole_sequence, ppo_clip, detached)
//   mean            what the loss averages over first: `sequence`, each sequence's own tokens, or `none`
//   divides_by      and then: `sequences`, `tokens`, or `lengths` = sequences x max_completion_length
//   whole_sequence  c = dL/d(logp) of a token needs its whole sequence, at the token level too
//   ppo_clip        the policy term is PPO's clipped ratio
//   detached        the ratio (or weight) of the policy term is not differentiated
#define LONGGRPO_LOSS_TYPES(X)          \
  X(grpo, sequence, sequences, 0, 1, 0) \
  X(bnpo, none, tokens, 0, 1, 0)        \
  X(dr_grpo, none, lengths, 0, 1, 0)    \
  X(dapo, none, tokens, 0, 1, 0)        \
  X(cispo, none, tokens, 0, 0, 1)       \
  X(sapo, sequence, sequences, 0, 0, 0) \
  X(vespo, none, tokens, 1, 0, 1)       \
  X(luspo, none, sequences, 0, 1, 0)    \
  X(gmpo, sequence, sequences, 1, 0, 0)

// X(name, exact): `exact` is a sum over the vocabulary, which the head adds.
#define LONGGRPO_KL_ESTIMATORS(X) \
  X(k1, 0)                        \
  X(abs, 0)                       \
  X(k2, 0)                        \
  X(k3, 0)                        \
  X(k3_plus, 0)                   \
  X(forward, 0)                   \
  X(forward_unbiased, 0)          \
  X(article_reverse, 0)           \
  X(article_forward, 0)           \
  X(exact_reverse, 1)             \
  X(exact_forward, 1)

// X(name, of_sequence, masks): whose ratio it is, the token's or the sequence's, and what becomes of a ratio beyond the
// cap, 0 or the cap.
#define LONGGRPO_CORRECTIONS(X) \
  X(none, 0, 0)                 \
  X(token_truncate, 0, 0)       \
  X(token_mask, 0, 1)           \
  X(sequence_truncate, 1, 0)    \
  X(sequence_mask, 1, 1)

namespace longgrpo {

#define LONGGRPO_NAME(name, ...) name,
enum class LossType : int { LONGGRPO_LOSS_TYPES(LONGGRPO_NAME) };
enum class Kl : int { LONGGRPO_KL_ESTIMATORS(LONGGRPO_NAME) };
enum class Correction : int { LONGGRPO_CORRECTIONS(LONGGRPO_NAME) };
#undef LONGGRPO_NAME

// What C++ reads of a line: rules(type).detached.
struct LossTypeRules {
  bool whole_sequence, ppo_clip, detached;
};
struct KlRules {
  bool exact;
};
struct CorrectionRules {
  bool of_sequence, masks;
};

#define LONGGRPO_RULES(Rules, Kind, TABLE, LINE) \
  LONGGRPO_HD Rules rules(Kind kind) {           \
    switch (kind) { TABLE(LINE) }                \
    return {};                                   \
  }
#define LONGGRPO_LINE(name, mean, divides_by, ...) \
  case LossType::name:                             \
    return {__VA_ARGS__};
LONGGRPO_RULES(LossTypeRules, LossType, LONGGRPO_LOSS_TYPES, LONGGRPO_LINE)
#undef LONGGRPO_LINE
#define LONGGRPO_LINE(name, ...) \
  case Kl::name:                 \
    return {__VA_ARGS__};
LONGGRPO_RULES(KlRules, Kl, LONGGRPO_KL_ESTIMATORS, LONGGRPO_LINE)
#undef LONGGRPO_LINE
#define LONGGRPO_LINE(name, ...) \
  case Correction::name:         \
    return {__VA_ARGS__};
LONGGRPO_RULES(CorrectionRules, Correction, LONGGRPO_CORRECTIONS, LONGGRPO_LINE)
#undef LONGGRPO_LINE
#undef LONGGRPO_RULES

// A line for each row of a table, the columns' names first.
constexpr const char* kLossTypeTable = "name mean divides_by whole_sequence ppo_clip detached\n"
#define LONGGRPO_LINE(name, mean, divides_by, whole_sequence, ppo_clip, detached) \
  #name " " #mean " " #divides_by " " #whole_sequence " " #ppo_clip " " #detached "\n"
    LONGGRPO_LOSS_TYPES(LONGGRPO_LINE);
#undef LONGGRPO_LINE

constexpr const char* kKlTable = "name exact\n"
#define LONGGRPO_LINE(name, exact) #name " " #exact "\n"
    LONGGRPO_KL_ESTIMATORS(LONGGRPO_LINE);
#undef LONGGRPO_LINE

constexpr const char* kCorrectionTable = "name of_sequence masks\n"
#define LONGGRPO_LINE(name, of_sequence, masks) #name " " #of_sequence " " #masks "\n"
    LONGGRPO_CORRECTIONS(LONGGRPO_LINE);
#undef LONGGRPO_LINE

}  // namespace longgrpo
