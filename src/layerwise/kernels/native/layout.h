// The repacked matrix, and what every instruction set must be able to do with it.
//
// Only plain data is declared here. This header is read by files that are compiled for different instruction sets, and
// a function in it could be compiled with AVX-512, kept by the linker as the one copy, and then be run everywhere.
//
// A tile is 32 output rows, two registers of 16; a row is one 32-bit lane. Four consecutive columns of a row are the four
// bytes of its lane, so that one dot-product instruction does 64 products and nothing is ever summed across lanes:
//
//     64 bytes at 4 bits, columns k .. k+7      lane r, byte j:  q[r, k+j]  |  q[r, k+4+j] << 4
//     64 bytes at 2 bits, columns k .. k+15     lane r, byte j:  q[r, k+j]  |  q[r, k+4+j] << 2  |  ..8.. |  ..12..
//
// Other widths are such planes one after the other, as in the stored form: 3 = 2 + 1, 6 = 4 + 2. A *unit* is the least
// number of columns that fills every plane with whole lines (32 where there is a 1-bit plane, 16 with a 2-bit plane,
// else 8 or 4): first that of rows 0 .. 15, then that of rows 16 .. 31. A *block* is a run of columns with one scale: a
// group, or a piece of a long one, so that sums stay short. Blocks lie in memory two and two, their scales in front of
// their codes, so that a tile is one stream from end to end (scales behind all codes would be a second one, whose every
// line comes too late: measured, a third of the time):
//
//     [ 32 scales of each ][ 32 zeros of each ]  padded to 64 bytes  [ units of the first ][ units of the second ]  ...
//
// Blocks are padded to whole units with code 0, whose activation is 0. A matrix that is a sum of planes (ternary) has the
// blocks of every plane; they read the same activations.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Asked of the compiler too: a universal build compiles every file for two processors.
#if defined(LAYERWISE_ARM) && defined(__aarch64__)
#define LAYERWISE_NEON
#endif

namespace layerwise {

constexpr int kRows = 32;  // of a tile
constexpr int kHalf = 16;  // rows of a register
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

struct Places {  // of a block, inside a tile
  int64_t scale, zero, codes;
};

struct Matrix {
  int64_t rows, columns, tiles;
  int64_t width;        // of a row of padded activations
  int64_t tile_bytes;   // of one tile, a multiple of 64
  int32_t bits, planes;
  int32_t blocks;       // of one plane; a tile has planes * blocks
  int32_t centre;       // code that stands for zero where the form has no zeros
  ScaleKind scale_kind;
  ZeroKind zero_kind;   // none: the zero is `centre`
  int32_t table;        // 1: a code is a place in `levels` and has no zero
  int32_t narrow;       // 1: a code less its whole zero is -128 .. 127, whatever the code
  int32_t trellis;      // 1: what is multiplied are codes of eight bits, to which those of `bits` lead, see trellis.h
  Block* block;         // [blocks]
  Places* places;       // [planes * blocks]
  uint8_t* data;        // tiles
  float* factor;        // [tiles * 32] of the row, with scales of one byte; else null
  float levels[16];     // up to 4 bits: the value of every code, centred
  uint8_t values[256];  // of a trellis: the code of eight bits that every state stands for
  size_t bytes;         // of data
};

// Activations as the tile loops read them: floats for tables, else whole numbers of a step for each token and block,
//
//     x ~ step (d0 + 256 d1 + 65536 d2),       digits from -128 to 127, as many as `digits`
//
// One digit is what is called int8 activations. Two hold what a bf16 value does, three what a float does, as long as the
// values of a block are of a size: the error is 2^-16 and 2^-24 of the block's largest. Every sum of products with codes
// is then exact in int32, and the results are the same bits on every path.
//
// Many tokens are multiplied some at a time, and those lie side by side, in sets: `together` of them where it is not 0.
// A block of all sets lies together, since a block of the matrix meets them all before the next one does. The last set
// may not be full; what is worked out of the missing ones is dropped.
struct Activations {
  int64_t tokens, blocks;
  int64_t stride;         // floats of `values`, bytes of `codes`, of a token
  int64_t sets;           // where tokens lie side by side
  int32_t digits, together;
  int32_t shifted;  // 1: paths that may take the codes as signed bytes have the digits of tokens side by side plus 128
  float* values;    // [tokens, width]
  int8_t* codes;    // [tokens, width / 4, digits, 4]         or [blocks, sets, padded / 4, digits, together, 4]
  float* steps;     // [tokens, blocks]                       or [blocks, sets, together]
  float* sums;      // the same, of the values or of the whole numbers
  float* counts;    // [tokens, blocks, digits]  sums of the digits: whole numbers up to 2^15
  int32_t* whole;   // [blocks, sets, digits, together]  the same sums, instead
};

// Where a product goes: `y` is [tokens, ...] with `stride` floats between tokens and the matrix's row 0 at y[0].
struct Output {
  float* y;
  int64_t stride;
  const float* bias;  // [rows], added to every token, or null
};

// A matrix of which some entries are kept. Its arrays are the caller's, who has made sure that they fit one another.
enum ValueKind : int32_t { kHalfValues = 0, kBrainValues = 1, kCodeValues = 2 };

struct Sparse {
  int64_t rows, columns, words;  // words: runs of 16 columns, the last one may be short
  int64_t kind;                  // ValueKind: 16-bit floats of either sort, or codes of a byte each
  int64_t bits;                  // of a code: the highest is the sign, the others the magnitude m of +- (floor + m) scale
  int64_t groups, group_words;   // runs of columns with a scale and a floor; one without codes
  const uint16_t* mask;          // [rows, words]  a bit a column, the first one lowest
  const int64_t* starts;         // [rows + 1]  of a row's values
  const uint8_t* values;         // row after row, and 64 bytes behind the last
  const float *scale, *floor;    // [rows, groups] with codes
};

// Tiles first .. last-1.
// decode: `y` is [columns, ...], transposed, with tile `first` at y[0]; all 32 rows of a tile are written.
// side_by_side: how many tokens of so many digits are, in large batches.
// sparse: rows first .. last-1; x is [tokens, 16 * words], `stride` floats between tokens, 0 behind the last column.
// quantize: tokens first .. last-1 of x into the order of the blocks.
struct Path {
  const char* name;
  void (*multiply)(const Matrix&, const Activations&, int64_t first, int64_t last, const Output& out);
  void (*decode)(const Matrix&, int64_t first, int64_t last, float* y, int64_t stride);
  uint64_t (*read)(const uint8_t* data, size_t bytes);  // touches every line: the limit that a product is held against
  int64_t (*dots)(int64_t rounds, int32_t* found);  // nothing else: the limit of many tokens; how many products
  int (*side_by_side)(int digits);
  void (*sparse)(const Sparse&, const float* x, int64_t stride, int64_t tokens, int64_t first, int64_t last,
                 const Output& out);
  void (*quantize)(const Matrix&, const float* x, int64_t x_stride, int64_t first, int64_t last, const Activations&);
};

extern const Path kPortable;
#if defined(LAYERWISE_X86)
extern const Path kAvx2;
extern const Path kAvx512;
#endif
#if defined(LAYERWISE_NEON)
extern const Path kNeon;
extern const Path kNeonDot;
#endif

}  // namespace layerwise
