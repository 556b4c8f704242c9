// Memory for what is read and written much: on pages of 2 MB where the system has them. Pages of 4 KB
// cost a product of many rows a tenth of its time in look-ups.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ql {

constexpr int64_t HUGE_PAGE = 2 << 20;

// Whole pages that hold so many bytes: of 64 KB, the largest usual ones, which are multiples of all others.
inline int64_t whole_pages(int64_t bytes) { return (bytes + (1 << 16) - 1) >> 16 << 16; }

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

// Memory of a block of 2 MB or more is the system's own, so that no other piece of the heap comes to lie
// in large pages: a byte that is written there would fill a whole one.
inline char* take_pages(int64_t bytes) {
#if defined(__linux__)
    void* pages = mmap(nullptr, (size_t)(bytes + HUGE_PAGE), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    char* first = (char*)(((uintptr_t)pages + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    const int64_t before = first - (char*)pages, after = HUGE_PAGE - before;
    const int64_t whole = whole_pages(bytes);
    if (before) munmap(pages, (size_t)before);
    if (after + bytes > whole) munmap(first + whole, (size_t)(bytes + after - whole));
    madvise(first, (size_t)whole, MADV_HUGEPAGE);
    return first;
#else
    char* first = (char*)::operator new((size_t)bytes, std::align_val_t{HUGE_PAGE});
    std::memset(first, 0, (size_t)bytes);
    return first;
#endif
}

// Memory that grows and is kept; 64-byte aligned, zero when it is new. What was in it is lost when it
// grows.
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { release(); }

    template <class T>
    T* get(int64_t count) {
        const int64_t bytes = count * (int64_t)sizeof(T);
        if (bytes > size_ || !data_) {
            release();
            if (bytes < HUGE_PAGE) {
                data_ = (char*)::operator new((size_t)bytes, std::align_val_t{64});
                std::memset(data_, 0, (size_t)bytes);
            } else {
                data_ = take_pages(bytes);
            }
            size_ = bytes;
        }
        return (T*)data_;
    }

  private:
    void release() {
        if (!data_) return;
        if (size_ < HUGE_PAGE) ::operator delete(data_, std::align_val_t{64});
#if defined(__linux__)
        else munmap(data_, (size_t)whole_pages(size_));
#else
        else ::operator delete(data_, std::align_val_t{HUGE_PAGE});
#endif
        data_ = nullptr;
        size_ = 0;
    }

    char* data_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace ql
