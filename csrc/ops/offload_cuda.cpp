// The CUDA library's part of offload: a backend on torch's current stream.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../offload/cuda_backend.h"
#include "box.h"

namespace longgrpo::offload {
namespace {

Stream current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

int64_t cuda_backend(int64_t device) {
  return reinterpret_cast<int64_t>(
      make_cuda_backend(int(device), [=] { return current_stream(int(device)); }).release());
}

}  // namespace
}  // namespace longgrpo::offload

STABLE_TORCH_LIBRARY_FRAGMENT(longgrpo, m) { m.def("offload_cuda_backend(int device) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(longgrpo, CompositeExplicitAutograd, m) {
  m.impl("offload_cuda_backend", LONGGRPO_BOX(&longgrpo::offload::cuda_backend));
}
