// Every path of the compiled library against the portable one, bit for bit, through the C interface alone; and the bits
// themselves against those of other processors. For machines without Python, such as an emulated one:
//
//     compare_paths [the paths that must run here, best first]
//
// Says what differs and exits with 1, or with the number of comparisons and 0.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#include "parts.h"

using namespace layerwise;

extern "C" {
const char* layerwise_path(int32_t index);
void* layerwise_repack(const Stored* stored, int64_t size, int32_t threads);
void layerwise_release(void* matrix);
int64_t layerwise_bytes(const void* matrix);
int32_t layerwise_multiply(const void* handle, const char* path, const float* x, int64_t tokens, int64_t x_stride,
                           float* y, int64_t y_stride, const float* bias, int32_t digits, int32_t threads);
int32_t layerwise_sparse(const Sparse* matrix, int64_t size, const char* path, const float* x, int64_t tokens,
                         int64_t x_stride, float* y, int64_t y_stride, const float* bias, int32_t threads);
int32_t layerwise_decode(const void* handle, const char* path, int64_t first, int64_t last, float* y, int64_t stride,
                         int32_t threads);
uint64_t layerwise_read(const void* handle, const char* path, int32_t threads);
int64_t layerwise_dots(const char* path, int64_t rounds, int32_t threads);
int32_t layerwise_encode(const EncoderBlock* block, int64_t size, int32_t threads);
}

namespace {

// Of all results of the portable path, on whatever processor: what equals them here equals them there as well.
constexpr uint64_t kDigest = 0xd74d286e80be48a7ull;

constexpr const char* kReference = "portable";
using Floats = std::vector<float>;

uint64_t state = 88172645463325252ull;
uint64_t digest = 14695981039346656037ull;
int64_t compared = 0, failed = 0;

uint32_t random_bits() {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return uint32_t(state >> 16);
}

int random_below(int end) { return int(random_bits() % uint32_t(end)); }
float random_float() { return float(int32_t(random_bits() >> 7) - (1 << 24)) * 0x1p-24f; }  // -1 .. 1, of 25 bits

std::vector<uint8_t> random_bytes(int64_t count, int end = 256) {
  std::vector<uint8_t> out(size_t(count), 0);
  for (auto& byte : out) byte = uint8_t(random_below(end));
  return out;
}

// fp16 values from 2^(low - 15) on: exponents low .. high-1 of 30, any fraction.
std::vector<uint8_t> random_halves(int64_t count, int low, int high, bool negative = false) {
  std::vector<uint8_t> out(size_t(2 * count));
  for (int64_t i = 0; i < count; ++i) {
    const int sign = negative && random_below(2) ? 0x8000 : 0;
    const uint16_t half = uint16_t(sign | (low + random_below(high - low)) << 10 | random_below(1024));
    memcpy(&out[size_t(2 * i)], &half, 2);
  }
  return out;
}

// Tokens of many sizes, with zeros and with values far below the others of their block.
Floats random_tokens(int64_t tokens, int64_t stride) {
  Floats x(size_t(tokens * stride));
  for (int64_t t = 0; t < tokens; ++t) {
    const float size = ldexpf(1.0f, random_below(24) - 12);
    for (int64_t k = 0; k < stride; ++k) {
      const int kind = random_below(16);
      x[size_t(t * stride + k)] = kind == 0 ? 0.0f : random_float() * (kind == 1 ? size * 1e-5f : size);
    }
  }
  return x;
}

// Bit for bit, except that one NaN is as good as another.
bool same_bits(const Floats& a, const Floats& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (memcmp(&a[i], &b[i], 4) != 0 && !(isnan(a[i]) && isnan(b[i]))) return false;
  }
  return a.size() == b.size();
}

void keep_digest(const Floats& values) {
  for (float value : values) {
    uint32_t bits = 0x7fc00000u;
    if (!isnan(value)) memcpy(&bits, &value, 4);
    for (int i = 0; i < 4; ++i) digest = (digest ^ (bits >> 8 * i & 255)) * 1099511628211ull;
  }
}

void check(bool passed, const std::string& what) {
  ++compared;
  if (!passed && ++failed <= 20) printf("differs: %s\n", what.c_str());
}

std::vector<std::string> paths() {
  std::vector<std::string> found;
  for (int32_t i = 0; const char* name = layerwise_path(i); ++i) found.emplace_back(name);
  return found;
}

// work(path, threads, y) on every path, y filled alike before: what it becomes is compared whole, the rest of it too.
template <typename Work>
void on_every_path(const std::string& what, size_t floats, Work&& work) {
  Floats expected(floats, -7.5f);
  check(work(kReference, 1, expected.data()) == 0, what + ": refused");
  keep_digest(expected);
  for (const auto& path : paths()) {
    for (int threads : {1, 3}) {
      Floats y(floats, -7.5f);
      check(work(path.c_str(), threads, y.data()) == 0, what + ": refused by " + path);
      check(same_bits(y, expected), what + ", " + path + ", " + std::to_string(threads) + " threads");
    }
  }
}

// ---------------------------------------------------------------- forms

struct Form {
  const char* name;
  int64_t rows, columns, bits, group;
  int64_t planes = 1, zero_kind = kZeroNone;
  bool byte_scales = false, trits = false, levels = false;
  int filled = -1;  // what every code is, if not random
  bool trellis = false;
};

// A matrix of random codes, scales and zeros, and the handle that the library makes of it.
struct Weights {
  Form form;
  std::vector<uint8_t> codes, scale, zero, values;
  Floats factor, levels, bias;
  Stored stored = {};
  void* handle = nullptr;

  explicit Weights(const Form& f) : form(f) {
    const int64_t groups = (f.columns + f.group - 1) / f.group, entries = f.rows * f.planes * groups;
    int64_t row_bytes = (f.columns + 4) / 5;
    if (!f.trits) {
      row_bytes = 0;
      for (int width = 8; width > 0; width /= 2) row_bytes += f.bits & width ? (f.columns * width + 7) / 8 : 0;
    }
    codes = random_bytes(f.rows * f.planes * row_bytes);
    if (f.filled >= 0) codes.assign(codes.size(), uint8_t(f.filled));
    scale = f.byte_scales ? random_bytes(entries) : random_halves(entries, 0, 16);
    if (f.zero_kind == kZeroByte) zero = random_bytes(entries, 1 << f.bits);
    if (f.zero_kind == kZeroHalf) zero = random_halves(entries, 10, 15 + int(f.bits), true);
    for (int64_t row = 0; row < f.rows; ++row) {
      factor.push_back(random_float()), bias.push_back(random_float());
    }
    for (int i = 0; i < 16; ++i) levels.push_back(random_float());
    if (f.trellis) values = random_bytes(256);
    const int64_t centre = f.trellis ? 128 : f.trits ? 1 : int64_t(1) << (f.bits - 1);
    stored = {f.rows, f.columns, f.bits, f.planes, f.group, f.trits, f.byte_scales ? kScaleByte : kScaleHalf,
              f.zero_kind, centre, codes.data(), int64_t(codes.size()), scale.data(),
              int64_t(scale.size()), zero.empty() ? nullptr : zero.data(), int64_t(zero.size()),
              f.byte_scales ? factor.data() : nullptr, f.levels ? levels.data() : nullptr,
              f.trellis ? reinterpret_cast<const int8_t*>(values.data()) : nullptr};
    handle = layerwise_repack(&stored, sizeof(stored), 2);
    if (handle == nullptr) {
      printf("%s: refused\n", f.name);
      exit(1);
    }
  }
  ~Weights() { layerwise_release(handle); }
  Weights(const Weights&) = delete;
};

constexpr int64_t kTokens[] = {1, 2, 3, 5, 8, 9, 11, 14, 33, 150};  // few, sets that are full and not, several rounds

void multiply(const Weights& w, int64_t tokens, int digits, const Floats& x, int64_t x_stride, bool bias,
              const std::string& what) {
  const int64_t y_stride = w.form.rows + 3;
  on_every_path(what, size_t(tokens * y_stride), [&](const char* path, int threads, float* y) {
    return layerwise_multiply(w.handle, path, x.data(), tokens, x_stride, y, y_stride, bias ? w.bias.data() : nullptr,
                              digits, threads);
  });
}

void decode(const Weights& w) {
  const int64_t tiles = (w.form.rows + kRows - 1) / kRows, stride = tiles * kRows + 5;
  on_every_path(std::string(w.form.name) + " decoded", size_t(w.form.columns * stride),
                [&](const char* path, int threads, float* y) {
                  return layerwise_decode(w.handle, path, 0, tiles, y, stride, threads);
                });
}

// Digits that are all 127, or all -127, or the lowest there are: -128 wherever one is not the block's largest.
void extreme(Floats& x, int64_t stride, int digits, int which) {
  x.assign(x.size(), which == 0 ? 1.0f : -1.0f);
  for (size_t i = 0; which == 2 && digits > 1 && i < x.size(); ++i) {
    const bool largest = i % size_t(stride) % kLongestBlock == 0;
    x[i] = digits == 2 ? (largest ? 32639.0f : -128.0f) : (largest ? 8355711.0f : -32768.0f);
  }
}

void whole_numbers(const Form& form) {
  const Weights w(form);
  decode(w);
  const int64_t stride = form.columns + 7;
  for (int digits = 1; digits <= 3; ++digits) {
    for (int64_t tokens : kTokens) {
      const std::string what = std::string(form.name) + ", " + std::to_string(digits) + " digits, " +
                               std::to_string(tokens) + " tokens";
      Floats x = random_tokens(tokens, stride);
      if (form.filled >= 0) extreme(x, stride, digits, int(tokens % 3));
      if (tokens == 11) x[size_t(3 * stride)] = NAN, x[size_t(4 * stride + 1)] = INFINITY;
      multiply(w, tokens, digits, x, stride, tokens % 2 == 0, what);
    }
  }
}

// Products of tables are of floats, added up in chains: one way where products and sums are fused (two chains; AVX-512
// has four), another where they are not, on the portable path. The fused ways are worked out here.
void tables(const Form& form, int64_t tokens) {
  const Weights w(form);
  decode(w);
  const Floats x = random_tokens(tokens, form.columns);
  const int64_t row_bytes = (form.columns + 1) / 2, groups = (form.columns + form.group - 1) / form.group;
  Floats scales(w.scale.size() / (form.byte_scales ? 1 : 2));
  for (size_t i = 0; i < scales.size(); ++i) {
    uint16_t half = 0;
    if (!form.byte_scales) memcpy(&half, &w.scale[2 * i], 2);
    const int exponent = half >> 10, fraction = half & 1023;
    scales[i] = form.byte_scales ? float(w.scale[i])
                : exponent == 0  ? ldexpf(float(fraction), -24)
                                 : ldexpf(float(1024 + fraction), exponent - 25);
  }
  const auto worked_out = [&](int64_t t, int64_t row, int chains) {
    float total = 0.0f;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t end = (g + 1) * form.group < form.columns ? (g + 1) * form.group : form.columns;
      for (int64_t first = g * form.group; first < end; first += kLongestBlock) {
        float sum[4] = {};
        for (int64_t k = first; k < end && k < first + kLongestBlock; ++k) {
          const int code = w.codes[size_t(row * row_bytes + k / 2)] >> (k % 2 * 4) & 15;
          float& own = sum[(k - first) % chains];
          own = fmaf(w.levels[size_t(code)], x[size_t(t * form.columns + k)], own);
        }
        total = fmaf(scales[size_t(row * groups + g)], (sum[0] + sum[1]) + (sum[2] + sum[3]), total);
      }
    }
    return (form.byte_scales ? total * w.factor[size_t(row)] : total) + w.bias[size_t(row)];
  };
  for (const auto& path : paths()) {
    Floats expected, y(size_t(tokens * form.rows));
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t row = 0; row < form.rows; ++row) expected.push_back(worked_out(t, row, path == "avx512" ? 4 : 2));
    }
    check(layerwise_multiply(w.handle, path.c_str(), x.data(), tokens, form.columns, y.data(), form.rows,
                             w.bias.data(), 3, 2) == 0, std::string(form.name) + ": refused by " + path);
    const std::string what = std::string(form.name) + ", " + std::to_string(tokens) + " tokens, " + path;
    if (path == kReference) {
      double off = 0.0, all = 0.0;
      for (size_t i = 0; i < y.size(); ++i) off += pow(y[i] - expected[i], 2), all += pow(expected[i], 2);
      check(off <= 1e-12 * all, what);
      keep_digest(y);
    } else {
      check(same_bits(y, expected), what);
    }
  }
}

void kept_entries(int64_t kind, int64_t bits, int64_t rows, int64_t columns, int64_t group_words) {
  const int64_t words = (columns + 15) / 16, groups = kind == kCodeValues ? (words + group_words - 1) / group_words : 1;
  std::vector<uint16_t> mask;
  std::vector<int64_t> starts = {0};
  for (int64_t row = 0; row < rows; ++row) {
    int64_t count = 0;
    for (int64_t word = 0; word < words; ++word) {
      const int left = int(columns - word * 16), most = left < 16 ? (1 << left) - 1 : 65535;
      const int drawn = random_below(8) == 0 ? 65535 : int(random_bits() & 65535);
      mask.push_back(uint16_t(drawn & most));
      count += __builtin_popcount(unsigned(drawn & most));
    }
    starts.push_back(starts.back() + count);
  }
  auto values = kind == kCodeValues   ? random_bytes(starts.back(), 1 << bits)
                : kind == kHalfValues ? random_halves(starts.back(), 0, 31, true)
                                      : random_halves(starts.back(), 10, 20, true);
  values.resize(values.size() + 64, 255);
  Floats scale, floor;
  for (int64_t i = 0; i < rows * groups; ++i) scale.push_back(random_float()), floor.push_back(random_float());
  const Sparse sparse = {rows, columns, words, kind, bits, groups, kind == kCodeValues ? group_words : words,
                         mask.data(), starts.data(), values.data(), scale.data(), floor.data()};
  for (int64_t tokens : {1, 2, 3, 7, 20}) {
    const Floats x = random_tokens(tokens, columns);
    const std::string what = "kept entries of kind " + std::to_string(kind) + ", " + std::to_string(bits) + " bits, " +
                             std::to_string(tokens) + " tokens";
    on_every_path(what, size_t(tokens * rows), [&](const char* path, int threads, float* y) {
      return layerwise_sparse(&sparse, sizeof(sparse), path, x.data(), tokens, columns, y, rows, scale.data(), threads);
    });
  }
}

void encoder(int digits, bool norms_first) {
  const int64_t width = 64, inner = 112, sequences = 3, tokens = 13;
  const Weights square[4] = {Weights({"query", width, width, 4, 32}), Weights({"key", width, width, 8, 64}),
                             Weights({"value", width, width, 3, 32}), Weights({"out", width, width, 2, 16})};
  const Weights up({"up", inner, width, 4, 32, 1, kZeroByte}), down({"down", width, inner, 4, 32, 1, kZeroHalf});
  const Weights* all[kLinears] = {&square[0], &square[1], &square[2], &square[3], &up, &down};
  const Floats x = random_tokens(1, sequences * tokens * width), norm = random_tokens(1, width);
  EncoderBlock block = {};
  block.sequences = sequences, block.tokens = tokens, block.width = width, block.heads = 2;
  block.x = x.data(), block.scale = 0.2f, block.digits = digits, block.norms_first = norms_first;
  for (int i = 0; i < kLinears; ++i) {
    block.matrix[i] = static_cast<const Matrix*>(all[i]->handle), block.bias[i] = all[i]->bias.data();
  }
  for (int i = 0; i < 2; ++i) block.weight[i] = block.shift[i] = norm.data(), block.epsilon[i] = 1e-5f;
  on_every_path("an encoder's block", x.size(), [&](const char* path, int threads, float* y) {
    block.path = path, block.y = y;
    return layerwise_encode(&block, sizeof(block), threads);
  });
}

void everything() {
  const int64_t sizes[][3] = {{1, 4, 4}, {17, 30, 12}, {40, 172, 64}, {33, 300, 300}};  // rows, columns, group
  for (int bits = 2; bits <= 8; ++bits) {
    for (const auto& size : sizes) {
      if (size[0] == 33 && bits % 2) continue;  // slow where a processor is emulated
      const std::string shape = std::to_string(size[0]) + "x" + std::to_string(size[1]);
      const std::string name = std::to_string(bits) + " bits " + shape;
      whole_numbers({(name + ", symmetric").c_str(), size[0], size[1], bits, size[2]});
      whole_numbers({(name + ", zeros").c_str(), size[0], size[1], bits, size[2], 1, kZeroByte, true});
      whole_numbers({(name + ", fp16 zeros").c_str(), size[0], size[1], bits, size[2], 1, kZeroHalf});
    }
    for (int filled : {0, 255}) {
      whole_numbers({(std::to_string(bits) + " bits, all alike").c_str(), 16, 512, bits, 512, 1, kZeroNone, false, false,
                     false, filled});
    }
  }
  for (int planes : {1, 2, 4}) {
    whole_numbers({"ternary", 18, 150, 2, 128, planes, kZeroNone, planes == 2, true});
  }
  for (int64_t tokens : {1, 2, 5, 40}) {
    tables({"levels", 19, 100, 4, 32, 1, kZeroNone, tokens == 2, false, true}, tokens);
    tables({"levels, long groups", 35, 600, 4, 600, 1, kZeroNone, false, false, true}, tokens);
  }
  kept_entries(kHalfValues, 1, 21, 100, 1), kept_entries(kBrainValues, 1, 6, 33, 1);
  for (int bits : {2, 3, 4, 8}) kept_entries(kCodeValues, bits, 13, 150, bits == 3 ? 1 : 4);
  for (int digits : {1, 3}) encoder(digits, false), encoder(digits, true);
  for (int bits = 1; bits <= 5; ++bits) {
    const std::string name = "trellis of " + std::to_string(bits) + " bits";
    Form form = {name.c_str(), 40, 172, bits, 64};
    form.trellis = true;
    whole_numbers(form);
    form.rows = 33, form.columns = 300, form.group = 300, form.byte_scales = true;
    if (bits != 3) whole_numbers(form);
  }
  const Weights read({"read", 64, 128, 4, 32});
  for (const auto& path : paths()) {
    check(layerwise_read(read.handle, path.c_str(), 2) == layerwise_read(read.handle, path.c_str(), 1) ||
              path.compare(0, 3, "avx") == 0, "reading by " + path);
    check(layerwise_dots(path.c_str(), 10, 2) == 2 * layerwise_dots(path.c_str(), 10, 1), "dots by " + path);
  }
}

}  // namespace

int main(int count, char** named) {
  const auto here = paths();
  for (const auto& path : here) printf("%s%s", path == here[0] ? "paths: " : ", ", path.c_str());
  printf("\n");
  if (count > 1) {
    bool expected = here.size() == size_t(count - 1);
    for (int i = 1; expected && i < count; ++i) expected = here[size_t(i - 1)] == named[i];
    check(expected, "the paths are not those that were named");
  }
  everything();
  check(digest == kDigest, "the portable results from those of other processors");
  printf("%lld comparisons, %lld differ; digest %016llx\n", (long long)compared, (long long)failed,
         (unsigned long long)digest);
  return failed == 0 ? 0 : 1;
}
