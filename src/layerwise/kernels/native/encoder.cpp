// A transformer block of an encoder in one call: everything between its input and its output, without going back to
// the caller. Where there are many sequences, each thread takes some of them through the whole block, so that what lies
// between two products stays in its own cache and nobody waits for anybody; where there are few, all threads do every
// step together. Either way the same numbers are rounded at the same places: the results are the same bits.
#include <string.h>

#include "parts.h"
#include "room.h"

namespace layerwise {

namespace {

thread_local Scratch scratch;

// The threads of one step.
struct Team {
  int threads;

  // step(first, last) for parts of 0 .. count-1.
  template <typename Step>
  void share(int64_t count, Step&& step) const {
    if (threads <= 1 || count <= 1) return step(int64_t(0), count);
    struct Shared {
      Step* step;
      int64_t count;
    } shared = {&step, count};
    const auto part = [](void* data, int own, int parts) {
      const auto& s = *static_cast<Shared*>(data);
      const int64_t first = s.count * own / parts, last = s.count * (own + 1) / parts;
      if (first < last) (*s.step)(first, last);
    };
    parallel(threads < count ? threads : int(count), part, &shared);
  }

  // step(item) for 0 .. count-1, each taken by whoever is free.
  template <typename Step>
  void take(int64_t count, Step&& step) const {
    int64_t next = 0;
    share(threads, [&](int64_t, int64_t) {
      for (;;) {
        const int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (item >= count) return;
        step(item);
      }
    });
  }
};

bool same_layout(const Matrix& a, const Matrix& b) {
  return a.columns == b.columns && a.width == b.width && a.blocks == b.blocks && a.trellis == b.trellis &&
         memcmp(a.block, b.block, size_t(a.blocks) * sizeof(Block)) == 0;
}

// Some sequences of a block, and where their values lie: what is between the steps.
struct Run {
  const EncoderBlock& e;
  const Path& path;
  const Rows& rows;
  const Team team;
  const int64_t first, sequences, count;  // sequences, and their tokens
  uint8_t* memory;
  size_t used = 0;

  Run(const EncoderBlock& block, const Path& chosen, int threads, int64_t from, int64_t to)
      : e(block), path(chosen), rows(rows_of(chosen)), team{threads}, first(from), sequences(to - from),
        count((to - from) * block.tokens), memory(nullptr) {}

  const Matrix& matrix(int which) const { return *e.matrix[which]; }
  int64_t inner() const { return matrix(kUp).rows; }
  size_t floats(int64_t width) const { return whole_lines(size_t(count) * size_t(width) * sizeof(float)); }
  int64_t widest() const { return inner() > 3 * e.width ? inner() : 3 * e.width; }  // q, k, v; later what GELU takes

  // Which of query, key and value an activation is shared with: the first that reads it in the same order.
  int shared_with(int which) const {
    for (int other = kQuery; other < which && which <= kValue; ++other) {
      if (same_layout(matrix(other), matrix(which))) return other;
    }
    return which;
  }

  size_t digits_bytes() const {
    size_t own = 0, most = 0;
    for (int which = 0; which < kLinears; ++which) {
      const size_t bytes = whole_lines(ActivationRoom(path, matrix(which), count, e.digits).bytes);
      if (which <= kValue) {
        own += shared_with(which) == which ? bytes : 0;
      } else {
        most = bytes > most ? bytes : most;
      }
    }
    return own > most ? own : most;
  }

  size_t bytes() const { return 2 * floats(e.width) + floats(widest()) + digits_bytes(); }

  float* take_floats(int64_t width) {
    auto* at = reinterpret_cast<float*>(memory + used);
    used += floats(width);
    return at;
  }

  Activations digits_at(int which, size_t offset) const {
    return ActivationRoom(path, matrix(which), count, e.digits).at(memory + used + offset, matrix(which), count, e.digits);
  }

  void quantize(int which, const Activations& a, const float* x, int64_t from, int64_t to) const {
    path.quantize(matrix(which), x, matrix(which).columns, from, to, a);
  }

  // Products of the matrices first .. last side by side: y is [count, stride].
  void multiply(int from, int to, const Activations* a, float* y, int64_t stride) const {
    int64_t tiles = 0;
    for (int which = from; which <= to; ++which) tiles += matrix(which).tiles;
    team.take(tiles, [&](int64_t tile) {
      int which = from;
      float* own = y;
      for (; tile >= matrix(which).tiles; ++which) tile -= matrix(which).tiles, own += matrix(which).rows;
      path.multiply(matrix(which), a[which], tile, tile + 1, {own, stride, e.bias[which]});
    });
  }

  int attention(const float* qkv, float* out) const {
    const int64_t stride = 3 * e.width, dim = e.width / e.heads;
    Attention a = {sequences, e.heads, e.tokens, e.tokens, dim, qkv, qkv + e.width, qkv + 2 * e.width,
                   {e.tokens * stride, dim, stride}, {e.tokens * stride, dim, stride}, {e.tokens * stride, dim, stride},
                   e.mask == nullptr ? nullptr : e.mask + first * e.mask_stride[0],
                   {e.mask_stride[0], e.mask_stride[1]}, out, path.name, e.scale, 0};
    return attend(a, team.threads);
  }

  void normalize(int which, const float* x, const float* y, float* sum, float* out) const {
    rows.normalize(x, y, e.width, e.weight[which], e.shift[which], e.epsilon[which], sum, out);
  }

  int run() {
    memory = scratch.at_least(bytes());
    if (memory == nullptr) return 3;
    const int64_t width = e.width;
    const float* x = e.x + first * e.tokens * width;
    float* y = e.y + first * e.tokens * width;
    float* state = take_floats(width);   // behind the heads
    float* made = take_floats(width);    // by attention, by products
    float* wide = take_floats(widest());
    Activations a[kLinears];
    size_t offset = 0;
    for (int which = kQuery; which <= kValue; ++which) {
      const int same = shared_with(which);
      a[which] = same == which ? digits_at(which, offset) : a[same];
      if (same == which) offset += whole_lines(ActivationRoom(path, matrix(which), count, e.digits).bytes);
    }
    for (int which = kOut; which <= kDown; ++which) a[which] = digits_at(which, 0);

    team.share(count, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t) {
        if (e.norms_first) normalize(0, x + t * width, nullptr, nullptr, made + t * width);
        for (int which = kQuery; which <= kValue; ++which) {
          if (shared_with(which) == which) quantize(which, a[which], e.norms_first ? made : x, t, t + 1);
        }
      }
    });
    multiply(kQuery, kValue, a, wide, 3 * width);
    const int failed = attention(wide, made);
    if (failed) return failed;
    team.share(count, [&](int64_t from, int64_t to) { quantize(kOut, a[kOut], made, from, to); });
    multiply(kOut, kOut, a, made, width);
    team.share(count, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t) {
        float *own = made + t * width, *kept = state + t * width;
        if (e.norms_first) {
          normalize(1, x + t * width, own, kept, own);
        } else {
          normalize(0, x + t * width, own, nullptr, kept);
        }
        quantize(kUp, a[kUp], e.norms_first ? made : state, t, t + 1);
      }
    });
    multiply(kUp, kUp, a, wide, inner());
    team.share(count, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t) {
        rows.gelu(wide + t * inner(), inner());
        quantize(kDown, a[kDown], wide, t, t + 1);
      }
    });
    multiply(kDown, kDown, a, made, width);
    team.share(count, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t) {
        const float *own = made + t * width, *kept = state + t * width;
        if (e.norms_first) {
          rows.add(kept, own, width, y + t * width);
        } else {
          normalize(1, kept, own, nullptr, y + t * width);
        }
      }
    });
    return 0;
  }
};

bool fits(const EncoderBlock& e) {
  if (e.sequences < 0 || e.tokens < 1 || e.tokens > kMostKeys || e.width < 1 || e.heads < 1) return false;
  if (e.width % e.heads || e.width / e.heads % 32 || e.width / e.heads > kLongestHead) return false;
  if (e.digits < 1 || e.digits > 3) return false;
  for (int which = 0; which < kLinears; ++which) {
    const Matrix* m = e.matrix[which];
    if (m == nullptr || m->table) return false;
    const int64_t rows = which == kUp ? e.matrix[kUp]->rows : e.width;
    const int64_t columns = which == kDown ? e.matrix[kUp]->rows : e.width;
    if (m->rows != rows || m->columns != columns) return false;
  }
  return e.weight[0] != nullptr && e.weight[1] != nullptr;
}

// How many sequences a thread takes at once: about kAtOnce tokens, which with all that is between the steps lie in a
// second cache, and as many parts for every thread. 0: a thread would have too little to do, or others to wait for it.
constexpr int64_t kAtOnce = 64, kLeast = 8;

int64_t together(const EncoderBlock& e, int threads) {
  if (e.together != 0) return e.together < 0 ? 0 : e.together;
  const int64_t tokens = e.sequences * e.tokens;
  if (tokens < kLeast * threads) return 0;
  const int64_t rounds = (tokens + kAtOnce * threads - 1) / (kAtOnce * threads), parts = rounds * threads;
  for (int64_t own = (e.sequences + parts - 1) / parts; own > 0; --own) {
    const int64_t made = (e.sequences + own - 1) / own, longest = (made + threads - 1) / threads * own;
    if (e.sequences * 100 >= longest * threads * 85) return own;  // the busiest thread has hardly more than its share
  }
  return 0;
}

}  // namespace

int encode(const EncoderBlock& e, int threads) {
  const Path* path = path_named(e.path);
  if (path == nullptr) return 1;
  if (!fits(e)) return 4;
  if (e.sequences == 0) return 0;
  if (threads < 1) threads = 1;
  const int64_t own = together(e, threads);
  if (own == 0) return Run(e, *path, threads, 0, e.sequences).run();
  int failed = 0;
  const int64_t parts = (e.sequences + own - 1) / own;
  Team{threads < parts ? threads : int(parts)}.take(parts, [&](int64_t part) {
    const int64_t first = part * own, last = first + own < e.sequences ? first + own : e.sequences;
    const int status = Run(e, *path, 1, first, last).run();
    if (status) __atomic_store_n(&failed, status, __ATOMIC_RELAXED);
  });
  return failed;
}

}  // namespace layerwise
