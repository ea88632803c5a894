/* SPDX-License-Identifier: Apache-2.0 */
#include "loader.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <string.h>

#include "../../core/parts.h"

#define DEFAULT_LIBRARY "libibverbs.so.1"

static pthread_mutex_t load_lock = PTHREAD_MUTEX_INITIALIZER; /* guards the two below */
static struct tfd_verbs_library library;
static char loaded_path[sizeof(((struct tfd_group_options *)0)->library)];

struct symbol {
	const char *name;
	void *slot;
};

/* Of a name with several versions this is the newest, as a linker would take it. */
static bool find(void *handle, const struct symbol *symbol)
{
	void *found = dlsym(handle, symbol->name);

	memcpy(symbol->slot, &found, sizeof(found));
	return found != NULL;
}

static int resolve(const char *path, void *handle, struct tfd_verbs_library *out, struct tfd_error *error)
{
#define SYMBOL(field, symbol) { #symbol, &out->field },
	const struct symbol symbols[] = { TFD_VERBS_SYMBOLS(SYMBOL) };
	const struct symbol optional[] = { TFD_VERBS_OPTIONAL(SYMBOL) };
#undef SYMBOL

	for (size_t i = 0; i < sizeof(symbols) / sizeof(symbols[0]); i++) {
		if (!find(handle, &symbols[i]))
			return tfd_fail(error, -ENOTSUP,
			                "%s is not the libibverbs of rdma-core 33 or newer (no symbol %s); "
			                "install that, or set verbs.library",
			                path, symbols[i].name);
	}
	for (size_t i = 0; i < sizeof(optional) / sizeof(optional[0]); i++)
		(void)find(handle, &optional[i]);
	return 0;
}

static int load_locked(const char *path, struct tfd_error *error)
{
	struct tfd_verbs_library fresh = { 0 };
	void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	int rc;

	if (!handle)
		return tfd_fail(
			error, -ENOENT,
			"provider verbs is unavailable: %s; install libibverbs1 and ibverbs-providers "
			"(Debian, Ubuntu), rdma-core elsewhere, or set verbs.library",
			dlerror());
	rc = resolve(path, handle, &fresh, error);
	if (rc) {
		(void)dlclose(handle);
		return rc;
	}
	/*
	 * Before anything is registered: a child of ours must not take pages from under the device. Kernels that copy pinned pages
	 * at fork need nothing, and then it does nothing (README.md, Children).
	 */
	(void)fresh.fork_init();
	library = fresh;
	(void)strncpy(loaded_path, path, sizeof(loaded_path) - 1);
	return 0; /* the handle stays for the life of the process: drivers leave atexit handlers */
}

int tfd_verbs_load(const char *path, const struct tfd_verbs_library **out, struct tfd_error *error)
{
	int rc = 0;

	if (!path[0])
		path = DEFAULT_LIBRARY;
	(void)pthread_mutex_lock(&load_lock);
	if (!loaded_path[0])
		rc = load_locked(path, error);
	else if (strcmp(loaded_path, path) != 0)
		rc = tfd_fail(error, -EBUSY, "libibverbs was loaded from %s; one process uses one version",
		              loaded_path);
	(void)pthread_mutex_unlock(&load_lock);
	if (!rc)
		*out = &library;
	return rc;
}
