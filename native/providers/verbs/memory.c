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

static int explain_dmabuf(int rc, size_t length, struct tfd_error *error)
{
	return tfd_fail(error, -rc, "registering %zu bytes of a dma-buf failed: %s%s", length, strerror(rc),
	                rc == EOPNOTSUPP ? ": its driver, or libibverbs (rdma-core 34), is too old" : "");
}

/* The library keeps what is registered from children, page by page. */
static bool fork_is_guarded(const struct tfd_verbs_library *library)
{
	return library->is_fork_initialized && library->is_fork_initialized() == IBV_FORK_ENABLED;
}

static int explain(const struct tfd_domain *domain, int rc, size_t length, struct tfd_error *error)
{
	struct rlimit limit = { 0 };

	if (rc == EINVAL && fork_is_guarded(domain->library))
		return tfd_fail(error, -rc,
		                "registering %zu bytes failed: %s: on this kernel, which copies no pinned "
		                "pages at fork, memory "
		                "of huge pages needs RDMAV_HUGEPAGES_SAFE=1 in the environment of the daemon",
		                length, strerror(rc));
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

/* 0: the device is not let go of until mr_made. */
static int mr_new(struct tfd_domain *domain, struct tfd_mr **out, struct tfd_error *error)
{
	(void)pthread_rwlock_rdlock(&domain->device_lock);
	if (tfd_load_relaxed(&domain->state) == TFD_RAIL_GONE) {
		(void)pthread_rwlock_unlock(&domain->device_lock);
		return tfd_fail(error, -ENODEV, "the rail's device is gone");
	}
	*out = calloc(1, sizeof(**out));
	if (*out)
		return 0;
	(void)pthread_rwlock_unlock(&domain->device_lock);
	return tfd_fail(error, -ENOMEM, "no memory for a registration");
}

/* The second version of a registration drops an optional flag that the kernel does not know. */
static unsigned int access_of(uint32_t access)
{
	return IBV_ACCESS_RELAXED_ORDERING |
	       (access & TFD_MR_UNREADABLE ? 0u : (unsigned int)IBV_ACCESS_REMOTE_READ) |
	       (access & TFD_MR_WRITABLE ? IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE : 0u);
}

/* Or not: errno says why. */
static int mr_made(struct tfd_domain *domain, struct tfd_mr *mr, uint64_t address, size_t length,
                   struct tfd_mr **out, struct tfd_region_key *key, struct tfd_error *error)
{
	int rc = errno;

	if (mr->mr) {
		(void)pthread_mutex_lock(&domain->mrs_lock);
		tfd_list_push(&domain->mrs, &mr->link);
		(void)pthread_mutex_unlock(&domain->mrs_lock);
	}
	(void)pthread_rwlock_unlock(&domain->device_lock);
	if (!mr->mr) {
		bool foreign = mr->foreign;

		free(mr);
		return foreign ? explain_dmabuf(rc, length, error) : explain(domain, rc, length, error);
	}
	key->key = mr->mr->rkey;
	key->address = address;
	*out = mr;
	return 0;
}

int tfd_verbs_mr_open(struct tfd_domain *domain, void *address, size_t length, uint32_t access,
                      struct tfd_mr **out, struct tfd_region_key *key, struct tfd_error *error)
{
	struct tfd_mr *mr;
	int rc = mr_new(domain, &mr, error);

	if (rc)
		return rc;
	mr->mr = domain->library->reg_mr_iova2(domain->pd, address, length, (uintptr_t)address,
	                                       access_of(access));
	return mr_made(domain, mr, (uintptr_t)address, length, out, key, error);
}

int tfd_verbs_mr_open_dmabuf(struct tfd_domain *domain, const struct tfd_dmabuf *dmabuf, int writable,
                             struct tfd_mr **out, struct tfd_region_key *key, struct tfd_error *error)
{
	struct tfd_mr *mr;
	int rc = mr_new(domain, &mr, error);

	if (rc)
		return rc;
	mr->foreign = true;
	errno = EOPNOTSUPP;
	if (domain->library->reg_dmabuf_mr)
		mr->mr = domain->library->reg_dmabuf_mr(domain->pd, dmabuf->offset, dmabuf->length,
		                                        dmabuf->address, dmabuf->fd,
		                                        (int)access_of(writable ? TFD_MR_WRITABLE : 0));
	return mr_made(domain, mr, dmabuf->address, dmabuf->length, out, key, error);
}

void tfd_verbs_mr_close(struct tfd_domain *domain, struct tfd_mr *mr)
{
	(void)pthread_rwlock_rdlock(&domain->device_lock);
	(void)pthread_mutex_lock(&domain->mrs_lock);
	tfd_list_remove(&mr->link);
	(void)pthread_mutex_unlock(&domain->mrs_lock);
	if (mr->mr)
		(void)domain->library->dereg_mr(mr->mr);
	(void)pthread_rwlock_unlock(&domain->device_lock);
	free(mr);
}
