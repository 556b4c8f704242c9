// A few threads that wait for the next loop where it will come from: in a spin, then yielding, then
// asleep. A token takes a hundred short loops; waking a sleeping thread for each costs more than the
// loop, and OpenMP's teams stall for milliseconds when another job holds the core.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ql {

inline void pause_briefly() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
  public:
    explicit Pool(int threads) : threads_(threads < 1 ? 1 : threads) {
        for (int i = 1; i < threads_; i++) workers_.emplace_back([this, i] { work(i); });
    }
    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stopping_ = true;
            epoch_.fetch_add(1);
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }
    int size() const { return threads_; }

    // body(first, last, thread) over parts of [0, count), each of at least `grain`; returns when all
    // are done. Called by one thread at a time. Without `linger` the workers sleep at once afterwards,
    // and leave the cores to whoever called.
    template <class Body>
    void run(int64_t count, int64_t grain, Body&& body, bool linger = true) {
        if (count <= 0) return;
        int64_t part = (count + 4 * threads_ - 1) / (4 * threads_);
        part_ = part < grain ? grain : part;
        if (threads_ == 1 || part_ >= count) {
            body(0, count, 0);
            return;
        }
        count_ = count;
        linger_ = linger;
        context_ = &body;
        call_ = [](void* context, int64_t first, int64_t last, int thread) {
            (*static_cast<std::remove_reference_t<Body>*>(context))(first, last, thread);
        };
        next_.store(0, std::memory_order_relaxed);
        busy_.store(threads_ - 1, std::memory_order_relaxed);
        {
            // Under the lock only where someone sleeps: a sleeper checks the epoch under it.
            epoch_.fetch_add(1);
            if (sleeping_.load() > 0) {
                std::lock_guard<std::mutex> lock(mutex_);
                wake_.notify_all();
            }
        }
        take_parts(0);
        for (int spins = 0; busy_.load(std::memory_order_acquire) > 0; spins++) {
            if (spins < SPINS) pause_briefly();
            else std::this_thread::yield();
        }
    }

  private:
    static constexpr int SPINS = 4000;    // about 50 us
    static constexpr int YIELDS = 20000;  // some 10 ms

    void take_parts(int thread) {
        for (;;) {
            int64_t first = next_.fetch_add(part_, std::memory_order_relaxed);
            if (first >= count_) return;
            int64_t last = first + part_;
            call_(context_, first, last < count_ ? last : count_, thread);
        }
    }

    void work(int thread) {
        uint64_t seen = 0;
        bool linger = true;
        for (;;) {
            int tries = linger ? 0 : SPINS + YIELDS;
            while (epoch_.load(std::memory_order_acquire) == seen) {
                if (tries < SPINS) pause_briefly();
                else if (tries < SPINS + YIELDS) std::this_thread::yield();
                else {
                    std::unique_lock<std::mutex> lock(mutex_);
                    sleeping_.fetch_add(1);
                    wake_.wait(lock, [&] { return epoch_.load() != seen; });
                    sleeping_.fetch_sub(1);
                }
                tries++;
            }
            seen = epoch_.load(std::memory_order_acquire);
            if (stopping_) return;
            linger = linger_;
            take_parts(thread);
            busy_.fetch_sub(1, std::memory_order_release);
        }
    }

    const int threads_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> epoch_{0};
    std::atomic<int> busy_{0}, sleeping_{0};
    std::atomic<int64_t> next_{0};
    bool stopping_ = false;
    int64_t count_ = 0, part_ = 1;
    bool linger_ = true;
    void* context_ = nullptr;
    void (*call_)(void*, int64_t, int64_t, int) = nullptr;
};

}  // namespace ql
