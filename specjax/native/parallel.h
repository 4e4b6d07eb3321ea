// Work shared among the threads of XLA's pool and the one that asks.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

// Runs work(task) for every task in [0, tasks), and returns when all are done.
//
// Threads take tasks as they come, the caller too: it waits only for tasks that a thread is running,
// never for a thread to come free, so any number of callers may share the pool.
template <typename Work>
void Parallel(xla::ffi::ThreadPool pool, int64_t tasks, Work work) {
  struct State {
    State(Work work, int64_t tasks) : work(std::move(work)), tasks(tasks) {}

    // An exception here has nobody to catch it: the buffers are in others' use.
    void Run() noexcept {
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
        work(task);
        done.fetch_add(1, std::memory_order_release);
      }
    }

    const Work work;
    const int64_t tasks;
    std::atomic<int64_t> next{0}, done{0};
  };
  // Shared, since a thread may look for work when all is done and the caller gone.
  auto state = std::make_shared<State>(std::move(work), tasks);
  for (int64_t i = 1; i < std::min(tasks, pool.num_threads()); ++i) {
    pool.Schedule([state] { state->Run(); });
  }
  state->Run();
  while (state->done.load(std::memory_order_acquire) < tasks) std::this_thread::yield();
}
