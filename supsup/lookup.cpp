// Kernels of task inference over packed masks, for CPUs with AVX-512. supsup/native.py compiles
// them for the machine they run on; supsup/packed.py calls them.
//
// A mask is a string of bits; every bit belongs to a weight. What inference needs is, for many
// masks, the sum of a query's numbers over the bits that are set. Four bits at a time are looked
// up: a table of 16 partial sums fits one register, and one permutation reads it for 16 masks.
//
// Masks lie `stride` bytes apart, and may be longer than the B bytes that are asked about.
//
// Shapes: T masks, B bytes of a mask, W = 8 B bits, Q queries, D = ceil(B / 4) words of a mask, C
// chunks of 32 words, G groups of 64 masks.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kLanes = 16;
constexpr int kVectors = 4;                  // registers of masks looked up side by side
constexpr int kGroup = kVectors * kLanes;
constexpr int kWords = 32;                   // words of a chunk: its tables stay in the L1 cache
constexpr int kNibbles = 8;                  // of a word
constexpr int kWordBits = 32;
constexpr int64_t kChunkBits = kWords * kWordBits;

// The 16 bits of a mask from `bit` on; those beyond the mask are zero.
__mmask16 bits_at(const uint8_t* mask, int64_t bytes, int64_t bit) {
  uint32_t word = 0;
  const int64_t left = bytes - bit / 8;
  if (left >= 4)
    std::memcpy(&word, mask + bit / 8, 4);
  else
    std::memcpy(&word, mask + bit / 8, left);
  return static_cast<__mmask16>(word >> (bit % 8));
}

__mmask16 lanes_left(int64_t left) {
  return left >= kLanes ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
}

// Fill the tables of a word: table[n][m] is the sum of values[4 n + b] over the bits b of m.
// Returns false, and fills nothing, if all values are zero.
bool fill_tables(const float* values, float* tables) {
  const __m512 zero = _mm512_setzero_ps();
  const __mmask16 low = _mm512_cmpneq_ps_mask(_mm512_loadu_ps(values), zero);
  const __mmask16 high = _mm512_cmpneq_ps_mask(_mm512_loadu_ps(values + kLanes), zero);
  if (!(low | high)) return false;
  for (int n = 0; n < kNibbles; n++) {
    __m512 table = _mm512_setzero_ps();
    table = _mm512_mask_add_ps(table, 0xaaaa, table, _mm512_set1_ps(values[4 * n]));
    table = _mm512_mask_add_ps(table, 0xcccc, table, _mm512_set1_ps(values[4 * n + 1]));
    table = _mm512_mask_add_ps(table, 0xf0f0, table, _mm512_set1_ps(values[4 * n + 2]));
    table = _mm512_mask_add_ps(table, 0xff00, table, _mm512_set1_ps(values[4 * n + 3]));
    _mm512_store_ps(tables + n * kLanes, table);
  }
  return true;
}

constexpr int64_t kBlock = 64;  // bytes of masks that are turned over together
constexpr int kTogether = 4;    // groups whose sums stay in registers
constexpr int64_t kAhead = 16;  // columns that are fetched ahead: they lie anywhere

// Values of a query that are looked at, and the bits that they belong to.
struct Chosen {
  int64_t count = 0;
  std::vector<int32_t> bit;
  std::vector<float> value;

  explicit Chosen(int64_t bits) : bit(bits + kLanes), value(bits + kLanes) {}

  void choose(const float* values, int64_t bits, float least) {
    const __m512 bound = _mm512_set1_ps(least);
    __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    count = 0;
    for (int64_t w = 0; w < bits; w += kLanes) {
      const __m512 x = _mm512_maskz_loadu_ps(lanes_left(bits - w), values + w);
      const __mmask16 large = _mm512_cmp_ps_mask(_mm512_abs_ps(x), bound, _CMP_GT_OQ);
      _mm512_storeu_si512(bit.data() + count, _mm512_maskz_compress_epi32(large, at));
      _mm512_storeu_ps(value.data() + count, _mm512_maskz_compress_ps(large, x));
      count += __builtin_popcount(large);
      at = _mm512_add_epi32(at, _mm512_set1_epi32(kLanes));
    }
  }
};

// sums of N groups = the chosen values, each added to the masks of its column.
template <int N>
void add_columns(const uint64_t* columns, int64_t groups, const Chosen& chosen, float* sums) {
  constexpr int kVectors = N * kGroup / kLanes;
  __m512 sum[kVectors];
  for (int i = 0; i < kVectors; i++) sum[i] = _mm512_setzero_ps();
  for (int64_t n = 0; n < chosen.count; n++) {
    const int64_t later = std::min(n + kAhead, chosen.count - 1);
    __builtin_prefetch(columns + chosen.bit[later] * groups);
    __mmask16 masks[kVectors];
    std::memcpy(masks, columns + chosen.bit[n] * groups, sizeof masks);
    const __m512 value = _mm512_set1_ps(chosen.value[n]);
    for (int i = 0; i < kVectors; i++) sum[i] = _mm512_mask_add_ps(sum[i], masks[i], sum[i], value);
  }
  for (int i = 0; i < kVectors; i++) _mm512_storeu_ps(sums + i * kLanes, sum[i]);
}

}  // namespace

extern "C" {

// Words of masks [T, B] in the order in which `lookup_sums` reads them: [C, G, 32, 64], and one
// more, since it reads from every byte on. Writes masks first..last - 1 alone; what belongs to no
// mask must be zero before.
void interleave(const uint8_t* packed_TB, int64_t stride, int64_t masks, int64_t bytes,
                int64_t first, int64_t last, uint32_t* words) {
  const int64_t groups = (masks + kGroup - 1) / kGroup, step = groups * kWords * kGroup;
  for (int64_t t = first; t < last; t++) {
    const uint8_t* mask = packed_TB + t * stride;
    uint32_t* column = words + t / kGroup * kWords * kGroup + t % kGroup;
    for (int64_t d = 0; 4 * d < bytes; d++)
      std::memcpy(column + d / kWords * step + d % kWords * kGroup, mask + 4 * d,
                  std::min<int64_t>(4, bytes - 4 * d));
  }
}

// sums [Q, 64 G] = for each query and mask, the values [Q, 1024 C] of the bits that are set, added.
// Only groups first..last - 1 are done.
void lookup_sums(const uint32_t* words, const float* values_QW, int64_t queries, int64_t chunks,
                 int64_t groups, int64_t first, int64_t last, float* sums_QT) {
  alignas(64) float tables[kWords][kNibbles][kLanes];
  int64_t used[kWords];
  for (int64_t c = 0; c < chunks; c++)
    for (int64_t q = 0; q < queries; q++) {
      const float* values = values_QW + (q * chunks + c) * kChunkBits;
      int64_t count = 0;
      for (int64_t d = 0; d < kWords; d++)
        if (fill_tables(values + d * kWordBits, tables[count][0])) used[count++] = d;
      if (!count) continue;
      for (int64_t g = first; g < last; g++) {
        const uint32_t* group = words + (c * groups + g) * kWords * kGroup;
        float* sums = sums_QT + (q * groups + g) * kGroup;
        __m512 sum[kVectors];
        for (int i = 0; i < kVectors; i++) sum[i] = _mm512_loadu_ps(sums + i * kLanes);
        for (int64_t u = 0; u < count; u++) {
          const char* word = reinterpret_cast<const char*>(group + used[u] * kGroup);
          // A permutation looks at the lowest 4 bits alone. To read from the next byte on takes a
          // load where a shift would wait for the same port as the permutation.
          for (int byte = 0; byte < 4; byte++) {
            const __m512 low = _mm512_load_ps(tables[u][2 * byte]);
            const __m512 high = _mm512_load_ps(tables[u][2 * byte + 1]);
            for (int i = 0; i < kVectors; i++) {
              const __m512i bits = _mm512_loadu_si512(word + i * sizeof(__m512i) + byte);
              sum[i] = _mm512_add_ps(sum[i], _mm512_permutexvar_ps(bits, low));
              sum[i] = _mm512_add_ps(
                  sum[i], _mm512_permutexvar_ps(_mm512_srli_epi32(bits, 4), high));
            }
          }
        }
        for (int i = 0; i < kVectors; i++) _mm512_storeu_ps(sums + i * kLanes, sum[i]);
      }
    }
}

// Masks [T, B] turned over: for every bit, those masks that have it, [W, G] words of 64 masks.
void turn_over(const uint8_t* packed_TB, int64_t stride, int64_t masks, int64_t bytes,
               uint64_t* columns_WG) {
  alignas(64) uint8_t block[kGroup][kBlock], column[kGroup];
  const int64_t groups = (masks + kGroup - 1) / kGroup;
  for (int64_t start = 0; start < bytes; start += kBlock)
    for (int64_t g = 0; g < groups; g++) {
      const int64_t count = std::min(kBlock, bytes - start);
      std::memset(block, 0, sizeof block);
      for (int64_t t = g * kGroup; t < std::min(masks, (g + 1) * kGroup); t++)
        std::memcpy(block[t % kGroup], packed_TB + t * stride + start, count);
      for (int64_t b = 0; b < count; b++) {
        for (int t = 0; t < kGroup; t++) column[t] = block[t][b];
        const __m512i byte = _mm512_load_si512(column);
        for (int bit = 0; bit < 8; bit++)
          columns_WG[(8 * (start + b) + bit) * groups + g] =
              _mm512_test_epi8_mask(byte, _mm512_set1_epi8(static_cast<char>(1 << bit)));
      }
    }
}

// sums [Q, 64 G] = for each query and mask, the values [Q, `width`] of the bits that are set, added;
// only those values whose magnitude is above the query's `least`. The others cost nothing. Only
// queries first_q..last_q - 1 and groups first..last - 1 are done.
void column_sums(const uint64_t* columns_WG, const float* values_QW, const float* least_Q,
                 int64_t width, int64_t bits, int64_t groups, int64_t first_q, int64_t last_q,
                 int64_t first, int64_t last, float* sums_QT) {
  Chosen chosen(bits);
  for (int64_t q = first_q; q < last_q; q++) {
    chosen.choose(values_QW + q * width, bits, least_Q[q]);
    float* sums = sums_QT + q * groups * kGroup;
    int64_t g = first;
    for (; g + kTogether <= last; g += kTogether)
      add_columns<kTogether>(columns_WG + g, groups, chosen, sums + g * kGroup);
    for (; g < last; g++) add_columns<1>(columns_WG + g, groups, chosen, sums + g * kGroup);
  }
}

// total [W] += the masks of some tasks, each times its weight.
void add_masks(const uint8_t* packed_TB, int64_t stride, int64_t bytes, const int64_t* tasks,
               const float* weights, int64_t count, float* total_W) {
  constexpr int64_t kBlock = 2048;  // bytes: their total stays in the cache from mask to mask
  for (int64_t start = 0; start < bytes; start += kBlock)
    for (int64_t n = 0; n < count; n++) {
      const uint8_t* mask = packed_TB + tasks[n] * stride;
      const __m512 weight = _mm512_set1_ps(weights[n]);
      for (int64_t bit = 8 * start; bit < 8 * std::min(start + kBlock, bytes); bit += kLanes) {
        const __mmask16 lanes = lanes_left(8 * bytes - bit);
        const __m512 total = _mm512_maskz_loadu_ps(lanes, total_W + bit);
        const __mmask16 set = bits_at(mask, bytes, bit);
        _mm512_mask_storeu_ps(total_W + bit, lanes, _mm512_mask_add_ps(total, set, total, weight));
      }
    }
}

// sums [Q, N] = for each query and each of its tasks [Q, N], the values [Q, `width`] of the bits that
// are set, added. Only queries first..last - 1 are done.
void sums_of(const uint8_t* packed_TB, int64_t stride, int64_t bytes, const int64_t* tasks_QN,
             int64_t count, const float* values_QW, int64_t width, int64_t first, int64_t last,
             float* sums_QN) {
  for (int64_t n = first * count; n < last * count; n++) {
    const uint8_t* mask = packed_TB + tasks_QN[n] * stride;
    const float* values_W = values_QW + n / count * width;
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t bit = 0; bit < 8 * bytes; bit += 2 * kLanes)
      for (int i = 0; i < 2; i++) {
        const int64_t at = bit + i * kLanes;
        if (at >= 8 * bytes) break;
        const __mmask16 set = bits_at(mask, bytes, at) & lanes_left(8 * bytes - at);
        sum[i] = _mm512_add_ps(sum[i], _mm512_maskz_loadu_ps(set, values_W + at));
      }
    sums_QN[n] = _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
  }
}

// y [N, O] = x [N, I] (weights [O, I] ⊙ mask)ᵀ for the layer whose bits start at byte `start`.
void masked_layer(const uint8_t* mask, int64_t bytes, int64_t start, const float* weights_OI,
                  const float* x_NI, int64_t images, int64_t inputs, int64_t outputs,
                  float* y_NO) {
  constexpr int kTogether = 4;
  for (int64_t o = 0; o < outputs; o++)
    for (int64_t first = 0; first < images; first += kTogether) {
      const int together = static_cast<int>(std::min<int64_t>(kTogether, images - first));
      __m512 sum[kTogether];
      for (int n = 0; n < kTogether; n++) sum[n] = _mm512_setzero_ps();
      for (int64_t i = 0; i < inputs; i += kLanes) {
        const __mmask16 lanes = lanes_left(inputs - i);
        const __mmask16 set = bits_at(mask, bytes, 8 * start + o * inputs + i) & lanes;
        const __m512 weight = _mm512_maskz_loadu_ps(set, weights_OI + o * inputs + i);
        for (int n = 0; n < together; n++)
          sum[n] = _mm512_fmadd_ps(
              weight, _mm512_maskz_loadu_ps(lanes, x_NI + (first + n) * inputs + i), sum[n]);
      }
      for (int n = 0; n < together; n++)
        y_NO[(first + n) * outputs + o] = _mm512_reduce_add_ps(sum[n]);
    }
}

}  // extern "C"
