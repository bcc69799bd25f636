// Draws noise for samples that lie as (pixels, channels) in memory (Call::channels_last). A Philox block is the noise
// of four neighbouring pixels of one channel, but a word of four elements in memory has several channels. Four pixels
// with all their channels (a "quad") are as many blocks as words, and these words are contiguous in memory. So each
// lane of a warp draws one block of a quad and processes one word of the quad. It gets the noise of its word from the
// other lanes through shared memory.
#pragma once

#include "cuda/access.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/normals.cuh"

namespace ddpm_ext::cuda {

// The words that a thread processes of a sample's quads `from` to `to`. The thread's warp has number `warp` of `warps`.
// A warp processes as many quads at once as it has lanes for. All of its lanes take part in every turn (loop
// iteration), since they wait for one another. A turn is identified by the warp's first quad. A block has at most
// kMostThreads threads.
template <int kMostThreads = kThreads>
class PixelWords {
 public:
  __device__ __forceinline__ PixelWords(const Call& call, const Dividers& dividers, uint32_t warp, uint32_t warps,
                                        uint32_t from, uint32_t to)
      : channels_(static_cast<uint32_t>(call.channels_last)), pixels_(static_cast<uint32_t>(call.sizes[0])) {
    const auto quads = [&](uint32_t lanes) { return static_cast<uint32_t>(dividers.by[1].quotient(lanes)); };
    const uint32_t lane = threadIdx.x % kLanes;
    own_ = quads(lane), channel_ = lane - own_ * channels_, at_once_ = quads(kLanes);
    first = from + warp * at_once_, step = warps * at_once_, end = to;
  }
  // The words of all quads, divided among the warps of the grid.
  __device__ __forceinline__ PixelWords(const Call& call, const Dividers& dividers)
      : PixelWords(call, dividers, (blockIdx.x * blockDim.x + threadIdx.x) / kLanes, gridDim.x * blockDim.x / kLanes, 0,
                   static_cast<uint32_t>(call.sizes[0]) / 4) {}

  // The warp's first turn, the step to its next turn, and the end of the quads.
  uint32_t first, step, end;

  // Whether the thread has a word in a turn; and the index of the word's first element.
  __device__ __forceinline__ bool has(uint32_t quad) const { return own_ < at_once_ && quad + own_ < end; }
  __device__ __forceinline__ uint32_t element(uint32_t quad) const {
    return 4 * ((quad + own_) * channels_ + channel_);
  }

  // Calls put(channel, pixel, i) for the four elements i of the thread's word in a turn.
  template <class Put>
  __device__ __forceinline__ void each(const Dividers& dividers, uint32_t quad, Put put) const {
    DDPM_UNROLL
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t pixel = static_cast<uint32_t>(dividers.by[1].quotient(4 * channel_ + i));
      put(4 * channel_ + i - pixel * channels_, 4 * (quad + own_) + pixel, i);
    }
  }

  // Draws the noise of the thread's word in a turn, as two pairs. All threads of the warp must call this.
  __device__ __forceinline__ void draw_normals(const PhiloxKeys& keys, const PhiloxSample& sample, uint32_t quad,
                                               F2* z) const {
    // In shared memory a quad takes an odd number of words, so that fewer lanes write to the same bank.
    constexpr int kTile = 192;  // for two channels, which need the most
    alignas(16) __shared__ float tiles[kMostThreads / kLanes][kTile];
    float* const tile = tiles[(threadIdx.y * blockDim.x + threadIdx.x) / kLanes] + 4 * own_ * (channels_ | 1);
    __syncwarp();  // waits until no lane reads the previous turn's noise
    if (has(quad)) {
      cuda::draw_normals(keys, sample, channel_ * pixels_ + 4 * (quad + own_), z);
      float* const to = tile + channel_;
      to[0] = z[0].v.x, to[channels_] = z[0].v.y, to[2 * channels_] = z[1].v.x, to[3 * channels_] = z[1].v.y;
    }
    __syncwarp();
    if (!has(quad)) return;
    const float4 word = *reinterpret_cast<const float4*>(tile + 4 * channel_);
    z[0] = F2(word.x, word.y), z[1] = F2(word.z, word.w);
  }

 private:
  uint32_t channels_, pixels_, own_, channel_, at_once_;  // own_: the thread's quad among the warp's
};

}  // namespace ddpm_ext::cuda
