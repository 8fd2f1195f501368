// The operators that engine and trainer share (rollout.bitwise): on the CPU, in a fixed order of sums.
#include "../cpu/attention.h"
#include "../cpu/convert.h"
#include "../cpu/fixed_linear.h"
#include "../cpu/gate.h"
#include "arguments.h"

STABLE_TORCH_LIBRARY_FRAGMENT(longgrpo, m) {
  // Whether the products of bf16 can be computed on this processor; those of float32 always can.
  m.def("fixed_bf16() -> bool");
  // x [N, K], weight [M, K], bias [M], all of one dtype -> [N, M]
  m.def("fixed_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  // query [N, heads, D]; key, value [rows, key_heads, D] of sequences laid end to end, or with `pages` [S, P] of a
  // cache [pages, 32 rows, key_heads, D] in any strides; query_start [S + 1], length [S] int32; scale; window: 0 for
  // none.
  m.def(
      "fixed_attention(Tensor query, Tensor key, Tensor value, Tensor? pages, Tensor query_start, Tensor length, "
      "float scale, int window) -> Tensor");
  // act(gate) up, rows of a dense last dimension; activation: 0 silu, 1 gelu by tanh
  m.def("fixed_gate(Tensor gate, Tensor up, int activation) -> Tensor");
  m.def(
      "fixed_gate_backward(Tensor gate, Tensor up, Tensor grad, int activation) -> (Tensor gate_grad, Tensor up_grad)");
}

namespace longgrpo {
namespace {

struct Threads {
  int64_t threads() const { return torch::stable::get_num_threads(); }
  template <class F>
  void parallel_for(int64_t n, F&& f) const {
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  }
};

bool fixed_bf16() { return lanes::supported(); }

template <class T>
const T* in(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// f(a number of the type) for a type of which there are products here.
template <class F>
void by_type(ScalarType type, F&& f) {
  if (type == ScalarType::Float) return f(float{});
  STD_TORCH_CHECK(type == ScalarType::BFloat16, "longgrpo: a fixed order of sums is for float32 and bfloat16");
  STD_TORCH_CHECK(lanes::supported(), "longgrpo: a fixed order of sums in bfloat16 needs AVX512-BF16");
  f(lanes::Bf16{});
}

void check_rows(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.stride(tensor.dim() - 1) == 1 || tensor.size(tensor.dim() - 1) == 1, "longgrpo: ", name,
                  " must be dense in its last dimension");
}

Tensor fixed_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  check_rows(x, "x"), check_rows(weight, "weight");
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) && x.size(1) % 2 == 0,
                  "longgrpo: x [N, K] and weight [M, K] with an even K");
  STD_TORCH_CHECK(x.scalar_type() == weight.scalar_type() && (!bias || bias->scalar_type() == x.scalar_type()),
                  "longgrpo: x, weight and bias of one dtype");
  Tensor y = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  by_type(x.scalar_type(), [&](auto number) {
    using T = decltype(number);
    const LinearArguments<T> arguments{in<T>(x),       x.stride(0),      x.size(0),
                                       x.size(1),      in<T>(weight),    weight.stride(0),
                                       weight.size(0), pointer<T>(bias), static_cast<T*>(y.mutable_data_ptr())};
    Tensor panels = torch::stable::new_empty(x, {std::max<int64_t>(1, arguments.panels() * arguments.panel_size())});
    run_linear(Threads{}, arguments, static_cast<T*>(panels.mutable_data_ptr()));
  });
  return y;
}

Tensor fixed_attention(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& pages,
                       const Tensor& query_start, const Tensor& length, double scale, int64_t window) {
  check_rows(query, "query"), check_rows(key, "key"), check_rows(value, "value");
  const int64_t dims = pages ? 4 : 3, rows = dims - 3;
  STD_TORCH_CHECK(query.dim() == 3 && key.dim() == dims && value.dim() == dims, "longgrpo: shapes of an attention");
  for (int64_t i = 0; i < dims; ++i)
    STD_TORCH_CHECK(key.stride(i) == value.stride(i) || key.size(i) == 1, "longgrpo: key and value lie differently");
  STD_TORCH_CHECK(!pages || key.size(1) == kPage, "longgrpo: a page has 32 rows");
  STD_TORCH_CHECK(query.size(2) % 2 == 0 && query.size(1) % key.size(dims - 2) == 0, "longgrpo: heads of an attention");
  const int64_t sequences = length.numel();
  Tensor out = torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2)});
  std::vector<int32_t> first(size_t(sequences), 0);
  for (int64_t s = 1; s < sequences; ++s) first[size_t(s)] = first[size_t(s - 1)] + in<int32_t>(length)[s - 1];
  by_type(query.scalar_type(), [&](auto number) {
    using T = decltype(number);
    run_attention(Threads{}, AttentionArguments<T>{.query = in<T>(query),
                                                   .key = in<T>(key),
                                                   .value = in<T>(value),
                                                   .out = static_cast<T*>(out.mutable_data_ptr()),
                                                   .sequences = sequences,
                                                   .heads = query.size(1),
                                                   .key_heads = key.size(dims - 2),
                                                   .head_size = query.size(2),
                                                   .query_token = query.stride(0),
                                                   .query_head = query.stride(1),
                                                   .key_row = key.stride(rows),
                                                   .key_head = key.stride(rows + 1),
                                                   .key_page = pages ? key.stride(0) : 0,
                                                   .query_start = in<int32_t>(query_start),
                                                   .length = in<int32_t>(length),
                                                   .pages = pointer<int32_t>(pages),
                                                   .most_pages = pages ? pages->stride(0) : 0,
                                                   .first_row = first.data(),
                                                   .scale = float(scale),
                                                   .window = window});
  });
  return out;
}

const void* row(const Tensor& x, int64_t i) {
  return static_cast<const char*>(x.const_data_ptr()) + i * x.stride(0) * int64_t(x.element_size());
}
void* row_of(Tensor& x, int64_t i) {
  return static_cast<char*>(x.mutable_data_ptr()) + i * x.stride(0) * int64_t(x.element_size());
}

void check_gate(const Tensor& gate, const Tensor& up) {
  check_rows(gate, "gate"), check_rows(up, "up");
  STD_TORCH_CHECK(gate.dim() == 2 && up.dim() == 2 && gate.size(0) == up.size(0) && gate.size(1) == up.size(1) &&
                      gate.scalar_type() == up.scalar_type(),
                  "longgrpo: gate and up [N, I] of one dtype");
}

Tensor fixed_gate(const Tensor& gate, const Tensor& up, int64_t activation) {
  check_gate(gate, up);
  Tensor y = torch::stable::new_empty(gate, {gate.size(0), gate.size(1)});
  Threads{}.parallel_for(gate.size(0), [&](int64_t i) {
    gated(Activation(activation), dtype_of(gate), row(gate, i), row(up, i), row_of(y, i), gate.size(1));
  });
  return y;
}

std::tuple<Tensor, Tensor> fixed_gate_backward(const Tensor& gate, const Tensor& up, const Tensor& grad,
                                               int64_t activation) {
  check_gate(gate, up), check_gate(gate, grad);
  Tensor dgate = torch::stable::new_empty(gate, {gate.size(0), gate.size(1)});
  Tensor dup = torch::stable::new_empty(gate, {gate.size(0), gate.size(1)});
  Threads{}.parallel_for(gate.size(0), [&](int64_t i) {
    gated_backward(Activation(activation), dtype_of(gate), row(gate, i), row(up, i), row(grad, i), row_of(dgate, i),
                   row_of(dup, i), gate.size(1));
  });
  return {dgate, dup};
}

}  // namespace
}  // namespace longgrpo

STABLE_TORCH_LIBRARY_IMPL(longgrpo, CompositeExplicitAutograd, m) {
  m.impl("fixed_bf16", LONGGRPO_BOX(&longgrpo::fixed_bf16));
}
STABLE_TORCH_LIBRARY_IMPL(longgrpo, CPU, m) {
  m.impl("fixed_linear", LONGGRPO_BOX(&longgrpo::fixed_linear));
  m.impl("fixed_attention", LONGGRPO_BOX(&longgrpo::fixed_attention));
  m.impl("fixed_gate", LONGGRPO_BOX(&longgrpo::fixed_gate));
  m.impl("fixed_gate_backward", LONGGRPO_BOX(&longgrpo::fixed_gate_backward));
}
