/* SPDX-License-Identifier: Apache-2.0 */
/* libfabric by dlopen: the few exported symbols; everything else is called through the objects they return. */
#ifndef TFD_LIBFABRIC_LOADER_H
#define TFD_LIBFABRIC_LOADER_H

#include <rdma/fabric.h>

#include "transferd/core.h"

struct tfd_fi_library {
	int (*getinfo)(uint32_t version, const char *node, const char *service, uint64_t flags,
	               const struct fi_info *hints, struct fi_info **info);
	void (*freeinfo)(struct fi_info *info);
	struct fi_info *(*dupinfo)(const struct fi_info *info);
	int (*fabric)(struct fi_fabric_attr *attr, struct fid_fabric **fabric, void *context);
	uint32_t (*version)(void);
	const char *(*strerror)(int error);
};

/* Loads it once per path and keeps it. -ENOENT: not there; -ENOTSUP: too old. Any control thread. */
int tfd_fi_load(const char *path, const struct tfd_fi_library **out, struct tfd_error *error);

#endif
