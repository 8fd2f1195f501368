// World, the arena and the budget for tests/offload/test_core.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "counting_backend.h"
#include "world.h"

namespace py = pybind11;
using namespace longgrpo::offload;

namespace {

// The arena by itself; addresses as offsets from its first block.
struct ArenaAlone {
  explicit ArenaAlone(size_t budget, size_t pin_limit) : arena(backend, budget) { backend.pin_limit = pin_limit; }

  py::object alloc(size_t bytes) {
    char* p = arena.find(bytes);
    if (!p) p = arena.grow(bytes);
    if (!p) return py::none();
    std::memset(p, 0x5a, bytes);  // it is really there
    return py::int_(reinterpret_cast<uintptr_t>(p));
  }
  void free(uintptr_t p, size_t bytes) { arena.free(reinterpret_cast<char*>(p), bytes); }

  std::vector<std::tuple<size_t, size_t, bool>> pieces(uintptr_t p, size_t bytes) {
    std::vector<std::tuple<size_t, size_t, bool>> out;
    arena.for_each_piece(reinterpret_cast<char*>(p), bytes,
                         [&](size_t offset, size_t n, bool pinned) { out.emplace_back(offset, n, pinned); });
    return out;
  }

  FaultyBackend backend;
  Arena arena;
};

}  // namespace

PYBIND11_MODULE(offload_native, m) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  py::enum_<Schedule>(m, "Schedule")
      .value("threaded", Schedule::threaded)
      .value("lazy", Schedule::lazy)
      .value("seeded", Schedule::seeded);
  py::enum_<OnFull>(m, "OnFull")
      .value("keep", OnFull::keep)
      .value("pageable", OnFull::pageable)
      .value("raise_", OnFull::raise);

  py::class_<World>(m, "World")
      .def(py::init([](Schedule schedule, uint64_t seed, size_t host_bytes, int prefetch, int inflight, int keep_last,
                       OnFull on_full, size_t pin_limit) {
             return std::make_unique<World>(Options{host_bytes, prefetch, inflight, keep_last, on_full}, schedule, seed,
                                            pin_limit);
           }),
           py::arg("schedule"), py::arg("seed") = 0, py::arg("host_bytes") = size_t(1) << 20, py::arg("prefetch") = 1,
           py::arg("inflight") = 2, py::arg("keep_last") = 1, py::arg("on_full") = OnFull::keep,
           py::arg("pin_limit") = SIZE_MAX)
      .def("pack", &World::pack, py::arg("bytes"), py::arg("group") = -1, NoGil())
      .def("unpack", &World::unpack, NoGil())
      .def("give_back", &World::give_back, NoGil())
      .def("drop", &World::drop, NoGil())
      .def("finish", &World::finish, NoGil())
      .def("settle", &World::settle, NoGil())
      .def_property_readonly("reads", [](World& w) { return w.reads.load(); })
      .def_property_readonly("wrong", [](World& w) { return w.wrong.load(); })
      .def("fail_copy", [](World& w, int n) { w.backend->copies_until_failure = n; })
      .def("limit_device", [](World& w, size_t bytes) { w.backend->device_limit = bytes; })
      .def_property_readonly("stats", [](World& w) {
        Stats s = w.engine->stats();
        py::dict out;
#define FIELD(name) out[#name] = s.name
        FIELD(packs), FIELD(bytes_out), FIELD(bytes_in), FIELD(resident), FIELD(hits), FIELD(misses), FIELD(keeps);
        FIELD(pageable), FIELD(records), FIELD(allocations), FIELD(host_live), FIELD(host_peak), FIELD(host_committed);
        FIELD(host_pinned), FIELD(host_budget), FIELD(device_live), FIELD(device_peak), FIELD(prefetch);
#undef FIELD
        return out;
      });

  py::class_<ArenaAlone>(m, "Arena")
      .def(py::init<size_t, size_t>(), py::arg("budget"), py::arg("pin_limit") = SIZE_MAX)
      .def("alloc", &ArenaAlone::alloc)
      .def("free", &ArenaAlone::free)
      .def("pieces", &ArenaAlone::pieces)
      .def_property_readonly("live", [](ArenaAlone& a) { return a.arena.live(); })
      .def_property_readonly("peak", [](ArenaAlone& a) { return a.arena.peak(); })
      .def_property_readonly("committed", [](ArenaAlone& a) { return a.arena.committed(); })
      .def_property_readonly("pinned", [](ArenaAlone& a) { return a.arena.pinned(); });

  m.def("host_budget", &host_budget, py::arg("root") = "");
}
