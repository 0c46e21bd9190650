// From the stored codes, row by row, to tiles of 16 rows.
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "half.h"
#include "parts.h"

namespace layerwise {

namespace {

int unit_columns(int bits) { return bits == 8 ? 4 : (bits & 1) ? 32 : (bits & 2) ? 16 : 8; }

// Widths of the planes of a code, widest first, which hold its bits from the lowest up.
int plane_widths(int bits, int widths[4]) {
  int count = 0;
  for (int width = 8; width > 0; width /= 2) {
    if (bits & width) widths[count++] = width;
  }
  return count;
}

int64_t stored_row_bytes(const Stored& s) {
  if (s.trits) return (s.columns + 4) / 5;
  int widths[4];
  int64_t total = 0;
  const int count = plane_widths(int(s.bits), widths);
  for (int i = 0; i < count; ++i) total += (s.columns * widths[i] + 7) / 8;
  return total;
}

void unpack_row(const Stored& s, const uint8_t* row, uint8_t* codes) {
  if (s.trits) {
    static const int power[5] = {1, 3, 9, 27, 81};
    for (int64_t k = 0; k < s.columns; ++k) codes[k] = uint8_t((3 * ((row[k / 5] * power[k % 5]) & 255)) >> 8);
    return;
  }
  int widths[4], shift = 0;
  const int count = plane_widths(int(s.bits), widths);
  memset(codes, 0, size_t(s.columns));
  for (int i = 0; i < count; ++i) {
    const int width = widths[i], per_byte = 8 / width, mask = (1 << width) - 1;
    for (int64_t k = 0; k < s.columns; ++k) {
      codes[k] |= uint8_t(((row[k / per_byte] >> (k % per_byte * width)) & mask) << shift);
    }
    row += (s.columns * width + 7) / 8;
    shift += width;
  }
}

// The states of a row of a trellis: its codes and those of the rows above it, round its strip, which is a tile.
void unpack_states(const Stored& s, int64_t row, int64_t row_bytes, uint8_t* states, uint8_t* codes) {
  memset(states, 0, size_t(s.columns));
  const int64_t strip = row / kRows * kRows;
  for (int64_t back = 0; back * s.bits < 8; ++back) {
    const int64_t above = strip + (row - strip - back + kRows) % kRows;
    if (above >= s.rows) continue;  // code 0
    unpack_row(s, s.codes + above * row_bytes, codes);
    for (int64_t k = 0; k < s.columns; ++k) states[k] = uint8_t(states[k] | codes[k] << (back * s.bits));
  }
}

// One block of one row of a tile, into memory that is zero.
void place_row(int bits, const Block& block, const uint8_t* codes, int row, uint8_t* out) {
  int widths[4];
  const int count = plane_widths(bits, widths), unit = unit_columns(bits), unit_bytes = 2 * unit * bits;
  const int half = row / kHalf, lane = row % kHalf;
  for (int32_t k = 0; k < block.length; ++k) {
    uint8_t* line = out + (int64_t(k / unit) * 2 + half) * unit_bytes;
    const int chunk = k % unit / 4;
    int code = codes[block.column + k];
    for (int i = 0; i < count; ++i) {
      const int width = widths[i], per_line = 8 / width;
      uint8_t* to = line + kLine * (chunk / per_line) + 4 * lane + k % 4;
      *to = uint8_t(*to | (code & ((1 << width) - 1)) << (width * (chunk % per_line)));
      code >>= width;
      line += 2 * unit * width;
    }
  }
}

bool sound(const Stored& s) {
  if (s.rows < 1 || s.columns < 1 || s.rows > INT_MAX || s.columns > INT_MAX) return false;
  if (s.rows * s.columns > int64_t(1) << 40) return false;
  if (s.bits < (s.values != nullptr ? 1 : 2) || s.bits > 8 || s.planes < 1 || s.planes > 4 || s.group < 1 || s.group > s.columns) return false;
  if (s.trits && s.bits != 2) return false;
  if (s.levels != nullptr && (s.bits != 4 || s.zero_kind != kZeroNone)) return false;
  if (s.scale_kind != kScaleHalf && s.scale_kind != kScaleByte) return false;
  if (s.zero_kind < kZeroNone || s.zero_kind > kZeroHalf || s.centre < 0 || s.centre > 128) return false;
  if (s.values != nullptr) {
    if (s.bits > 5 || s.planes != 1 || s.trits || s.levels != nullptr || s.zero_kind != kZeroNone) return false;
  }
  // A centred code is an int8.
  if (s.bits == 8 || s.values != nullptr ? s.centre != 128 : s.centre > (1 << (s.bits - 1))) return false;
  const int64_t groups = (s.columns + s.group - 1) / s.group, entries = s.rows * s.planes * groups;
  if (s.codes == nullptr || s.codes_bytes != s.rows * s.planes * stored_row_bytes(s)) return false;
  if (s.scale == nullptr || s.scale_bytes != entries * (s.scale_kind == kScaleHalf ? 2 : 1)) return false;
  const int64_t zero_bytes = s.zero_kind == kZeroNone ? 0 : entries * (s.zero_kind == kZeroHalf ? 2 : 1);
  if (s.zero_bytes != zero_bytes || (zero_bytes > 0 && s.zero == nullptr)) return false;
  return true;
}

// Groups, cut into blocks of at most kLongestBlock columns; with `out` null they are only counted.
int64_t cut_blocks(const Stored& s, Block* out, int64_t* width) {
  const int unit = unit_columns(int(s.bits));
  int64_t count = 0, place = 0;
  for (int64_t start = 0; start < s.columns; start += s.group) {
    const int64_t stop = start + s.group < s.columns ? start + s.group : s.columns;
    for (int64_t at = start; at < stop; at += kLongestBlock, ++count) {
      const int64_t length = stop - at < kLongestBlock ? stop - at : kLongestBlock;
      const int64_t padded = (length + unit - 1) / unit * unit;
      if (out != nullptr) out[count] = {at, place, int32_t(length), int32_t(padded)};
      place += padded;
    }
  }
  *width = place;
  return count;
}

struct Packing {
  const Stored* stored;
  Matrix* matrix;
  int failed;
};

void pack_tiles(void* data, int part, int parts) {
  auto& packing = *static_cast<Packing*>(data);
  const Stored& s = *packing.stored;
  Matrix& m = *packing.matrix;
  const int64_t row_bytes = stored_row_bytes(s), groups = (s.columns + s.group - 1) / s.group;
  const int scale_size = m.scale_kind == kScaleHalf ? 2 : 1, zero_size = m.zero_kind == kZeroHalf ? 2 : 1;
  auto* codes = static_cast<uint8_t*>(malloc(size_t(s.columns)));
  if (codes == nullptr) {
    __atomic_store_n(&packing.failed, 1, __ATOMIC_RELAXED);
    return;
  }
  for (int64_t tile = m.tiles * part / parts; tile < m.tiles * (part + 1) / parts; ++tile) {
    uint8_t* base = m.data + tile * m.tile_bytes;
    memset(base, 0, size_t(m.tile_bytes));  // by the thread that will read it: memory comes to be where it is touched
    for (int lane = 0; lane < kRows && tile * kRows + lane < m.rows; ++lane) {
      const int64_t row = tile * kRows + lane;
      for (int plane = 0; plane < m.planes; ++plane) {
        const int64_t of_plane = row * m.planes + plane;
        unpack_row(s, s.codes + of_plane * row_bytes, codes);
        for (int b = 0; b < m.blocks; ++b) {
          const Block& block = m.block[b];
          const Places& places = m.places[plane * m.blocks + b];
          place_row(m.bits, block, codes, lane, base + places.codes);
          const int64_t from = of_plane * groups + block.column / s.group;
          memcpy(base + places.scale + lane * scale_size, s.scale + from * scale_size, size_t(scale_size));
          if (m.zero_kind == kZeroNone) continue;
          memcpy(base + places.zero + lane * zero_size, s.zero + from * zero_size, size_t(zero_size));
        }
      }
    }
  }
  free(codes);
}

int64_t lines(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

// Where everything of a tile is; returns its size.
int64_t lay_out(Matrix& m) {
  const int64_t scale_bytes = kRows * (m.scale_kind == kScaleHalf ? 2 : 1);
  const int64_t zero_bytes = m.zero_kind == kZeroNone ? 0 : kRows * (m.zero_kind == kZeroHalf ? 2 : 1);
  const int64_t all = int64_t(m.planes) * m.blocks;
  int64_t at = 0;
  for (int64_t first = 0; first < all; first += 2) {
    const int64_t count = all - first < 2 ? 1 : 2;
    int64_t codes = at + lines(count * (scale_bytes + zero_bytes));
    for (int64_t i = 0; i < count; ++i) {
      m.places[first + i] = {at + i * scale_bytes, at + count * scale_bytes + i * zero_bytes, codes};
      codes += int64_t(m.block[(first + i) % m.blocks].padded) * kRows * m.bits / 8;
    }
    at = codes;
  }
  return at;
}

}  // namespace

void* aligned_memory(size_t bytes) {
  // A spare line, so that nothing that is read beside the last value lies outside; huge pages where they pay.
  const size_t large = size_t(1) << 21;
  const size_t alignment = bytes >= 2 * large ? large : size_t(kLine);
  const size_t rounded = (bytes + kLine + alignment - 1) / alignment * alignment;
  void* memory = aligned_alloc(alignment, rounded);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (memory != nullptr && alignment == large) madvise(memory, rounded, MADV_HUGEPAGE);
#endif
  return memory;
}

// Whether codes less their whole zeros are signed bytes, see layout.h.
static bool is_narrow(const Stored& s) {
  int64_t least = s.centre, most = s.centre;
  if (s.zero_kind == kZeroByte) {
    least = 255, most = 0;
    for (int64_t i = 0; i < s.zero_bytes; ++i) {
      least = s.zero[i] < least ? s.zero[i] : least;
      most = s.zero[i] > most ? s.zero[i] : most;
    }
  }
  const int64_t codes = s.values != nullptr ? 256 : int64_t(1) << s.bits;
  return most <= 128 && codes - 1 - least <= 127;
}

// A state of a trellis as the loops put it together, see trellis.h.
static int in_order(int state, int bits) {
  const auto field = [state](int from, int count, int to) { return (state >> from & ((1 << count) - 1)) << to; };
  if (bits == 3) return field(0, 2, 0) | field(2, 1, 6) | field(3, 2, 4) | field(5, 1, 7) | field(6, 2, 2);
  if (bits == 5) return field(0, 4, 0) | field(4, 1, 7) | field(5, 3, 4);
  return state;
}

Matrix* repack(const Stored& s, int threads) {
  if (!sound(s)) return nullptr;
  auto* m = static_cast<Matrix*>(calloc(1, sizeof(Matrix)));
  if (m == nullptr) return nullptr;
  m->rows = s.rows, m->columns = s.columns, m->tiles = (s.rows + kRows - 1) / kRows;
  m->bits = int32_t(s.bits), m->planes = int32_t(s.planes), m->centre = int32_t(s.centre);
  m->scale_kind = ScaleKind(s.scale_kind), m->zero_kind = ZeroKind(s.zero_kind);
  m->table = s.levels != nullptr, m->narrow = is_narrow(s), m->trellis = s.values != nullptr;
  for (int state = 0; m->trellis && state < 256; ++state) {
    m->values[in_order(state, m->bits)] = uint8_t(s.values[state] + 128);
  }
  for (int code = 0; code < 16; ++code) m->levels[code] = m->table ? s.levels[code] : float(code - m->centre);
  const int64_t blocks = cut_blocks(s, nullptr, &m->width);
  if (blocks > INT_MAX / 4) return release(m), nullptr;
  m->blocks = int32_t(blocks);
  m->block = static_cast<Block*>(malloc(size_t(blocks) * sizeof(Block)));
  if (m->block == nullptr) return release(m), nullptr;
  cut_blocks(s, m->block, &m->width);
  m->places = static_cast<Places*>(malloc(size_t(blocks * m->planes) * sizeof(Places)));
  if (m->places == nullptr) return release(m), nullptr;
  m->tile_bytes = lay_out(*m);
  m->bytes = size_t(m->tiles * m->tile_bytes);
  m->data = static_cast<uint8_t*>(aligned_memory(m->bytes));
  if (m->data == nullptr) return release(m), nullptr;
  if (s.factor != nullptr) {
    m->factor = static_cast<float*>(aligned_memory(size_t(m->tiles * kRows) * sizeof(float)));
    if (m->factor == nullptr) return release(m), nullptr;
    for (int64_t row = 0; row < m->tiles * kRows; ++row) m->factor[row] = row < s.rows ? s.factor[row] : 0.0f;
  }
  Packing packing = {&s, m, 0};
  parallel(threads, pack_tiles, &packing);
  if (packing.failed) return release(m), nullptr;
  return m;
}

namespace {

struct Copying {
  const Matrix* from;
  Matrix* to;
};

void copy_tiles(void* data, int part, int parts) {
  const auto& c = *static_cast<Copying*>(data);
  const int64_t first = c.from->tiles * part / parts, last = c.from->tiles * (part + 1) / parts;
  const int64_t size = c.from->tile_bytes;
  memcpy(c.to->data + first * size, c.from->data + first * size, size_t((last - first) * size));
}

}  // namespace

Matrix* copy(const Matrix& from, int threads) {
  auto* m = static_cast<Matrix*>(malloc(sizeof(Matrix)));
  if (m == nullptr) return nullptr;
  *m = from;
  const size_t blocks = size_t(from.blocks) * sizeof(Block), places = size_t(from.blocks * from.planes) * sizeof(Places);
  const size_t factors = size_t(from.tiles * kRows) * sizeof(float);
  m->block = static_cast<Block*>(malloc(blocks));
  m->places = static_cast<Places*>(malloc(places));
  m->data = static_cast<uint8_t*>(aligned_memory(from.bytes));
  m->factor = from.factor == nullptr ? nullptr : static_cast<float*>(aligned_memory(factors));
  if (!m->block || !m->places || !m->data || (from.factor != nullptr && m->factor == nullptr)) {
    return release(m), nullptr;
  }
  memcpy(m->block, from.block, blocks);
  memcpy(m->places, from.places, places);
  if (m->factor != nullptr) memcpy(m->factor, from.factor, factors);
  Copying copying = {&from, m};
  parallel(threads, copy_tiles, &copying);
  return m;
}

int take_rows(const Stored& s, const int64_t* index, int64_t count, float* out) {
  if (!sound(s)) return 4;
  for (int64_t i = 0; i < count; ++i) {
    if (index[i] < 0 || index[i] >= s.rows) return 5;
  }
  auto* codes = static_cast<uint8_t*>(malloc(size_t(s.columns) * (s.values != nullptr ? 2 : 1)));
  if (codes == nullptr) return 3;
  const int64_t row_bytes = stored_row_bytes(s), groups = (s.columns + s.group - 1) / s.group;
  const auto half_at = [](const uint8_t* from) {
    uint16_t half;
    memcpy(&half, from, 2);
    return half_to_float(half);
  };
  for (int64_t i = 0; i < count; ++i) {
    float* to = out + i * s.columns;
    for (int64_t plane = 0; plane < s.planes; ++plane) {
      const int64_t of_plane = index[i] * s.planes + plane;
      if (s.values != nullptr) {
        unpack_states(s, index[i], row_bytes, codes, codes + s.columns);
      } else {
        unpack_row(s, s.codes + of_plane * row_bytes, codes);
      }
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = of_plane * groups + g, last = (g + 1) * s.group < s.columns ? (g + 1) * s.group : s.columns;
        float scale = s.scale_kind == kScaleHalf ? half_at(s.scale + 2 * at) : float(s.scale[at]);
        if (s.factor != nullptr) scale *= s.factor[index[i]];
        float zero = float(s.centre);
        if (s.zero_kind == kZeroByte) zero = float(s.zero[at]);
        if (s.zero_kind == kZeroHalf) zero = half_at(s.zero + 2 * at);
        for (int64_t k = g * s.group; k < last; ++k) {
          const float level = s.levels != nullptr   ? s.levels[codes[k] & 15]
                              : s.values != nullptr ? float(s.values[codes[k]])
                                                    : float(codes[k]) - zero;
          const float value = level * scale;
          to[k] = plane == 0 ? value : to[k] + value;
        }
      }
    }
  }
  free(codes);
  return 0;
}

void release(Matrix* m) {
  if (m == nullptr) return;
  free(m->block);
  free(m->places);
  free(m->data);
  free(m->factor);
  free(m);
}

}  // namespace layerwise
