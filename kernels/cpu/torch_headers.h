// What of torch and of the library the sources include: compiled once for all of them (build.py).
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>
