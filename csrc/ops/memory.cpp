// What a head op allocates inside, for whoever plans memory: by the functions that the ops plan their own tiles with.
#include "../cpu/head_bytes.h"
#include "../kernels/head.h"
#include "arguments.h"

STABLE_TORCH_LIBRARY_FRAGMENT(longgrpo, m) {
  // Bytes of one pass. `multiprocessors` of the GPU, or 0 for the CPU; `beyond_logp`: a gradient of the entropy or of
  // the exact KL is wanted.
  m.def(
      "head_workspace(int tokens, int hidden, int vocabulary, ScalarType hidden_dtype, ScalarType weight_dtype, "
      "bool hidden_gradient, bool weight_gradient, bool reference, bool beyond_logp, int workspace, "
      "int multiprocessors) -> int");
}

namespace longgrpo {
namespace {

int64_t head_workspace(int64_t tokens, int64_t hidden, int64_t vocabulary, ScalarType hidden_dtype,
                       ScalarType weight_dtype, bool hidden_gradient, bool weight_gradient, bool reference,
                       bool beyond_logp, int64_t workspace, int64_t multiprocessors) {
  const HeadShape shape{tokens, hidden, vocabulary};
  const Dtype h = dtype_of(hidden_dtype), w = dtype_of(weight_dtype);
  if (tokens == 0) return 0;
  if (multiprocessors == 0)
    return head_bytes(shape, h, w, hidden_gradient, weight_gradient, reference, torch::stable::get_num_threads(),
                      workspace);
  return plan_gpu({shape, h, w, reference, weight_gradient, beyond_logp}, workspace, {int(multiprocessors), 0}).bytes();
}

}  // namespace
}  // namespace longgrpo

STABLE_TORCH_LIBRARY_IMPL(longgrpo, CompositeExplicitAutograd, m) {
  m.impl("head_workspace", TORCH_BOX(&longgrpo::head_workspace));
}
