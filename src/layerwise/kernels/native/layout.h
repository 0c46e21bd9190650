// The repacked matrix, and what every instruction set must be able to do with it.
//
// Only plain data is declared here. This header is read by files that are compiled for different instruction sets, and
// a function in it could be compiled with AVX-512, kept by the linker as the one copy, and then be run everywhere.
//
// A tile is 16 output rows; a row is one 32-bit lane. Four consecutive columns of a row are the four bytes of its lane,
// so that one dot-product instruction does 64 products and nothing is ever summed across lanes:
//
//     64 bytes at 4 bits, columns k .. k+7      lane r, byte j:  q[r, k+j]  |  q[r, k+4+j] << 4
//     64 bytes at 2 bits, columns k .. k+15     lane r, byte j:  q[r, k+j]  |  q[r, k+4+j] << 2  |  ..8.. |  ..12..
//
// Other widths are such planes one after the other, as in the stored form: 3 = 2 + 1, 6 = 4 + 2. A *unit* is the least
// number of columns that fills every plane with whole lines (32 where there is a 1-bit plane, 16 with a 2-bit plane,
// else 8 or 4). Tile after tile lies in memory:
//
//     [ units of block 0, block 1, ... ][ 16 scales of each block ][ 16 zeros of each block ]    padded to 64 bytes
//
// A *block* is a run of columns with one scale: a group, or a piece of a long one, so that sums stay short. Blocks are
// padded to whole units with code 0, whose activation is 0. A matrix that is a sum of planes (ternary) has the blocks
// of every plane; they read the same activations.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace layerwise {

constexpr int kRows = 16;
constexpr int kLine = 64;
constexpr int kLongestBlock = 256;

enum ScaleKind : int32_t { kScaleHalf = 0, kScaleByte = 1 };
enum ZeroKind : int32_t { kZeroNone = 0, kZeroByte = 1, kZeroHalf = 2 };

struct Block {
  int64_t column;  // first column of the matrix
  int64_t place;   // first place in a row of padded activations
  int32_t length;  // columns
  int32_t padded;  // whole units
};

struct Matrix {
  int64_t rows, columns, tiles;
  int64_t width;        // of a row of padded activations
  int64_t tile_bytes;   // of one tile, a multiple of 64
  int64_t scale_at, zero_at;  // inside a tile
  int32_t bits, planes;
  int32_t blocks;       // of one plane; a tile has planes * blocks
  int32_t centre;       // code that is subtracted from every code before it meets a float: less cancellation
  ScaleKind scale_kind;
  ZeroKind zero_kind;   // none: the zero is `centre`
  int32_t table;        // 1: a code is a place in `levels` and has no zero
  Block* block;         // [blocks]
  uint8_t* data;        // tiles
  float* factor;        // [tiles * 16] of the row, with scales of one byte; else null
  float levels[16];     // up to 4 bits: the value of every code, centred
  size_t bytes;         // of data
};

// Activations as the tile loops read them. Sums and scales are per token and block.
struct Activations {
  int64_t tokens, width, blocks;
  const float* values;    // [tokens, width]
  const float* sums;      // [tokens, blocks]  sum of the block's values
  const int8_t* codes;    // [tokens, width]   -127 .. 127
  const float* steps;     // [tokens, blocks]  value = code * step
  const int32_t* counts;  // [tokens, blocks]  sum of the block's codes
};

// Tiles first .. last-1. `y` is [tokens, ...] with `stride` floats between tokens and the matrix's row 0 at y[0].
// decode: `y` is [columns, ...], transposed, with tile `first` at y[0]; all 16 rows of a tile are written.
struct Path {
  const char* name;
  void (*multiply_float)(const Matrix&, const Activations&, int64_t first, int64_t last, float* y, int64_t stride);
  void (*multiply_int8)(const Matrix&, const Activations&, int64_t first, int64_t last, float* y, int64_t stride);
  void (*decode)(const Matrix&, int64_t first, int64_t last, float* y, int64_t stride);
  uint64_t (*read)(const uint8_t* data, size_t bytes);  // touches every line: the limit that a product is held against
};

extern const Path kPortable;
#if defined(LAYERWISE_X86)
extern const Path kAvx2;
extern const Path kAvx512;
#endif

}  // namespace layerwise
