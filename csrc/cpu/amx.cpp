#include "amx.h"

#ifdef LONGGRPO_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace longgrpo::amx {
namespace {

bool find() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = d & (1u << 24), bf16 = d & (1u << 22);
  constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM of the feature XTILEDATA
  return tiles && bf16 && syscall(SYS_arch_prctl, request, tile_data) == 0;
}

LONGGRPO_AMX void configure() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
  asm volatile("" ::"r"(&config) : "memory");  // as `written`
  _tile_loadconfig(&config);
}

LONGGRPO_AMX void release() { _tile_release(); }

}  // namespace

bool available() {
  static const bool yes = find();
  return yes;
}

TileState::TileState() {
  if (available()) configure();
}
TileState::~TileState() {
  if (available()) release();
}

}  // namespace longgrpo::amx

#else

namespace longgrpo::amx {
bool available() { return false; }
TileState::TileState() = default;
TileState::~TileState() = default;
}  // namespace longgrpo::amx

#endif
