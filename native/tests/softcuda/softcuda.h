/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The calls of libcuda that transferd uses, by host memory: what a double of the driver exports. Names, arguments and results are
 * the driver's (CUDA Driver API); README.md says what is not as in the driver. Any thread may call any of them.
 */
#ifndef SOFTCUDA_H
#define SOFTCUDA_H

#include <stddef.h>
#include <stdint.h>

#define SOFT_API __attribute__((visibility("default"))) int

/* CUresult */
enum {
	SOFT_SUCCESS = 0,
	SOFT_INVALID_VALUE = 1,
	SOFT_OUT_OF_MEMORY = 2,
	SOFT_NO_DEVICE = 100,
	SOFT_INVALID_DEVICE = 101,
	SOFT_INVALID_CONTEXT = 201,
	SOFT_INVALID_HANDLE = 400,
	SOFT_NOT_FOUND = 500,
	SOFT_NOT_READY = 600,
	SOFT_ILLEGAL_ADDRESS = 700,
	SOFT_ALREADY_REGISTERED = 712,
	SOFT_NOT_REGISTERED = 713,
	SOFT_NOT_SUPPORTED = 801,
};

struct soft_ipc_handle { /* CUipcMemHandle */
	char bytes[64];
};

struct soft_copy_2d { /* CUDA_MEMCPY2D */
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

struct soft_allocation { /* CUmemAllocationProp: the type, the kind of handle, and the device */
	int type, handle_types, location_type, device;
	void *attributes;
	uint64_t flags;
};

/* ---- devices and contexts ---- */

SOFT_API cuInit(unsigned flags);
SOFT_API cuDriverGetVersion(int *version);
SOFT_API cuGetErrorName(int result, const char **name);
SOFT_API cuGetErrorString(int result, const char **text);
SOFT_API cuDeviceGetCount(int *count);
SOFT_API cuDeviceGet(int *device, int ordinal);
SOFT_API cuDeviceGetName(char *name, int bytes, int device);
SOFT_API cuDeviceGetUuid_v2(void *uuid, int device);
SOFT_API cuDeviceGetAttribute(int *out, int attribute, int device);
SOFT_API cuDevicePrimaryCtxRetain(void **context, int device);
SOFT_API cuDevicePrimaryCtxRelease_v2(int device);
SOFT_API cuCtxGetCurrent(void **context);
SOFT_API cuCtxSetCurrent(void *context);
SOFT_API cuCtxGetDevice(int *device);
SOFT_API cuCtxPushCurrent_v2(void *context);
SOFT_API cuCtxPopCurrent_v2(void **context);
SOFT_API cuCtxEnablePeerAccess(void *context, unsigned flags);
SOFT_API cuCtxGetStreamPriorityRange(int *least, int *greatest);

/* ---- memory ---- */

SOFT_API cuMemAlloc_v2(uint64_t *address, size_t bytes);
SOFT_API cuMemFree_v2(uint64_t address);
SOFT_API cuMemHostRegister_v2(void *address, size_t bytes, unsigned flags);
SOFT_API cuMemHostUnregister(void *address);
SOFT_API cuMemHostGetDevicePointer_v2(uint64_t *out, void *address, unsigned flags);
SOFT_API cuPointerGetAttribute(void *out, int attribute, uint64_t address);
SOFT_API cuPointerGetAttributes(unsigned count, int *attributes, void **out, uint64_t address);
SOFT_API cuPointerSetAttribute(const void *value, int attribute, uint64_t address);
SOFT_API cuMemGetAddressRange_v2(uint64_t *base, size_t *bytes, uint64_t address);
SOFT_API cuMemGetHandleForAddressRange(void *out, uint64_t address, size_t bytes, int kind, uint64_t flags);
SOFT_API cuIpcGetMemHandle(struct soft_ipc_handle *out, uint64_t address);
SOFT_API cuIpcOpenMemHandle_v2(uint64_t *out, struct soft_ipc_handle handle, unsigned flags);
SOFT_API cuIpcCloseMemHandle(uint64_t address);

/* ---- physical chunks ---- */

SOFT_API cuMemCreate(uint64_t *out, size_t bytes, const struct soft_allocation *what, uint64_t flags);
SOFT_API cuMemRelease(uint64_t chunk);
SOFT_API cuMemRetainAllocationHandle(uint64_t *out, void *address);
SOFT_API cuMemExportToShareableHandle(void *out, uint64_t chunk, int kind, uint64_t flags);
SOFT_API cuMemImportFromShareableHandle(uint64_t *out, void *fd, int kind);
SOFT_API cuMemAddressReserve(uint64_t *out, size_t bytes, size_t alignment, uint64_t address, uint64_t flags);
SOFT_API cuMemAddressFree(uint64_t address, size_t bytes);
SOFT_API cuMemMap(uint64_t address, size_t bytes, size_t offset, uint64_t chunk, uint64_t flags);
SOFT_API cuMemUnmap(uint64_t address, size_t bytes);
SOFT_API cuMemSetAccess(uint64_t address, size_t bytes, const void *access, size_t count);

/* ---- streams ---- */

SOFT_API cuStreamCreateWithPriority(void **out, unsigned flags, int priority);
SOFT_API cuStreamDestroy_v2(void *stream);
SOFT_API cuStreamQuery(void *stream);
SOFT_API cuStreamSynchronize(void *stream);
SOFT_API cuStreamGetCtx(void *stream, void **context);
SOFT_API cuStreamGetId(void *stream, uint64_t *id);
SOFT_API cuStreamIsCapturing(void *stream, int *out);
SOFT_API cuThreadExchangeStreamCaptureMode(int *mode);
SOFT_API cuStreamWaitValue64_v2(void *stream, uint64_t address, uint64_t value, unsigned flags);
SOFT_API cuStreamWriteValue64_v2(void *stream, uint64_t address, uint64_t value, unsigned flags);
SOFT_API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *stream);
SOFT_API cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream);
SOFT_API cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream);
SOFT_API cuMemcpy2DAsync_v2(const struct soft_copy_2d *copy, void *stream);

/* ---- kernels: there are none ---- */

SOFT_API cuModuleLoadData(void **out, const void *image);
SOFT_API cuModuleUnload(void *module);
SOFT_API cuModuleGetFunction(void **out, void *module, const char *name);
SOFT_API cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                        unsigned bz, unsigned shared, void *stream, void **arguments, void **extra);

#endif
