/* SPDX-License-Identifier: Apache-2.0 */
/* Registration: ibv_reg_mr(3). */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "../../core/barrier.h"
#include "../../core/parts.h"
#include "verbs.h"

static int explain(const struct tfd_domain *domain, int rc, size_t length, struct tfd_error *error)
{
	struct rlimit limit = { 0 };

	if (rc != ENOMEM && rc != EPERM && rc != EAGAIN)
		return tfd_fail(error, -rc, "verbs: registering %zu bytes failed: %s", length, strerror(rc));
	if (getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY)
		return tfd_fail(error, -ENOMEM,
		                "registering %zu bytes failed (%s): RDMA pins memory, and the memlock limit "
		                "is %llu KiB: raise it (ulimit -l unlimited, LimitMEMLOCK=infinity, or "
		                "CAP_IPC_LOCK)",
		                length, strerror(rc), (unsigned long long)limit.rlim_cur / 1024);
	return tfd_fail(error, -ENOMEM,
	                "registering %zu bytes failed (%s): no memory to pin, or the device has all its %d "
	                "registrations",
	                length, strerror(rc), domain->attributes.max_mr);
}

int tfd_verbs_mr_open(struct tfd_domain *domain, void *address, size_t length, int writable,
                      struct tfd_mr **out, struct tfd_region_key *key, struct tfd_error *error)
{
	unsigned int access = IBV_ACCESS_REMOTE_READ | IBV_ACCESS_RELAXED_ORDERING;
	struct tfd_mr *mr = calloc(1, sizeof(*mr));

	if (tfd_load_relaxed(&domain->state) == TFD_RAIL_GONE) {
		free(mr);
		return tfd_fail(error, -ENODEV, "the rail's device is gone");
	}
	if (!mr)
		return tfd_fail(error, -ENOMEM, "no memory for a registration");
	if (writable)
		access |= IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE;
	/* The second version drops an optional flag that the kernel does not know. */
	mr->mr = domain->library->reg_mr_iova2(domain->pd, address, length, (uintptr_t)address, access);
	if (!mr->mr) {
		int rc = errno;

		free(mr);
		return explain(domain, rc, length, error);
	}
	key->key = mr->mr->rkey;
	key->address = (uint64_t)(uintptr_t)address;
	*out = mr;
	return 0;
}

void tfd_verbs_mr_close(struct tfd_domain *domain, struct tfd_mr *mr)
{
	(void)domain->library->dereg_mr(mr->mr);
	free(mr);
}
