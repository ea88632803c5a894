/* SPDX-License-Identifier: Apache-2.0 */
/* The calls of libcuda that the helper makes, found with dlsym: nothing is linked, and no header of CUDA's is needed to build. */
#ifndef TFD_GPU_DRIVER_H
#define TFD_GPU_DRIVER_H

#include <stddef.h>
#include <stdint.h>

#include "transferd/core.h"
#include "transferd/gpu.h"

#define TFD_CUDA_VERSION_MIN 12000 /* as client/cuda/driver.py */

/* CUresult, as far as somebody looks at them. */
enum {
	TFD_CUDA_SUCCESS = 0,
	TFD_CUDA_INVALID_VALUE = 1,
	TFD_CUDA_NOT_READY = 600,
};

enum { TFD_CUDA_HOST = 1, TFD_CUDA_DEVICE = 2 }; /* CUmemorytype */

struct tfd_cuda_handle { /* CUipcMemHandle */
	uint8_t bytes[TFD_GPU_HANDLE_BYTES];
};

struct tfd_cuda_copy_2d { /* CUDA_MEMCPY2D */
	size_t src_x, src_y;
	int src_type;
	const void *src_host;
	uint64_t src_device;
	void *src_array;
	size_t src_pitch;
	size_t dst_x, dst_y;
	int dst_type;
	void *dst_host;
	uint64_t dst_device;
	void *dst_array;
	size_t dst_pitch;
	size_t width, height;
};

struct tfd_cuda_access { /* CUmemAccessDesc */
	int type, device, flags;
};

/* X(name, symbol, parameters) */
#define TFD_CUDA_CALLS(X)                                                                                  \
	X(init, cuInit, (unsigned flags))                                                                  \
	X(version, cuDriverGetVersion, (int *out))                                                         \
	X(error_name, cuGetErrorName, (int result, const char **out))                                      \
	X(device_count, cuDeviceGetCount, (int *out))                                                      \
	X(device_name, cuDeviceGetName, (char *out, int bytes, int device))                                \
	X(device_uuid, cuDeviceGetUuid_v2, (void *out, int device))                                        \
	X(context_retain, cuDevicePrimaryCtxRetain, (void **out, int device))                              \
	X(context_set, cuCtxSetCurrent, (void *context))                                                   \
	X(priorities, cuCtxGetStreamPriorityRange, (int *least, int *greatest))                            \
	X(stream_create, cuStreamCreateWithPriority, (void **out, unsigned flags, int priority))           \
	X(stream_query, cuStreamQuery, (void *stream))                                                     \
	X(stream_synchronize, cuStreamSynchronize, (void *stream))                                         \
	X(write_value, cuStreamWriteValue64_v2,                                                            \
	  (void *stream, uint64_t address, uint64_t value, unsigned flags))                                \
	X(copy_in, cuMemcpyHtoDAsync_v2, (uint64_t to, const void *from, size_t bytes, void *stream))      \
	X(copy_out, cuMemcpyDtoHAsync_v2, (void *to, uint64_t from, size_t bytes, void *stream))           \
	X(copy_2d, cuMemcpy2DAsync_v2, (const struct tfd_cuda_copy_2d *copy, void *stream))                \
	X(host_register, cuMemHostRegister_v2, (void *address, size_t bytes, unsigned flags))              \
	X(host_pointer, cuMemHostGetDevicePointer_v2, (uint64_t *out, void *address, unsigned flags))      \
	X(range, cuMemGetAddressRange_v2, (uint64_t *base, size_t *bytes, uint64_t address))               \
	X(ipc_open, cuIpcOpenMemHandle_v2, (uint64_t *out, struct tfd_cuda_handle handle, unsigned flags)) \
	X(ipc_close, cuIpcCloseMemHandle, (uint64_t address))                                              \
	X(chunk_import, cuMemImportFromShareableHandle, (uint64_t *out, void *fd, int kind))               \
	X(chunk_release, cuMemRelease, (uint64_t chunk))                                                   \
	X(reserve, cuMemAddressReserve,                                                                    \
	  (uint64_t *out, size_t bytes, size_t alignment, uint64_t address, uint64_t flags))               \
	X(unreserve, cuMemAddressFree, (uint64_t address, size_t bytes))                                   \
	X(map, cuMemMap, (uint64_t address, size_t bytes, size_t offset, uint64_t chunk, uint64_t flags))  \
	X(unmap, cuMemUnmap, (uint64_t address, size_t bytes))                                             \
	X(access, cuMemSetAccess,                                                                          \
	  (uint64_t address, size_t bytes, const struct tfd_cuda_access *access, size_t count))

struct tfd_cuda {
#define TFD_CUDA_FIELD(name, symbol, parameters) int(*name) parameters;
	TFD_CUDA_CALLS(TFD_CUDA_FIELD)
#undef TFD_CUDA_FIELD
};

/* Opens the driver. -ENOENT: there is none; -ENOTSUP: too old; error says what to do. */
int tfd_cuda_load(const char *path, struct tfd_cuda *out, struct tfd_error *error);
/* Its name for a result. */
const char *tfd_cuda_word(const struct tfd_cuda *cuda, int result);
/* Fills error with "`call` failed with NAME (number): what to do", and returns -EIO, of what is short of memory -ENOMEM. */
int tfd_cuda_fail(const struct tfd_cuda *cuda, struct tfd_error *error, const char *call, int result);
/*
 * Finds the GPU with a UUID, makes its primary context current; tells its ordinal. -ENODEV, -EIO. Whatever it comes to, seen has the
 * UUIDs of the GPUs that it saw.
 */
int tfd_cuda_enter(const struct tfd_cuda *cuda, const uint8_t uuid[TFD_GPU_UUID_BYTES],
                   uint8_t seen[TFD_GPU_SEEN][TFD_GPU_UUID_BYTES], int *device, struct tfd_error *error);

#endif
