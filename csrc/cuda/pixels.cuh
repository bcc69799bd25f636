// Samples that lie as (pixels, channels) and whose noise is drawn (Call::channels_last). A block of Philox is the noise
// of four neighbouring pixels of one channel, while a word of four elements has several channels. But four pixels of
// all channels, here a quad, are as many blocks as words, which are neighbours in memory. So each lane of a warp draws
// one block of a quad, takes one word of it, and has the word's noise from the others through shared memory.
#pragma once

#include "cuda/access.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/normals.cuh"

namespace ddpm_ext::cuda {

// The words that a thread takes of a sample's quads `from` to `to`, where its warp is one of several. A warp takes as
// many quads at once as it has lanes for, and all of its lanes go through the same turns, since they wait for one
// another. Turns are named by the first quad of the warp. A block has at most kMostThreads.
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
  // Of all quads, of which each warp of the grid takes some.
  __device__ __forceinline__ PixelWords(const Call& call, const Dividers& dividers)
      : PixelWords(call, dividers, (blockIdx.x * blockDim.x + threadIdx.x) / kLanes, gridDim.x * blockDim.x / kLanes, 0,
                   static_cast<uint32_t>(call.sizes[0]) / 4) {}

  // The warp's first turn, how far it is to the next one, and where the quads end.
  uint32_t first, step, end;

  // Whether the thread has a word in a turn, and the first of its elements.
  __device__ __forceinline__ bool has(uint32_t quad) const { return own_ < at_once_ && quad + own_ < end; }
  __device__ __forceinline__ uint32_t element(uint32_t quad) const {
    return 4 * ((quad + own_) * channels_ + channel_);
  }

  // Calls put(channel, pixel, i) for the four elements of the thread's word in a turn.
  template <class Put>
  __device__ __forceinline__ void each(const Dividers& dividers, uint32_t quad, Put put) const {
    DDPM_UNROLL
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t pixel = static_cast<uint32_t>(dividers.by[1].quotient(4 * channel_ + i));
      put(4 * channel_ + i - pixel * channels_, 4 * (quad + own_) + pixel, i);
    }
  }

  // Draws the noise of the thread's word in a turn, as two pairs. All threads of the warp must come here.
  __device__ __forceinline__ void draw_normals(const PhiloxKeys& keys, const PhiloxSample& sample, uint32_t quad,
                                               F2* z) const {
    // A quad takes an odd number of words here, so that fewer lanes write to the same bank.
    constexpr int kTile = 192;  // of two channels, which take the most
    alignas(16) __shared__ float tiles[kMostThreads / kLanes][kTile];
    float* const tile = tiles[(threadIdx.y * blockDim.x + threadIdx.x) / kLanes] + 4 * own_ * (channels_ | 1);
    __syncwarp();  // until nobody reads the noise of the turn before
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
  uint32_t channels_, pixels_, own_, channel_, at_once_;  // own_: which of the warp's quads is the thread's
};

}  // namespace ddpm_ext::cuda
