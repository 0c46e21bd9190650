// What the parts of the library that are compiled for every processor offer one another.
#pragma once

#include "layout.h"

namespace layerwise {

// A matrix in its stored form, as the caller hands it over. Everything is checked; sizes are in bytes.
struct Stored {
  int64_t rows, columns, bits, planes, group;
  int64_t trits;       // 1: five codes to a byte (see encoding/trits.py); 0: bit planes (encoding/bitplanes.py)
  int64_t scale_kind;  // ScaleKind
  int64_t zero_kind;   // ZeroKind; zeros are unpacked: a byte or a half each
  int64_t centre;
  const uint8_t* codes;   // [rows, planes, bytes of a row]
  int64_t codes_bytes;
  const uint8_t* scale;   // [rows, planes, groups]
  int64_t scale_bytes;
  const uint8_t* zero;    // [rows, planes, groups], or null
  int64_t zero_bytes;
  const float* factor;    // [rows], or null
  const float* levels;    // [16], or null: the codes are places in it
  const int8_t* values;   // [256], or null: what the states of a trellis stand for (encoding/trellis.py), of 1 to 5 bits
};

Matrix* repack(const Stored& stored, int threads);  // null: it does not fit together, or there is no memory
Matrix* copy(const Matrix& matrix, int threads);         // null: there is no memory
void release(Matrix* matrix);

// Rows `index` [count] of the stored form as float32 [count, columns], each value as the form defines it. 0 done; 3 no
// memory; 4 it does not fit together; 5 there is no such row.
int take_rows(const Stored& stored, const int64_t* index, int64_t count, float* out);

// Float32 tensors [sequences, heads, tokens, dim], the last side by side, strides in floats. `mask` is null or has a byte
// for every sequence, query and key, strides of the first two: 0 where the key is not seen. A query that sees none
// gets zeros. `out` is [sequences, queries, heads, dim], whole.
struct Attention {
  int64_t sequences, heads, queries, keys, dim;
  const float *q, *k, *v;
  int64_t q_stride[3], k_stride[3], v_stride[3];
  const uint8_t* mask;
  int64_t mask_stride[2];
  float* out;
  const char* path;
  float scale;
  int32_t failed;
};

constexpr int kLongestHead = 128;  // and a multiple of 32
constexpr int kMostKeys = 1024;
int attend(Attention& attention, int threads);  // 0 done; 3 no memory; 4 sizes it does not take

// A transformer block of an encoder: a = heads(x), h = norm(x + a), y = norm(h + feed(h)), or, with the norms in front,
// h = x + heads(norm(x)), y = h + feed(norm(h)). heads: query, key, value, attention, output; feed: up, exact GELU, down.
// x and y are [sequences, tokens, width], whole; the mask is that of Attention.
enum Linear : int32_t { kQuery, kKey, kValue, kOut, kUp, kDown, kLinears };
struct EncoderBlock {
  int64_t sequences, tokens, width, heads;
  int64_t together;                 // sequences that a thread takes through the block at once; 0: as fits; -1: all
                                    // threads do every step together
  const float* x;
  float* y;
  const Matrix* matrix[kLinears];
  const float* bias[kLinears];      // each may be null
  const float *weight[2], *shift[2];  // of the norms, [width]; a shift may be null
  float epsilon[2];
  float scale;                      // of the scores
  int32_t digits;                   // of the activations, 1 to 3
  int32_t norms_first;
  int32_t reserved;
  const uint8_t* mask;
  int64_t mask_stride[2];
  const char* path;
};

int encode(const EncoderBlock& block, int threads);  // 0 done; 1 no such path; 3 no memory; 4 it does not fit together

// Some blocks of a decoder, one behind the other, over a cache of keys and values:
//
//     h = x + out(heads(norm(x))),  y = h + down(silu(gate(norm(h))) up(norm(h)))
//
// heads: query, key, value; both of the first normed head by head, where there are such norms, and turned by their position; the keys and values of `groups` heads, each for
// heads / groups queries, are written to the cache where the row begins, and every position sees those up to its own.
// Behind the last block, where there is a head: scores = head(norm(y)).
enum DecoderLinear : int32_t { kToQuery, kToKey, kToValue, kFromHeads, kGate, kWiden, kNarrow, kDecoderLinears };
struct DecoderBlock {
  const Matrix* matrix[kDecoderLinears];
  const float* bias[kDecoderLinears];  // each may be null
  const float *weight[2], *shift[2];   // of the norms, [width]; a shift may be null
  float epsilon[2];
  const float* head_weight[2];         // [dim]  of the norms of queries and keys; null: there is none
  float head_epsilon[2];
  float *keys, *values;                // [rows, groups, capacity, dim]
  int64_t window;                      // how many positions are seen, the own one the last; 0: all
};
struct Decoder {
  int64_t rows, count, width, heads, groups, dim, capacity;  // count: new positions of each row
  int64_t blocks;
  const DecoderBlock* block;
  const float* x;                      // [rows, count, width]
  float* y;                            // the same, or null
  const int64_t* starts;               // [rows]  where the new positions begin
  const float *cosine, *sine;          // [turns, turned], of positions from `origin` on; null: nothing is turned
  int64_t origin, turns, turned;       // turned: features of a head that are, the first ones
  const Matrix* head;                  // or null
  const float *head_bias, *weight, *shift;
  float* scores;                       // [rows, count, rows of the head]
  float epsilon;                       // of the last norm
  float scale;                         // of the scores of keys
  int32_t digits;                      // of the activations, 1 to 3
  int32_t centred;                     // 1: norms take the mean off first
  const char* path;
};

constexpr int kLongestDecoderHead = 256;  // and a multiple of 16, as is the width
int decode_tokens(const Decoder& decoder, int threads);  // 0 done; 1 no such path; 3 no memory; 4 it does not fit together

// Whole rows of floats, in plain arithmetic and one order: the same bits on every path.
struct Rows {
  // sum = x + y (either may be null: no y, or the sum is not kept), out = (sum - mean) / deviation * weight + shift
  void (*normalize)(const float* x, const float* y, int64_t width, const float* weight, const float* shift,
                    float epsilon, float* sum, float* out);
  // the same with no mean taken off, the deviation from zero
  void (*scale)(const float* x, const float* y, int64_t width, const float* weight, const float* shift, float epsilon,
                float* sum, float* out);
  void (*add)(const float* x, const float* y, int64_t width, float* out);
  void (*gelu)(float* x, int64_t count);  // the exact one, in place, to 4e-7
  void (*gated)(const float* x, const float* by, int64_t count, float* out);  // by x / (1 + e^-x)
};
const Rows& rows_of(const Path& path);

// Single queries over a cache, in plain arithmetic and one order too.
struct Heads {
  // out = x, its first `turned` features (an even number) turned by their angles, times `scale`; x may be out
  void (*turn)(const float* x, const float* cosine, const float* sine, int64_t turned, int64_t dim, float scale, float* out);
  // out [dim] = softmax(query keys^T) values of keys and values [count, dim]; scores: room for count and 15 more
  void (*look)(const float* query, const float* keys, const float* values, int64_t count, int64_t dim, float* scores,
               float* out);
};
const Heads& heads_of(const Path& path);

// What an encoder to grids of integers does with each weight (encoding/loops.py); arrays are whole, rows after rows.
struct Candidates {  // of the range of each group: step and zero [rows, groups, candidates], best [rows, groups]
  int64_t rows, columns, groups, candidates, width;
  const float *weight, *importance, *step, *zero;
  int64_t* best;
  float top;
};

struct Nearest {  // weight and codes [rows, columns], step and zero [rows, groups]
  int64_t rows, columns, groups, width;
  const float *weight, *step, *zero;
  uint8_t* codes;
  double top;
};

struct Tile {  // transposed: weight, codes and change [columns, rows], step and zero [groups, rows]
  int64_t rows, width, first, first_row, height;
  const float *weight, *step, *zero;
  const int64_t* group_of;  // [columns]
  const double* lower;      // [width, width]
  double* carried;          // [width, rows]
  uint8_t* codes;
  double* change;
  double top;
};

struct Grids {
  void (*best)(const Candidates&);
  void (*nearest)(const Nearest&);
  void (*columns)(const Tile&);
};
const Grids& grids_of(const Path& path);

// What an encoder to a trellis does with a tile (encoding/trellis_loops.py); arrays as in Tile.
struct Cut {
  int64_t rows, width, first, first_row, height, bits, coupled;
  const float *weight, *scales;  // [columns, rows], [groups, rows]
  const int64_t* group_of;       // [columns]
  const float* table;            // [256]
  const double* lower;           // [width, width]
  double* carried;               // [width, rows]
  uint8_t* states;               // [columns, rows]
  double* change;                // [columns, rows]
  const double* pivots;          // [height]
  const double* lower_rows;      // [height, height], and the next two, where rows are coupled
  double *below, *absorbed;      // [width, height], [width, rows]
};

struct Recut {
  int64_t rows, width, first, first_row, height, bits;
  const float *weight, *scales;
  const int64_t* group_of;
  const float* table;
  const double* curvature;  // [width, width]
  double* pull;             // [width, rows]
  uint8_t* states;
  double* change;
  const double* row_curvature;  // [height, height]
  double* slope;                // [width, height]
};

struct Cuts {
  void (*cut)(const Cut&);
  void (*recut)(const Recut&);
};
const Cuts& cuts_of(const Path& path);

const Path* path_named(const char* name);  // null: it does not run here

using Body = void (*)(void* data, int part, int parts);
// Runs body for the parts 0 .. parts-1, at most `threads` of them, on the host's OpenMP threads where it has some.
void parallel(int threads, Body body, void* data);
// The same, all parts at one time, so that they may wait for one another. Parts may be fewer than threads.
void at_once(int threads, Body body, void* data);
const char* thread_pool();

void* aligned_memory(size_t bytes);  // 64-byte aligned, padded by a line; free with free()

}  // namespace layerwise
