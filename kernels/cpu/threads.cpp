// How many threads a kernel takes that is called from this thread. Torch's common setting is read at a thread's first
// parallel loop, once for each library that has such loops; what is set elsewhere later does not reach that thread.
#include <ATen/Parallel.h>
#include <torch/library.h>

namespace polyrank {

int64_t threads() {
  at::internal::lazy_init_num_threads();  // this library's, as in at::parallel_for
  return at::get_num_threads();
}

TORCH_LIBRARY_FRAGMENT(polyrank, m) { m.def("threads() -> int", threads); }

}  // namespace polyrank
