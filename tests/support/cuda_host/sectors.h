// Counts the sectors that the accesses of warps touch, in Control::sectors if Control::counts_sectors is set.
#pragma once

namespace standin {

// Counts what the threads of the block that has ended noted. The n-th loads of a warp's threads are one access, and so
// are the n-th stores.
void count_sectors();

}  // namespace standin
