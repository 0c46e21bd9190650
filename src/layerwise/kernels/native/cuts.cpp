// The inner loops of cutting weights to a trellis; what they compute is said in encoding/trellis_loops.py, whose
// functions they repeat bit for bit: additions in the order written, no fused products.
#include <string.h>

#include <utility>

#include "parts.h"

namespace layerwise {

namespace {

#define LAYERWISE_STEP inline __attribute__((always_inline))

constexpr int kStrip = 32;
constexpr int kStates = 256;
constexpr int kAround = 16;  // rows looked at on both sides of where the ring is closed
constexpr float kNever = 1e30f;

struct Room {
  alignas(64) float now[kStates], least[kStates / 2];
  alignas(64) int32_t came[kStrip][kStates / 2];
  alignas(64) float table[kStates];
  float wanted[kStrip], cost[kStrip];
  uint8_t path[kStrip];
};

// As many floats as are compared or added at a time; what has no such registers takes them in pieces.
template <int kLanes>
struct Few {
  typedef float Floats __attribute__((vector_size(4 * kLanes), may_alias));
  typedef int32_t Ints __attribute__((vector_size(4 * kLanes), may_alias));
};

// The least of the kFan states that lead to each of some places, and which it is; the first of those that are equal.
template <int kFan, int kKept, typename Floats, typename Ints>
LAYERWISE_STEP void least_of(const float* now, Floats& least, Ints& from) {
  constexpr int kWays = kFan < 8 ? 1 : 4, kOf = kFan / kWays;  // chains that do not wait for each other
  Floats best[kWays];
  Ints back[kWays];
#pragma GCC unroll 4
  for (int w = 0; w < kWays; ++w) {
    best[w] = *reinterpret_cast<const Floats*>(now + w * kOf * kKept);
    back[w] = Ints{} + w * kOf;
  }
#pragma GCC unroll 8
  for (int j = 1; j < kOf; ++j) {
#pragma GCC unroll 4
    for (int w = 0; w < kWays; ++w) {
      const Floats at = *reinterpret_cast<const Floats*>(now + (w * kOf + j) * kKept);
      const Ints better = at < best[w];
      best[w] = better ? at : best[w];
      back[w] = better ? Ints{} + (w * kOf + j) : back[w];
    }
  }
#pragma GCC unroll 2
  for (int gap = 1; gap < kWays; gap *= 2) {
#pragma GCC unroll 2
    for (int w = 0; w < kWays; w += 2 * gap) {
      const Ints better = best[w + gap] < best[w];
      best[w] = better ? best[w + gap] : best[w];
      back[w] = better ? back[w + gap] : back[w];
    }
  }
  least = best[0];
  from = back[0];
}

// The costs of part kPart, kLanes states, of those that kLanes places lead to, 2^kBits each.
template <int kBits, int kLanes, int kPart, int... kPlace>
LAYERWISE_STEP void lead(const float* least, const float* table, float v, float c, float* now,
                         std::integer_sequence<int, kPlace...>) {
  using Floats = typename Few<kLanes>::Floats;
  const Floats from = *reinterpret_cast<const Floats*>(least);
#if defined(__clang__)
  const Floats first = __builtin_shufflevector(from, from, ((kPart * kLanes + kPlace) >> kBits)...);
#else
  const Floats first = __builtin_shuffle(from, typename Few<kLanes>::Ints{((kPart * kLanes + kPlace) >> kBits)...});
#endif
  const Floats d = v - *reinterpret_cast<const Floats*>(table + kPart * kLanes);
  *reinterpret_cast<Floats*>(now + kPart * kLanes) = first + d * d * c;
}

template <int kBits, int kLanes, int... kPart>
LAYERWISE_STEP void lead_all(const float* least, const float* table, float v, float c, float* now,
                             std::integer_sequence<int, kPart...>) {
  (lead<kBits, kLanes, kPart>(least, table, v, c, now, std::make_integer_sequence<int, kLanes>{}), ...);
}

// kWide: floats in a register.
template <int kBits, int kWide>
LAYERWISE_STEP void walk(Room& room, int count, int turn, int steps, int closed) {
  constexpr int kFan = 1 << kBits, kKept = kStates >> kBits;
  constexpr int kLanes = kKept < kWide ? kKept : kWide;
  using Floats = typename Few<kLanes>::Floats;
  using Ints = typename Few<kLanes>::Ints;
  using Own = typename Few<kWide>::Floats;
  float *now = room.now, *least = room.least;
  for (int s = 0; s < kStates; ++s) now[s] = closed < 0 || s == closed ? 0.0f : kNever;
  for (int place = 0; place < steps; ++place) {
    const int row = (place + turn) % kStrip;
    const float v = room.wanted[row], c = room.cost[row];
    for (int h = 0; h < kKept; h += kLanes) {
      Floats best;
      Ints back;
      least_of<kFan, kKept>(now + h, best, back);
      *reinterpret_cast<Floats*>(least + h) = best;
      *reinterpret_cast<Ints*>(room.came[place] + h) = back;
    }
    if (row >= count) {
      for (int s = 0; s < kStates; ++s) now[s] = kNever;
      for (int h = 0; h < kKept; ++h) now[h * kFan] = least[h];
    } else if constexpr (kFan < kWide) {
      for (int h = 0; h < kKept; h += kWide) {
        lead_all<kBits, kWide>(least + h, room.table + h * kFan, v, c, now + h * kFan,
                               std::make_integer_sequence<int, kFan>{});
      }
    } else {
      for (int h = 0; h < kKept; ++h) {
        const Own first = Own{} + least[h];
        for (int q = h * kFan; q < (h + 1) * kFan; q += kWide) {
          const Own d = v - *reinterpret_cast<const Own*>(room.table + q);
          *reinterpret_cast<Own*>(now + q) = first + d * d * c;
        }
      }
    }
  }
  int state = closed;
  if (closed < 0) {
    state = 0;
    for (int s = 1; s < kStates; ++s)
      if (now[s] < now[state]) state = s;
  }
  for (int place = steps - 1; place >= 0; --place) {
    room.path[place] = uint8_t(state);
    const int h = state >> kBits;
    state = h + room.came[place][h] * kKept;
  }
}

template <int kBits, int kWide>
LAYERWISE_STEP void cut_strip(Room& room, int count) {
  walk<kBits, kWide>(room, count, kStrip - kAround, 2 * kAround, -1);
  walk<kBits, kWide>(room, count, 0, kStrip, room.path[kAround - 1]);
}

template <int kBits, int kWide>
LAYERWISE_STEP void cut(const Cut& t) {
  Room room;
  memcpy(room.table, t.table, sizeof(room.table));
  memset(room.wanted, 0, sizeof(room.wanted));
  memset(room.cost, 0, sizeof(room.cost));
  const int64_t last = t.first_row + t.height;
  for (int64_t b = t.width - 1; b >= 0; --b) {
    const int64_t j = t.first + b;
    const float *weight = t.weight + j * t.rows, *own = t.scales + t.group_of[j] * t.rows;
    double *change = t.change + j * t.rows, *carried = t.carried + b * t.rows;
    double* below = t.coupled ? t.below + b * t.height : nullptr;
    for (int64_t start = (t.height - 1) / kStrip * kStrip; start >= 0; start -= kStrip) {
      const int count = int(t.height - start < kStrip ? t.height - start : kStrip);
      for (int r = 0; r < count; ++r) {
        const int64_t i = t.first_row + start + r;
        double value = double(weight[i]) - carried[i];
        if (t.coupled) value -= below[start + r];
        const double s = own[i];
        room.wanted[r] = s > 0 ? float(value / s) : 0.0f;
        room.cost[r] = float(t.pivots[start + r] * s * s);
      }
      cut_strip<kBits, kWide>(room, count);
      for (int r = 0; r < count; ++r) {
        const int64_t i = t.first_row + start + r;
        const double d = double(room.table[room.path[r]]) * double(own[i]) - double(weight[i]);
        t.states[j * t.rows + i] = room.path[r];
        change[i] = d;
        if (t.coupled) {
          const double c = d + carried[i];
          t.absorbed[b * t.rows + i] = c;
          const double* lower = t.lower_rows + (start + r) * t.height;
          for (int64_t k = 0; k < start; ++k) below[k] += lower[k] * c;
        }
      }
    }
    for (int64_t k = 0; k < b; ++k) {
      const double factor = t.lower[b * t.width + k];
      double* into = t.carried + k * t.rows;
      for (int64_t i = t.first_row; i < last; ++i) into[i] += change[i] * factor;
    }
  }
}

template <int kBits, int kWide>
LAYERWISE_STEP void recut(const Recut& t) {
  Room room;
  memcpy(room.table, t.table, sizeof(room.table));
  memset(room.wanted, 0, sizeof(room.wanted));
  memset(room.cost, 0, sizeof(room.cost));
  double moved[kStrip];
  for (int64_t b = t.width - 1; b >= 0; --b) {
    const int64_t j = t.first + b;
    const float *weight = t.weight + j * t.rows, *own = t.scales + t.group_of[j] * t.rows;
    double *change = t.change + j * t.rows, *slope = t.slope + b * t.height;
    const double* curvature = t.curvature + b * t.width;
    const double bend = curvature[b];
    for (int64_t start = (t.height - 1) / kStrip * kStrip; start >= 0; start -= kStrip) {
      const int count = int(t.height - start < kStrip ? t.height - start : kStrip);
      for (int r = 0; r < count; ++r) {
        const int64_t a = start + r, i = t.first_row + a;
        const double s = own[i], mine = t.row_curvature[a * t.height + a];
        const double at = double(weight[i]) + change[i] - slope[a] / (mine * bend);
        room.wanted[r] = s > 0 ? float(at / s) : 0.0f;
        room.cost[r] = float(mine * s * s);
      }
      cut_strip<kBits, kWide>(room, count);
      double gain = 0.0;
      for (int r = 0; r < count; ++r) {
        const int64_t a = start + r, i = t.first_row + a;
        moved[r] = double(room.table[room.path[r]]) * double(own[i]) - double(weight[i]) - change[i];
        gain += 2.0 * moved[r] * slope[a];
      }
      for (int r = 0; r < count; ++r) {
        if (moved[r] == 0.0) continue;
        const double* among = t.row_curvature + (start + r) * t.height + start;
        for (int q = 0; q < count; ++q) gain += bend * moved[r] * moved[q] * among[q];
      }
      if (gain >= 0.0) continue;
      for (int r = 0; r < count; ++r) {
        const int64_t i = t.first_row + start + r;
        t.states[j * t.rows + i] = room.path[r];
        change[i] += moved[r];
        if (moved[r] == 0.0) continue;
        for (int64_t k = 0; k < t.width; ++k) t.pull[k * t.rows + i] += curvature[k] * moved[r];
      }
      for (int64_t a = 0; a < t.height; ++a) {
        const double* among = t.row_curvature + a * t.height + start;
        double push = 0.0;
        for (int r = 0; r < count; ++r) push += among[r] * moved[r];
        for (int64_t k = 0; k <= b; ++k) t.slope[k * t.height + a] += curvature[k] * push;
      }
    }
  }
}

#define BITS(what, wide, t)                \
  switch (t.bits) {                        \
    case 1: return what<1, wide>(t);       \
    case 2: return what<2, wide>(t);       \
    case 3: return what<3, wide>(t);       \
    case 4: return what<4, wide>(t);       \
    default: return what<5, wide>(t);      \
  }

#define CUTS(name, wide, target)                              \
  target void cut_##name(const Cut& t) { BITS(cut, wide, t) } \
  target void recut_##name(const Recut& t) { BITS(recut, wide, t) } \
  constexpr Cuts cuts_##name = {cut_##name, recut_##name}

CUTS(portable, 4, );
#if defined(LAYERWISE_X86)
CUTS(avx2, 8, __attribute__((target("avx2"))));
CUTS(avx512, 16, __attribute__((target("avx512f,avx512bw,avx512vl,prefer-vector-width=512"))));
#endif

}  // namespace

const Cuts& cuts_of(const Path& path) {
#if defined(LAYERWISE_X86)
  if (strcmp(path.name, "avx512") == 0) return cuts_avx512;
  if (strcmp(path.name, "avx2") == 0) return cuts_avx2;
#endif
  (void)path;
  return cuts_portable;
}

}  // namespace layerwise
