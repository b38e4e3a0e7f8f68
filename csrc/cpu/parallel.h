// Dynamic scheduling over PyTorch's thread pool, and memory that is not returned to the system between calls.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace vosops::cpu {

// Calls make_worker() once per thread and its result with every task number in [0, tasks), whichever thread
// is free taking the next one. Tasks must write to separate places; then the result does not depend on the
// number of threads.
template <class MakeWorker>
void parallel_tasks(int64_t tasks, const MakeWorker& make_worker) {
  if (tasks <= 0) return;
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      auto worker = make_worker();
      for (int64_t task = next++; task < tasks; task = next++) worker(task);
    }
  });
}

// Calls f(i) for i in [0, count) on the pool.
template <class F>
void parallel_each(int64_t count, const F& f) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// A 64-byte aligned buffer of T, uninitialised. Fresh pages cost more than the copies that fill them, so up
// to kRetainedBytes of released buffers are kept for the next call.
template <class T>
class Workspace {
 public:
  explicit Workspace(size_t count) : bytes_(count * sizeof(T) + kAlignment), data_(pool().take(bytes_)) {}
  ~Workspace() { pool().give(data_, bytes_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  T* data() { return static_cast<T*>(data_); }
  T& operator[](size_t i) { return data()[i]; }
  const T* data() const { return static_cast<const T*>(data_); }

  // Gives back the buffers that are kept for later calls.
  static void release() { pool().release(); }

 private:
  static constexpr size_t kAlignment = 64;
  static constexpr size_t kRetainedBytes = size_t{64} << 20;

  class Pool {
   public:
    // The smallest retained buffer of at least `bytes` and at most twice that, or a new one; updates `bytes`.
    void* take(size_t& bytes) {
      bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
      {
        std::lock_guard lock(mutex_);
        auto best = free_.end();
        for (auto it = free_.begin(); it != free_.end(); ++it) {
          const bool fits = it->bytes >= bytes && it->bytes <= 2 * bytes;
          if (fits && (best == free_.end() || it->bytes < best->bytes)) best = it;
        }
        if (best != free_.end()) {
          void* data = best->data;
          bytes = best->bytes;
          retained_ -= bytes;
          free_.erase(best);
          return data;
        }
      }
      void* data = std::aligned_alloc(kAlignment, bytes);
      if (data == nullptr) throw std::bad_alloc();
      return data;
    }

    void give(void* data, size_t bytes) {
      std::lock_guard lock(mutex_);
      free_.push_back({data, bytes});
      retained_ += bytes;
      while (retained_ > kRetainedBytes) {
        retained_ -= free_.front().bytes;
        std::free(free_.front().data);
        free_.erase(free_.begin());
      }
    }

    void release() {
      std::lock_guard lock(mutex_);
      for (const Buffer& buffer : free_) std::free(buffer.data);
      free_.clear();
      retained_ = 0;
    }

   private:
    struct Buffer {
      void* data;
      size_t bytes;
    };
    std::mutex mutex_;
    std::vector<Buffer> free_;
    size_t retained_ = 0;
  };

  static Pool& pool() {
    static Pool* instance = new Pool;  // never destroyed: worker threads may outlive static destructors
    return *instance;
  }

  size_t bytes_;
  void* data_;
};

}  // namespace vosops::cpu
