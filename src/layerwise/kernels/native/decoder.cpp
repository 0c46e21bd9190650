// The blocks of a decoder in one call, for the new tokens of some texts. All threads go through all blocks together and
// wait for one another five times a block, awake: a product of a small network takes less time than waking a thread.
// What a few tokens need between two products every thread works out for itself, in memory of its own, since that takes
// less time than waiting; of many tokens each thread takes some. Either way the results are the same bits.
#include <string.h>

#include <atomic>
#include <thread>

#include "parts.h"
#include "room.h"

#if defined(LAYERWISE_X86)
#include <immintrin.h>
#endif

namespace layerwise {

namespace {

thread_local Scratch scratch;

constexpr int64_t kApart = 2;     // up to so many tokens, every thread takes all of them between products
constexpr int64_t kShared = 16;   // from so many on, tiles are taken one by one
constexpr int64_t kAlone = 2 << 20;  // bytes times tokens below which more threads take longer

// Where threads wait for one another, awake as long as a step between two products may take. Then, or where there are
// fewer processors than threads, they let others have the processor.
class Barrier {
 public:
  explicit Barrier(int threads) : spins_(std::thread::hardware_concurrency() >= unsigned(threads) ? 1000 : 0) {}

  void wait(int parts) {
    if (parts <= 1) return;
    const int own = round_.load(std::memory_order_relaxed);
    if (come_.fetch_add(1, std::memory_order_acq_rel) + 1 == parts) {
      come_.store(0, std::memory_order_relaxed);
      round_.store(own + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == own; ++spins) {
      if (spins < spins_) {
#if defined(LAYERWISE_X86)
        _mm_pause();
#endif
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  const int spins_;
  alignas(kLine) std::atomic<int> come_{0};
  alignas(kLine) std::atomic<int> round_{0};
};

bool same_layout(const Matrix& a, const Matrix& b) {
  return a.columns == b.columns && a.width == b.width && a.blocks == b.blocks && a.table == b.table && a.trellis == b.trellis &&
         memcmp(a.block, b.block, size_t(a.blocks) * sizeof(Block)) == 0;
}

int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// What a call works on, and where it lies.
struct Work {
  const Decoder& d;
  const Path& path;
  const Rows& rows;
  const Heads& heads;
  const int64_t tokens, asking, offering;  // tokens in all; features of all queries, of all keys
  const bool apart;
  int64_t inner = 0;       // the widest block's
  size_t digits = 0;       // bytes of the activations of a step
  int64_t longest = 0;     // keys that a position sees at most, and 16 more
  size_t own_bytes = 0;    // of a thread
  uint8_t* memory = nullptr;
  float *attended = nullptr, *made = nullptr, *wide = nullptr;
  int64_t* next = nullptr;  // of every product, the tile that nobody has taken yet
  Barrier barrier;

  Work(const Decoder& decoder, const Path& chosen, int threads)
      : d(decoder), path(chosen), rows(rows_of(chosen)), heads(heads_of(chosen)), tokens(decoder.rows * decoder.count),
        asking(decoder.heads * decoder.dim), offering(decoder.groups * decoder.dim), apart(tokens <= kApart), barrier(threads) {
    for (int64_t b = 0; b < d.blocks; ++b) {
      const Matrix* const* m = d.block[b].matrix;
      inner = most(inner, m[kGate]->rows);
      digits = bytes_of(m + kToQuery, 3) > digits ? bytes_of(m + kToQuery, 3) : digits;
      digits = bytes_of(m + kFromHeads, 1) > digits ? bytes_of(m + kFromHeads, 1) : digits;
      digits = bytes_of(m + kGate, 2) > digits ? bytes_of(m + kGate, 2) : digits;
      digits = bytes_of(m + kNarrow, 1) > digits ? bytes_of(m + kNarrow, 1) : digits;
    }
    if (d.head != nullptr && bytes_of(&d.head, 1) > digits) digits = bytes_of(&d.head, 1);
    for (int64_t row = 0; row < d.rows; ++row) longest = most(longest, d.starts[row] + d.count);
    longest += 16;
    own_bytes = (apart ? between_bytes() : 0) + whole_lines(size_t(longest) * sizeof(float));
  }

  size_t floats(int64_t width) const { return whole_lines(size_t(tokens) * size_t(width) * sizeof(float)); }
  size_t between_bytes() const { return 2 * floats(d.width) + floats(inner) + digits; }
  size_t counters() const { return whole_lines(size_t(4 * d.blocks + 1) * sizeof(int64_t)); }
  int64_t widest() const { return most(asking + 2 * offering, 2 * inner); }

  size_t bytes(int threads) const {
    return floats(asking) + floats(d.width) + floats(widest()) + (apart ? 0 : between_bytes()) + counters() +
           size_t(threads) * own_bytes;
  }

  int32_t digits_of(const Matrix& m) const { return m.table ? 0 : d.digits; }
  size_t room_of(const Matrix& m) const { return whole_lines(ActivationRoom(path, m, tokens, digits_of(m)).bytes); }

  // Which of some products an activation is shared with: the first that reads it in the same order.
  static int shared_with(const Matrix* const* m, int which) {
    for (int other = 0; other < which; ++other) {
      if (same_layout(*m[other], *m[which])) return other;
    }
    return which;
  }

  size_t bytes_of(const Matrix* const* m, int count) const {
    size_t all = 0;
    for (int which = 0; which < count; ++which) all += shared_with(m, which) == which ? room_of(*m[which]) : 0;
    return all;
  }
};

// One thread's way through the blocks.
class Worker {
 public:
  Worker(Work& work, int part, int parts) : w_(work), d_(work.d), part_(part), parts_(parts) {
    uint8_t* at = w_.memory + w_.floats(w_.asking) + w_.floats(d_.width) + w_.floats(w_.widest()) + w_.counters();
    uint8_t* own = at + (w_.apart ? 0 : w_.between_bytes()) + size_t(part) * w_.own_bytes;
    scores_ = reinterpret_cast<float*>(w_.apart ? own + w_.between_bytes() : own);
    uint8_t* between = w_.apart ? own : at;
    state_ = reinterpret_cast<float*>(between);
    normed_ = reinterpret_cast<float*>(between + w_.floats(d_.width));
    fed_ = reinterpret_cast<float*>(between + 2 * w_.floats(d_.width));
    digits_ = between + 2 * w_.floats(d_.width) + w_.floats(w_.inner);
  }

  void run() {
    const float* added = nullptr;  // to the state: what the block before has made
    for (int64_t b = 0; b < d_.blocks; ++b) {
      block(d_.block[b], b, b == 0 ? d_.x : state_, added);
      added = w_.made;
    }
    const float* from = d_.blocks == 0 ? d_.x : state_;
    if (d_.y != nullptr) {
      const int64_t first = w_.tokens * part_ / parts_, last = w_.tokens * (part_ + 1) / parts_;
      for (int64_t t = first; t < last; ++t) {
        if (added != nullptr) {
          w_.rows.add(from + t * d_.width, added + t * d_.width, d_.width, d_.y + t * d_.width);
        } else {
          memcpy(d_.y + t * d_.width, from + t * d_.width, size_t(d_.width) * sizeof(float));
        }
      }
    }
    if (d_.head == nullptr) return;
    prepare(&d_.head, 1, [&](int64_t t) {
      normalize(t, from, added, d_.weight, d_.shift, d_.epsilon);
      return normed_;
    });
    multiply(&d_.head, &d_.head_bias, 1, d_.scores, d_.head->rows, 4 * d_.blocks);
  }

 private:
  void wait() { w_.barrier.wait(parts_); }

  // x + added -> the state, and its norm beside it.
  void normalize(int64_t t, const float* x, const float* added, const float* weight, const float* shift, float epsilon) {
    const auto norm = d_.centred ? w_.rows.normalize : w_.rows.scale;
    const int64_t at = t * d_.width;
    norm(x + at, added == nullptr ? nullptr : added + at, d_.width, weight, shift, epsilon, state_ + at, normed_ + at);
  }

  // The activations of some products: input(t) makes token t's ready and says where they all lie.
  template <typename Input>
  void prepare(const Matrix* const* m, int count, Input&& input) {
    uint8_t* at = digits_;
    for (int which = 0; which < count; ++which) {
      const int same = w_.shared_with(m, which);
      const ActivationRoom room(w_.path, *m[which], w_.tokens, w_.digits_of(*m[which]));
      a_[which] = same == which ? room.at(at, *m[which], w_.tokens, w_.digits_of(*m[which])) : a_[same];
      if (same == which) at += whole_lines(room.bytes);
    }
    const int64_t first = w_.apart ? 0 : w_.tokens * part_ / parts_;
    const int64_t last = w_.apart ? w_.tokens : w_.tokens * (part_ + 1) / parts_;
    for (int64_t t = first; t < last; ++t) {
      const float* x = input(t);
      for (int which = 0; which < count; ++which) {
        if (w_.shared_with(m, which) == which) w_.path.quantize(*m[which], x, m[which]->columns, t, t + 1, a_[which]);
      }
    }
    if (!w_.apart) wait();
  }

  // Their products side by side: y is [tokens, stride].
  void multiply(const Matrix* const* m, const float* const* bias, int count, float* y, int64_t stride, int64_t number) {
    int64_t tiles = 0;
    for (int which = 0; which < count; ++which) tiles += m[which]->tiles;
    const auto some = [&](int64_t first, int64_t last) {
      float* own = y;
      for (int which = 0; which < count && last > 0; ++which) {
        const int64_t here = m[which]->tiles, end = last < here ? last : here;
        if (first < end) w_.path.multiply(*m[which], a_[which], first, end, {own, stride, bias[which]});
        first = first > here ? first - here : 0, last -= here, own += m[which]->rows;
      }
    };
    if (w_.tokens < kShared) {
      const int64_t first = tiles * part_ / parts_, last = tiles * (part_ + 1) / parts_;
      if (first < last) some(first, last);
    } else {
      for (;;) {
        const int64_t tile = __atomic_fetch_add(w_.next + number, 1, __ATOMIC_RELAXED);
        if (tile >= tiles) break;
        some(tile, tile + 1);
      }
    }
    wait();
  }

  // A head of position `at`, normed, and turned by its angles. which: 0 of queries, 1 of keys.
  void turn(const DecoderBlock& block, int which, float* x, int64_t at, float scale, float* to) const {
    if (const float* weight = block.head_weight[which]) {
      w_.rows.scale(x, nullptr, d_.dim, weight, nullptr, block.head_epsilon[which], nullptr, x);
    }
    const int64_t angles = d_.turned > 0 ? (at - d_.origin) * d_.turned : 0;
    w_.heads.turn(x, d_.cosine + angles, d_.sine + angles, d_.turned, d_.dim, scale, to);
  }

  // Turns the keys of a row's new positions, and writes them and the values to the cache.
  void keep(const DecoderBlock& block, int64_t row, int64_t group) {
    for (int64_t t = 0; t < d_.count; ++t) {
      const int64_t at = d_.starts[row] + t;
      float* k = w_.wide + (row * d_.count + t) * stride() + w_.asking + group * d_.dim;
      const int64_t to = ((row * d_.groups + group) * d_.capacity + at) * d_.dim;
      turn(block, 1, k, at, 1.0f, block.keys + to);
      memcpy(block.values + to, k + w_.offering, size_t(d_.dim) * sizeof(float));
    }
  }

  void look(const DecoderBlock& block, int64_t row, int64_t head) {
    const int64_t group = head / (d_.heads / d_.groups);
    for (int64_t t = 0; t < d_.count; ++t) {
      const int64_t at = d_.starts[row] + t, token = row * d_.count + t;
      float* q = w_.wide + token * stride() + head * d_.dim;
      turn(block, 0, q, at, d_.scale, q);
      const int64_t seen = block.window > 0 && block.window < at + 1 ? block.window : at + 1;
      const int64_t from = ((row * d_.groups + group) * d_.capacity + at + 1 - seen) * d_.dim;
      w_.heads.look(q, block.keys + from, block.values + from, seen, d_.dim, scores_,
                    w_.attended + token * w_.asking + head * d_.dim);
    }
  }

  void attend(const DecoderBlock& block) {
    const int64_t groups = d_.rows * d_.groups, heads = d_.rows * d_.heads;
    for (int64_t i = groups * part_ / parts_; i < groups * (part_ + 1) / parts_; ++i) {
      keep(block, i / d_.groups, i % d_.groups);
    }
    if (groups % parts_ != 0) wait();  // else a thread looks at what it has kept itself
    for (int64_t i = heads * part_ / parts_; i < heads * (part_ + 1) / parts_; ++i) {
      look(block, i / d_.heads, i % d_.heads);
    }
    wait();
  }

  int64_t stride() const { return w_.asking + 2 * w_.offering; }

  void block(const DecoderBlock& b, int64_t number, const float* x, const float* added) {
    const int64_t inner = b.matrix[kGate]->rows;
    prepare(b.matrix + kToQuery, 3, [&](int64_t t) {
      normalize(t, x, added, b.weight[0], b.shift[0], b.epsilon[0]);
      return normed_;
    });
    multiply(b.matrix + kToQuery, b.bias + kToQuery, 3, w_.wide, stride(), 4 * number);
    attend(b);
    prepare(b.matrix + kFromHeads, 1, [&](int64_t) { return w_.attended; });
    multiply(b.matrix + kFromHeads, b.bias + kFromHeads, 1, w_.made, d_.width, 4 * number + 1);
    prepare(b.matrix + kGate, 2, [&](int64_t t) {
      normalize(t, state_, w_.made, b.weight[1], b.shift[1], b.epsilon[1]);
      return normed_;
    });
    multiply(b.matrix + kGate, b.bias + kGate, 2, w_.wide, 2 * inner, 4 * number + 2);
    prepare(b.matrix + kNarrow, 1, [&](int64_t t) {
      const float* gate = w_.wide + t * 2 * inner;
      w_.rows.gated(gate, gate + inner, inner, fed_ + t * inner);
      return fed_;
    });
    multiply(b.matrix + kNarrow, b.bias + kNarrow, 1, w_.made, d_.width, 4 * number + 3);
  }

  Work& w_;
  const Decoder& d_;
  const int part_, parts_;
  float *state_, *normed_, *fed_, *scores_;
  uint8_t* digits_;
  Activations a_[3];
};

bool shaped(const Matrix* m, int64_t rows, int64_t columns) {
  return m != nullptr && m->rows == rows && m->columns == columns;
}

bool fits(const DecoderBlock& b, const Decoder& d) {
  const int64_t asking = d.heads * d.dim, offering = d.groups * d.dim;
  if (b.matrix[kGate] == nullptr) return false;
  const int64_t inner = b.matrix[kGate]->rows;
  return shaped(b.matrix[kToQuery], asking, d.width) && shaped(b.matrix[kToKey], offering, d.width) &&
         shaped(b.matrix[kToValue], offering, d.width) && shaped(b.matrix[kFromHeads], d.width, asking) &&
         shaped(b.matrix[kGate], inner, d.width) && shaped(b.matrix[kWiden], inner, d.width) &&
         shaped(b.matrix[kNarrow], d.width, inner) && b.weight[0] != nullptr && b.weight[1] != nullptr &&
         b.keys != nullptr && b.values != nullptr && b.window >= 0;
}

bool fits(const Decoder& d) {
  constexpr int64_t kMost = int64_t(1) << 30;
  if (d.rows < 1 || d.count < 1 || d.rows > kMost / d.count || d.blocks < 0) return false;
  if (d.width < 16 || d.width % 16 || d.width > kMost || d.x == nullptr) return false;
  if (d.digits < 1 || d.digits > 3) return false;
  if (d.blocks == 0) return d.head != nullptr ? shaped(d.head, d.head->rows, d.width) && d.weight && d.scores : d.y != nullptr;
  if (d.block == nullptr || d.starts == nullptr || (d.y == nullptr && d.head == nullptr)) return false;
  if (d.dim < 16 || d.dim % 16 || d.dim > kLongestDecoderHead) return false;
  if (d.groups < 1 || d.heads < d.groups || d.heads % d.groups || d.heads > kMost / d.dim) return false;
  if (d.origin < 0 || d.turned < 0 || d.turned % 2 || d.turned > d.dim) return false;
  if (d.turned > 0 && (d.cosine == nullptr || d.sine == nullptr)) return false;
  for (int64_t row = 0; row < d.rows; ++row) {
    if (d.starts[row] < 0 || d.starts[row] > d.capacity - d.count) return false;
    if (d.turned > 0 && (d.starts[row] < d.origin || d.starts[row] - d.origin > d.turns - d.count)) return false;
  }
  if (d.head != nullptr && (!shaped(d.head, d.head->rows, d.width) || !d.weight || !d.scores)) return false;
  for (int64_t b = 0; b < d.blocks; ++b) {
    if (!fits(d.block[b], d)) return false;
  }
  return true;
}

int useful_threads(const Decoder& d, int threads) {
  int64_t bytes = d.head == nullptr ? 0 : int64_t(d.head->bytes);
  for (int64_t b = 0; b < d.blocks; ++b) {
    for (const Matrix* m : d.block[b].matrix) bytes += int64_t(m->bytes);
  }
  return threads < 1 || bytes < kAlone / (d.rows * d.count) ? 1 : threads;
}

}  // namespace

int decode_tokens(const Decoder& d, int threads) {
  const Path* path = path_named(d.path);
  if (path == nullptr) return 1;
  if (!fits(d)) return 4;
  threads = useful_threads(d, threads);
  static const int64_t from_the_start[1] = {0};
  Decoder given = d;
  if (d.blocks == 0) {
    given.starts = from_the_start, given.count = d.rows * d.count, given.rows = 1;
    given.heads = given.groups = given.dim = 0;
  }
  Work work(given, *path, threads);
  work.memory = scratch.at_least(work.bytes(threads));
  if (work.memory == nullptr) return 3;
  work.attended = reinterpret_cast<float*>(work.memory);
  work.made = reinterpret_cast<float*>(work.memory + work.floats(work.asking));
  work.wide = reinterpret_cast<float*>(work.memory + work.floats(work.asking) + work.floats(d.width));
  work.next = reinterpret_cast<int64_t*>(work.memory + work.floats(work.asking) + work.floats(d.width) +
                                         work.floats(work.widest()));
  memset(work.next, 0, work.counters());
  const auto body = [](void* data, int part, int parts) {
    Worker(*static_cast<Work*>(data), part, parts).run();
  };
  at_once(threads, body, &work);
  return 0;
}

}  // namespace layerwise
