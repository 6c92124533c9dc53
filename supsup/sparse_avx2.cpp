// Kernels of training in fp32 for CPUs with AVX2 and FMA: the first layer over the pixels that are
// not background, and the score update. The functions are those of sparse.cpp, with other types.
//
// The first layer's weights are all ±c, and pixels are bytes: its products are done in integers, on
// signs, and are exact. The caller multiplies slope and background by c.
//
// Shapes: B images of a batch, P pixels, Q = ceil(P / 2) pairs of pixels, O outputs of the first
// layer, K = O rounded up to a multiple of 32.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kLanes = 8;

// All ones in the first `left` lanes.
__m256i lanes_left(int64_t left) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(std::min<int64_t>(left, kLanes))),
                            lane);
}

__m256 load(const float* p, int64_t left) {
  if (left >= kLanes) return _mm256_loadu_ps(p);
  return left > 0 ? _mm256_maskload_ps(p, lanes_left(left)) : _mm256_setzero_ps();
}

void store(float* p, int64_t left, __m256 x) {
  if (left >= kLanes)
    _mm256_storeu_ps(p, x);
  else if (left > 0)
    _mm256_maskstore_ps(p, lanes_left(left), x);
}

// One RMSprop step on 8 scores, given their gradient; returns the lanes that are kept.
struct RmsProp {
  __m256 rate, alpha, rest, epsilon;

  RmsProp(float rate, float alpha, float epsilon)
      : rate(_mm256_set1_ps(rate)), alpha(_mm256_set1_ps(alpha)),
        rest(_mm256_set1_ps(1 - alpha)), epsilon(_mm256_set1_ps(epsilon)) {}

  __m256 step(__m256 g, float* scores, float* square_avg) const {
    const __m256 square = _mm256_fmadd_ps(_mm256_mul_ps(rest, g), g,
                                          _mm256_mul_ps(alpha, _mm256_loadu_ps(square_avg)));
    const __m256 moved = _mm256_div_ps(_mm256_mul_ps(rate, g),
                                       _mm256_add_ps(_mm256_sqrt_ps(square), epsilon));
    const __m256 score = _mm256_sub_ps(_mm256_loadu_ps(scores), moved);
    _mm256_storeu_ps(square_avg, square);
    _mm256_storeu_ps(scores, score);
    return _mm256_cmp_ps(score, _mm256_setzero_ps(), _CMP_GE_OQ);
  }
};

struct Batch {
  const int32_t* row_start;    // [B + 1]
  const uint16_t* row_pair;    // which pair of pixels
  const uint32_t* row_value;   // both pixels of it, twice
  const int32_t* column_start; // [2 Q + 1]
  const uint16_t* column_image;
  const float* column_value;
};

// The first layer's signs, scores and sums are stored in tiles of 32 outputs, [K / 32, P, 32], so
// that a tile is read and written from one end to the other.
constexpr int kVectors = 4;
constexpr int kTile = kVectors * kLanes;
constexpr int kPairs = 2 * kTile / static_cast<int>(sizeof(__m256i));  // registers of a pair
constexpr int32_t kNoOverflow = 64;  // 64 pairs of bytes add up to 64 * 2 * 255 < 2^15

// N adjoining tiles at once, `stride` signs apart.
template <int N>
void forward_tiles(const Batch& batch, const int8_t* masked, const float* sum, int64_t stride,
                   float slope, float background, int64_t images, int64_t outputs, int64_t first,
                   float* hidden_BO) {
  constexpr int V = N * kPairs;
  const __m256 scale = _mm256_set1_ps(slope);
  for (int64_t b = 0; b < images; b++) {
    __m256i total[V][2];
    for (int i = 0; i < V; i++) total[i][0] = total[i][1] = _mm256_setzero_si256();
    for (int32_t n = batch.row_start[b]; n < batch.row_start[b + 1];) {
      __m256i acc[V];
      for (int i = 0; i < V; i++) acc[i] = _mm256_setzero_si256();
      const int32_t stop = std::min(n + kNoOverflow, batch.row_start[b + 1]);
      for (; n < stop; n++) {
        const __m256i value = _mm256_set1_epi32(static_cast<int>(batch.row_value[n]));
        const int8_t* signs = masked + batch.row_pair[n] * 2 * kTile;
        for (int i = 0; i < V; i++) {
          const int8_t* at = signs + i / kPairs * stride + i % kPairs * sizeof(__m256i);
          acc[i] = _mm256_add_epi16(
              acc[i], _mm256_maddubs_epi16(
                          value, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))));
        }
      }
      for (int i = 0; i < V; i++) {
        const __m128i low = _mm256_castsi256_si128(acc[i]);
        const __m128i high = _mm256_extracti128_si256(acc[i], 1);
        total[i][0] = _mm256_add_epi32(total[i][0], _mm256_cvtepi16_epi32(low));
        total[i][1] = _mm256_add_epi32(total[i][1], _mm256_cvtepi16_epi32(high));
      }
    }
    for (int i = 0; i < 2 * V; i++) {
      const int64_t o = first + i * kLanes;
      const __m256 base =
          _mm256_mul_ps(_mm256_set1_ps(background), _mm256_loadu_ps(sum + i * kLanes));
      const __m256 pre = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[i / 2][i % 2]), scale, base);
      store(hidden_BO + b * outputs + o, outputs - o, _mm256_max_ps(pre, _mm256_setzero_ps()));
    }
  }
}

void update_tile(const Batch& batch, const float* delta_BO, const float* hidden_BO,
                 const int8_t* signs, float* scores, float* square_avg, int8_t* masked,
                 float* sum, float slope, float background, int64_t images, int64_t pairs,
                 int64_t outputs, int64_t first, const RmsProp& rmsprop, float* delta_tile) {
  __m256 bias[kVectors];
  __m256i total[kVectors];
  for (int i = 0; i < kVectors; i++) bias[i] = _mm256_setzero_ps();
  for (int i = 0; i < kVectors; i++) total[i] = _mm256_setzero_si256();
  for (int64_t b = 0; b < images; b++)
    for (int i = 0; i < kVectors; i++) {
      const int64_t o = first + i * kLanes;
      const __m256 hidden = load(hidden_BO + b * outputs + o, outputs - o);
      const __m256 active = _mm256_cmp_ps(hidden, _mm256_setzero_ps(), _CMP_GT_OQ);
      const __m256 delta =
          _mm256_and_ps(load(delta_BO + b * outputs + o, outputs - o), active);
      _mm256_store_ps(delta_tile + b * kTile + i * kLanes, delta);
      bias[i] = _mm256_add_ps(bias[i], delta);
    }
  for (int i = 0; i < kVectors; i++)
    bias[i] = _mm256_mul_ps(bias[i], _mm256_set1_ps(background));
  const __m256 scale = _mm256_set1_ps(slope);
  for (int64_t q = 0; q < pairs; q++) {
    __m256i pair[2][kVectors];
    for (int half = 0; half < 2; half++) {
      const int64_t p = 2 * q + half;
      __m256 acc[2][kVectors];  // two images side by side: additions wait for each other
      for (int i = 0; i < kVectors; i++) acc[0][i] = acc[1][i] = _mm256_setzero_ps();
      int32_t n = batch.column_start[p];
      const int32_t stop = batch.column_start[p + 1];
      for (; n + 1 < stop; n += 2)
        for (int k = 0; k < 2; k++) {
          const __m256 value = _mm256_set1_ps(batch.column_value[n + k]);
          const float* delta = delta_tile + batch.column_image[n + k] * kTile;
          for (int i = 0; i < kVectors; i++)
            acc[k][i] = _mm256_fmadd_ps(value, _mm256_load_ps(delta + i * kLanes), acc[k][i]);
        }
      if (n < stop) {
        const __m256 value = _mm256_set1_ps(batch.column_value[n]);
        const float* delta = delta_tile + batch.column_image[n] * kTile;
        for (int i = 0; i < kVectors; i++)
          acc[0][i] = _mm256_fmadd_ps(value, _mm256_load_ps(delta + i * kLanes), acc[0][i]);
      }
      for (int i = 0; i < kVectors; i++) {
        const int64_t at = p * kTile + i * kLanes;
        const __m256i sign = _mm256_cvtepi8_epi32(
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(signs + at)));
        const __m256 grad = _mm256_fmadd_ps(_mm256_add_ps(acc[0][i], acc[1][i]), scale, bias[i]);
        const __m256 kept = rmsprop.step(_mm256_mul_ps(grad, _mm256_cvtepi32_ps(sign)),
                                         scores + at, square_avg + at);
        pair[half][i] = _mm256_and_si256(sign, _mm256_castps_si256(kept));
        total[i] = _mm256_add_epi32(total[i], pair[half][i]);
      }
    }
    for (int i = 0; i < kVectors; i += 2) {
      __m256i both[2];
      for (int k = 0; k < 2; k++)  // bytes (even, odd) of the pair, in the lower half of each lane
        both[k] = _mm256_and_si256(
            _mm256_blendv_epi8(_mm256_slli_epi32(pair[1][i + k], 8), pair[0][i + k],
                               _mm256_set1_epi32(0xff)),
            _mm256_set1_epi32(0xffff));
      // Packing goes by halves of registers.
      const __m256i packed =
          _mm256_permute4x64_epi64(_mm256_packus_epi32(both[0], both[1]), 0xd8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(masked + (q * kTile + i * kLanes) * 2),
                          packed);
    }
  }
  for (int i = 0; i < kVectors; i++)
    _mm256_storeu_ps(sum + i * kLanes, _mm256_cvtepi32_ps(total[i]));
}

// Call found(pixel, value) for every pixel of an image that is not zero, in order.
template <class Found>
void each_pixel(const uint8_t* image, int64_t pixels, Found found) {
  constexpr int64_t kBytes = sizeof(__m256i);
  for (int64_t start = 0; start < pixels; start += kBytes) {
    alignas(kBytes) uint8_t part[kBytes] = {};
    std::memcpy(part, image + start, std::min(kBytes, pixels - start));
    const __m256i values = _mm256_load_si256(reinterpret_cast<const __m256i*>(part));
    auto set = ~static_cast<uint32_t>(
        _mm256_movemask_epi8(_mm256_cmpeq_epi8(values, _mm256_setzero_si256())));
    for (; set; set &= set - 1) {
      const int bit = __builtin_ctz(set);
      found(start + bit, part[bit]);
    }
  }
}

void list_batch(const uint8_t* images_BP, int64_t images, int64_t pixels, int32_t* row_start,
                uint16_t* row_pair, uint32_t* row_value, int32_t* column_start,
                uint16_t* column_image, float* column_value) {
  const int64_t pairs = (pixels + 1) / 2;
  int32_t n = 0;
  std::fill(column_start, column_start + 2 * pairs + 1, 0);
  for (int64_t b = 0; b < images; b++) {
    row_start[b] = n;
    each_pixel(images_BP + b * pixels, pixels, [&](int64_t p, uint8_t value) {
      const auto q = static_cast<uint16_t>(p / 2);
      if (n == row_start[b] || row_pair[n - 1] != q) {
        row_pair[n] = q;
        row_value[n++] = 0;
      }
      row_value[n - 1] |= value * 0x00010001u << p % 2 * 8;
      column_start[p + 1]++;
    });
  }
  row_start[images] = n;
  for (int64_t p = 0; p < 2 * pairs; p++) column_start[p + 1] += column_start[p];
  // Fill the columns; their starts move to their ends, and are moved back after.
  for (int64_t b = 0; b < images; b++)
    each_pixel(images_BP + b * pixels, pixels, [&](int64_t p, uint8_t value) {
      const int32_t at = column_start[p]++;
      column_image[at] = static_cast<uint16_t>(b);
      column_value[at] = value;
    });
  for (int64_t p = 2 * pairs; p > 0; p--) column_start[p] = column_start[p - 1];
  column_start[0] = 0;
}

}  // namespace

extern "C" {

// Lists the pixels of batches of uint8 images [M, B, P] that are not zero: by image in pairs, and by
// pixel. The lists of a batch must have room for B Q pairs and B P pixels.
void list_pixels(const uint8_t* images_MBP, int64_t batches, int64_t images, int64_t pixels,
                 int32_t* row_start, uint16_t* row_pair, uint32_t* row_value,
                 int32_t* column_start, uint16_t* column_image, float* column_value) {
  const int64_t pairs = (pixels + 1) / 2;
  for (int64_t m = 0; m < batches; m++)
    list_batch(images_MBP + m * images * pixels, images, pixels, row_start + m * (images + 1),
               row_pair + m * images * pairs, row_value + m * images * pairs,
               column_start + m * (2 * pairs + 1), column_image + m * images * pixels,
               column_value + m * images * pixels);
}

// hidden [B, O] = relu((slope pixels + background) maskedᵀ). `masked` [K / 32, Q, 32] holds the
// masked signs of both pixels of a pair, `sum` [K] their sum over all pixels.
void first_layer_forward(const int32_t* row_start, const uint16_t* row_pair,
                         const uint32_t* row_value, const int8_t* masked, const float* sum_K,
                         float slope, float background, int64_t images, int64_t pixels,
                         int64_t outputs, float* hidden_BO) {
  const Batch batch{row_start, row_pair, row_value, nullptr, nullptr, nullptr};
  const int64_t stride = (pixels + 1) / 2 * 2 * kTile;
  int64_t first = 0;
  for (; first + kTile < outputs; first += 2 * kTile, masked += 2 * stride)
    forward_tiles<2>(batch, masked, sum_K + first, stride, slope, background, images, outputs,
                     first, hidden_BO);
  if (first < outputs)
    forward_tiles<1>(batch, masked, sum_K + first, stride, slope, background, images, outputs,
                     first, hidden_BO);
}

// One step of the first layer: the gradient of its weights from `delta` [B, O] (that of `hidden`),
// RMSprop on the scores [K / 32, 2 Q, 32], and the new `masked` and `sum`. `signs` are -1, 1, and 0
// where there is no weight. `scratch` has room for 32 B floats and lies on a boundary of 64 bytes.
void first_layer_update(const int32_t* column_start, const uint16_t* column_image,
                        const float* column_value, const float* delta_BO, const float* hidden_BO,
                        const int8_t* signs, float* scores, float* square_avg, int8_t* masked,
                        float* sum_K, float slope, float background, int64_t images,
                        int64_t pixels, int64_t outputs, float rate, float alpha, float epsilon,
                        float* scratch) {
  const Batch batch{nullptr, nullptr, nullptr, column_start, column_image, column_value};
  const int64_t pairs = (pixels + 1) / 2;
  const RmsProp rmsprop(rate, alpha, epsilon);
  const float mean = 1.0f / static_cast<float>(images);
  for (int64_t first = 0, at = 0; first < outputs; first += kTile, at += 2 * pairs * kTile)
    update_tile(batch, delta_BO, hidden_BO, signs + at, scores + at, square_avg + at, masked + at,
                sum_K + first, slope * mean, background * mean, images, pairs, outputs, first,
                rmsprop, scratch);
}

// RMSprop on n scores, a multiple of 16, from the gradient of the weights, summed over the batch;
// writes the new masked weights.
void update_scores(const float* grad, const float* weights, float* scores, float* square_avg,
                   float* masked, int64_t n, float rate, float alpha, float epsilon,
                   float images) {
  const RmsProp rmsprop(rate, alpha, epsilon);
  const __m256 mean = _mm256_set1_ps(1.0f / images);
  for (int64_t i = 0; i < n; i += kLanes) {
    const __m256 weight = _mm256_loadu_ps(weights + i);
    const __m256 g = _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(grad + i), mean), weight);
    const __m256 kept = rmsprop.step(g, scores + i, square_avg + i);
    _mm256_storeu_ps(masked + i, _mm256_and_ps(kept, weight));
  }
}

}  // extern "C"
