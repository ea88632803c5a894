/* SPDX-License-Identifier: Apache-2.0 */
/* Devices and contexts: nothing but their numbers. A context is the primary one of its device. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/barrier.h"
#include "soft.h"

#define STACK 16

/* CUdevice_attribute */
enum { MAJOR = 75, MINOR = 76, FLUSH_OPTIONS = 117, WRITES_ORDERING = 118 };

static int contexts[SOFT_DEVICES_MAX]; /* their addresses are the contexts; how often each was retained */
static _Thread_local void *stack[STACK];
static _Thread_local int depth;

static int environment(const char *name, int otherwise)
{
	const char *text = getenv(name);

	return text && *text ? atoi(text) : otherwise;
}

int soft_device_count(void)
{
	int count = environment("SOFTCUDA_DEVICES", 2);

	return count < 0 ? 0 : count > SOFT_DEVICES_MAX ? SOFT_DEVICES_MAX : count;
}

static bool known(int device)
{
	return device >= 0 && device < soft_device_count();
}

void *soft_current(void)
{
	return depth ? stack[depth - 1] : NULL;
}

int soft_device_of(void *context)
{
	return (int)((int *)context - contexts);
}

int cuInit(unsigned flags)
{
	int result = soft_fault("cuInit");

	(void)flags;
	return result ? result : soft_device_count() ? SOFT_SUCCESS : SOFT_NO_DEVICE;
}

int cuDriverGetVersion(int *version)
{
	*version = environment("SOFTCUDA_VERSION", 13000);
	return SOFT_SUCCESS;
}

int cuGetErrorName(int result, const char **name)
{
	static const struct {
		int result;
		const char *name;
	} names[] = {
		{ SOFT_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE" },
		{ SOFT_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY" },
		{ SOFT_NO_DEVICE, "CUDA_ERROR_NO_DEVICE" },
		{ SOFT_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE" },
		{ SOFT_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS" },
		{ SOFT_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED" },
	};

	*name = "CUDA_ERROR_OF_SOFTCUDA";
	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
		if (names[i].result == result)
			*name = names[i].name;
	}
	return SOFT_SUCCESS;
}

int cuGetErrorString(int result, const char **text)
{
	return cuGetErrorName(result, text);
}

int cuDeviceGetCount(int *count)
{
	*count = soft_device_count();
	return SOFT_SUCCESS;
}

int cuDeviceGet(int *device, int ordinal)
{
	if (!known(ordinal))
		return SOFT_INVALID_DEVICE;
	*device = ordinal;
	return SOFT_SUCCESS;
}

int cuDeviceGetName(char *name, int bytes, int device)
{
	if (!known(device))
		return SOFT_INVALID_DEVICE;
	(void)snprintf(name, (size_t)bytes, "softcuda %d", device);
	return SOFT_SUCCESS;
}

int cuDeviceGetUuid_v2(void *uuid, int device)
{
	char text[17];

	if (!known(device))
		return SOFT_INVALID_DEVICE;
	(void)snprintf(text, sizeof(text), "softcuda-uuid-%02x", device & 0xff);
	memcpy(uuid, text, 16);
	return SOFT_SUCCESS;
}

int cuDeviceGetAttribute(int *out, int attribute, int device)
{
	if (!known(device))
		return SOFT_INVALID_DEVICE;
	switch (attribute) {
	case MAJOR:
		*out = 9;
		return SOFT_SUCCESS;
	case WRITES_ORDERING:
		*out = 100;
		return SOFT_SUCCESS;
	case MINOR:
	case FLUSH_OPTIONS:
		*out = 0;
		return SOFT_SUCCESS;
	default:
		return SOFT_INVALID_VALUE;
	}
}

int cuDevicePrimaryCtxRetain(void **context, int device)
{
	int result = soft_enter("cuDevicePrimaryCtxRetain");

	if (result)
		return result;
	if (!known(device))
		return SOFT_INVALID_DEVICE;
	(void)tfd_add_seq(&contexts[device], 1);
	*context = &contexts[device];
	return SOFT_SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int device)
{
	if (!known(device))
		return SOFT_INVALID_DEVICE;
	(void)tfd_sub_seq(&contexts[device], 1);
	return SOFT_SUCCESS;
}

int cuCtxGetCurrent(void **context)
{
	*context = soft_current();
	return SOFT_SUCCESS;
}

int cuCtxSetCurrent(void *context)
{
	if (!depth)
		depth = 1;
	stack[depth - 1] = context;
	return SOFT_SUCCESS;
}

int cuCtxGetDevice(int *device)
{
	if (!soft_current())
		return SOFT_INVALID_CONTEXT;
	*device = soft_device_of(soft_current());
	return SOFT_SUCCESS;
}

int cuCtxPushCurrent_v2(void *context)
{
	if (depth == STACK)
		return SOFT_INVALID_VALUE;
	stack[depth++] = context;
	return SOFT_SUCCESS;
}

int cuCtxPopCurrent_v2(void **context)
{
	if (!depth)
		return SOFT_INVALID_CONTEXT;
	*context = stack[--depth];
	return SOFT_SUCCESS;
}

int cuCtxEnablePeerAccess(void *context, unsigned flags)
{
	(void)context;
	(void)flags;
	return SOFT_SUCCESS;
}

int cuCtxGetStreamPriorityRange(int *least, int *greatest)
{
	*least = 0;
	*greatest = -5;
	return SOFT_SUCCESS;
}

int cuModuleLoadData(void **out, const void *image)
{
	(void)out;
	(void)image;
	return SOFT_NOT_SUPPORTED;
}

int cuModuleUnload(void *module)
{
	(void)module;
	return SOFT_NOT_SUPPORTED;
}

int cuModuleGetFunction(void **out, void *module, const char *name)
{
	(void)out;
	(void)module;
	(void)name;
	return SOFT_NOT_SUPPORTED;
}

int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void *stream, void **arguments, void **extra)
{
	(void)function;
	(void)gx;
	(void)gy;
	(void)gz;
	(void)bx;
	(void)by;
	(void)bz;
	(void)shared;
	(void)stream;
	(void)arguments;
	(void)extra;
	return SOFT_NOT_SUPPORTED;
}
