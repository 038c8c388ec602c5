// Device memory: address space, so many bytes of it, and never a page.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <map>
#include <mutex>

namespace emulated {

constexpr size_t kDeviceBytes = 150109880320ull;  // an H200's

struct Memory {
  std::mutex lock;
  std::map<void*, size_t> blocks;
  size_t taken = 0;

  bool take(size_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    if (taken + bytes > kDeviceBytes) return false;
    taken += bytes;
    return true;
  }
  void give_back(size_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    taken -= bytes;
  }
  void* reserve(size_t bytes) {
    void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return found == MAP_FAILED ? nullptr : found;
  }
  void* allocate(size_t bytes) {
    if (!take(bytes)) return nullptr;
    void* found = reserve(bytes ? bytes : 1);
    std::lock_guard<std::mutex> guard(lock);
    blocks[found] = bytes;
    return found;
  }
  void release(void* block) {
    size_t bytes = 0;
    {
      std::lock_guard<std::mutex> guard(lock);
      auto found = blocks.find(block);
      if (found == blocks.end()) return;
      bytes = found->second;
      blocks.erase(found);
    }
    munmap(block, bytes ? bytes : 1);
    give_back(bytes);
  }
};

}  // namespace emulated

// One for both libraries: the driver hands the runtime's out.
extern "C" emulated::Memory* emulated_device_memory();
