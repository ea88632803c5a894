/* SPDX-License-Identifier: Apache-2.0 */
#include "driver.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "../core/parts.h"

#define DEFAULT_LIBRARY "libcuda.so.1"

enum { OUT_OF_MEMORY = 2, NO_DEVICE = 100, SYSTEM_DRIVER_MISMATCH = 803 };

static int resolve(const char *path, void *handle, struct tfd_cuda *out, struct tfd_error *error)
{
#define SLOT(name, symbol, parameters) { #symbol, &out->name },
	const struct {
		const char *name;
		void *slot;
	} symbols[] = { TFD_CUDA_CALLS(SLOT) };
#undef SLOT

	for (size_t i = 0; i < sizeof(symbols) / sizeof(symbols[0]); i++) {
		void *found = dlsym(handle, symbols[i].name);

		memcpy(symbols[i].slot, &found, sizeof(found));
		if (!found)
			return tfd_fail(error, -ENOTSUP,
			                "%s has no %s: update NVIDIA's driver; host memory works without it",
			                path, symbols[i].name);
	}
	return 0;
}

int tfd_cuda_load(const char *path, struct tfd_cuda *out, struct tfd_error *error)
{
	int version = 0, rc;
	void *handle;

	if (!path[0])
		path = DEFAULT_LIBRARY;
	handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (!handle)
		return tfd_fail(
			error, -ENOENT,
			"the CUDA driver cannot be loaded (%s): install NVIDIA's driver, or start the "
			"container with the GPU; host memory works without it",
			dlerror());
	rc = resolve(path, handle, out, error);
	if (rc)
		return rc;
	(void)out->version(&version);
	if (version < TFD_CUDA_VERSION_MIN)
		return tfd_fail(
			error, -ENOTSUP,
			"the driver here is of CUDA %d.%d, staging needs %d.0 or later: update NVIDIA's "
			"driver; host memory works without it",
			version / 1000, version % 1000 / 10, TFD_CUDA_VERSION_MIN / 1000);
	return 0;
}

const char *tfd_cuda_word(const struct tfd_cuda *cuda, int result)
{
	const char *word = NULL;

	return cuda->error_name(result, &word) || !word ? "CUDA_ERROR" : word;
}

int tfd_cuda_fail(const struct tfd_cuda *cuda, struct tfd_error *error, const char *call, int result)
{
	const char *remedy =
		result == OUT_OF_MEMORY ? ": the GPU, or the host, has no memory left: free some, or lower "
					  "gpu.staging_bytes" :
		result == NO_DEVICE     ? ": no GPU is visible: see nvidia-smi" :
		result == SYSTEM_DRIVER_MISMATCH ? ": the kernel's module is of another driver: reboot" :
						   "";

	return tfd_fail(error, result == OUT_OF_MEMORY ? -ENOMEM : -EIO, "%s failed with %s (%d)%s", call,
	                tfd_cuda_word(cuda, result), result, remedy);
}

int tfd_cuda_enter(const struct tfd_cuda *cuda, const uint8_t uuid[TFD_GPU_UUID_BYTES],
                   uint8_t seen[TFD_GPU_SEEN][TFD_GPU_UUID_BYTES], int *device, struct tfd_error *error)
{
	uint8_t found[TFD_GPU_UUID_BYTES];
	void *context = NULL;
	int count = 0, chosen = -1;
	uint32_t told = 0;
	int result = cuda->init(0);

	if (result)
		return tfd_cuda_fail(cuda, error, "cuInit", result);
	result = cuda->device_count(&count);
	if (result)
		return tfd_cuda_fail(cuda, error, "cuDeviceGetCount", result);
	for (int i = 0; i < count; i++) {
		if (cuda->device_uuid(found, i))
			continue;
		if (told < TFD_GPU_SEEN)
			memcpy(seen[told++], found, sizeof(found));
		if (chosen < 0 && !memcmp(found, uuid, sizeof(found)))
			chosen = i;
	}
	if (chosen < 0)
		return tfd_fail(error, -ENODEV,
		                "none of the %d GPUs that the daemon's helper sees is the one whose memory "
		                "was registered: start the daemon with that GPU, too",
		                count);
	result = cuda->context_retain(&context, chosen);
	if (!result)
		result = cuda->context_set(context);
	if (result)
		return tfd_cuda_fail(cuda, error, "cuDevicePrimaryCtxRetain", result);
	*device = chosen;
	return 0;
}
