// Schemas of the loss ops, and the tables of math/loss_types.h as one. Shapes: N tokens, H hidden, V vocabulary, S
// sequences.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "../math/loss_types.h"
#include "box.h"

#define HEAD_ARGUMENTS                                                                                        \
  "Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? token_temperature, float temperature, " \
  "float softcap, float logit_scale, "
#define TOKEN_ARGUMENTS                                                                                      \
  "Tensor token_weight, Tensor advantages, Tensor? old_logp, Tensor? ref_logp, Tensor? importance, Tensor? " \
  "sampling_logp, Tensor? cu_seqlens, "
#define CONFIG_ARGUMENTS "int[] options, float[] constants"

STABLE_TORCH_LIBRARY(longgrpo, m) {
  m.def("linear_logprob(" HEAD_ARGUMENTS
        "bool entropy, bool direction, int workspace, bool normalizer=False, bool alone=False) -> "
        "(Tensor logp, Tensor entropy, Tensor direction, Tensor normalizer)");
  m.def("linear_logprob_backward(" HEAD_ARGUMENTS
        "Tensor logp_grad, Tensor? entropy_grad, bool need_hidden, bool need_weight, bool need_bias, int workspace, "
        "Tensor? logp=None, Tensor? normalizer=None) -> (Tensor hidden_grad, Tensor weight_grad, Tensor bias_grad)");
  m.def("token_loss(Tensor logp, " TOKEN_ARGUMENTS "Tensor? entropy, " CONFIG_ARGUMENTS
        ") -> (Tensor loss, Tensor metrics, Tensor logp_grad)");
  m.def("linear_grpo_loss(" HEAD_ARGUMENTS TOKEN_ARGUMENTS "Tensor? ref_hidden, Tensor? ref_weight, " CONFIG_ARGUMENTS
        ", bool need_hidden, bool need_weight, bool need_bias, bool metrics, int workspace, int active=-1) -> "
        "(Tensor loss, Tensor metrics, Tensor logp, Tensor entropy, Tensor direction, Tensor scale, "
        "Tensor weight_grad, Tensor bias_grad)");
  // Tiles of a head on `like`'s device from now on (TileChoice::unpack); none: by the device's own rule.
  m.def(
      "choose_tiles(Tensor like, int hidden, int vocabulary, ScalarType hidden_dtype, ScalarType weight_dtype, "
      "int[] choice) -> ()");
  m.def("scale_rows(Tensor x, Tensor scale) -> Tensor");
  m.def("scale_rows_(Tensor(a!) x, Tensor scale) -> ()");
  m.def("loss_tables() -> (str loss_types, str kl_estimators, str corrections)");
}

namespace longgrpo {
namespace {

std::tuple<std::string, std::string, std::string> loss_tables() { return {kLossTypeTable, kKlTable, kCorrectionTable}; }

}  // namespace
}  // namespace longgrpo

STABLE_TORCH_LIBRARY_IMPL(longgrpo, CompositeExplicitAutograd, m) {
  m.impl("loss_tables", LONGGRPO_BOX(&longgrpo::loss_tables));
}
