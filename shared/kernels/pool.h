#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

// Threads that wait in the kernel, not on the processor: their neighbours compute too.
class Pool {
 public:
  explicit Pool(int threads) {
    try {
      for (int i = 1; i < threads; i++) threads_.emplace_back([this] { work(); });
    } catch (const std::system_error&) {  // the system gives no more: those that there are do the work
    }
  }
  // task(0), ..., task(count - 1), in any order, on all threads; returns when all are done.
  void run(int64_t count, const std::function<void(int64_t)>& task) {
    if (threads_.empty() || count == 1) {
      for (int64_t i = 0; i < count; i++) task(i);
      return;
    }
    task_ = &task;
    count_ = count;
    next_ = 0;
    busy_ = static_cast<int>(threads_.size());
    round_++;
    round_.notify_all();
    take();
    for (int busy = busy_; busy; busy = busy_) busy_.wait(busy);
  }

 private:
  void take() {
    for (int64_t i; (i = next_++) < count_;) (*task_)(i);
  }
  void work() {
    for (uint32_t seen = 0;;) {
      round_.wait(seen);
      seen++;
      take();
      if (--busy_ == 0) busy_.notify_one();
    }
  }
  std::vector<std::thread> threads_;  // they are as old as the process
  const std::function<void(int64_t)>* task_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<int> busy_{0};
  std::atomic<uint32_t> round_{0};
};

