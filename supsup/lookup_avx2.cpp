// Kernels of task inference over packed masks, for CPUs with AVX2 and FMA: the functions of
// lookup.cpp. supsup/native.py compiles them for the machine they run on; supsup/packed.py calls
// them.
//
// What inference needs is, for many masks, the sum of a query's numbers over the bits that are set.
// Registers have room for a table of two bits only (four sums, twice), so there are two ways. Many
// queries side by side: a table of a byte's 256 sums for each of 16 queries, read one entry for each
// mask. Few queries: masks side by side, two bits at a time. Both add the same numbers in the same
// order, so which one is taken changes no bit of the sums.
//
// Masks lie `stride` bytes apart, and may be longer than the B bytes that are asked about.
//
// Shapes: T masks, B bytes of a mask, W = 8 B bits, Q queries, D = ceil(B / 4) words of a mask, C
// chunks of 32 words, G groups of 64 masks.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kLanes = 8;
constexpr int kGroup = 64;
constexpr int kWords = 32;  // words of a chunk
constexpr int kWordBits = 32;
constexpr int64_t kChunkBits = kWords * kWordBits;

// Word d of a mask; bits beyond the mask are zero.
uint32_t word_of(const uint8_t* mask, int64_t bytes, int64_t d) {
  uint32_t word = 0;
  if (4 * d + 4 <= bytes)
    std::memcpy(&word, mask + 4 * d, 4);
  else
    std::memcpy(&word, mask + 4 * d, bytes - 4 * d);
  return word;
}

// Bits 8 i to 8 i + 7 of a word, each as the sign of a lane.
__m256i signs(__m256i word, int i) {
  const __m256i first = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
  return _mm256_sllv_epi32(word, _mm256_sub_epi32(first, _mm256_set1_epi32(8 * i)));
}

// x where a lane's sign is set, else zero.
__m256 where(__m256i sign, __m256 x) {
  return _mm256_blendv_ps(_mm256_setzero_ps(), x, _mm256_castsi256_ps(sign));
}

float total_of(__m256 x) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

// Whether a word has a value that is not zero.
bool any(const float* values) {
  int found = 0;
  for (int i = 0; i < kWordBits; i += kLanes)
    found |= _mm256_movemask_ps(
        _mm256_cmp_ps(_mm256_loadu_ps(values + i), _mm256_setzero_ps(), _CMP_NEQ_UQ));
  return found != 0;
}

// The same word of the next group: too far away for the processor to foresee.
constexpr int64_t kNext = sizeof(uint32_t) * kWords * kGroup;

void prefetch(const char* line) { _mm_prefetch(line, _MM_HINT_T0); }

// What `lookup_sums` is given.
struct Task {
  const uint32_t* words;
  const float* values_QW;
  int64_t chunks, groups;
  float* sums_QT;

  const float* values(int64_t q, int64_t c) const {
    return values_QW + (q * chunks + c) * kChunkBits;
  }
  const uint32_t* group(int64_t c, int64_t g) const {
    return words + (c * groups + g) * kWords * kGroup;
  }
  float* sums(int64_t q, int64_t g) const { return sums_QT + (q * groups + g) * kGroup; }
};

// --- masks side by side ---

constexpr int kPairs = 16;    // pairs of bits in a word
constexpr int kTogether = 4;  // registers of masks

// One query and chunk; the words that are kept are bits of `kept`.
void look_up_pairs(const Task& task, int64_t q, int64_t c, uint32_t kept, int64_t first,
                   int64_t last) {
  alignas(32) float tables[kWords][kPairs][4];
  int used[kWords], count = 0;
  const float* values = task.values(q, c);
  for (int d = 0; d < kWords; d++) {
    if (!(kept >> d & 1)) continue;
    for (int n = 0; n < kPairs; n++) {
      const float* pair = values + d * kWordBits + 2 * n;
      float* table = tables[count][n];
      table[0] = 0, table[1] = pair[0], table[2] = pair[1], table[3] = pair[0] + pair[1];
    }
    used[count++] = d;
  }
  if (!count) return;
  for (int64_t at = first * kGroup; at < last * kGroup; at += kTogether * kLanes) {
    const uint32_t* masks = task.group(c, at / kGroup) + at % kGroup;
    float* sums = task.sums(q, at / kGroup) + at % kGroup;
    __m256 sum[kTogether];
    for (int i = 0; i < kTogether; i++) sum[i] = _mm256_loadu_ps(sums + i * kLanes);
    for (int u = 0; u < count; u++) {
      const char* word = reinterpret_cast<const char*>(masks + used[u] * kGroup);
      prefetch(word + kNext);
      prefetch(word + kNext + 64);
      // A permutation looks at the lowest 2 bits alone. To read from the next byte on takes a load
      // where a shift would wait for the same ports as the permutation.
      for (int byte = 0; byte < 4; byte++) {
        __m256 table[4];
        for (int n = 0; n < 4; n++)
          table[n] =
              _mm256_broadcast_ps(reinterpret_cast<const __m128*>(tables[u][4 * byte + n]));
        for (int i = 0; i < kTogether; i++) {
          const __m256i bits = _mm256_loadu_si256(
              reinterpret_cast<const __m256i*>(word + i * sizeof(__m256i) + byte));
          const __m256 low =
              _mm256_add_ps(_mm256_permutevar_ps(table[0], bits),
                            _mm256_permutevar_ps(table[1], _mm256_srli_epi32(bits, 2)));
          const __m256 high =
              _mm256_add_ps(_mm256_permutevar_ps(table[2], _mm256_srli_epi32(bits, 4)),
                            _mm256_permutevar_ps(table[3], _mm256_srli_epi32(bits, 6)));
          sum[i] = _mm256_add_ps(sum[i], _mm256_add_ps(low, high));
        }
      }
    }
    for (int i = 0; i < kTogether; i++) _mm256_storeu_ps(sums + i * kLanes, sum[i]);
  }
}

// --- queries side by side ---

constexpr int kVectors = 2;
constexpr int kQueries = kVectors * kLanes;
constexpr int kBytes = 256;
constexpr int64_t kBlock = 48;  // groups whose sums stay in the L2 cache, with a word's tables

struct alignas(64) Entry {  // one number for each of 16 queries: a line of the cache
  float at[kQueries];

  __m256 get(int i) const { return _mm256_load_ps(at + i * kLanes); }
  void set(int i, __m256 x) { _mm256_store_ps(at + i * kLanes, x); }
};

// table[m] = the sum of values[b] over the bits b of m, added as `look_up_pairs` does.
void fill_table(const Entry values[8], Entry table[kBytes]) {
  for (int i = 0; i < kVectors; i++) {
    __m256 nibbles[2][16];
    for (int half = 0; half < 2; half++) {
      __m256 pairs[2][4];
      for (int n = 0; n < 2; n++) {
        const Entry* pair = values + 4 * half + 2 * n;
        const __m256 even = pair[0].get(i), odd = pair[1].get(i);
        pairs[n][0] = _mm256_setzero_ps();
        pairs[n][1] = even;
        pairs[n][2] = odd;
        pairs[n][3] = _mm256_add_ps(even, odd);
      }
      for (int m = 0; m < 16; m++)
        nibbles[half][m] = _mm256_add_ps(pairs[0][m % 4], pairs[1][m / 4]);
    }
    for (int high = 0; high < 16; high++)
      for (int low = 0; low < 16; low++)
        table[16 * high + low].set(i, _mm256_add_ps(nibbles[0][low], nibbles[1][high]));
  }
}

struct Room {
  std::vector<Entry> sums = std::vector<Entry>(kBlock * kGroup);
  std::vector<Entry> tables = std::vector<Entry>(4 * kBytes);
  Entry values[kWordBits] = {};
};

// Queries first_q..first_q + count - 1, at most 16, and groups first..last - 1, at most kBlock.
// The words that are kept are bits of `kept` [16, C].
void look_up_bytes(const Task& task, int64_t first_q, int64_t count, const uint32_t* kept,
                   int64_t first, int64_t last, Room& room) {
  Entry *const tables = room.tables.data(), *const sums = room.sums.data();
  std::fill(sums, sums + (last - first) * kGroup, Entry{});
  for (int64_t c = 0; c < task.chunks; c++)
    for (int d = 0; d < kWords; d++) {
      bool any = false;
      for (int64_t q = 0; q < count; q++) {
        const bool keep = kept[q * task.chunks + c] >> d & 1;
        const float* values = task.values(first_q + q, c) + d * kWordBits;
        prefetch(reinterpret_cast<const char*>(values + kWordBits));
        prefetch(reinterpret_cast<const char*>(values + kWordBits + 16));
        for (int b = 0; b < kWordBits; b++) room.values[b].at[q] = keep ? values[b] : 0;
        any |= keep;
      }
      if (!any) continue;
      for (int byte = 0; byte < 4; byte++)
        fill_table(room.values + 8 * byte, tables + byte * kBytes);
      for (int64_t g = first; g < last; g++) {
        const uint32_t* masks = task.group(c, g) + d * kGroup;
        for (int line = 0; line < 4; line++)
          prefetch(reinterpret_cast<const char*>(masks) + 2 * kNext + 64 * line);
        for (int t = 0; t < kGroup; t++) {
          const uint32_t word = masks[t];
          Entry& sum = sums[(g - first) * kGroup + t];
          for (int i = 0; i < kVectors; i++) {
            __m256 x = sum.get(i);
            for (int byte = 0; byte < 4; byte++)
              x = _mm256_add_ps(x, tables[byte * kBytes + (word >> 8 * byte & 0xff)].get(i));
            sum.set(i, x);
          }
        }
      }
    }
  for (int64_t q = 0; q < count; q++)
    for (int64_t t = 0; t < (last - first) * kGroup; t++)
      task.sums(first_q + q, first)[t] = sums[t].at[q];
}

// Say whether tables of bytes are faster. Weights are cycles of a Zen 3, measured.
bool bytes_are_faster(const uint32_t* kept, int64_t queries, int64_t chunks, int64_t masks) {
  int64_t all = 0, together = 0;
  for (int64_t c = 0; c < chunks; c++) {
    uint32_t any = 0;
    for (int64_t q = 0; q < queries; q++) {
      all += __builtin_popcount(kept[q * chunks + c]);
      any |= kept[q * chunks + c];
    }
    together += __builtin_popcount(any);
  }
  return together * (2048 + 8 * masks) < all * 2 * masks;
}

// 32 bits of a mask from `bit` on; those beyond the mask are zero.
uint32_t bits_at(const uint8_t* mask, int64_t bytes, int64_t bit) {
  uint64_t read = 0;
  const int64_t left = bytes - bit / 8;
  if (left >= 8)
    std::memcpy(&read, mask + bit / 8, 8);
  else
    std::memcpy(&read, mask + bit / 8, left);
  return static_cast<uint32_t>(read >> bit % 8);
}

// One output of N images, `outputs` apart: products of x [N, I] and weights [I] whose bits are set.
template <int N>
void masked_row(const uint8_t* mask, int64_t bytes, int64_t bit, const float* weights,
                const float* x_NI, int64_t inputs, int64_t outputs, float* y) {
  __m256 sum[2][N];  // two of each: additions wait for each other
  for (int n = 0; n < N; n++) sum[0][n] = sum[1][n] = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + kWordBits <= inputs; i += kWordBits) {
    const __m256i word = _mm256_set1_epi32(static_cast<int>(bits_at(mask, bytes, bit + i)));
    for (int k = 0; k < 4; k++) {
      const int64_t at = i + k * kLanes;
      const __m256 weight = where(signs(word, k), _mm256_loadu_ps(weights + at));
      for (int n = 0; n < N; n++)
        sum[k % 2][n] =
            _mm256_fmadd_ps(weight, _mm256_loadu_ps(x_NI + n * inputs + at), sum[k % 2][n]);
    }
  }
  if (const int64_t left = inputs - i) {
    const uint32_t inside = (1u << left) - 1;
    const __m256i lanes = _mm256_set1_epi32(static_cast<int>(inside));
    const __m256i word =
        _mm256_set1_epi32(static_cast<int>(bits_at(mask, bytes, bit + i) & inside));
    for (int k = 0; k < 4; k++) {
      const int64_t at = i + k * kLanes;
      const __m256 weight = _mm256_maskload_ps(weights + at, signs(word, k));
      for (int n = 0; n < N; n++)
        sum[k % 2][n] = _mm256_fmadd_ps(
            weight, _mm256_maskload_ps(x_NI + n * inputs + at, signs(lanes, k)), sum[k % 2][n]);
    }
  }
  for (int n = 0; n < N; n++) y[n * outputs] = total_of(_mm256_add_ps(sum[0][n], sum[1][n]));
}

// sums [N] = for each of some tasks, the values [W] of the bits that are set, added.
void sums_of_query(const uint8_t* packed_TB, int64_t stride, int64_t bytes, const int64_t* tasks,
                   int64_t count, const float* values_W, float* sums) {
  constexpr int64_t kStep = 128;  // words: their values stay in the cache from mask to mask
  const int64_t words = (bytes + 3) / 4;
  std::fill(sums, sums + count, 0.0f);
  for (int64_t start = 0; start < words; start += kStep)
    for (int64_t n = 0; n < count; n++) {
      const uint8_t* mask = packed_TB + tasks[n] * stride;
      __m256 sum[kWordBits / kLanes];
      for (int i = 0; i < 4; i++) sum[i] = _mm256_setzero_ps();
      for (int64_t d = start; d < std::min(start + kStep, words); d++) {
        const __m256i word = _mm256_set1_epi32(static_cast<int>(word_of(mask, bytes, d)));
        for (int i = 0; i < 4; i++)
          sum[i] = _mm256_add_ps(
              sum[i],
              where(signs(word, i), _mm256_loadu_ps(values_W + d * kWordBits + i * kLanes)));
      }
      sums[n] +=
          total_of(_mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3])));
    }
}

// sums of a group = some values, each added to the masks of its column.
void add_columns(const uint64_t* columns, int64_t groups, const float* values,
                 const int32_t* chosen, int64_t count, float* sums) {
  constexpr int64_t kAhead = 16;  // columns that are fetched ahead: they lie anywhere
  __m256 sum[kGroup / kLanes];
  for (__m256& x : sum) x = _mm256_setzero_ps();
  for (int64_t n = 0; n < count; n++) {
    prefetch(reinterpret_cast<const char*>(columns + chosen[std::min(n + kAhead, count - 1)] * groups));
    const uint64_t masks = columns[chosen[n] * groups];
    const __m256 value = _mm256_set1_ps(values[chosen[n]]);
    for (int half = 0; half < 2; half++) {
      const __m256i word = _mm256_set1_epi32(static_cast<int>(masks >> 32 * half));
      for (int i = 0; i < 4; i++) {
        __m256& x = sum[4 * half + i];
        x = _mm256_add_ps(x, where(signs(word, i), value));
      }
    }
  }
  for (int i = 0; i < kGroup / kLanes; i++) _mm256_storeu_ps(sums + i * kLanes, sum[i]);
}

}  // namespace

extern "C" {

// Words of masks [T, B] in the order in which `lookup_sums` reads them: [C, G, 32, 64], and one
// more, since it reads from every byte on. Writes masks first..last - 1 alone; what belongs to no
// mask must be zero before.
void interleave(const uint8_t* packed_TB, int64_t stride, int64_t masks, int64_t bytes,
                int64_t first, int64_t last, uint32_t* words) {
  const int64_t groups = (masks + kGroup - 1) / kGroup;
  for (int64_t g = first / kGroup; g * kGroup < last; g++)
    for (int64_t d = 0; 4 * d < bytes; d++) {
      uint32_t* row = words + (d / kWords * groups + g) * kWords * kGroup + d % kWords * kGroup;
      for (int64_t t = std::max(first, g * kGroup); t < std::min(last, (g + 1) * kGroup); t++)
        row[t % kGroup] = word_of(packed_TB + t * stride, bytes, d);
    }
}

// sums [Q, 64 G] = for each query and mask, the values [Q, 1024 C] of the bits that are set, added.
// Only groups first..last - 1 are done; their sums are zero before.
void lookup_sums(const uint32_t* words, const float* values_QW, int64_t queries, int64_t chunks,
                 int64_t groups, int64_t first, int64_t last, float* sums_QT) {
  const Task task{words, values_QW, chunks, groups, sums_QT};
  std::vector<uint32_t> kept(kQueries * chunks);
  Room room;
  for (int64_t start = 0; start < queries; start += kQueries) {
    const int64_t count = std::min<int64_t>(kQueries, queries - start);
    std::fill(kept.begin(), kept.end(), 0);
    for (int64_t q = 0; q < count; q++)
      for (int64_t c = 0; c < chunks; c++)
        for (int d = 0; d < kWords; d++)
          kept[q * chunks + c] |= uint32_t{any(task.values(start + q, c) + d * kWordBits)} << d;
    if (bytes_are_faster(kept.data(), count, chunks, (last - first) * kGroup)) {
      for (int64_t g = first; g < last; g += kBlock)
        look_up_bytes(task, start, count, kept.data(), g, std::min(g + kBlock, last), room);
    } else {
      for (int64_t c = 0; c < chunks; c++)
        for (int64_t q = 0; q < count; q++)
          look_up_pairs(task, start + q, c, kept[q * chunks + c], first, last);
    }
  }
}

// Masks [T, B] turned over: for every bit, those masks that have it, [W, G] words of 64 masks.
void turn_over(const uint8_t* packed_TB, int64_t stride, int64_t masks, int64_t bytes,
               uint64_t* columns_WG) {
  constexpr int64_t kBytesTogether = 64;
  alignas(32) uint8_t block[kGroup][kBytesTogether], column[kGroup];
  const int64_t groups = (masks + kGroup - 1) / kGroup;
  for (int64_t start = 0; start < bytes; start += kBytesTogether)
    for (int64_t g = 0; g < groups; g++) {
      const int64_t count = std::min(kBytesTogether, bytes - start);
      std::memset(block, 0, sizeof block);
      for (int64_t t = g * kGroup; t < std::min(masks, (g + 1) * kGroup); t++)
        std::memcpy(block[t % kGroup], packed_TB + t * stride + start, count);
      for (int64_t b = 0; b < count; b++) {
        for (int t = 0; t < kGroup; t++) column[t] = block[t][b];
        __m256i half[2];
        for (int i = 0; i < 2; i++)
          half[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(column) + i);
        for (int bit = 7; bit >= 0; bit--) {  // the topmost first; then all bits move up
          const auto low = static_cast<uint32_t>(_mm256_movemask_epi8(half[0]));
          const auto high = static_cast<uint32_t>(_mm256_movemask_epi8(half[1]));
          columns_WG[(8 * (start + b) + bit) * groups + g] = low | uint64_t{high} << 32;
          for (__m256i& bytes_up : half) bytes_up = _mm256_add_epi8(bytes_up, bytes_up);
        }
      }
    }
}

// sums [Q, 64 G] = for each query and mask, the values [Q, `width`] of the bits that are set, added;
// only those values whose magnitude is above the query's `least`. The others cost nothing. Only
// queries first_q..last_q - 1 and groups first..last - 1 are done.
void column_sums(const uint64_t* columns_WG, const float* values_QW, const float* least_Q,
                 int64_t width, int64_t bits, int64_t groups, int64_t first_q, int64_t last_q,
                 int64_t first, int64_t last, float* sums_QT) {
  std::vector<int32_t> chosen(bits);
  for (int64_t q = first_q; q < last_q; q++) {
    const float* values = values_QW + q * width;
    int64_t count = 0;
    for (int64_t w = 0; w < bits; w++) {
      chosen[count] = static_cast<int32_t>(w);
      count += std::abs(values[w]) > least_Q[q];
    }
    for (int64_t g = first; g < last; g++)
      add_columns(columns_WG + g, groups, values, chosen.data(), count,
                  sums_QT + (q * groups + g) * kGroup);
  }
}

// total [W] += the masks of some tasks, each times its weight.
void add_masks(const uint8_t* packed_TB, int64_t stride, int64_t bytes, const int64_t* tasks,
               const float* weights, int64_t count, float* total_W) {
  constexpr int64_t kStep = 512;  // words: their total stays in the cache from mask to mask
  constexpr int kMasks = 4;
  const int64_t words = (bytes + 3) / 4;
  for (int64_t start = 0; start < words; start += kStep)
    for (int64_t n = 0; n < count; n += kMasks) {
      const int masks = static_cast<int>(std::min<int64_t>(kMasks, count - n));
      for (int64_t d = start; d < std::min(start + kStep, words); d++) {
        __m256 total[kWordBits / kLanes];
        for (int i = 0; i < 4; i++)
          total[i] = _mm256_loadu_ps(total_W + d * kWordBits + i * kLanes);
        for (int m = 0; m < masks; m++) {
          const uint8_t* mask = packed_TB + tasks[n + m] * stride;
          const __m256i word = _mm256_set1_epi32(static_cast<int>(word_of(mask, bytes, d)));
          const __m256 weight = _mm256_set1_ps(weights[n + m]);
          for (int i = 0; i < 4; i++)
            total[i] = _mm256_add_ps(total[i], where(signs(word, i), weight));
        }
        for (int i = 0; i < 4; i++)
          _mm256_storeu_ps(total_W + d * kWordBits + i * kLanes, total[i]);
      }
    }
}

// sums [Q, N] = for each query and each of its tasks [Q, N], the values [Q, `width`] of the bits that
// are set, added. Only queries first..last - 1 are done.
void sums_of(const uint8_t* packed_TB, int64_t stride, int64_t bytes, const int64_t* tasks_QN,
             int64_t count, const float* values_QW, int64_t width, int64_t first, int64_t last,
             float* sums_QN) {
  for (int64_t q = first; q < last; q++)
    sums_of_query(packed_TB, stride, bytes, tasks_QN + q * count, count, values_QW + q * width,
                  sums_QN + q * count);
}

// y [N, O] = x [N, I] (weights [O, I] ⊙ mask)ᵀ for the layer whose bits start at byte `start`.
void masked_layer(const uint8_t* mask, int64_t bytes, int64_t start, const float* weights_OI,
                  const float* x_NI, int64_t images, int64_t inputs, int64_t outputs,
                  float* y_NO) {
  for (int64_t o = 0; o < outputs; o++) {
    const int64_t bit = 8 * start + o * inputs;
    const float* weights = weights_OI + o * inputs;
    int64_t n = 0;
    for (; n + 4 <= images; n += 4)
      masked_row<4>(mask, bytes, bit, weights, x_NI + n * inputs, inputs, outputs,
                    y_NO + n * outputs + o);
    for (; n < images; n++)
      masked_row<1>(mask, bytes, bit, weights, x_NI + n * inputs, inputs, outputs,
                    y_NO + n * outputs + o);
  }
}

}  // extern "C"
