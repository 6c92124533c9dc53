// Kernels of training for CPUs with AVX512-BF16: the first layer over the pixels that are not
// background, and the score update. supsup/native.py compiles them for the machine they run on;
// supsup/sparse.py calls them.
//
// Shapes: B images of a batch, P pixels, Q = ceil(P / 2) pairs of pixels, O outputs of the first
// layer, K = O rounded up to a multiple of 32.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kLanes = 16;

__m512 from_bf16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

__m512 load_bf16(const uint16_t* p, __mmask16 lanes) {
  return from_bf16(_mm256_maskz_loadu_epi16(lanes, p));
}

__mmask16 lanes_left(int64_t left) {
  return left >= kLanes ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
}

// One RMSprop step on 16 scores; returns the new masked weights.
struct RmsProp {
  __m512 rate, alpha, rest, epsilon;

  RmsProp(float rate, float alpha, float epsilon)
      : rate(_mm512_set1_ps(rate)), alpha(_mm512_set1_ps(alpha)),
        rest(_mm512_set1_ps(1 - alpha)), epsilon(_mm512_set1_ps(epsilon)) {}

  __m512 step(__m512 grad, __m512 weight, float* scores, float* square_avg) const {
    const __m512 g = _mm512_mul_ps(grad, weight);
    const __m512 square = _mm512_fmadd_ps(_mm512_mul_ps(rest, g), g,
                                          _mm512_mul_ps(alpha, _mm512_loadu_ps(square_avg)));
    const __m512 moved = _mm512_div_ps(_mm512_mul_ps(rate, g),
                                       _mm512_add_ps(_mm512_sqrt_ps(square), epsilon));
    const __m512 score = _mm512_sub_ps(_mm512_loadu_ps(scores), moved);
    _mm512_storeu_ps(square_avg, square);
    _mm512_storeu_ps(scores, score);
    const __mmask16 kept = _mm512_cmp_ps_mask(score, _mm512_setzero_ps(), _CMP_GE_OQ);
    return _mm512_maskz_mov_ps(kept, weight);
  }
};

struct Batch {
  const int32_t* row_start;    // [B + 1]
  const uint16_t* row_pair;    // which pair of pixels
  const uint32_t* row_value;   // both pixels of it, bf16
  const int32_t* column_start; // [2 Q + 1]
  const uint16_t* column_image;
  const float* column_value;
};

// The first layer's weights, scores and sums are stored in tiles of 32 outputs, [K / 32, P, 32], so
// that a tile is read and written from one end to the other.
constexpr int kVectors = 2;
constexpr int kTile = kVectors * kLanes;

// N adjoining tiles at once, `stride` numbers apart.
template <int N>
void forward_tiles(const Batch& batch, const uint32_t* masked, const float* sum, int64_t stride,
                   float slope, float background, int64_t images, int64_t outputs, int64_t first,
                   uint16_t* hidden_BO) {
  constexpr int V = N * kVectors;
  const __m512 scale = _mm512_set1_ps(slope);
  __m512 base[V];
  for (int i = 0; i < V; i++)
    base[i] = _mm512_mul_ps(_mm512_set1_ps(background), _mm512_loadu_ps(sum + i * kLanes));
  for (int64_t b = 0; b < images; b++) {
    __m512 acc[V];
    for (int i = 0; i < V; i++) acc[i] = _mm512_setzero_ps();
    for (int32_t n = batch.row_start[b]; n < batch.row_start[b + 1]; n++) {
      const __m512i value = _mm512_set1_epi32(static_cast<int>(batch.row_value[n]));
      const uint32_t* weights = masked + batch.row_pair[n] * kTile;
      for (int i = 0; i < V; i++) {
        const uint32_t* at = weights + i / kVectors * stride + i % kVectors * kLanes;
        acc[i] = _mm512_dpbf16_ps(acc[i], (__m512bh)value, (__m512bh)_mm512_loadu_si512(at));
      }
    }
    for (int i = 0; i < V; i++) {
      const int64_t o = first + i * kLanes;
      if (o >= outputs) break;
      const __m512 pre = _mm512_fmadd_ps(acc[i], scale, base[i]);
      const __m512 active = _mm512_max_ps(pre, _mm512_setzero_ps());
      _mm256_mask_storeu_epi16(hidden_BO + b * outputs + o, lanes_left(outputs - o),
                               (__m256i)_mm512_cvtneps_pbh(active));
    }
  }
}

void update_tile(const Batch& batch, const uint16_t* delta_BO, const uint16_t* hidden_BO,
                 const uint16_t* weights, float* scores, float* square_avg, uint32_t* masked,
                 float* sum, float slope, float background, int64_t images, int64_t pairs,
                 int64_t outputs, int64_t first, const RmsProp& rmsprop, float* delta_tile) {
  __m512 bias[kVectors], total[kVectors];
  for (int i = 0; i < kVectors; i++) bias[i] = total[i] = _mm512_setzero_ps();
  for (int64_t b = 0; b < images; b++)
    for (int i = 0; i < kVectors; i++) {
      const int64_t o = first + i * kLanes;
      const __mmask16 lanes = o < outputs ? lanes_left(outputs - o) : 0;
      const __m512 hidden = load_bf16(hidden_BO + b * outputs + o, lanes);
      const __mmask16 active = _mm512_cmp_ps_mask(hidden, _mm512_setzero_ps(), _CMP_GT_OQ);
      const __m512 delta = load_bf16(delta_BO + b * outputs + o, active);
      _mm512_store_ps(delta_tile + b * kTile + i * kLanes, delta);
      bias[i] = _mm512_add_ps(bias[i], delta);
    }
  for (int i = 0; i < kVectors; i++)
    bias[i] = _mm512_mul_ps(bias[i], _mm512_set1_ps(background));
  const __m512 scale = _mm512_set1_ps(slope);
  for (int64_t q = 0; q < pairs; q++) {
    __m512 pair[2][kVectors];
    for (int half = 0; half < 2; half++) {
      const int64_t p = 2 * q + half;
      __m512 acc[kVectors];
      for (int i = 0; i < kVectors; i++) acc[i] = _mm512_setzero_ps();
      for (int32_t n = batch.column_start[p]; n < batch.column_start[p + 1]; n++) {
        const __m512 value = _mm512_set1_ps(batch.column_value[n]);
        const float* delta = delta_tile + batch.column_image[n] * kTile;
        for (int i = 0; i < kVectors; i++)
          acc[i] = _mm512_fmadd_ps(value, _mm512_load_ps(delta + i * kLanes), acc[i]);
      }
      for (int i = 0; i < kVectors; i++) {
        const int64_t at = p * kTile + i * kLanes;
        const __m512 grad = _mm512_fmadd_ps(acc[i], scale, bias[i]);
        pair[half][i] =
            rmsprop.step(grad, load_bf16(weights + at, 0xffff), scores + at, square_avg + at);
        total[i] = _mm512_add_ps(total[i], pair[half][i]);
      }
    }
    for (int i = 0; i < kVectors; i++) {
      const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(pair[0][i]), 16);
      _mm512_storeu_si512(masked + q * kTile + i * kLanes,
                          _mm512_or_si512(low, _mm512_castps_si512(pair[1][i])));
    }
  }
  for (int i = 0; i < kVectors; i++) _mm512_storeu_ps(sum + i * kLanes, total[i]);
}

uint16_t bf16_of_small_integer(uint8_t value) {  // exact: 8 significant bits
  const float x = value;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

void list_batch(const uint8_t* images_BP, int64_t images, int64_t pixels, int32_t* row_start,
                uint16_t* row_pair, uint32_t* row_value, int32_t* column_start,
                uint16_t* column_image, float* column_value) {
  const int64_t pairs = (pixels + 1) / 2;
  int32_t n = 0;
  std::fill(column_start, column_start + 2 * pairs + 1, 0);
  for (int64_t b = 0; b < images; b++) {
    const uint8_t* image = images_BP + b * pixels;
    row_start[b] = n;
    for (int64_t q = 0; q < pairs; q++) {
      const uint8_t even = image[2 * q], odd = 2 * q + 1 < pixels ? image[2 * q + 1] : 0;
      if (!(even | odd)) continue;
      row_pair[n] = static_cast<uint16_t>(q);
      row_value[n++] = bf16_of_small_integer(even) | uint32_t{bf16_of_small_integer(odd)} << 16;
      column_start[2 * q + 1] += even != 0;
      column_start[2 * q + 2] += odd != 0;
    }
  }
  row_start[images] = n;
  for (int64_t p = 0; p < 2 * pairs; p++) column_start[p + 1] += column_start[p];
  // Fill the columns; their starts move to their ends, and are moved back after.
  for (int64_t b = 0; b < images; b++)
    for (int64_t p = 0; p < pixels; p++)
      if (const uint8_t value = images_BP[b * pixels + p]) {
        const int32_t at = column_start[p]++;
        column_image[at] = static_cast<uint16_t>(b);
        column_value[at] = value;
      }
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

// hidden [B, O] = relu((slope pixels + background) maskedᵀ), bf16. `masked` [K / 32, Q, 32] holds
// the masked weights of both pixels of a pair, `sum` [K] their sum over all pixels.
void first_layer_forward(const int32_t* row_start, const uint16_t* row_pair,
                         const uint32_t* row_value, const uint32_t* masked, const float* sum_K,
                         float slope, float background, int64_t images, int64_t pixels,
                         int64_t outputs, uint16_t* hidden_BO) {
  const Batch batch{row_start, row_pair, row_value, nullptr, nullptr, nullptr};
  const int64_t stride = (pixels + 1) / 2 * kTile;
  int64_t first = 0;
  for (; first + kTile < outputs; first += 2 * kTile, masked += 2 * stride)
    forward_tiles<2>(batch, masked, sum_K + first, stride, slope, background, images, outputs,
                     first, hidden_BO);
  if (first < outputs)
    forward_tiles<1>(batch, masked, sum_K + first, stride, slope, background, images, outputs,
                     first, hidden_BO);
}

// One step of the first layer: the gradient of its weights from `delta` [B, O] (bf16, that of
// `hidden`), RMSprop on the scores [K / 32, 2 Q, 32], and the new `masked` and `sum`.
// `scratch` has room for 32 B floats and lies on a boundary of 64 bytes.
void first_layer_update(const int32_t* column_start, const uint16_t* column_image,
                        const float* column_value, const uint16_t* delta_BO,
                        const uint16_t* hidden_BO, const uint16_t* weights, float* scores,
                        float* square_avg, uint32_t* masked, float* sum_K, float slope,
                        float background, int64_t images, int64_t pixels, int64_t outputs,
                        float rate, float alpha, float epsilon, float* scratch) {
  const Batch batch{nullptr, nullptr, nullptr, column_start, column_image, column_value};
  const int64_t pairs = (pixels + 1) / 2;
  const RmsProp rmsprop(rate, alpha, epsilon);
  const float mean = 1.0f / static_cast<float>(images);
  for (int64_t first = 0, at = 0; first < outputs; first += kTile, at += 2 * pairs * kTile)
    update_tile(batch, delta_BO, hidden_BO, weights + at, scores + at, square_avg + at,
                masked + at / 2, sum_K + first, slope * mean, background * mean, images, pairs,
                outputs, first, rmsprop, scratch);
}

// RMSprop on n scores, a multiple of 16, from the bf16 gradient of the weights, summed over the
// batch; writes the new masked weights, bf16.
void update_scores(const uint16_t* grad, const uint16_t* weights, float* scores,
                   float* square_avg, uint16_t* masked, int64_t n, float rate, float alpha,
                   float epsilon, float images) {
  const RmsProp rmsprop(rate, alpha, epsilon);
  const __m512 mean = _mm512_set1_ps(1.0f / images);
  for (int64_t i = 0; i < n; i += kLanes) {
    const __m512 g = _mm512_mul_ps(load_bf16(grad + i, 0xffff), mean);
    const __m512 kept =
        rmsprop.step(g, load_bf16(weights + i, 0xffff), scores + i, square_avg + i);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(masked + i),
                        (__m256i)_mm512_cvtneps_pbh(kept));
  }
}

}  // extern "C"
