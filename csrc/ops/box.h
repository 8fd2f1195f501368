// TORCH_BOX for a kernel whose std::invalid_argument has to arrive in Python as a ValueError. Torch makes one of it up
// to 2.14 and a RuntimeError since, so the type stands in the message, where python/longgrpo/_ops/library.py reads it.
#pragma once

#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>

namespace longgrpo {

template <auto boxed>
void typed_errors(StableIValue* stack, uint64_t arguments, uint64_t results) {
  try {
    boxed(stack, arguments, results);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string("ValueError: ") + error.what());
  }
}

}  // namespace longgrpo

#define LONGGRPO_BOX(kernel) (&longgrpo::typed_errors<TORCH_BOX(kernel)>)
