// Work shared out over torch's threads.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>

namespace sparse_compile {

// Do items 0, 1, ... in this order, each by the next thread that is free. `make_worker()` is called once a thread and
// gives what does an item, so that a thread's scratch memory lives as long as its work.
template <class MakeWorker>
void for_each_item(int64_t items, MakeWorker make_worker) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(items, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto work = make_worker();
    for (int64_t item; (item = next.fetch_add(1)) < items;) work(item);
  });
}

}  // namespace sparse_compile
