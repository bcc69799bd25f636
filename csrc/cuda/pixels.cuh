// Draws noise for samples whose order in memory is (pixels, channels): Call::channels_last. A Philox block is the noise
// of four neighbouring pixels of one channel. But a word, four neighbouring elements in memory, has several channels. A
// quad is four neighbouring pixels with all their channels. With C channels it has C Philox blocks, and also C words,
// which are contiguous in memory. So each lane of a warp draws one block of a quad and processes one word of the quad.
// The lanes exchange the noise through shared memory.
#pragma once

#include "cuda/access.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/normals.cuh"

namespace ddpm_ext::cuda {

// Selects the words that a thread processes among the quads from `from` to `to` - 1 of a sample. The quads are divided
// among `warps` warps, and the thread's warp has the number `warp`. A warp processes as many quads at once as fit into
// its lanes. All of its lanes must take part in every turn (loop iteration), since draw_normals synchronises the warp.
// The argument `quad` of the methods is the warp's first quad in a turn. A block has at most kMostThreads threads.
template <int kMostThreads = kThreads>
class PixelWords {
 public:
  __device__ __forceinline__ PixelWords(const Call& call, const Dividers& dividers, uint32_t warp, uint32_t warps,
                                        uint32_t from, uint32_t to)
      : channels_(static_cast<uint32_t>(call.channels_last)), pixels_(static_cast<uint32_t>(call.sizes[0])) {
    const auto quads = [&](uint32_t lanes) { return static_cast<uint32_t>(dividers.by[1].quotient(lanes)); };
    const uint32_t lane = threadIdx.x % kLanes;
    quad_of_lane_ = quads(lane), word_ = lane - quad_of_lane_ * channels_, at_once_ = quads(kLanes);
    first = from + warp * at_once_, step = warps * at_once_, end = to;
  }
  // Divides all quads of a sample among the warps of the grid.
  __device__ __forceinline__ PixelWords(const Call& call, const Dividers& dividers)
      : PixelWords(call, dividers, (blockIdx.x * blockDim.x + threadIdx.x) / kLanes, gridDim.x * blockDim.x / kLanes, 0,
                   static_cast<uint32_t>(call.sizes[0]) / 4) {}

  // The warp's first quad in its first turn, the number of quads from one turn to the next, and the end of the quads.
  uint32_t first, step, end;

  // Whether the thread has a word in a turn, and the index of the word's first element in the sample.
  __device__ __forceinline__ bool has(uint32_t quad) const {
    return quad_of_lane_ < at_once_ && quad + quad_of_lane_ < end;
  }
  __device__ __forceinline__ uint32_t element(uint32_t quad) const {
    return 4 * ((quad + quad_of_lane_) * channels_ + word_);
  }

  // Calls put(channel, pixel, i) for the four elements of the thread's word in a turn: element i is this channel of
  // this pixel of the sample.
  template <class Put>
  __device__ __forceinline__ void for_each_element(const Dividers& dividers, uint32_t quad, Put put) const {
    DDPM_UNROLL
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t pixel = static_cast<uint32_t>(dividers.by[1].quotient(4 * word_ + i));
      put(4 * word_ + i - pixel * channels_, 4 * (quad + quad_of_lane_) + pixel, i);
    }
  }

  // Draws the noise of the thread's word in a turn, as two pairs. All threads of the warp must call this.
  __device__ __forceinline__ void draw_normals(const PhiloxKeys& keys, const PhiloxSample& sample, uint32_t quad,
                                               F2* z) const {
    // In shared memory a quad (four pixels with all channels) takes four times an odd number of floats, so that fewer
    // lanes write to the same bank. 192 floats suffice for a warp's quads with any number of channels: two channels
    // need the most.
    constexpr int kTile = 192;
    alignas(16) __shared__ float tiles[kMostThreads / kLanes][kTile];
    float* const tile = tiles[(threadIdx.y * blockDim.x + threadIdx.x) / kLanes] + 4 * quad_of_lane_ * (channels_ | 1);
    __syncwarp();  // waits until no lane reads the noise of the previous turn
    if (has(quad)) {
      cuda::draw_normals(keys, sample, word_ * pixels_ + 4 * (quad + quad_of_lane_), z);  // of channel word_
      float* const to = tile + word_;
      to[0] = z[0].v.x, to[channels_] = z[0].v.y, to[2 * channels_] = z[1].v.x, to[3 * channels_] = z[1].v.y;
    }
    __syncwarp();
    if (!has(quad)) return;
    const float4 word = *reinterpret_cast<const float4*>(tile + 4 * word_);
    z[0] = F2(word.x, word.y), z[1] = F2(word.z, word.w);
  }

 private:
  // In a turn, the thread has the quad quad_of_lane_ of the warp's at_once_ quads. In that quad it draws the noise of
  // the channel word_, and processes the word word_.
  uint32_t channels_, pixels_, quad_of_lane_, word_, at_once_;
};

}  // namespace ddpm_ext::cuda
