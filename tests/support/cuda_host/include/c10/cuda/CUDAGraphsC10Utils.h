#pragma once

#include "standin/launch.h"

namespace standin {

inline bool capturing = false;  // whether the current stream is captured in a CUDA graph; launches run nevertheless

}  // namespace standin

namespace c10::cuda {

enum class CaptureStatus : int { None, Active, Invalidated };
inline CaptureStatus currentStreamCaptureStatusMayInitCtx() {
  return standin::capturing ? CaptureStatus::Active : CaptureStatus::None;
}

struct CUDAStreamCaptureModeGuard {
  explicit CUDAStreamCaptureModeGuard(cudaStreamCaptureMode) {}
};

}  // namespace c10::cuda
