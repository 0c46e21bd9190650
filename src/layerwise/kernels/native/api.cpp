// The C interface that Python calls. Nothing is thrown across it: 0 is success, and what cannot be done is said by a
// number or a null pointer. Handles are checked by Python, which alone makes and keeps them.
#include <stdlib.h>
#include <string.h>

#include "parts.h"
#include "room.h"

#if defined(LAYERWISE_NEON) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(LAYERWISE_NEON) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

using namespace layerwise;

namespace {

bool runs_avx2() {
#if defined(LAYERWISE_X86)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool runs_avx512() {
#if defined(LAYERWISE_X86)
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

#if defined(LAYERWISE_NEON)
bool runs_neon_dot() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & 1ul << 20) != 0;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof(has);
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}
#endif

// Best first.
const Path* path_at(int index) {
  const Path* known[4];
  int count = 0;
#if defined(LAYERWISE_X86)
  if (runs_avx512()) known[count++] = &kAvx512;
  if (runs_avx2()) known[count++] = &kAvx2;
#endif
#if defined(LAYERWISE_NEON)
  if (runs_neon_dot()) known[count++] = &kNeonDot;
  known[count++] = &kNeon;
#endif
  known[count++] = &kPortable;
  return index >= 0 && index < count ? known[index] : nullptr;
}

}  // namespace

const Path* layerwise::path_named(const char* name) {
  for (int i = 0; const Path* path = path_at(i); ++i) {
    if (strcmp(path->name, name) == 0) return path;
  }
  return nullptr;
}

namespace {

constexpr int64_t kSerialBytes = 64 << 10;  // below this a fork and join takes longer than the product

int useful_threads(int64_t bytes, int64_t tiles, int threads) {
  if (bytes < kSerialBytes || threads < 1) return 1;
  return threads < tiles ? threads : int(tiles);
}

struct Product {
  const Path* path;
  const Matrix* matrix;
  const Activations* activations;
  int64_t first, last;
  Output out;
};

// Every thread has a run of tiles of its own.
void multiply_part(void* data, int part, int parts) {
  const auto& p = *static_cast<Product*>(data);
  const int64_t tiles = p.last - p.first;
  const int64_t first = p.first + tiles * part / parts, last = p.first + tiles * (part + 1) / parts;
  if (first < last) p.path->multiply(*p.matrix, *p.activations, first, last, p.out);
}

// From so many tokens on tiles are taken one by one, and who is done with its own helps the others: a thread that is held
// up is not waited for. Its own first, since neighbouring results share pages, and are where they were the last time.
constexpr int64_t kShared = 16;

struct SharedProduct {
  static constexpr int kRuns = 64;
  struct alignas(kLine) Run {
    int64_t taken;
  };
  Product product;
  Run run[kRuns];
};

void multiply_shared(void* data, int part, int parts) {
  auto& s = *static_cast<SharedProduct*>(data);
  const Product& p = s.product;
  const int64_t tiles = p.last - p.first, runs = parts < SharedProduct::kRuns ? parts : SharedProduct::kRuns;
  for (int64_t i = 0; i < runs; ++i) {
    const int64_t own = (part + i) % runs, last = p.first + tiles * (own + 1) / runs;
    for (;;) {
      const int64_t tile = p.first + tiles * own / runs + __atomic_fetch_add(&s.run[own].taken, 1, __ATOMIC_RELAXED);
      if (tile >= last) break;
      p.path->multiply(*p.matrix, *p.activations, tile, tile + 1, p.out);
    }
  }
}

struct Quantization {
  const Path* path;
  const Matrix* matrix;
  const Activations* activations;
  const float* x;
  int64_t stride;
};

void quantize_part(void* data, int part, int parts) {
  const auto& q = *static_cast<Quantization*>(data);
  // Whole sets: what lies side by side is written by one thread.
  const int64_t tokens = q.activations->tokens, together = q.activations->together > 0 ? q.activations->together : 1;
  const int64_t sets = (tokens + together - 1) / together, first = sets * part / parts * together;
  const int64_t end = sets * (part + 1) / parts * together, last = end < tokens ? end : tokens;
  q.path->quantize(*q.matrix, q.x, q.stride, first, last, *q.activations);
}

thread_local Scratch scratch;

struct SparseProduct {
  const Path* path;
  const Sparse* matrix;
  const float* x;
  int64_t stride, tokens;
  Output out;
};

void sparse_part(void* data, int part, int parts) {
  const auto& p = *static_cast<SparseProduct*>(data);
  const int64_t first = p.matrix->rows * part / parts, last = p.matrix->rows * (part + 1) / parts;
  if (first < last) p.path->sparse(*p.matrix, p.x, p.stride, p.tokens, first, last, p.out);
}

void decode_part(void* data, int part, int parts) {
  const auto& p = *static_cast<Product*>(data);
  const int64_t tiles = p.last - p.first;
  const int64_t first = tiles * part / parts, last = tiles * (part + 1) / parts;
  if (first < last) p.path->decode(*p.matrix, p.first + first, p.first + last, p.out.y + first * kRows, p.out.stride);
}

struct Reading {
  const Path* path;
  const uint8_t* data;
  int64_t lines;
  uint64_t found;
};

void read_part(void* data, int part, int parts) {
  auto& r = *static_cast<Reading*>(data);
  const int64_t first = r.lines * part / parts, last = r.lines * (part + 1) / parts;
  const uint64_t sum = r.path->read(r.data + first * kLine, size_t((last - first) * kLine));
  __atomic_fetch_xor(&r.found, sum, __ATOMIC_RELAXED);
}

struct Counting {
  const Path* path;
  int64_t rounds, products;
  int32_t found;
};

void count_part(void* data, int, int) {
  auto& c = *static_cast<Counting*>(data);
  int32_t found = 0;
  const int64_t products = c.path->dots(c.rounds, &found);
  __atomic_fetch_add(&c.products, products, __ATOMIC_RELAXED);
  __atomic_fetch_xor(&c.found, found, __ATOMIC_RELAXED);
}

}  // namespace

#define LAYERWISE_API extern "C" __attribute__((visibility("default")))

LAYERWISE_API int32_t layerwise_version() { return 6; }

LAYERWISE_API const char* layerwise_threads() { return thread_pool(); }

// Name of the index-th path that this processor runs, best first; null behind the last.
LAYERWISE_API const char* layerwise_path(int32_t index) {
  const Path* path = path_at(index);
  return path == nullptr ? nullptr : path->name;
}

LAYERWISE_API void* layerwise_repack(const Stored* stored, int64_t size, int32_t threads) {
  if (stored == nullptr || size != int64_t(sizeof(Stored))) return nullptr;
  return repack(*stored, threads);
}

// Rows of the stored form itself, see parts.h for what is returned.
LAYERWISE_API int32_t layerwise_take(const void* stored, int64_t size, const int64_t* index, int64_t count, float* out) {
  if (stored == nullptr || size != int64_t(sizeof(Stored)) || count < 0) return 4;
  return take_rows(*static_cast<const Stored*>(stored), index, count, out);
}

LAYERWISE_API void* layerwise_copy(const void* matrix, int32_t threads) {
  return copy(*static_cast<const Matrix*>(matrix), threads);
}

LAYERWISE_API void layerwise_release(void* matrix) { release(static_cast<Matrix*>(matrix)); }

LAYERWISE_API int64_t layerwise_bytes(const void* matrix) {
  return int64_t(static_cast<const Matrix*>(matrix)->bytes);
}

// y [tokens, rows] = x [tokens, columns] W^T, both with a stride between tokens and 1 between features; any alignment
// of a float. digits: of the activations, 1 to 3, see layout.h; tables take them as floats. 0 done; 1 no such path; 2 no
// such digits; 3 no memory. bias: [rows], added to every token, or null.
LAYERWISE_API int32_t layerwise_multiply(const void* handle, const char* path, const float* x, int64_t tokens,
                                         int64_t x_stride, float* y, int64_t y_stride, const float* bias,
                                         int32_t digits, int32_t threads) {
  const Matrix& m = *static_cast<const Matrix*>(handle);
  Product p = {path_named(path), &m, nullptr, 0, m.tiles, {y, y_stride, bias}};
  if (p.path == nullptr) return 1;
  if (digits < 1 || digits > 3) return 2;
  if (m.table) digits = 0;
  if (tokens < 1) return 0;
  const ActivationRoom room(*p.path, m, tokens, digits);
  uint8_t* memory = scratch.at_least(room.bytes);
  if (memory == nullptr) return 3;
  const Activations a = room.at(memory, m, tokens, digits);
  Quantization q = {p.path, &m, &a, x, x_stride};
  parallel(tokens < 8 ? 1 : useful_threads(int64_t(room.values), tokens, threads), quantize_part, &q);
  p.activations = &a;
  const int parts = useful_threads(int64_t(m.bytes) * tokens, m.tiles, threads);
  if (tokens < kShared) {
    parallel(parts, multiply_part, &p);
  } else {
    SharedProduct shared = {p, {}};
    parallel(parts, multiply_shared, &shared);
  }
  return 0;
}

// The same of a matrix of which some entries are kept; what it points to is the caller's, and fits together. 4: sizes that
// it cannot have.
LAYERWISE_API int32_t layerwise_sparse(const Sparse* matrix, int64_t size, const char* path, const float* x,
                                       int64_t tokens, int64_t x_stride, float* y, int64_t y_stride, const float* bias,
                                       int32_t threads) {
  if (matrix == nullptr || size != int64_t(sizeof(Sparse))) return 4;
  const Sparse& m = *matrix;
  const int64_t width = m.words * kHalf;
  if (m.rows < 1 || m.columns < 1 || m.columns > width || m.columns <= width - kHalf) return 4;
  if (m.kind < kHalfValues || m.kind > kCodeValues || m.bits < 1 || m.bits > 8) return 4;
  if (m.group_words < 1 || m.groups != (m.words + m.group_words - 1) / m.group_words) return 4;
  SparseProduct p = {path_named(path), &m, x, x_stride, tokens, {y, y_stride, bias}};
  if (p.path == nullptr) return 1;
  if (tokens < 1) return 0;
  if (m.columns < width) {  // the last run of columns is read as if it were whole
    auto* padded = reinterpret_cast<float*>(scratch.at_least(size_t(tokens) * size_t(width) * sizeof(float)));
    if (padded == nullptr) return 3;
    for (int64_t t = 0; t < tokens; ++t) {
      memcpy(padded + t * width, x + t * x_stride, size_t(m.columns) * sizeof(float));
      memset(padded + t * width + m.columns, 0, size_t(width - m.columns) * sizeof(float));
    }
    p.x = padded, p.stride = width;
  }
  parallel(useful_threads(m.starts[m.rows] * tokens, m.rows, threads), sparse_part, &p);
  return 0;
}

// Tiles first .. last-1 as float32, transposed: y [columns, stride], 32 values a tile. 0 done; 1 no such path; 4 no
// such tiles.
LAYERWISE_API int32_t layerwise_decode(const void* handle, const char* path, int64_t first, int64_t last, float* y,
                                       int64_t stride, int32_t threads) {
  const Matrix& m = *static_cast<const Matrix*>(handle);
  Product p = {path_named(path), &m, nullptr, first, last, {y, stride, nullptr}};
  if (p.path == nullptr) return 1;
  if (first < 0 || last > m.tiles || first > last || stride < (last - first) * kRows) return 4;
  parallel(useful_threads(m.tile_bytes * (last - first), last - first, threads), decode_part, &p);
  return 0;
}

// Reads the whole matrix and computes nothing. The result keeps the compiler from leaving it out.
LAYERWISE_API uint64_t layerwise_read(const void* handle, const char* path, int32_t threads) {
  const Matrix& m = *static_cast<const Matrix*>(handle);
  Reading r = {path_named(path), m.data, int64_t(m.bytes) / kLine, 0};
  if (r.path == nullptr) return 0;
  parallel(useful_threads(int64_t(m.bytes), m.tiles, threads), read_part, &r);
  return r.found;
}

// The same of any memory, as far as it is whole lines.
LAYERWISE_API uint64_t layerwise_read_memory(const uint8_t* data, int64_t bytes, const char* path, int32_t threads) {
  Reading r = {path_named(path), data, bytes / kLine, 0};
  if (r.path == nullptr || bytes < 0) return 0;
  parallel(useful_threads(bytes, r.lines, threads), read_part, &r);
  return r.found;
}

// Products of codes and digits by every thread, with hardly a load; returns how many. The limit of large batches.
LAYERWISE_API int64_t layerwise_dots(const char* path, int64_t rounds, int32_t threads) {
  Counting c = {path_named(path), rounds, 0, 0};
  if (c.path == nullptr || rounds < 1) return 0;
  parallel(threads < 1 ? 1 : threads, count_part, &c);
  return c.products;
}

// See parts.h. 0 done; 1 no such path; 3 no memory; 4 it does not fit together.
LAYERWISE_API int32_t layerwise_attend(const Attention* attention, int64_t size, int32_t threads) {
  if (attention == nullptr || size != int64_t(sizeof(Attention))) return 4;
  Attention a = *attention;
  const Path* path = path_named(a.path);
  if (path == nullptr) return 1;
  a.path = path->name;
  return attend(a, threads);
}

// See parts.h. 0 done; 1 no such path; 3 no memory; 4 it does not fit together.
LAYERWISE_API int32_t layerwise_encode(const EncoderBlock* block, int64_t size, int32_t threads) {
  if (block == nullptr || size != int64_t(sizeof(EncoderBlock))) return 4;
  return encode(*block, threads);
}

// See parts.h. 0 done; 1 no such path; 3 no memory; 4 it does not fit together.
LAYERWISE_API int32_t layerwise_continue(const Decoder* decoder, int64_t size, int32_t threads) {
  if (decoder == nullptr || size != int64_t(sizeof(Decoder))) return 4;
  return decode_tokens(*decoder, threads);
}

// Loops of encoders: 0 done; 1 no such path; 4 the caller knows another layout.
LAYERWISE_API int32_t layerwise_best(const void* given, int64_t size, const char* path) {
  if (given == nullptr || size != int64_t(sizeof(Candidates))) return 4;
  const Path* found = path_named(path);
  if (found == nullptr) return 1;
  grids_of(*found).best(*static_cast<const Candidates*>(given));
  return 0;
}

LAYERWISE_API int32_t layerwise_nearest(const void* given, int64_t size, const char* path) {
  if (given == nullptr || size != int64_t(sizeof(Nearest))) return 4;
  const Path* found = path_named(path);
  if (found == nullptr) return 1;
  grids_of(*found).nearest(*static_cast<const Nearest*>(given));
  return 0;
}

LAYERWISE_API int32_t layerwise_columns(const void* given, int64_t size, const char* path) {
  if (given == nullptr || size != int64_t(sizeof(Tile))) return 4;
  const Path* found = path_named(path);
  if (found == nullptr) return 1;
  grids_of(*found).columns(*static_cast<const Tile*>(given));
  return 0;
}

LAYERWISE_API int32_t layerwise_cut(const void* given, int64_t size, const char* path) {
  if (given == nullptr || size != int64_t(sizeof(Cut))) return 4;
  const Path* found = path_named(path);
  if (found == nullptr) return 1;
  cuts_of(*found).cut(*static_cast<const Cut*>(given));
  return 0;
}

LAYERWISE_API int32_t layerwise_recut(const void* given, int64_t size, const char* path) {
  if (given == nullptr || size != int64_t(sizeof(Recut))) return 4;
  const Path* found = path_named(path);
  if (found == nullptr) return 1;
  cuts_of(*found).recut(*static_cast<const Recut*>(given));
  return 0;
}
