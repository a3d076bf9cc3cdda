// Layers of bytes for processors with AVX-512 VNNI: convolutions and matrix products, each with its requantization.
//
//     bytes -> [ u8 x s8 -> int32 ] -> * s_in * s_w + b -> (+ residual bytes) -> * 1/s + z -> cut -> round -> bytes
//
// Images are [N, H, W, C] in memory. A dense layer is an indirect product: for every output pixel there are pointers to the input pixels
// under the taps of its kernel, so nothing is copied, and padding is a pointer to a pixel of zeros. Each step in floats is rounded on its
// own, in the order of `IntegerLayer.reference`: compile without contraction to fused multiply-adds.

#include <immintrin.h>
#include <omp.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Shape {
  int64_t images, height, width, channels;
  int64_t out_channels, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups;
  int64_t out_height, out_width;
  bool is_depthwise() const { return groups > 1 && groups == channels && channels == out_channels; }
  // Where channels come in no fours, a row of the kernel is one tap, of all its pixels side by side.
  bool is_folded() const { return channels / groups % 4 != 0; }
};

struct Grids {
  float input_scale;
  uint8_t input_zero;
  float inverse, zero, low, high;  // of the output; inverse 0: float32 goes out
  float residual_scale;
  int32_t residual_zero;
};

// What a layer is made of. Sums start at what the zero-point of the input takes off them; everything is padded to whole vectors.
struct Weights {
  const int8_t* packed;
  const int32_t* start;
  const float *scale, *bias;
  Weights at(int64_t bytes, int64_t output) const { return {packed + bytes, start + output, scale + output, bias + output}; }
};

enum Output { BYTES, SUMS, FLOATS };  // what goes out: bytes, bytes of a sum with a residual, or float32

// sum += four products of unsigned and signed bytes in each of 16 places; as text, as compilers copy and spill the sums of the intrinsic.
inline void add_products(__m512i& sum, __m512i x, __m512i w) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w)); }

inline __m512 dequantized(__m512i sum, const Weights& w, int64_t at, const Grids& g) {
  const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(g.input_scale));
  return _mm512_add_ps(_mm512_mul_ps(y, _mm512_loadu_ps(w.scale + at)), _mm512_loadu_ps(w.bias + at));
}

inline __m512 plus_residual(__m512 y, __m128i bytes, const Grids& g) {
  const __m512i centered = _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(g.residual_zero));
  return _mm512_add_ps(y, _mm512_mul_ps(_mm512_cvtepi32_ps(centered), _mm512_set1_ps(g.residual_scale)));
}

inline __m512i quantized(__m512 y, const Grids& g) {
  y = _mm512_add_ps(_mm512_mul_ps(y, _mm512_set1_ps(g.inverse)), _mm512_set1_ps(g.zero));
  y = _mm512_min_ps(_mm512_max_ps(y, _mm512_set1_ps(g.low)), _mm512_set1_ps(g.high));
  return _mm512_cvtps_epi32(y);  // half to even
}

// 64 codes as bytes; within each 128 bits the four vectors take turns.
inline __m512i bytes_of(const __m512i (&codes)[4]) {
  return _mm512_packus_epi16(_mm512_packs_epi32(codes[0], codes[1]), _mm512_packs_epi32(codes[2], codes[3]));
}

inline __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~0ull : count <= 0 ? 0 : (1ull << count) - 1; }

// ---- dense layers -------------------------------------------------------------------------------------------------------------------

// Where the bytes under the taps of output pixels lie: under tap t of pixel p `pointers[p * a_pixel + t * a_tap] + offsets[t]`.
struct Places {
  const uint8_t* const* pointers;
  int64_t a_pixel, a_tap;
  const int64_t* offsets;
};

// `PIXELS` output pixels times 16 `VECTORS` outputs; two pixels of `out` are `out_stride` apart.
template <int PIXELS, int VECTORS, Output OUTPUT>
void tile(const Places& places, int64_t taps, int64_t depth, Weights w, const uint8_t* residual, uint8_t* out, int64_t out_stride,
          int64_t outputs, const Grids& given) {
  __m512i sums[PIXELS][VECTORS];
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; v++) {
#pragma GCC unroll 8
    for (int p = 0; p < PIXELS; p++) sums[p][v] = _mm512_loadu_si512(w.start + 16 * v);
  }
  for (int64_t t = 0; t < taps; t++) {
    const uint8_t* in[PIXELS];
#pragma GCC unroll 8
    for (int p = 0; p < PIXELS; p++) in[p] = places.pointers[p * places.a_pixel + t * places.a_tap] + places.offsets[t];
    for (int64_t k = 0; k < depth; k += 4, w.packed += 64 * VECTORS) {
      __m512i weight[VECTORS];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) weight[v] = _mm512_loadu_si512(w.packed + 64 * v);
#pragma GCC unroll 8
      for (int p = 0; p < PIXELS; p++) {
        int32_t four;
        std::memcpy(&four, in[p] + k, 4);
        const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) add_products(sums[p][v], x, weight[v]);
      }
    }
  }
  asm volatile("" ::: "memory");  // nothing of what follows may take registers from the sums
  const Grids g = given;          // a copy of its own, which stays in registers whatever is written
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
#pragma GCC unroll 8
  for (int p = 0; p < PIXELS; p++) {
    __m512i codes[4] = {};
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      const __mmask16 mask = (__mmask16)first_bytes(outputs - 16 * v);
      __m512 y = dequantized(sums[p][v], w, 16 * v, g);
      if (OUTPUT == SUMS) y = plus_residual(y, _mm_maskz_loadu_epi8(mask, residual + p * out_stride + 16 * v), g);
      if (OUTPUT == FLOATS) _mm512_mask_storeu_ps((float*)out + p * out_stride + 16 * v, mask, y);
      else codes[v] = quantized(y, g);
    }
    const __m512i bytes = _mm512_permutexvar_epi32(order, bytes_of(codes));
    if (OUTPUT != FLOATS) _mm512_mask_storeu_epi8(out + p * out_stride, first_bytes(outputs), bytes);
  }
}

using Tile = decltype(&tile<1, 1, BYTES>);
template <Output O>
constexpr Tile TILES[4][8] = {
    {tile<1, 1, O>, tile<2, 1, O>, tile<3, 1, O>, tile<4, 1, O>, tile<5, 1, O>, tile<6, 1, O>, tile<7, 1, O>, tile<8, 1, O>},
    {tile<1, 2, O>, tile<2, 2, O>, tile<3, 2, O>, tile<4, 2, O>, tile<5, 2, O>, tile<6, 2, O>, tile<7, 2, O>, tile<8, 2, O>},
    {tile<1, 3, O>, tile<2, 3, O>, tile<3, 3, O>, tile<4, 3, O>, tile<5, 3, O>, tile<6, 3, O>, tile<7, 3, O>, tile<8, 3, O>},
    {tile<1, 4, O>, tile<2, 4, O>, tile<3, 4, O>, tile<4, 4, O>, tile<5, 4, O>, tile<6, 4, O>, nullptr, nullptr}};
const int64_t MOST_PIXELS[4] = {8, 8, 8, 6};  // pixels whose sums fit the registers, by vectors

// The input pixels of a part of the output. Most have all taps inside of the image, at the same places from its corner; others a table.
class Window {
 public:
  Window(const uint8_t* codes, const Shape& s, uint8_t zero) : codes_(codes), s_(s), outside_(s.channels + 4, zero), table_(8 * taps()) {
    for (int64_t i = 0; i < s.kernel_h; i++)
      for (int64_t j = 0; j < s.kernel_w; j++) inner_.push_back((i * s.dilation_h * s.width + j * s.dilation_w) * s.channels);
    offsets_.resize(2 * taps());
  }
  int64_t taps() const { return s_.kernel_h * s_.kernel_w; }

  void move(int64_t from, int64_t to) {
    corners_.resize(to - from), tops_.resize(to - from), lefts_.resize(to - from), inside_.resize(to - from);
    const int64_t high = (s_.kernel_h - 1) * s_.dilation_h, wide = (s_.kernel_w - 1) * s_.dilation_w;
    int64_t x = from % s_.out_width, y = from / s_.out_width % s_.out_height, image = from / s_.out_width / s_.out_height;
    for (int64_t p = 0; p < to - from; image += y == s_.out_height, y %= s_.out_height) {
      const int64_t top = y * s_.stride_h - s_.padding_h, row = (image * s_.height + top) * s_.width;
      const bool rows = top >= 0 && top + high < s_.height;
      for (; x < s_.out_width && p < to - from; x++, p++) {
        const int64_t left = x * s_.stride_w - s_.padding_w;
        corners_[p] = codes_ + (row + left) * s_.channels, tops_[p] = top, lefts_[p] = left;
        inside_[p] = rows && left >= 0 && left + wide < s_.width;
      }
      if (x == s_.out_width) x = 0, y++;
    }
  }

  void choose(int64_t group_offset) {  // the channels of a group
    for (int64_t t = 0; t < taps(); t++) offsets_[t] = inner_[t] + group_offset, offsets_[taps() + t] = group_offset;
  }

  Places places(int64_t low, int64_t high) {
    const bool all_inside = std::all_of(inside_.begin() + low, inside_.begin() + high, [](uint8_t it) { return it; });
    if (all_inside) return {corners_.data() + low, 1, 0, offsets_.data()};
    const uint8_t** next = table_.data();
    for (int64_t p = low; p < high; p++)
      for (int64_t i = 0, t = 0; i < s_.kernel_h; i++)
        for (int64_t j = 0; j < s_.kernel_w; j++, t++) {
          const int64_t row = tops_[p] + i * s_.dilation_h, column = lefts_[p] + j * s_.dilation_w;
          *next++ = row >= 0 && row < s_.height && column >= 0 && column < s_.width ? corners_[p] + inner_[t] : outside_.data();
        }
    return {table_.data(), taps(), 1, offsets_.data() + taps()};
  }

 private:
  const uint8_t* codes_;
  const Shape& s_;
  const std::vector<uint8_t> outside_;  // a pixel of zeros
  std::vector<const uint8_t*> table_, corners_;
  std::vector<uint8_t> inside_;
  std::vector<int64_t> tops_, lefts_, inner_, offsets_;
};

void dense(const uint8_t* codes, const Weights& w, const uint8_t* residual, uint8_t* out, const Shape& s, int64_t depth, const Grids& g) {
  const int64_t taps = s.kernel_h * s.kernel_w, width = s.out_channels / s.groups;
  const int64_t padded = (width + 15) / 16 * 16, panels = (padded + 63) / 64;
  const int64_t count = s.images * s.out_height * s.out_width, threads = omp_get_max_threads();
  // Pixels of about 128 KiB, in and out, which stay in the second cache while panels of weights pass over them; some for every thread.
  const int64_t fitting = std::max<int64_t>(48, 131072 / (s.channels * s.stride_h * s.stride_w + s.out_channels));
  const int64_t chunk = std::min(fitting, std::max<int64_t>(24, (count + threads - 1) / threads));
  const int64_t tasks = (count + chunk - 1) / chunk * s.groups * panels;
  const Tile(&tiles)[4][8] = g.inverse == 0 ? TILES<FLOATS> : residual ? TILES<SUMS> : TILES<BYTES>;
#pragma omp parallel if (threads > 1 && tasks > 1)
  {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    Window window(codes, s, g.input_zero);
    int64_t seen = -1;
    for (int64_t task = tasks * me / all; task < tasks * (me + 1) / all; task++) {
      const int64_t part = task / (s.groups * panels), group = task / panels % s.groups, panel = task % panels;
      const int64_t from = part * chunk, to = std::min(count, from + chunk);
      if (part != seen) window.move(from, to), seen = part;
      window.choose(group * depth);
      const int64_t vectors = std::min<int64_t>(4, padded / 16 - 4 * panel), output = group * padded + 64 * panel;
      const int64_t outputs = std::min<int64_t>(64, width - 64 * panel), channel = group * width + 64 * panel;
      const Weights panel_w = w.at(output * taps * depth, output);
      const int64_t blocks = (to - from + MOST_PIXELS[vectors - 1] - 1) / MOST_PIXELS[vectors - 1];
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t low = (to - from) * b / blocks, high = (to - from) * (b + 1) / blocks, at = (from + low) * s.out_channels + channel;
        tiles[vectors - 1][high - low - 1](window.places(low, high), taps, depth, panel_w, residual ? residual + at : nullptr,
                                           out + at * (g.inverse == 0 ? 4 : 1), s.out_channels, outputs, g);
      }
    }
  }
}

// A dense layer whose channels come in no fours (images): on a padded copy the pixels under a row of the kernel lie side by side.
void folded(const uint8_t* codes, Weights w, const uint8_t* residual, uint8_t* out, const Shape& s, const Grids& g) {
  Shape wide = s;
  wide.height += 2 * s.padding_h, wide.width += 2 * s.padding_w;
  wide.padding_h = wide.padding_w = 0;
  const int64_t line = s.width * s.channels, wide_line = wide.width * s.channels, lines = s.images * wide.height;
  std::vector<uint8_t> copy(lines * wide_line + 4);  // the last four bytes may be read, and meet weights of zero
#pragma omp parallel for if (omp_get_max_threads() > 1 && lines > 64)
  for (int64_t i = 0; i < lines; i++) {
    uint8_t* to = copy.data() + i * wide_line;
    const int64_t row = i % wide.height - s.padding_h;
    std::memset(to, g.input_zero, wide_line);
    if (row >= 0 && row < s.height) std::memcpy(to + s.padding_w * s.channels, codes + (i / wide.height * s.height + row) * line, line);
  }
  wide.kernel_w = 1;
  dense(copy.data(), w, residual, out, wide, (s.kernel_w * s.channels + 3) / 4 * 4, g);
}

// ---- depthwise layers ---------------------------------------------------------------------------------------------------------------

// 64 bytes at a time: 64 channels of a pixel, or, where fewer are left, 32 of two or 16 of four neighbors.
struct Block {
  int64_t channel, channels;
  Block(int64_t from, const Shape& s) : channel(from), channels(std::min<int64_t>(64, s.channels - from)) {}
  int neighbors() const { return channels <= 16 ? 4 : channels <= 32 ? 2 : 1; }
};

// Writes the columns of a line: bytes of four rows side by side, as one product takes them. With neighbors, a column is part of several.
template <int NEIGHBORS>
void interleave(const uint8_t* const* rows, int64_t count, int64_t fours, const Block& block, const Shape& s, uint8_t zero,
                uint8_t* columns) {
  const __mmask64 mask = first_bytes(block.channels);
  const __m512i zeros = _mm512_set1_epi8((char)zero);
  for (int64_t c = 0; c < count; c++)
    for (int64_t f = 0; f < fours; f++) {
      const int64_t x = c - s.padding_w;
      __m512i v[4] = {zeros, zeros, zeros, zeros};
      if (x >= 0 && x < s.width)
        for (int i = 0; i < 4; i++) v[i] = _mm512_maskz_loadu_epi8(mask, rows[4 * f + i] + x * s.channels + block.channel);
      const __m512i low_ab = _mm512_unpacklo_epi8(v[0], v[1]), high_ab = _mm512_unpackhi_epi8(v[0], v[1]);
      const __m512i low_cd = _mm512_unpacklo_epi8(v[2], v[3]), high_cd = _mm512_unpackhi_epi8(v[2], v[3]);
      const __m512i out[4] = {_mm512_unpacklo_epi16(low_ab, low_cd), _mm512_unpackhi_epi16(low_ab, low_cd),
                              _mm512_unpacklo_epi16(high_ab, high_cd), _mm512_unpackhi_epi16(high_ab, high_cd)};
      for (int n = 0; n < NEIGHBORS && c >= n * s.stride_w; n++)
        for (int j = 0; j < 4; j++) {
          uint8_t* to = columns + ((c - n * s.stride_w) * fours + f) * 256 + 64 * j + 64 / NEIGHBORS * n;
          if (NEIGHBORS == 1) _mm512_storeu_si512(to, out[j]);
          else if (NEIGHBORS == 2) _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(out[j]));
          else _mm_storeu_si128((__m128i*)to, _mm512_castsi512_si128(out[j]));
        }
    }
}

// A line of output pixels; `columns` are those of the input, `FOURS` times four rows each. 0: known when it runs.
template <int KERNEL_W, int FOURS, int NEIGHBORS>
void depthwise_line(const uint8_t* columns, const Weights& w, uint8_t* out, const Block& block, const Shape& s, const Grids& given) {
  const Grids g = given;
  const int64_t kernel_w = KERNEL_W ? KERNEL_W : s.kernel_w, fours = FOURS ? FOURS : (s.kernel_h + 3) / 4;
  __m512i held[KERNEL_W * FOURS ? 4 * KERNEL_W * FOURS : 1];
  for (int i = 0; i < 4 * KERNEL_W * FOURS; i++) held[i] = _mm512_loadu_si512(w.packed + 64 * i);
  for (int64_t x = 0; x < s.out_width; x += NEIGHBORS) {
    __m512i sums[4], codes[4];
    for (int j = 0; j < 4; j++) sums[j] = _mm512_loadu_si512(w.start + 16 * j);
#pragma GCC unroll 3
    for (int64_t k = 0; k < kernel_w; k++)
      for (int64_t f = 0; f < fours; f++) {
        const uint8_t* column = columns + ((x * s.stride_w + k * s.dilation_w) * fours + f) * 256;
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          const int64_t at = 4 * (k * fours + f) + j;
          add_products(sums[j], _mm512_loadu_si512(column + 64 * j), KERNEL_W * FOURS ? held[at] : _mm512_loadu_si512(w.packed + 64 * at));
        }
      }
    for (int j = 0; j < 4; j++) codes[j] = quantized(dequantized(sums[j], w, 16 * j, g), g);
    const __m512i bytes = bytes_of(codes);
    // Those masked away in front of a neighbor's bytes are counted in its address, too.
    for (int64_t n = 0; n < std::min<int64_t>(NEIGHBORS, s.out_width - x); n++) {
      const int64_t masked = 64 / NEIGHBORS * n;
      _mm512_mask_storeu_epi8(out + (x + n) * s.channels + block.channel - masked, first_bytes(block.channels) << masked, bytes);
    }
  }
}

template <int NEIGHBORS>
void depthwise_block(const uint8_t* const* rows, int64_t count, const Weights& w, uint8_t* out, const Block& block, const Shape& s,
                     const Grids& g, uint8_t* columns) {
  const int64_t fours = (s.kernel_h + 3) / 4;
  interleave<NEIGHBORS>(rows, count, fours, block, s, g.input_zero, columns);
  if (s.kernel_w == 3 && fours == 1) depthwise_line<3, 1, NEIGHBORS>(columns, w, out, block, s, g);
  else depthwise_line<0, 0, NEIGHBORS>(columns, w, out, block, s, g);
}

// Gives bytes, without a residual.
void depthwise(const uint8_t* codes, const Weights& w, uint8_t* out, const Shape& s, const Grids& g) {
  const int64_t fours = (s.kernel_h + 3) / 4, line_bytes = s.width * s.channels, lines = s.images * s.out_height;
  const int64_t count = (s.out_width - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1;
  const std::vector<uint8_t> outside(line_bytes, g.input_zero);
#pragma omp parallel if (omp_get_max_threads() > 1 && lines > 1)
  {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    std::vector<uint8_t> columns(count * fours * 256);
    std::vector<const uint8_t*> rows(fours * 4, outside.data());  // the fourth of three meets weights of zero
    for (int64_t line = lines * me / all; line < lines * (me + 1) / all; line++) {
      for (int64_t i = 0; i < s.kernel_h; i++) {
        const int64_t y = line % s.out_height * s.stride_h - s.padding_h + i * s.dilation_h;
        rows[i] = y >= 0 && y < s.height ? codes + (line / s.out_height * s.height + y) * line_bytes : outside.data();
      }
      for (int64_t channel = 0; channel < s.channels; channel += 64) {
        const Block block(channel, s);
        const auto run = block.neighbors() == 4 ? depthwise_block<4> : block.neighbors() == 2 ? depthwise_block<2> : depthwise_block<1>;
        const Weights block_w = w.at(channel * s.kernel_w * fours * 4, channel);
        run(rows.data(), count, block_w, out + line * s.out_width * s.channels, block, s, g, columns.data());
      }
    }
  }
}

}  // namespace

// Computes a layer. `sizes` are N, C, H, W of the codes; `geometry`: outputs, kernel, stride, padding and dilation (height, width each),
// groups, height and width that go out; `grids`: those of `Grids`, in their order.
extern "C" void fxquant_vnni_layer(const uint8_t* codes, const int8_t* packed, const int32_t* start, const float* scale,
                                   const float* bias, const uint8_t* residual, uint8_t* out, const int64_t* sizes,
                                   const int64_t* geometry, const double* grids) {
  const int64_t* n = geometry;
  const Shape s{sizes[0], sizes[2], sizes[3], sizes[1], n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11]};
  const Grids g{(float)grids[0], (uint8_t)grids[1], (float)grids[2], (float)grids[3],
                (float)grids[4], (float)grids[5],   (float)grids[6], (int32_t)grids[7]};
  const Weights w{packed, start, scale, bias};
  if (s.is_depthwise()) depthwise(codes, w, out, s, g);
  else if (s.is_folded()) folded(codes, w, residual, out, s, g);
  else dense(codes, w, residual, out, s, s.channels / s.groups, g);
}

// The same for the code that inductor writes, without a detour through Python. A linear layer has outputs alone for `geometry`.
extern "C" AOTITorchError aoti_torch_cpu_vnni_layer(AtenTensorHandle codes, AtenTensorHandle packed, AtenTensorHandle start,
                                                    AtenTensorHandle scale, AtenTensorHandle bias, AtenTensorHandle* residual,
                                                    const int64_t* geometry, int64_t numbers, const double* grids, int64_t,
                                                    AtenTensorHandle* out) {
  const auto data = [](AtenTensorHandle tensor) {
    void* pointer = nullptr;
    aoti_torch_get_data_ptr(tensor, &pointer);
    return pointer;
  };
  int64_t *sizes = nullptr, dimensions = 0;
  aoti_torch_get_dim(codes, &dimensions);
  aoti_torch_get_sizes(codes, &sizes);
  std::vector<int64_t> in(sizes, sizes + dimensions), to = in, strides(dimensions, 1), n(geometry, geometry + numbers);
  if (numbers == 1) {  // rows are images of one pixel
    to.back() = n[0];
    int64_t rows = 1;
    for (int64_t d = dimensions - 1; d > 0; d--) rows *= in[d - 1], strides[d - 1] = strides[d] * to[d];
    in = {rows, in.back(), 1, 1};
    n.insert(n.end(), {1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1});
  } else {
    for (int i = 0; i < 2; i++) n.push_back((in[2 + i] + 2 * n[5 + i] - n[7 + i] * (n[1 + i] - 1) - 1) / n[3 + i] + 1);
    if (n[10] < 1 || n[11] < 1) return AOTI_TORCH_FAILURE;  // the map is smaller than the kernel
    to = {in[0], n[0], n[10], n[11]};
    strides = {n[0] * n[10] * n[11], 1, n[0] * n[11], n[0]};
  }
  const int32_t dtype = grids[2] == 0 ? aoti_torch_dtype_float32() : aoti_torch_dtype_uint8();
  const AOTITorchError error = aoti_torch_empty_strided(dimensions, to.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, out);
  if (error != AOTI_TORCH_SUCCESS) return error;
  fxquant_vnni_layer((const uint8_t*)data(codes), (const int8_t*)data(packed), (const int32_t*)data(start), (const float*)data(scale),
                     (const float*)data(bias), residual ? (const uint8_t*)data(*residual) : nullptr, (uint8_t*)data(*out), in.data(),
                     n.data(), grids);
  return AOTI_TORCH_SUCCESS;
}
