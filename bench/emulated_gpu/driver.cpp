// The part of CUDA's driver that returns something. Everything else does nothing (libraries.py).
#include <cstddef>
#include <cstdlib>

#include "memory.h"

namespace {
constexpr int kSuccess = 0, kOutOfMemory = 2;
void* const kContext = (void*)1;

int attribute(int number) {  // CUdevice_attribute
  switch (number) {
    case 1: return 1024;      // threads of a block
    case 8: return 49152;     // shared memory of a block
    case 10: return 32;       // warp
    case 12: return 65536;    // registers of a block
    case 13: return 1980000;  // clock, kHz
    case 16: return 132;      // multiprocessors
    case 36: return 3201000;  // memory clock, kHz
    case 37: return 6144;     // memory bus, bits
    case 75: return 9;
    case 76: return 0;
    case 97: return 232448;   // shared memory of a block that asks for it
    default: return 1;
  }
}
}  // namespace

extern "C" {

int cuDriverGetVersion(int* version) { *version = 13000; return kSuccess; }
int cuDeviceGetCount(int* count) { *count = 1; return kSuccess; }
int cuDeviceGet(int* device, int) { *device = 0; return kSuccess; }
int cuDeviceGetAttribute(int* value, int number, int) { *value = attribute(number); return kSuccess; }
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { *flags = 0; *active = 1; return kSuccess; }
int cuDevicePrimaryCtxRetain(void** context, int) { *context = kContext; return kSuccess; }
int cuCtxGetCurrent(void** context) { *context = kContext; return kSuccess; }
int cuCtxGetDevice(int* device) { *device = 0; return kSuccess; }
int cuGetErrorString(int, const char** text) { *text = "an error of the emulated GPU"; return kSuccess; }
int cuGetErrorName(int, const char** text) { *text = "emulated"; return kSuccess; }

int cuModuleLoad(void** module, const char*) { *module = malloc(8); return kSuccess; }
int cuModuleLoadData(void** module, const void*) { *module = malloc(8); return kSuccess; }
int cuModuleGetFunction(void** function, void*, const char*) { *function = malloc(8); return kSuccess; }
int cuFuncGetAttribute(int* value, int number, void*) {  // CUfunction_attribute
  *value = number == 0 ? 1024 : number == 4 ? 64 : 0;
  return kSuccess;
}
int cuPointerGetAttribute(void* value, int, unsigned long long pointer) {
  *(unsigned long long*)value = pointer;
  return kSuccess;
}
int cuOccupancyMaxActiveClusters(int* count, void*, void*) { *count = 4; return kSuccess; }

// --- expandable segments
int cuMemAddressReserve(unsigned long long* pointer, size_t bytes, size_t, unsigned long long, unsigned long long) {
  *pointer = (unsigned long long)emulated_device_memory()->reserve(bytes);
  return *pointer ? kSuccess : kOutOfMemory;
}
int cuMemAddressFree(unsigned long long pointer, size_t bytes) { munmap((void*)pointer, bytes); return kSuccess; }
int cuMemCreate(unsigned long long* handle, size_t bytes, const void*, unsigned long long) {
  *handle = bytes;  // all that its release needs to know
  return emulated_device_memory()->take(bytes) ? kSuccess : kOutOfMemory;
}
int cuMemRelease(unsigned long long handle) { emulated_device_memory()->give_back(handle); return kSuccess; }

}  // extern "C"
