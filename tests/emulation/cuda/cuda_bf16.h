#pragma once

#include <cuda_runtime.h>

#include "emulation/bf16.h"
