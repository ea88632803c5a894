/* SPDX-License-Identifier: Apache-2.0 */
#include "loader.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "../../core/parts.h"

#define DEFAULT_LIBRARY "libfabric.so.1"
#define MINIMUM FI_VERSION(1, 17)

static pthread_mutex_t load_lock = PTHREAD_MUTEX_INITIALIZER; /* guards the two below */
static struct tfd_fi_library library;
static char loaded_path[sizeof(((struct tfd_group_options *)0)->library)];

static int resolve(const char *path, void *handle, struct tfd_fi_library *out, struct tfd_error *error)
{
	const struct {
		const char *name;
		void *slot;
	} symbols[] = {
		{ "fi_getinfo", &out->getinfo }, { "fi_freeinfo", &out->freeinfo },
		{ "fi_dupinfo", &out->dupinfo }, { "fi_fabric", &out->fabric },
		{ "fi_version", &out->version }, { "fi_strerror", &out->strerror },
	};

	for (size_t i = 0; i < sizeof(symbols) / sizeof(symbols[0]); i++) {
		void *symbol = dlsym(handle, symbols[i].name);

		if (!symbol)
			return tfd_fail(
				error, -ENOTSUP,
				"%s is not libfabric 1.17 or newer (no symbol %s); install that, or set "
				"fabric.library",
				path, symbols[i].name);
		memcpy(symbols[i].slot, &symbol, sizeof(symbol));
	}
	return 0;
}

static int load_locked(const char *path, struct tfd_error *error)
{
	struct tfd_fi_library fresh = { 0 };
	void *handle;
	int rc;

	/*
	 * Without passthru, rxm 1.17 keeps about 70 MB of bounce buffers per endpoint and crashes in fi_close of an
	 * endpoint that is being written to; we only do RMA, which passthru hands straight to tcp.
	 */
	(void)setenv("FI_OFI_RXM_ENABLE_PASSTHRU", "1", 0);
	/* The providers that we may use: psm and psm2 would install signal handlers for SIGBUS and SIGSEGV. */
	(void)setenv("FI_PROVIDER", "efa,verbs,tcp,ofi_rxm", 0);
	/*
	 * The cache of registrations (verbs) hands out one key for the same bytes, whatever the rights. Ours live as long as their
	 * regions.
	 */
	(void)setenv("FI_MR_CACHE_MAX_COUNT", "0", 0);
	/* Peers of one endpoint, by which rxm over verbs sizes its queues: the default asks for more than devices have. */
	(void)setenv("FI_UNIVERSE_SIZE", "16", 0);
	/* Else it loads the CUDA driver, and makes contexts, as it is loaded (ofi_hmem_init): not in this process. From 1.20 on. */
	(void)setenv("FI_HMEM", "system", 0);
	handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (!handle)
		return tfd_fail(
			error, -ENOENT,
			"provider libfabric is unavailable: %s; install libfabric1 (Debian, Ubuntu) or set "
			"fabric.library",
			dlerror());
	rc = resolve(path, handle, &fresh, error);
	if (!rc && FI_VERSION_LT(fresh.version(), MINIMUM))
		rc = tfd_fail(error, -ENOTSUP, "libfabric %u.%u is too old: install 1.17 or newer",
		              FI_MAJOR(fresh.version()), FI_MINOR(fresh.version()));
	if (rc) {
		(void)dlclose(handle);
		return rc;
	}
	library = fresh;
	(void)strncpy(loaded_path, path, sizeof(loaded_path) - 1);
	return 0; /* the handle stays for the life of the process: providers leave threads and atexit handlers */
}

int tfd_fi_load(const char *path, const struct tfd_fi_library **out, struct tfd_error *error)
{
	int rc = 0;

	if (!path[0])
		path = DEFAULT_LIBRARY;
	(void)pthread_mutex_lock(&load_lock);
	if (!loaded_path[0])
		rc = load_locked(path, error);
	else if (strcmp(loaded_path, path) != 0)
		rc = tfd_fail(error, -EBUSY, "libfabric was loaded from %s; one process uses one version",
		              loaded_path);
	(void)pthread_mutex_unlock(&load_lock);
	if (!rc)
		*out = &library;
	return rc;
}
