// Stands in for c10's header.
#pragma once

#include <stdlib.h>

#define TORCH_CHECK_VALUE(condition, ...) ((condition) ? (void)0 : abort())
