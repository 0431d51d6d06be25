// Best-fit-decreasing bin packing: the longest sequence first, into the fullest bin that still holds it.
// At most 11/9 of the optimal number of bins, plus one (Johnson 1974). O(S log S).
#include <algorithm>
#include <numeric>
#include <set>
#include <utility>
#include <vector>

#include "fastrl.h"

namespace fastrl {
namespace {

// Bins are numbered in the order they are opened. Ties: the lower sequence first, the lower bin first.
Tensor pack_bins(const Tensor& lengths, int64_t budget) {
  const int64_t n = lengths.numel();
  check_vector(lengths, n, "lengths");
  const int64_t* length = lengths.const_data_ptr<int64_t>();
  for (int64_t s = 0; s < n; ++s) {
    STD_TORCH_CHECK(length[s] >= 0 && length[s] <= budget, "sequence ", s, " has length ", length[s],
                    ", not in [0, budget=", budget, "]");
  }
  Tensor bins = torch::stable::empty_like(lengths);
  int64_t* bin = bins.mutable_data_ptr<int64_t>();
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [length](int64_t x, int64_t y) { return length[x] > length[y]; });
  std::set<std::pair<int64_t, int64_t>> open;  // (room, bin)
  int64_t opened = 0;
  for (const int64_t s : order) {
    auto fits = open.lower_bound({length[s], -1});
    if (fits == open.end()) fits = open.insert({budget, opened++}).first;
    const auto [room, chosen] = *fits;
    bin[s] = chosen;
    open.erase(fits);
    open.insert({room - length[s], chosen});
  }
  return bins;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastrl, library) {
  library.def("pack_bins(Tensor lengths, int budget) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastrl, CPU, library) { library.impl("pack_bins", TORCH_BOX(&pack_bins)); }

}  // namespace fastrl
