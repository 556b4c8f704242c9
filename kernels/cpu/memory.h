// Memory for what is read and written much: on pages of 2 MB where the system has them. Pages of 4 KB
// cost a product of many rows a tenth of its time in look-ups.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ql {

constexpr int64_t HUGE_PAGE = 2 << 20;

// Ask for large pages behind what nobody has written to yet; whether they come makes no difference but
// speed.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
    const uintptr_t first = ((uintptr_t)data + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const int64_t whole = ((int64_t)((uintptr_t)data + bytes - first)) / HUGE_PAGE * HUGE_PAGE;
    if (whole > 0) madvise((void*)first, (size_t)whole, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

struct Free {
    std::align_val_t alignment;
    void operator()(char* data) const { ::operator delete(data, alignment); }
};

// Memory that grows and is kept; 64-byte aligned, zero when it is new. What was in it is lost when it
// grows.
class Buffer {
  public:
    template <class T>
    T* get(int64_t count) {
        const int64_t bytes = count * (int64_t)sizeof(T);
        if (bytes > size_ || !data_) {
            const std::align_val_t alignment{bytes < HUGE_PAGE ? (size_t)64 : (size_t)HUGE_PAGE};
            data_.reset();
            data_ = {(char*)::operator new((size_t)bytes, alignment), Free{alignment}};
            prefer_huge_pages(data_.get(), bytes);
            std::memset(data_.get(), 0, (size_t)bytes);
            size_ = bytes;
        }
        return (T*)data_.get();
    }

  private:
    std::unique_ptr<char, Free> data_{nullptr, Free{std::align_val_t{64}}};
    int64_t size_ = 0;
};

}  // namespace ql
